"""The demo's data: rebuilt to the byte, nothing shared between training and held-out files, answers that are right."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from reasoning_gym import get_score_answer_fn  # type: ignore[import-untyped]

from molora.training.recipes import DOMAINS, TASKS, Message, Record, build, num_files, verify, verify_composite, write
from molora.training.recipes.__main__ import main
from molora.training.recipes.documents import MAX_BODY_WORDS, documents
from molora.training.recipes.wordings import DOCUMENT_WORDINGS, EVERYDAY, SURFACE_FORMS, WORDINGS

NUM_TRAIN = 60
Files = dict[str, list[Record]]


@pytest.fixture(scope="module")
def files() -> Files:
    return dict(build(seed=0, num_train=NUM_TRAIN))


def text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def singles(records: list[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "single"]


def test_counts(files: Files) -> None:
    assert len(files) == num_files()
    assert len(files["heldout.jsonl"]) == 1000
    assert len(files["heldout_composite.jsonl"]) == 500
    assert len(files["heldout_base.jsonl"]) == 200
    for domain in DOMAINS:
        assert len(files[f"val_{domain}.jsonl"]) == 200
        train = files[f"train_{domain}.jsonl"]
        assert len(train) == NUM_TRAIN
        assert len(singles(train)) == round(0.7 * NUM_TRAIN)
        assert {record["domain"] for record in singles(train)} == {domain}
        assert all(domain in (record["domain"] or ()) for record in train)
    held_out = files["heldout.jsonl"]
    for domain in DOMAINS:
        lengths = [len(record["messages"]) for record in held_out if record["domain"] == domain]
        assert (lengths.count(2), lengths.count(4)) == (100, 100)
    router = files["train_router.jsonl"]
    assert {record["kind"] for record in router} == {"single", "composite", "base"}


def test_every_command_of_one_seed_writes_the_same_bytes(files: Files, tmp_path: Path) -> None:
    summary = write(tmp_path / "here", files.items(), seed=0, num_train=NUM_TRAIN)
    module = [sys.executable, "-m", "molora.training.recipes"]
    command = [*module, "--out", str(tmp_path / "there"), "--num-train", str(NUM_TRAIN)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert names == sorted(["recipe.json", *files])
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    assert json.loads((tmp_path / "here" / "recipe.json").read_text()) == summary


def test_another_seed_asks_other_things(files: Files) -> None:
    assert dict(build(seed=1, num_train=NUM_TRAIN))["heldout.jsonl"] != files["heldout.jsonl"]


def test_too_few_records_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--num-train", "3"])
    assert "at least 20" in capsys.readouterr().err


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_item_comes_twice(domain: str) -> None:
    keys = [item.key for item in TASKS[domain].items(seed=0, num_items=1500)]
    assert len(keys) == len(set(keys)) == 1500


def test_training_and_held_out_files_share_no_family(files: Files) -> None:
    def stories(prefixes: tuple[str, ...]) -> set[str]:
        records = [record for name in files if name.startswith(prefixes) for record in files[name]]
        texts = [text_of(record["messages"][-2]) for record in records]
        return {" ".join(found) for text in texts if (found := re.findall(r"\w+ is married to \w+\.", text))}

    train, others = stories(("train",)), stories(("heldout", "val"))
    assert len(train) > NUM_TRAIN // 2
    assert len(others) > 500
    assert not train & others


def test_training_and_held_out_files_share_no_working(files: Files) -> None:
    """Workings name their item, so equal facts in other words would show as equal workings."""

    def replies(prefixes: tuple[str, ...]) -> set[str]:
        texts: set[str] = set()
        for name, records in files.items():
            for record in records if name.startswith(prefixes) else ():
                content = record["messages"][-1]["content"]
                found = [content] if isinstance(content, str) else [part["text"] for part in content]
                # Two families may lead to the same working; their stories are compared above.
                domains = record["domain"] if isinstance(record["domain"], list) else [record["domain"]]
                marks = SURFACE_FORMS[record["wording"]].reply_marks if record["kind"] == "composite" else ("",)
                for text, domain, mark in zip(found, domains, marks, strict=False):
                    if domain not in (None, "family"):
                        texts.add(text.lstrip("\n").removeprefix(mark))
        return texts

    assert not replies(("train",)) & replies(("heldout", "val"))


def test_held_out_documents_are_not_trained_on(files: Files) -> None:
    held_out = {str(record["answer"]) for record in files["heldout_base.jsonl"]}
    train = [
        text_of(m) for name in files if name.startswith(("train", "val")) for r in files[name] for m in r["messages"]
    ]
    assert held_out.isdisjoint(train)


def test_held_out_wordings_are_absent_from_training(files: Files) -> None:
    for choices in (*WORDINGS.values(), DOCUMENT_WORDINGS):
        assert len(choices.training) >= 12
        assert len(choices.held_out) >= 5
        assert len({*choices.training, *choices.held_out}) == len(choices)
    assert not set(SURFACE_FORMS.training) & set(SURFACE_FORMS.held_out)
    for name, records in files.items():
        for record in records:
            if record["kind"] == "single":
                indices = WORDINGS[str(record["domain"])].indices(held_out=name.startswith("heldout"))
            elif record["kind"] == "composite":
                indices = SURFACE_FORMS.indices(held_out=name.startswith("heldout"))
            elif record["wording"] < len(DOCUMENT_WORDINGS):
                indices = DOCUMENT_WORDINGS.indices(held_out=name.startswith("heldout"))
            else:
                everyday = sum(len(each.questions) for each in EVERYDAY)
                indices = range(len(DOCUMENT_WORDINGS), len(DOCUMENT_WORDINGS) + everyday)
            assert record["wording"] in indices, name


def test_parts_follow_the_tasks_and_end_with_their_answers(files: Files) -> None:
    for record in [record for records in files.values() for record in records]:
        *history, question, reply = record["messages"]
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"] * (1 + len(history) // 2)
        for message in history:
            assert isinstance(message["content"], list)
            assert {part["domain"] for part in message["content"]} == {None}
        if record["kind"] == "composite":
            for message in (question, reply):
                assert isinstance(message["content"], list)
                assert [part["domain"] for part in message["content"]] == record["domain"]
            for part, answer in zip(reply["content"], record["answer"], strict=True):
                assert isinstance(part, dict)
                assert part["text"].endswith(f"Answer: {answer}")  # so connective text opens the part that follows
        else:
            assert isinstance(question["content"], str)
            assert isinstance(reply["content"], str)
        if record["kind"] != "base":
            assert not re.search(r"\{\w+\}", text_of(question))


def test_every_reference_answer_is_verified(files: Files) -> None:
    for record in [record for records in files.values() for record in records]:
        domain, answer, reply = record["domain"], record["answer"], text_of(record["messages"][-1])
        if isinstance(domain, list):
            assert isinstance(answer, list)
            assert verify_composite(domain, answer, reply) == [True] * len(domain)
        elif domain is not None:
            assert isinstance(answer, str)
            assert verify(domain, answer, reply)


def test_composite_answers_count_at_their_place() -> None:
    domains, answers = ["legs", "words"], ["26", "tac"]
    assert verify_composite(domains, answers, "1. Answer: 26\n2. c a t -> t a c\nAnswer: tac") == [True, True]
    assert verify_composite(domains, answers, "Answer: tac\nAnswer: 26") == [False, False]
    assert verify_composite(domains, answers, "Answer: 26") == [True, False]
    assert verify_composite(domains, answers, "I do not know.") == [False, False]


@pytest.mark.parametrize("domain", DOMAINS)
def test_verifier_agrees_with_reasoning_gym(domain: str) -> None:
    task = TASKS[domain]
    score = get_score_answer_fn(task.dataset)
    pairs = [(entry, item) for entry in task.entries(seed=3, num_entries=400) if (item := task.read(entry))]
    assert len(pairs) >= 40
    for (entry, item), (_, other) in pairwise(pairs):
        for answer in (item.answer, other.answer, f"{item.answer}1", ""):
            theirs = str(answer.split(", ")) if domain == "sorting" else answer
            assert verify(domain, item, f"{item.working}\nAnswer: {answer}") == (score(theirs, entry) == 1.0), answer
        assert verify(domain, item, f"Answer: {other.answer}\nNo, wait.\nAnswer: {item.answer}.\n")
        assert not verify(domain, item, item.answer)


def test_documents_are_prose_cut_between_sentences() -> None:
    found = documents()
    assert len(found) > 500
    assert len({document.body for document in found}) == len({document.summary for document in found}) == len(found)
    for document in found:
        assert document.num_words <= MAX_BODY_WORDS
        assert "\n" not in document.body
        assert document.body.endswith(".")
