"""From records to tokens: what is learned, and which domain each token belongs to."""

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from molora.tiny import byte_tokenizer
from molora.training.examples import BASE, Encoder, encode, examples, read_records

GEMMA = Path(__file__).parents[2] / "configs" / "gemma.jinja"
TOKENIZER = byte_tokenizer()
SINGLE = {
    "messages": [{"role": "user", "content": "2 times a"}, {"role": "assistant", "content": "aa"}],
    "domain": "letters",
}

PARTS = [{"type": "text", "text": "one", "domain": "x"}, {"type": "text", "text": "\ntwo", "domain": None}]


def stripping_tokenizer() -> Any:
    """One whose chat template strips each message."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", "(message['content'] | trim) +")
    return tokenizer


def decode(ids: object) -> str:
    return str(TOKENIZER.decode(ids))


def test_only_the_answer_and_its_end_are_learned() -> None:
    example = encode(SINGLE, TOKENIZER)
    learned = [i for i, yes in zip(example.token_ids, example.learned, strict=True) if yes]
    assert decode(learned) == "aa<|im_end|>"
    assert learned[-1] == TOKENIZER.eos_token_id


@pytest.mark.parametrize("record", [SINGLE, {"prompt": "a b", "completion": " c", "domain": "letters"}])
def test_of_some_records_only_the_labels_are_learned(record: dict[str, object]) -> None:
    example = encode({**record, "labels_only": True}, TOKENIZER)
    assert not any(example.learned)
    for nothing in (False, None):
        other = encode({**record, "labels_only": nothing}, TOKENIZER)
        assert any(other.learned)
        assert example.domains == other.domains
    with pytest.raises(ValueError, match="labels_only is 'yes'; expected true or false"):
        encode({**record, "labels_only": "yes"}, TOKENIZER)


def test_turn_and_response_are_where_their_headers_begin() -> None:
    example = encode(SINGLE, TOKENIZER)
    assert decode(example.token_ids[example.turn :]).startswith("<|im_start|>user\n2 times a")
    assert decode(example.token_ids[example.response :]).startswith("<|im_start|>assistant\naa")


def test_the_template_for_gemma_can_be_trained_on() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = GEMMA.read_text()
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    example = encode({"messages": [*earlier, *SINGLE["messages"]]}, tokenizer)
    prompt, answer = "<start_of_turn>user\n2 times a<end_of_turn>\n", "<start_of_turn>model\naa<|im_end|>"
    assert decode(example.token_ids[example.turn : example.response]) == prompt
    assert decode(example.token_ids[example.response :]) == answer
    learned = [i for i, yes in zip(example.token_ids, example.learned, strict=True) if yes]
    assert decode(learned) == "aa<|im_end|>"


def test_a_single_domain_covers_the_last_turn_but_not_its_header() -> None:
    example = encode(SINGLE, TOKENIZER)
    header = len(TOKENIZER("<|im_start|>user\n")["input_ids"])
    assert example.domains[example.turn : example.turn + header] == (None,) * header
    assert set(example.domains[example.turn + header :]) == {"letters"}


def test_history_before_the_last_turn_has_no_domain() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, *SINGLE["messages"]]
    example = encode({"messages": messages, "domain": "letters"}, TOKENIZER)
    assert set(example.domains[: example.turn]) == {None}


def test_a_null_domain_is_base_and_a_missing_one_is_unknown() -> None:
    assert encode({**SINGLE, "domain": None}, TOKENIZER).domains[-1] == BASE
    assert encode({"messages": SINGLE["messages"]}, TOKENIZER).domains[-1] is None


def test_parts_carry_their_own_domains_and_connectives_follow_the_next_part() -> None:
    record = {
        "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}],
        "domain": ["x", None],
    }
    example = encode(record, TOKENIZER)
    answer = list(zip(decode(example.token_ids[-8:-1]), example.domains[-8:-1], strict=True))
    assert answer == [(c, "x") for c in "one"] + [(c, BASE) for c in "\ntwo"]
    between = example.domains[example.response]
    assert between == "x"  # the assistant's header belongs to the part that follows it


def test_a_template_that_strips_messages_keeps_the_parts_apart() -> None:
    tokenizer = stripping_tokenizer()
    assert " x " not in tokenizer.apply_chat_template([{"role": "user", "content": " x "}], tokenize=False)
    parts = [{"type": "text", "text": " \n one", "domain": "x"}, {"type": "text", "text": "\ntwo  ", "domain": None}]
    record = {"messages": [{"role": "user", "content": "  hi "}, {"role": "assistant", "content": parts}]}
    example = encode(record, tokenizer)
    learned = [(i, d) for i, d, yes in zip(example.token_ids, example.domains, example.learned, strict=True) if yes]
    assert decode([i for i, _ in learned]) == "one\ntwo<|im_end|>"
    assert [d for _, d in learned] == ["x"] * 3 + [BASE] * 5


def test_a_stripped_message_is_not_found_in_the_next_one() -> None:
    tokenizer = stripping_tokenizer()
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": " " * 60 + "abc "},
        {"role": "assistant", "content": "so abc is it"},
    ]
    example = encode({"messages": messages, "domain": "x"}, tokenizer)
    header = len(tokenizer("<|im_start|>user\n")["input_ids"])
    assert set(example.domains[: example.turn + header]) == {None}
    assert set(example.domains[example.turn + header :]) == {"x"}


def test_messages_that_a_template_is_not_given_are_errors() -> None:
    messages = [{**SINGLE["messages"][0], "tool_calls": [{}]}, SINGLE["messages"][1]]
    with pytest.raises(ValueError, match="tool_calls"):
        encode({"messages": messages}, TOKENIZER)


def test_plain_text_records() -> None:
    example = encode({"prompt": "ab", "completion": "cd", "domain": "x"}, TOKENIZER)
    assert decode(example.token_ids) == "abcd<|im_end|>"
    assert example.learned == (False, False, True, True, True)
    assert (example.turn, example.response) == (0, 2)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "needs 'messages'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "must end with"),
        ({"messages": []}, "must end with"),
        ({"messages": 3}, "must be a list, not 3"),
        ({"messages": None}, "must be a list, not None"),
        ({"messages": ["hi", "ho"]}, "message 0 is 'hi'; expected"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}, "has content None"),
        ({"messages": [{"content": "x"}, {"role": "assistant", "content": "y"}]}, "expected {'role'"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}, "must end with"),
        ({"prompt": "x"}, "needs 'messages'"),
        ({"prompt": "x", "completion": None}, "completion must be text, not None"),
        ({"prompt": ["x"], "completion": "y"}, "prompt must be text"),
        ({"prompt": "x", "completion": "y", "domain": 3}, "a domain is 3; expected a name, or null"),
        (
            {"messages": [SINGLE["messages"][0], {"role": "assistant", "content": [{"text": "x", "domain": ["y"]}]}]},
            "a domain is ['y']; expected",
        ),
        (
            {"messages": [SINGLE["messages"][0], {"role": "assistant", "content": "b<|im_end|>c and the rest"}]},
            "the answer holds the end token '<|im_end|>', behind which nothing would be learned; remove it",
        ),
        ({**SINGLE, "domain": ["zzz"]}, "domain is the list ['zzz']; expected a name, or null for the base"),
        ({**SINGLE, "domain": []}, "domain is the list []; expected a name"),
        (
            {"messages": [SINGLE["messages"][0], {"role": "assistant", "content": PARTS}], "domain": ["x", "zzz"]},
            "domain is the list ['x', 'zzz']; expected a name",
        ),
        ({"prompt": "x", "completion": "y", "domain": ["zzz"]}, "domain is the list ['zzz']; expected a name"),
        ({"prompt": "x\ud800", "completion": "y"}, "a record's prompt holds half of a surrogate pair"),
        ({"prompt": "x", "completion": "\udc00y"}, "a record's completion holds half of a surrogate pair"),
    ],
)
def test_malformed_records_say_which_and_why(record: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"mine.jsonl: record 2: .*{re.escape(message)}"):
        examples([SINGLE, record], TOKENIZER, max_length=100, source="mine.jsonl")


def test_records_that_are_left_out_are_counted() -> None:
    long = {"prompt": "a" * 200, "completion": "b"}
    blank = {"prompt": "a", "completion": " \n"}
    parts = [{"text": "", "domain": "x"}, {"text": " ", "domain": "y"}]
    silent = {"messages": [SINGLE["messages"][0], {"role": "assistant", "content": parts}]}
    words = "mine.jsonl: 3 of 4 records are left out: 2 with an empty answer, 1 longer than 150 tokens."
    with pytest.warns(UserWarning, match=words):
        found = examples([blank, SINGLE, long, silent], TOKENIZER, max_length=150, source="mine.jsonl")
    assert found == [encode(SINGLE, TOKENIZER)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([SINGLE], "1 of 1 records are left out: 1 longer than 5 tokens"),
        ([{"prompt": "a", "completion": ""}], "1 of 1 records are left out: 1 with an empty answer"),
        ([], "mine.jsonl has no records"),
    ],
)
def test_nothing_left_is_an_error(records: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        examples(records, TOKENIZER, max_length=5, source="mine.jsonl")


def test_jsonl_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(SINGLE) + "\n{broken\n")
    with pytest.raises(ValueError, match="line 2"):
        list(read_records(path))
    path.write_text(json.dumps(SINGLE) + "\n" + "[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: JSON that is nested too deeply"):
        list(read_records(path))
    with pytest.raises(FileNotFoundError, match="recipes"):
        list(read_records(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_of_another_encoding_is_named(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "café", "completion": "au lait"}\n', encoding=encoding)
    with pytest.raises(ValueError, match=r"data\.jsonl is not text in UTF-8 .*save it in that encoding"):
        list(read_records(path))


def test_any_datasets_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(SINGLE) + "\n")
    (record,) = read_records(tmp_path)
    assert encode(record, TOKENIZER) == encode(SINGLE, TOKENIZER)


def test_processes_stay_for_the_next_source_and_end_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molora.training.examples.os.cpu_count", lambda: 2)
    records = [{"prompt": f"a{index}", "completion": "b"} for index in range(4200)]
    tokenizer = byte_tokenizer()
    expected = [encode(record, tokenizer) for record in records]
    before = set(multiprocessing.active_children())
    with Encoder(tokenizer, max_length=64) as encoder:
        assert encoder.examples(records) == expected
        children = set(multiprocessing.active_children()) - before
        assert 1 <= len(children) <= 2
        assert encoder.examples(records[::-1]) == expected[::-1]
        assert encoder.examples(records[:3]) == expected[:3]
        with pytest.raises(ValueError, match=r"second: record 4201"):
            encoder.examples([*records, {"prompt": "a"}], source="second")
        others = [{**record, "made_by": lambda: None} for record in records]  # what is not read does not travel
        assert encoder.examples(others) == expected
    assert set(multiprocessing.active_children()) <= before


def test_a_killed_process_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("molora.training.examples.encode", kill)
    monkeypatch.setattr("molora.training.examples.os.cpu_count", lambda: 2)
    records = [{"prompt": "a", "completion": "b"}] * 5000
    with pytest.raises(OSError, match=r"names\.jsonl: a process that tokenizes it was killed"):
        examples(records, byte_tokenizer(), max_length=64, source="names.jsonl")
