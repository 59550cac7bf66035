"""Which replica a request goes to for its prefix, without Ray."""

from typing import Any

import pytest

from molora.serving.cluster.prefixes import (
    MAX_PIECES,
    NO_PREFIX,
    PIECE_BYTES,
    PrefixMap,
    adapters_of,
    choose,
    prefix_of,
)


def chat(*contents: str, salt: str | None = None, **more: Any) -> dict[str, Any]:
    """A conversation that begins with the user."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": messages, **({} if salt is None else {"cache_salt": salt}), **more}


def shared(one: dict[str, Any], other: dict[str, Any]) -> int:
    """How many beginnings two requests have in common; after the first difference there is none."""
    same = [a == b for a, b in zip(prefix_of(one).keys, prefix_of(other).keys, strict=False)]
    assert same == sorted(same, reverse=True)
    return sum(same)


def test_conversations_share_what_is_the_same_from_the_beginning_on():
    first = chat("a" * 10, "b" * 10, "c" * 10)
    assert shared(first, chat("a" * 10, "b" * 10, "d" * 10)) == 2
    assert shared(first, chat("a" * 10, "b" * 10, "c" * 10, "e", "f")) == 3
    assert shared(first, chat("x" * 10, "b" * 10, "c" * 10)) == 0
    assert shared(first, chat("a" * 10 + "b" * 10, "", "c" * 10)) == 0


def test_long_messages_are_cut():
    long = "".join(map(str, range(1000)))
    num_pieces = -(-len(long) // PIECE_BYTES)
    assert len(prefix_of(chat(long)).keys) == num_pieces
    assert shared(chat(long), chat(long[:-1] + "x")) == num_pieces - 1
    assert shared({"prompt": long}, {"prompt": long[: PIECE_BYTES + 5] + "x" * 2000}) == 1


@pytest.mark.parametrize("body", [chat(*["a"] * 5000), {"prompt": "a" * (2 * MAX_PIECES * PIECE_BYTES)}])
def test_no_prompt_takes_all_the_room_for_keys(body):
    prefixes: PrefixMap[str] = PrefixMap(2 * MAX_PIECES)
    other, prefix = prefix_of(chat("b")), prefix_of(body)
    prefixes.record(other.keys, "first")
    prefixes.record(prefix.keys, "second")
    assert len(prefix.keys) == MAX_PIECES
    assert prefixes.num_held(other) == {"first": 1}
    assert choose(prefixes.num_held(prefix), prefix.num_bytes, {"first": 0, "second": 0}, 0) == ["second"]


def test_no_key_is_shared_between_salts():
    for body in (chat("a" * 2000, "b"), {"prompt": "a" * 2000}):
        salted = prefix_of(body | {"cache_salt": "one"})
        assert salted.keys == prefix_of(body | {"cache_salt": "one"}).keys
        for other in (body, body | {"cache_salt": "two"}, body | {"cache_salt": "oneone"}):
            assert not set(salted.keys) & set(prefix_of(other).keys)


def test_prompts_of_text_and_of_tokens():
    assert shared({"prompt": "hello"}, {"prompt": ["hello", "there"]}) == 1
    assert shared({"prompt": [1, 2, 3]}, {"prompt": [[1, 2, 3], [4]]}) == 1
    assert shared({"prompt": [1, 2, 3]}, {"prompt": [1, 2, 4]}) == 0
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert shared(chat("hello"), {"messages": [{"role": "user", "content": parts}]}) == 1
    assert (
        shared({"messages": [{"role": "user", "content": "x"}]}, {"messages": [{"role": "system", "content": "x"}]})
        == 0
    )


@pytest.mark.parametrize(
    "body",
    [None, 3, [], "x", {}, {"messages": []}, {"messages": 3}, {"messages": [None, 3]}, {"prompt": []}, {"prompt": ""}],
)
def test_what_is_no_prompt_has_no_prefix(body):
    assert prefix_of(body) == NO_PREFIX


def test_odd_values_do_no_harm():
    for content in (None, 3, {"a": [1]}, [3], ["x"], "\ud800"):
        assert prefix_of({"messages": [{"role": content, "content": content}], "cache_salt": content}).keys
        prefix_of({"prompt": content})
        prefix_of({"prompt": [content, content]})


def test_a_replica_holds_the_answer_that_it_gave():
    """A short question and a long answer: the next question goes where the answer was written."""
    prefixes: PrefixMap[str] = PrefixMap(100)
    prefixes.record(prefix_of(chat("q" * 10)).keys, "first")
    prefix = prefix_of(chat("q" * 10, "a" * 80, "r" * 10))
    assert prefixes.num_held(prefix) == {"first": 90}
    assert prefix.num_bytes == 100


def test_the_longest_beginning_counts():
    prefixes: PrefixMap[str] = PrefixMap(100)
    prefixes.record(prefix_of(chat("a" * 10)).keys, "first")
    prefixes.record(prefix_of(chat("a" * 10, "b" * 10, "c" * 10)).keys, "second")
    assert prefixes.num_held(prefix_of(chat("a" * 10, "b" * 10, "c" * 10))) == {"first": 20, "second": 30}
    assert prefixes.num_held(prefix_of(chat("z"))) == {}
    prefixes.keep(["first", "third"])
    assert prefixes.num_held(prefix_of(chat("a" * 10, "b" * 10, "c" * 10))) == {"first": 20}


def test_the_map_is_bounded_and_forgets_the_oldest():
    prefixes: PrefixMap[str] = PrefixMap(4)
    old, new = chat("a" * 2000), chat("b" * 2000)  # 4 keys each
    prefixes.record(prefix_of(old).keys, "first")
    prefixes.record(prefix_of(new).keys[:2], "second")
    assert len(prefixes) == 4
    assert prefixes.num_held(prefix_of(old)) == {"first": 2 * PIECE_BYTES}, "the end is forgotten before the beginning"
    prefixes.record(prefix_of(new).keys, "second")
    assert prefixes.num_held(prefix_of(old)) == {}


def test_a_map_that_is_told_of_another_forgets_the_same_first():
    """As an ingress hears what replicas have answered."""
    prefixes, copy = PrefixMap[str](4), PrefixMap[str](4)
    for content in ("a" * 600, "b" * 600, "a" * 600, "c" * 600):  # 2 keys each
        prefixes.record(prefix_of(chat(content)).keys, "first")
    copy.record(list(prefixes), "first")
    assert list(copy) == list(prefixes)
    assert copy.num_held(prefix_of(chat("a" * 600))) == {"first": 600}
    assert copy.num_held(prefix_of(chat("b" * 600))) == {}


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"model": "demo:x"}, {"x"}),
        ({"model": "demo"}, set()),
        ({"model": "org/base"}, set()),
        ({"model": "demo:x", "route": "y"}, {"y"}),
        ({"model": "demo:x", "route": "auto"}, set()),
        ({"model": "demo:x", "route": "base"}, set()),
        ({"model": "demo", "route": {"x": 0.5, "y": 0.5}}, {"x", "y"}),
        *[(body, set()) for body in (None, 3, [], "x", {}, {"model": 3}, {"route": 3}, {"route": [3]}, {"route": {}})],
    ],
)
def test_the_adapters_that_a_request_names(body, names):
    assert adapters_of(body) == names


def test_whose_request_it_is_says_nothing_of_its_adapters_and_no_adapter_is_in_a_key():
    one, other = (chat("a" * 2000, salt=salt, model="demo:x") for salt in ("one", "two"))
    assert adapters_of(one) == adapters_of(other)
    assert prefix_of(one) == prefix_of(one | {"model": "demo:y"}) == prefix_of(one | {"route": "y"})
    prefixes: PrefixMap[str] = PrefixMap(100)
    prefixes.record(prefix_of(one).keys, "first")
    held = prefixes.num_held(prefix_of(other))
    assert choose(held, 2000, {"first": 0, "second": 0}, 0) == []
    assert choose(held, 2000, {"first": 0, "second": 0}, 0, {"second"}) == ["second"]


@pytest.mark.parametrize(
    ("held", "loads", "expected"),
    [
        ({}, {"a": 0, "b": 0}, []),
        ({"a": 80}, {"a": 0, "b": 0}, ["a"]),
        ({"a": 80}, {"a": 3, "b": 0}, ["a"]),
        ({"a": 80}, {"a": 4, "b": 0}, []),  # over the bound
        ({"a": 80}, {"a": 9, "b": 6}, ["a"]),
        ({"a": 80, "b": 60}, {"a": 4, "b": 0}, ["b"]),
        ({"a": 80, "b": 60}, {"a": 0, "b": 0}, ["a"]),
        ({"a": 80, "b": 80}, {"a": 2, "b": 1}, ["b"]),
        ({"a": 49}, {"a": 0, "b": 0}, []),  # little to save
        ({"gone": 80}, {"a": 0, "b": 0}, []),
        ({"a": 80}, {}, []),
    ],
)
def test_the_choice(held, loads, expected):
    assert choose(held, 100, loads, max_imbalance=3) == expected


@pytest.mark.parametrize(
    ("held", "loads", "ready", "expected"),
    [
        ({}, {"a": 0, "b": 3}, "b", ["b"]),
        ({}, {"a": 0, "b": 4}, "b", []),  # over the bound
        ({}, {"a": 1, "b": 0, "c": 2}, "ac", ["a", "c"]),
        ({}, {"a": 0, "b": 0}, ["gone"], []),
        ({"a": 49}, {"a": 0, "b": 0}, "b", ["b"]),
        ({"a": 80}, {"a": 0, "b": 0}, "b", ["a"]),  # a prompt's beginning counts for more
        ({"a": 80, "b": 60}, {"a": 0, "b": 0}, "b", ["a"]),
        ({"a": 80, "b": 80}, {"a": 0, "b": 2}, "b", ["b"]),
        ({"a": 80, "b": 80}, {"a": 0, "b": 4}, "b", ["a"]),
        ({"a": 80, "b": 80}, {"a": 0, "b": 2}, "ab", ["a"]),
    ],
)
def test_the_choice_among_replicas_that_have_the_adapters(held, loads, ready, expected):
    assert choose(held, 100, loads, max_imbalance=3, ready=set(ready)) == expected
