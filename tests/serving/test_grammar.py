"""Grammars: whatever is drawn at random under their masks matches, and whatever cannot be followed is refused."""

import ast
import json
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora import Grammar
from molora.serving import grammar as grammar_module
from molora.serving.grammar import ANNOTATIONS, DEFINITIONS, KEYWORDS, GrammarCompiler, Matcher
from molora.tiny import byte_tokenizer

VOCAB_SIZE = 512  # wider than the tokenizer's 259
END = 2
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCAB_SIZE)


def schema(**keys: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(keys))


def regex(text: str) -> Grammar:
    return Grammar("regex", text)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


def draw(matcher: Matcher, rng: random.Random, *, max_tokens: int = 4000) -> str:
    """A random answer. After a while it closes what is open, so that it comes to an end."""
    closing = set(ids_of('"]}0\n'))
    ids: list[int] = []
    while not matcher.is_finished and not (matcher.allows_end and rng.random() < 0.2):
        assert len(ids) < max_tokens
        may_come = set(matcher.more().tolist())
        short = may_come & closing if len(ids) > 60 and rng.random() < 0.8 else set()
        ids.append(rng.choice(sorted(short or may_come)))
        matcher.accept(ids[-1])
    assert matcher.allows_end
    return str(TOKENIZER.decode(ids))


def allowed(matcher: Matcher) -> set[int]:
    mask = matcher.bitmask()
    assert mask.dtype == torch.int32
    assert mask.shape == (VOCAB_SIZE // 32,)
    return {token for token in range(VOCAB_SIZE) if int(mask[token // 32]) >> token % 32 & 1}


def matches(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    matcher = compiler.compile(grammar).matcher()
    try:
        for token in ids_of(text):
            matcher.accept(token)
    except ValueError:
        return False
    return matcher.allows_end


NODE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["name", "next"],
}
PERSON: dict[str, Any] = {
    "$defs": {"node": NODE},
    "title": "Person",
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 3, "maximum": 140},
        "height": {"type": ["number", "null"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", 1, None]}, "minItems": 1, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-\\d+$"},
        "chain": {"$ref": "#/$defs/node"},
        "day": {"type": "string", "format": "date"},
    },
    "required": ["age", "tags", "chain"],
}


def is_node(value: Any) -> bool:
    if value is None:
        return True
    # A lone token of the byte tokenizer may begin a character that another one does not complete.
    name_fits = isinstance(value["name"], str) and ("\ufffd" in value["name"] or 1 <= len(value["name"]) <= 4)
    return set(value) == {"name", "next"} and name_fits and is_node(value["next"])


def test_random_answers_match_a_nested_schema(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(schema(**PERSON))
    seen: set[str] = set()
    for seed in range(40):
        value = json.loads(draw(compiled.matcher(), random.Random(seed)))
        seen |= set(value)
        assert {"age", "tags", "chain"} <= set(value) <= set(PERSON["properties"])
        assert type(value["age"]) is int
        assert 3 <= value["age"] <= 140
        assert value.get("height") is None or isinstance(value["height"], (int, float))
        assert 1 <= len(value["tags"]) <= 3
        assert all(tag in ("a", "b\n", 1, None) for tag in value["tags"])
        assert re.fullmatch(r"[A-Z]{2}-\d+", value.get("code", "AB-1"))
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", value.get("day", "2020-02-02"))
        assert value["chain"] is not None
        assert is_node(value["chain"])
    assert seen == set(PERSON["properties"])


@pytest.mark.parametrize(
    "text",
    [
        "[a-z]+@[a-z]+(\\.[a-z]+)+",
        "^(yes|no)$",
        "\\d{4}-\\d{2}",
        "(- .+\\n)+",
        "[^\\W\\d]\\x41a?",
        "a{2,5}?b*",
        "é|€+|😀",
    ],
)
def test_random_answers_match_a_regex(compiler: GrammarCompiler, text: str) -> None:
    compiled = compiler.compile(regex(text))
    for seed in range(40):
        answer = draw(compiled.matcher(), random.Random(seed))
        if "\ufffd" not in answer:
            assert re.fullmatch(text, answer, re.ASCII), answer


def test_any_object_is_an_object(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(Grammar("json_object"))
    answers = [json.loads(draw(compiled.matcher(), random.Random(seed))) for seed in range(30)]
    assert all(isinstance(answer, dict) for answer in answers)
    assert any(answers)
    assert matches(compiler, Grammar("json_object"), '{"a": [1, {"b": null}]}')
    assert not matches(compiler, Grammar("json_object"), "[]")


@pytest.mark.parametrize(
    ("keys", "good", "bad"),
    [
        ({"type": "object"}, ["{}", '{"a": 1}'], ["1"]),
        ({"type": "array"}, ["[]", '[1, "a"]'], ["{}"]),
        ({"type": "array", "minItems": 1, "maxItems": 2}, ["[1]", '[1, "a"]'], ["[]", "[1, 2, 3]"]),
        ({"properties": {"a": {}}, "required": ["a"]}, ['{"a": [1]}'], ["{}", '{"a": 1, "b": 2}']),
        ({"properties": {"a": {}}, "additionalProperties": True}, ['{"a": 1, "b": 2}', "{}"], []),
        ({"required": ["z"], "additionalProperties": {"type": "null"}}, ['{"z": null}'], ["{}", '{"z": 1}']),
        ({"oneOf": [{"type": "integer"}, {"const": "x"}], "discriminator": {}}, ["3", '"x"'], ['"y"']),
        ({"allOf": [{"minimum": 3, "type": "integer"}], "description": "three up"}, ["3"], ["2"]),
        ({"type": "string", "maxLength": 2}, ['"ab"', '""', '"é€"'], ['"abc"', '"\t"', '"a\x01"']),
        ({"minLength": 2}, ['"ab"'], ['"a"', "1"]),
        ({"type": "string", "pattern": "."}, ['"a"'], ['"\\"', '"""', '"\n"']),
        ({"type": "string", "enum": ["é"], "default": 1}, ['"é"'], ['"e"']),
        ({"type": "integer", "exclusiveMinimum": 0}, ["1", "10"], ["0", "-1", "1.0"]),
        ({"type": "string", "format": "anything"}, ['"a"'], ["1"]),
        ({"items": {"type": "integer"}, "uniqueItems": False}, ["[1, 1]"], ['["a"]']),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, ["[null]"], ["[1]", "[null, 1]"]),
    ],
)
def test_schemas_mean_what_they_say(
    compiler: GrammarCompiler, keys: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert matches(compiler, schema(**keys), text), text
    for text in bad:
        assert not matches(compiler, schema(**keys), text), text


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("a.c", ["abc"], ["a\nc"]),
        ("\\x41a", ["Aa"], ["\x1a", "A"]),  # xgrammar alone reads one number of three digits
        ("\\u{42}\\cJ", ["B\n"], ["BJ"]),
        ("[\\x41-C]\\D", ["Bx"], ["B1", "Dx"]),
        ("(?:ab)+|(?<name>c)", ["abab", "c"], ["abc"]),
        ("a\\$", ["a$"], ["a"]),
        ("^a\\\\$", ["a\\"], ["a$"]),
    ],
)
def test_regexes_mean_what_they_say(compiler: GrammarCompiler, text: str, good: list[str], bad: list[str]) -> None:
    assert all(matches(compiler, regex(text), each) for each in good)
    assert not any(matches(compiler, regex(text), each) for each in bad)


def test_an_answer_ends_where_nothing_may_follow(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(regex("ab?")).matcher()
    assert (matcher.is_finished, matcher.allows_end) == (False, False)
    assert allowed(matcher) == set(ids_of("a"))
    matcher.accept(*ids_of("a"))
    assert (matcher.is_finished, matcher.allows_end) == (False, True)
    assert allowed(matcher) == {END, *ids_of("b")}
    assert matcher.more().tolist() == ids_of("b")
    matcher.accept(*ids_of("b"))
    assert (matcher.is_finished, matcher.allows_end) == (True, True)
    assert allowed(matcher) == {END}
    matcher.accept(END)
    assert (matcher.is_finished, matcher.allows_end) == (True, True)
    assert allowed(matcher) == {END}
    for token in (END, *ids_of("b")):
        with pytest.raises(ValueError, match="does not match"):
            matcher.accept(token)


def test_a_token_that_does_not_match_changes_nothing(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(regex("ab")).matcher()
    for token in (*ids_of("b"), END, 0, 300, VOCAB_SIZE - 1):
        with pytest.raises(ValueError, match=f"token {token} does not match"):
            matcher.accept(token)
    matcher.accept(*ids_of("a"))


def test_a_json_answer_is_finished_at_its_last_brace(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(schema(properties={"a": {"type": "null"}}, required=["a"])).matcher()
    for token in ids_of('{"a":null'):
        matcher.accept(token)
        assert not matcher.is_finished
    matcher.accept(*ids_of("}"))
    assert matcher.is_finished


def test_special_tokens_and_padding_never_come() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE, end_ids=[1, 2])
    matcher = compiler.compile(regex("[^x]*")).matcher()
    assert allowed(matcher) & {0, 1, 2, *range(259, VOCAB_SIZE)} == {1, 2}
    odd = GrammarCompiler(TOKENIZER, 261).compile(regex("[^x]*")).matcher().bitmask()
    assert odd.shape == (9,)
    assert int(odd[8]) >> 3 & 1 == 0


def test_special_tokens_are_not_what_they_look_like(compiler: GrammarCompiler) -> None:
    grammar = regex("<\\|im_start\\|>x?")
    assert allowed(compiler.compile(grammar).matcher()) == set(ids_of("<"))


def test_masks_go_into_a_batch(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(regex("a")).matcher()
    bitmask = torch.full((3, VOCAB_SIZE // 32), -1, dtype=torch.int32)
    matcher.fill(bitmask, 1)
    assert torch.equal(bitmask[1], matcher.bitmask())
    assert (bitmask[[0, 2]] == -1).all()


def test_matchers_of_one_grammar_are_apart(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(regex("ab"))
    first, second = compiled.matcher(), compiled.matcher()
    first.accept(*ids_of("a"))
    assert allowed(second) == set(ids_of("a"))
    assert allowed(first) == set(ids_of("b"))


def test_whitespace_is_bounded(compiler: GrammarCompiler) -> None:
    for text, fits in (("[" + " " * 20 + "]", True), ("[" + " " * 30 + "]", False), ("[] ", False)):
        assert matches(compiler, schema(type="array"), text) is fits


REFUSED = [
    (Grammar("json_schema", "{"), "is no JSON"),
    (Grammar("json_schema", '{"minimum": NaN}'), "is no JSON"),
    (Grammar("json_schema", '{"minimum": 1e999}'), "is no JSON"),
    (Grammar("json_schema", "[" * 60_000), "nested too deeply"),
    (Grammar("json_schema", '{"items":' * 40 + "{}" + "}" * 40), "nested deeper than"),
    (Grammar("json_schema", '{"const":"' + "x" * 70_000 + '"}'), "bytes; expected"),
    (Grammar("json_schema", "3"), "expected a schema"),
    (Grammar("json_schema", "false"), "expected a schema"),
    (Grammar("json_schema", '"\ud800"'), "surrogate"),
    (schema(properties={f"p{i}": {} for i in range(2000)}), "more than"),
    (schema(type="integer", multipleOf=3), "# of the JSON schema has multipleOf, which is not supported"),
    (schema(properties={"a": {"not": {}}}), "#/properties/a of the JSON schema has not,"),
    (schema(patternProperties={}), "patternProperties"),
    (schema(anyOf=[{"type": "null"}], properties={}), "anyOf beside properties"),
    (schema(allOf=[{}, {}]), "several schemas"),
    (schema(minLength=1, minimum=1), "several types"),
    (schema(enum=[]), "no list of values"),
    (schema(enum=[1], type="string"), "another type"),
    (schema(type={}), "/type"),
    (schema(type=[]), "/type"),
    (schema(type=[{}]), "/type"),
    (schema(type="string", minLength=-1), "no count"),
    (schema(type="string", maxLength=1 << 40), "no count"),
    (schema(type="string", minLength=3, maxLength=2), "over its maxLength"),
    (schema(type="string", minLength=True), "no count"),
    (schema(type="string", pattern=3), "no text"),
    (schema(type="string", format=3), "no text"),
    (schema(type="string", pattern="(?=a)b"), "look-around"),
    (schema(type="string", pattern='"'), "JSON may write in another way"),
    (schema(type="string", pattern="a", maxLength=3), "the pattern can say both"),
    (schema(type="integer", minimum="1"), "no number"),
    (schema(type="integer", minimum=5, maximum=4), "cannot be followed"),
    (schema(type="integer", minimum=1e300), "cannot be followed"),
    (schema(properties=[]), "no object of schemas"),
    (schema(properties={"\ud800": {}}), "cannot be followed"),
    (schema(required=[1]), "no list of names"),
    (schema(required=["a"], additionalProperties=False), "requires 'a'"),
    (schema(**{"$ref": "http://example.org/schema"}), "has no http"),
    (schema(**{"$ref": "#/$defs/a"}), "has no #/"),
    (schema(**{"$ref": 3}), "no text"),
    (schema(**{"$ref": "#"}), "nothing matches"),
    (schema(**{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "nothing"),
    (
        schema(properties={f"p{i}": {"type": "string", "maxLength": 150} for i in range(5)}),
        "longer than",
    ),
    *(
        (regex(text), "cannot be read")
        for text in (
            "[",
            "[]",
            "a{",
            "{,3}",
            "\\",
            "\\1",
            "\\p{L}",
            "[\\p{L}]",
            "\\b",
            "(?i)a",
            "(?P<x>a)",
            "a^b",
            "a$b",
        )
    ),
    *((regex(text), "cannot be followed") for text in ("*", "a**", "{3}", "[z-a]", "a|*", "a{3,1}")),
    (regex("(a"), "leaves a group open"),
    (regex("a)"), "never opened"),
    (regex("(" * 2000 + ")" * 2000), "cannot be followed"),
    (regex("a\0"), "cannot be read"),
    (regex("\ud800"), "surrogate"),
    (regex("a" * 5000), "characters"),
    (regex("\\u{110000}"), "no character"),
    (regex("a?" * 100), "quantifiers"),
    *((regex(text), "more than 256 times") for text in ("a{1,100000}", "a{257}", "(b(a{20}){10}){2}", "a{257,}")),
    *((regex(text), "no fixed length") for text in ("(a*)*", "(.+)+x", "(\\w+\\s?)+", "(.?){200}", "((a+|b)c?){2}|d")),
]


@pytest.mark.parametrize(("grammar", "words"), REFUSED)
def test_what_cannot_be_followed_is_refused(compiler: GrammarCompiler, grammar: Grammar, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        compiler.compile(grammar)
    assert len(str(caught.value)) < 300
    assert "/project/" not in str(caught.value)


@pytest.mark.parametrize("text", ["a{10}", "(\\d{3}){85}", "a{0}", "(\\.[a-z]+)+", "(?:a|bc*){3}", "(a{3})+"])
def test_modest_repeats_are_accepted(compiler: GrammarCompiler, text: str) -> None:
    compiler.compile(regex(text))


def test_what_takes_too_long_is_refused(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "TRIAL_S", 0.0)
    with pytest.raises(ValueError, match="takes too long to follow"):
        compiler.compile(regex("slow.*"))


WORDS = ("type", "anyOf", "oneOf", "allOf", "enum", "const", "$ref", "not", "object", "#")
KEYS = st.sampled_from([*WORDS, *sorted(ANNOTATIONS), *DEFINITIONS, *sorted(set[str]().union(*KEYWORDS.values()))])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
SCHEMAS = st.dictionaries(
    KEYS,
    JSON | st.sampled_from(["object", "string", "array", "integer", "#", "#/$defs/object", [{}], {"object": {}}]),
    max_size=5,
)


@settings(max_examples=300, deadline=None)
@given(SCHEMAS)
def test_no_schema_does_harm(compiler: GrammarCompiler, keys: dict[str, Any]) -> None:
    _survives(compiler, Grammar("json_schema", json.dumps(keys)))


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from('ab.*+?{}()[]|^$\\d1,-uxw\0é😀\n"') | st.characters(), max_size=14))
def test_no_regex_does_harm(compiler: GrammarCompiler, text: str) -> None:
    _survives(compiler, regex(text))


def _survives(compiler: GrammarCompiler, grammar: Grammar) -> None:
    try:
        matcher = compiler.compile(grammar).matcher()
    except ValueError:
        return
    rng = random.Random(0)
    for _ in range(20):
        if matcher.is_finished:
            return
        matcher.accept(rng.choice(matcher.more().tolist()))


def test_the_last_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "CACHE_SIZE", 2)
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    first, second = compiler.compile(regex("a")), compiler.compile(regex("b"))
    assert compiler.compile(regex("a")) is first
    compiler.compile(regex("c"))
    assert compiler.compile(regex("a")) is first
    assert compiler.compile(regex("b")) is not second
    assert compiler.compile(Grammar("json_object")) is compiler.compile(Grammar("json_object"))


def test_threads_compile_side_by_side() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    found: list[str] = []
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for index in range(10):
                text = f"x{(seed + index) % 7}[a-z]*"
                answer = draw(compiler.compile(regex(text)).matcher(), random.Random(seed))
                assert re.fullmatch(text, answer)
                found.append(answer)
                compiler.compile(schema(**PERSON, description=str(seed * 10 + index)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(found) == 60


def test_compiling_lets_other_threads_run(compiler: GrammarCompiler) -> None:
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before, start_s = ticks[0], time.monotonic()
    while time.monotonic() - start_s < 0.2:
        compiler._compile(schema(enum=["x" * 20_000]))
    stop.set()
    thread.join()
    assert ticks[0] - before > 20


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no end token"):
        GrammarCompiler(TOKENIZER, VOCAB_SIZE, end_ids=[])


def test_xgrammar_is_imported_when_it_is_needed() -> None:
    """Its import takes seconds, and few servers are asked for grammars."""
    module = ast.parse(Path(grammar_module.__file__).read_text())
    imported = [alias.name for node in module.body if isinstance(node, ast.Import) for alias in node.names]
    assert "json" in imported
    assert "xgrammar" not in imported
