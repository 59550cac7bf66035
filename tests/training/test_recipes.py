"""The data of the demo, and of all tasks: the same bytes, nothing held out in training, answers that are right."""

import json
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from difflib import SequenceMatcher
from itertools import accumulate, pairwise, product
from operator import add, gt, lt, sub, truediv
from pathlib import Path
from random import Random
from typing import Any

import pytest
from reasoning_gym import get_score_answer_fn  # type: ignore[import-untyped]

from molora.training.recipes import (
    DEMO,
    DOMAINS,
    TASKS,
    Item,
    Message,
    Record,
    build,
    functions,
    num_files,
    unknown,
    verify,
    verify_composite,
    write,
)
from molora.training.recipes.__main__ import main
from molora.training.recipes.choices import ALTERNATIVES, Choices, Split, settle
from molora.training.recipes.composed_marks import COUNTS, INTROS, LABELS, NAMES, ORDINALS, PHRASES, composed_marks
from molora.training.recipes.conversations import Material
from molora.training.recipes.documents import MAX_BODY_WORDS, Document, documents
from molora.training.recipes.everyday import EVERYDAY
from molora.training.recipes.passages import MAX_ANSWER_WORDS, MAX_WORDS, MIN_WORDS, passages
from molora.training.recipes.readings import DOCUMENT_WORDINGS, PASSAGE_WORDINGS
from molora.training.recipes.surfaces import CLOSERS, OPENERS, SURFACE_FORMS
from molora.training.recipes.told_wordings import OTHERS, told
from molora.training.recipes.wordings import WORDINGS

NUM_TRAIN = 60
KINDS = {"single", "composite", "base"}
UNKNOWN = "train_unknown.jsonl"
Files = dict[str, list[Record]]


@pytest.fixture(scope="module")
def found_documents() -> list[Document]:
    return documents()


@pytest.fixture(scope="module", autouse=True)
def _documents_are_read_once(found_documents: list[Document]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules[build.__module__], "documents", lambda: list(found_documents))
        yield


@pytest.fixture(scope="module", params=[DEMO, DOMAINS], ids=["demo", "all"])
def domains(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return tuple(request.param)


@pytest.fixture(scope="module")
def built(domains: tuple[str, ...]) -> dict[str, Any]:
    return dict(build(seed=0, num_train=NUM_TRAIN, domains=domains))


@pytest.fixture(scope="module")
def files(built: dict[str, Any]) -> Files:
    """Those whose records are the recipes' own conversations."""
    return {name: records for name, records in built.items() if name != UNKNOWN}


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with "demo" and "all" as the command writes them, in a process where strings have other hashes."""
    folder = tmp_path_factory.mktemp("commanded")
    options = ["--num-train", str(NUM_TRAIN)]
    runs = [["--out", str(folder / "demo"), *options], ["--out", str(folder / "all"), *options, "--domains", *DOMAINS]]
    command = "sys.argv[1:] = run; runpy.run_module('molora.training.recipes', run_name='__main__')"
    code = f"import runpy, sys\nfor run in {runs!r}:\n    {command}"
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    return folder


def text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def split_of(name: str) -> Split:
    return "held out" if name.startswith("heldout") else "val" if name.startswith("val") else "train"


def is_framed(question: str) -> bool:
    return question.endswith(tuple(f"{gap}{closer}" for closer in CLOSERS for gap in " \n")) or question.startswith(
        tuple(f"{opener}{gap}" for opener in OPENERS for gap in " \n")
    )


def domain_of(message: Message) -> str | None:
    """Of a message of a history."""
    assert isinstance(message["content"], list)
    (part,) = message["content"]
    return part["domain"]


def templates(choices: Choices[str], split: Split) -> list[str]:
    return [choices[index] for index in choices.indices(split)]


def forms(split: Split) -> list[str]:
    chosen = [SURFACE_FORMS[index] for index in SURFACE_FORMS.indices(split)]
    return [form.intro + form.gap.join(form.marks) for form in chosen]


def singles(records: list[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "single"]


def test_counts(built: dict[str, Any], files: Files, domains: tuple[str, ...]) -> None:
    assert len(built) == num_files(domains)
    assert len(built[UNKNOWN]) == NUM_TRAIN // 4
    assert len(files["heldout.jsonl"]) == 200 * len(domains)
    assert len(files["heldout_composite.jsonl"]) == 500
    assert len(files["heldout_base.jsonl"]) == 200
    assert len(files["heldout_prose.jsonl"]) == 40 * (len(domains) + 1)
    assert len(files["heldout_turns.jsonl"]) == 40 * len(domains)
    for domain in domains:
        assert len(files[f"val_{domain}.jsonl"]) == 200
        train = files[f"train_{domain}.jsonl"]
        assert len(train) == NUM_TRAIN
        assert len(singles(train)) == round(0.3 * NUM_TRAIN)
        assert {record["domain"] for record in singles(train)} == {domain}
        assert all(domain in (record["domain"] or ()) for record in train)
    held_out = files["heldout.jsonl"]
    for domain in domains:
        lengths = [len(record["messages"]) for record in held_out if record["domain"] == domain]
        assert (lengths.count(2), lengths.count(4)) == (100, 100)
    router = files["train_router.jsonl"]
    assert {record["kind"] for record in router} == KINDS
    kinds = Counter(record["kind"] for record in router)
    assert kinds["composite"] == 1.5 * NUM_TRAIN
    assert kinds["base"] == NUM_TRAIN // 4
    assert {record["domain"] for record in singles(router)} == set(domains)
    for name in ("heldout_composite.jsonl", "train_router.jsonl"):
        composites = [record["domain"] for record in files[name] if record["kind"] == "composite"]
        assert {domain for each in composites for domain in each or ()} == set(domains)


def test_every_command_of_one_seed_writes_the_same_bytes(
    built: dict[str, Any], domains: tuple[str, ...], commanded: Path, tmp_path: Path
) -> None:
    summary = write(tmp_path, built.items(), seed=0, num_train=NUM_TRAIN, domains=domains)
    there = commanded / ("demo" if domains == DEMO else "all")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in there.iterdir()) == sorted(["recipe.json", *built])
    for name in names:
        assert (tmp_path / name).read_bytes() == (there / name).read_bytes(), name
    assert json.loads((tmp_path / "recipe.json").read_text()) == summary
    assert summary["command"].endswith(f"--num-train {NUM_TRAIN}" if domains == DEMO else " ".join(domains))


def test_the_demo_is_the_default() -> None:
    names = [name for name, _ in build(seed=0, num_train=NUM_TRAIN)]
    assert [name for name in names if name.startswith("val")] == [f"val_{domain}.jsonl" for domain in DEMO]
    assert len(names) == num_files()


@pytest.mark.parametrize(("split", "three", "again"), [("train", 0.5, 0.35), ("held out", 0.2, 0.0)])
def test_domains_of_composites(split: Split, three: float, again: float) -> None:
    material = Material(Random(0), split, dict.fromkeys(DOMAINS, iter(())))
    own = [material.domains("words" if split == "train" else None) for _ in range(4000)]
    assert {len(chosen) for chosen in own} == {2, 3}
    assert statistics.mean(len(chosen) == 3 for chosen in own) == pytest.approx(three, abs=0.03)
    others = sum(len(chosen) - 1 for chosen in own)
    repeated = sum(len(chosen) - len(set(chosen)) for chosen in own)
    assert repeated / others == pytest.approx(again, abs=0.02)
    assert split != "train" or all("words" in chosen for chosen in own)
    firsts = Counter(chosen[0] for chosen in own)
    assert set(firsts) == set(DOMAINS), "in any order"


def test_another_seed_asks_other_things(files: Files, domains: tuple[str, ...]) -> None:
    name, records = next(build(seed=1, num_train=NUM_TRAIN, domains=domains))
    assert name == "heldout.jsonl"
    assert records != files[name]


@pytest.mark.parametrize("command", [main, functions.main])
def test_without_reasoning_gym_it_says_what_to_install(
    command: Callable[[list[str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.data", None)
    with pytest.raises(SystemExit):
        command(["--out", str(tmp_path)])
    said = " ".join(capsys.readouterr().err.split())
    assert 'is not installed; pip install -e ".[data]" installs what the recipe needs' in said


def test_too_few_records_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--num-train", "3"])
    assert "at least 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("domains", "said"),
    [
        (("words", "chess", "legs"), f"unknown domain 'chess': the domains are {', '.join(DOMAINS)}"),
        (("words", "legs"), "three different"),
        (("words", "legs", "words", "clock"), "three different"),
    ],
)
def test_domains_that_cannot_be_built_are_refused(
    domains: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--domains", *domains])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_item_comes_twice(domain: str) -> None:
    keys = [item.key for item in TASKS[domain].items(seed=0, num_items=1500)]
    assert len(keys) == len(set(keys)) == 1500


def test_training_and_held_out_files_share_no_family(files: Files) -> None:
    def stories(prefixes: tuple[str, ...]) -> set[str]:
        records = [record for name in files if name.startswith(prefixes) for record in files[name]]
        texts = [text_of(message) for record in records for message in record["messages"] if message["role"] == "user"]
        return {" ".join(found) for text in texts if (found := re.findall(r"\w+ is married to \w+\.", text))}

    train, others = stories(("train",)), stories(("heldout", "val"))
    assert len(train) > NUM_TRAIN // 2
    assert len(others) > 500
    assert not train & others


def test_training_and_held_out_files_share_no_list_to_filter(files: Files, domains: tuple[str, ...]) -> None:
    def lists(prefixes: tuple[str, ...]) -> set[tuple[str, ...]]:
        records = [record for name in files if name.startswith(prefixes) for record in singles(files[name])]
        asked = [text_of(record["messages"][-2]) for record in records if record["domain"] == "filtering"]
        return {tuple(sorted(re.findall(r"\d+", text))) for text in asked}

    train, others = lists(("train",)), lists(("heldout", "val"))
    assert bool(train) == bool(others) == ("filtering" in domains)
    assert not train & others


def test_training_and_held_out_files_share_no_working(files: Files) -> None:
    """Workings name their item, so equal facts in other words would show as equal workings."""

    def replies(prefixes: tuple[str, ...]) -> set[str]:
        texts: set[str] = set()
        for name, records in files.items():
            for record in records if name.startswith(prefixes) else ():
                content = record["messages"][-1]["content"]
                found = [content] if isinstance(content, str) else [part["text"] for part in content]
                # Two families may lead to the same working; they are compared above.
                domains = record["domain"] if isinstance(record["domain"], list) else [record["domain"]]
                marks = SURFACE_FORMS[record["wording"]].reply_marks if record["kind"] == "composite" else ("",)
                for text, domain, mark in zip(found, domains, marks, strict=False):
                    if domain not in (None, "family"):
                        texts.add(text.lstrip("\n").removeprefix(mark))
        return texts

    assert not replies(("train",)) & replies(("heldout", "val"))


def test_what_no_adapter_knows_is_no_adapter_s_and_not_held_out(built: dict[str, Any], files: Files) -> None:
    assert not {*unknown.TASKS} & {task.dataset for task in TASKS.values()}
    records = unknown.unknown(600, 0, ["one text of five words", "and another"])
    assert {record.get("task") for record in records} == {None, *unknown.TASKS}
    assert sum("prompt" in record for record in records) == 180
    requests = {record["messages"][0]["content"] for record in records if "messages" in record and "task" not in record}
    assert 100 < len(requests) <= 180
    held_out = [record for name in files if name.startswith("heldout") for record in files[name]]
    asked = " ".join(text_of(message) for record in held_out for message in record["messages"])
    kept = " ".join(passage.text for passage in passages(held_out=True))
    sentences = {sentence for sentence in re.split(r"(?<=[.!?]) ", kept) if len(sentence.split()) >= 4}
    assert len(sentences) > 100
    for record in records:
        text = "".join(message["content"] for message in record.get("messages", ()))
        assert not any(sentence.rstrip(".!?") in text for sentence in sentences), text
    others = unknown.unknown(600, 1, ["one text of five words", "and another"])
    questions = [
        {record["messages"][0]["content"] for record in each if "messages" in record} for each in (records, others)
    ]
    assert len(questions[0] & questions[1]) < 0.2 * len(questions[0])  # some ask the same of whom they ask
    for record in built[UNKNOWN]:
        assert record["domain"] is None
        assert record["labels_only"]
        if "prompt" in record:
            assert record["prompt"] + record["completion"] not in asked


def test_held_out_documents_are_not_trained_on(files: Files) -> None:
    held_out = {str(record["answer"]) for record in files["heldout_base.jsonl"]}
    train = [
        text_of(m) for name in files if name.startswith(("train", "val")) for r in files[name] for m in r["messages"]
    ]
    assert held_out.isdisjoint(train)


def test_held_out_passages_are_not_trained_on(files: Files) -> None:
    held_out = {one for passage in passages(held_out=True) for one in passage.sentences if len(one.split()) > 5}
    train = {one for passage in passages(held_out=False) for one in passage.sentences}
    assert len(held_out) >= 30
    assert not held_out & train
    for name, records in files.items():
        texts = "\n".join(text_of(message) for record in records for message in record["messages"])
        assert any(one in texts for one in held_out) == (name == "heldout_prose.jsonl"), name
        assert any(one in texts for one in train) == name.startswith("train"), name


def test_held_out_wordings_are_absent_from_training(files: Files) -> None:
    for choices in (*WORDINGS.values(), DOCUMENT_WORDINGS):
        assert len(choices.held_out) >= 5
    assert len(SURFACE_FORMS.held_out) >= 5
    first_passage = len(DOCUMENT_WORDINGS) + sum(len(each.questions) for each in EVERYDAY)
    starts = accumulate(map(len, PASSAGE_WORDINGS.values()), initial=first_passage)
    of_passages: dict[Split, set[int]] = {"train": set(), "val": set(), "held out": set()}
    for start, choices in zip(starts, PASSAGE_WORDINGS.values(), strict=False):
        for split, indices in of_passages.items():
            indices.update(start + index for index in choices.indices(split))
    for name, records in files.items():
        split = split_of(name)
        for record in records:
            if record["kind"] == "single":
                allowed = set(WORDINGS[str(record["domain"])].indices(split))
            elif record["kind"] == "composite":
                allowed = set(SURFACE_FORMS.indices(split))
            else:
                allowed = {*DOCUMENT_WORDINGS.indices(split), *of_passages[split]}
                if split == "train":
                    allowed.update(range(len(DOCUMENT_WORDINGS), first_passage))
            assert record["wording"] in allowed, name


def test_training_has_many_wordings() -> None:
    for choices in WORDINGS.values():
        assert len(choices.indices("train")) >= 45
    for many in (SURFACE_FORMS.indices("train"), DOCUMENT_WORDINGS.indices("train")):
        assert len(many) >= 30
    assert len(EVERYDAY) >= 12
    assert len(set(OPENERS)) >= 25
    assert len(set(CLOSERS)) >= 15
    assert len({SURFACE_FORMS[index] for index in range(len(SURFACE_FORMS))}) == len(SURFACE_FORMS)


@pytest.mark.parametrize("choices", [*WORDINGS.values(), DOCUMENT_WORDINGS, *PASSAGE_WORDINGS.values()])
def test_no_training_wording_is_nearly_a_held_out_one(choices: Choices[str]) -> None:
    train, held_out = templates(choices, "train"), templates(choices, "held out")
    assert len({*train, *held_out}) == len(choices)
    assert not [pair for one in train for other in held_out if ratio(*(pair := (one, other))) >= 0.9]


def test_no_training_surface_form_is_nearly_a_held_out_one() -> None:
    pairs = [(one, other) for one in forms("train") for other in forms("held out")]
    assert not [pair for pair in pairs if ratio(*pair) >= 0.9]


def test_composed_marks_have_every_name_and_count_and_none_that_is_held_out() -> None:
    composed = list(composed_marks())
    assert len(set(composed)) == len(composed) > 400
    held_out = [SURFACE_FORMS[index] for index in SURFACE_FORMS.indices("held out")]
    kept = {mark for form in held_out for mark in (*form.marks, *form.reply_marks) if mark}
    found = [{*marks, *answers} for marks, answers, _, _ in composed]
    assert not [marks for marks in found if marks & kept]
    text = " ".join(mark for marks in found for mark in marks).lower()
    words = {word.lower() for group in (*NAMES, *COUNTS, *ORDINALS, *LABELS, *PHRASES) for word in group}
    assert not {word for word in words if not re.search(rf"(?<!\w){word}(?!\w)", text)}


def test_counts_intros_and_the_marks_of_answers_are_combined_freely() -> None:
    kinds: dict[str, set[str]] = {}
    intros: dict[str, set[str]] = {}
    for marks, answers, intro, _ in composed_marks():
        kind = "none" if not any(answers) else "the same" if marks == answers else "another"
        intros.setdefault(kind, set()).add(intro)
        is_named = any(asked in marks[0] for asked, answer in NAMES if asked != answer)
        for counts in COUNTS if is_named else ():
            if all(re.search(rf"(?<!\w){count}(?!\w)", mark) for count, mark in zip(counts, marks, strict=True)):
                kinds.setdefault(counts[0], set()).add(kind)
    assert all(found == {*INTROS} for found in intros.values())
    assert {*kinds} == {counts[0] for counts in COUNTS}
    assert all(len(found) >= 2 for found in kinds.values()), kinds
    assert "another" in kinds["1"]


def ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one.lower(), other.lower(), autojunk=False).ratio()


def expansions(template: str) -> list[str]:
    """Every combination of a template's alternatives."""
    parts = ALTERNATIVES.split(template)  # what stands between the alternatives, and they in turn
    return [
        "".join(chosen) for chosen in product(*(part.split("|") if i % 2 else [part] for i, part in enumerate(parts)))
    ]


def test_alternatives_are_chosen_by_the_stream() -> None:
    template = "[Add|Sum] {a} [and|with] {b}[| now]."
    combinations = expansions(template)
    assert len(combinations) == 8
    assert combinations[0] == "Add {a} and {b}."
    assert {settle(template, Random(seed)) for seed in range(200)} == set(combinations)
    rng = Random(0)
    assert [settle(template, Random(0)) for _ in range(9)] == [settle(template, rng)] * 9
    state = rng.getstate()
    assert settle("{brackets} has none.", rng) == "{brackets} has none."
    assert rng.getstate() == state


def malformed(template: str) -> bool:
    return bool(re.search(r"[][|]", ALTERNATIVES.sub("", template)))


def test_every_bracket_of_a_wording_is_closed_and_has_options() -> None:
    assert all(map(malformed, ("[a|b", "a|b]", "[a]", "[a [b|c]|d]", "a|b")))
    intros = [SURFACE_FORMS[index].intro for index in range(len(SURFACE_FORMS))]
    wordings = [choices[index] for choices in WORDINGS.values() for index in range(len(choices))]
    assert not [template for template in (*wordings, *intros) if malformed(template)]
    for template in wordings:
        for found in ALTERNATIVES.finditer(template):
            options = found[1].split("|")
            assert len(set(options)) == len(options), template


def test_only_wordings_that_are_trained_on_have_alternatives() -> None:
    for choices in WORDINGS.values():
        assert not [index for index in choices.indices("val") if ALTERNATIVES.search(choices[index])]
        assert not any(map(ALTERNATIVES.search, choices.held_out))
    assert not [form for form in SURFACE_FORMS.held_out if ALTERNATIVES.search(form.intro)]


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_combination_is_new_and_fits_the_facts(domain: str) -> None:
    choices = WORDINGS[domain]
    varied = [template for template in choices.more if ALTERNATIVES.search(template)]
    assert len(varied) >= 25
    combinations = [each for template in varied for each in expansions(template)]
    assert len(set(combinations)) == len(combinations) >= 700
    assert not set(combinations) & set(templates(choices, "held out"))
    # Compare the numbers of letters first: that is quick, and rules most pairs out.
    for held_out in templates(choices, "held out"):
        matcher = SequenceMatcher(None, b=held_out.lower(), autojunk=False)
        for each in combinations:
            matcher.set_seq1(each.lower())
            assert matcher.real_quick_ratio() < 0.9 or matcher.quick_ratio() < 0.9 or matcher.ratio() < 0.9, each
    items = TASKS[domain].items(seed=5, num_items=5)
    for each in combinations:
        for item in items:
            question = each.format_map(item.facts)
            assert question == question.strip(), each
            assert not re.search(r"[{}|]|  ", question), each


LISTS = [{"commas"}, {"spaces"}, {"brackets"}, {"semicolons"}, {"lines"}, {"bullets"}, {"prose"}]
NEEDED: dict[str, list[list[set[str]]]] = {  # one option of the first group, and one or more of the others
    "arithmetic": [[{"expression"}, {"spoken"}, {"first", "steps"}]],
    "words": [[{"word"}]],
    "family": [[{"story"}, {"lines"}], [{"a", "b"}]],
    "sorting": [LISTS, [{"order"}, {"direction"}, {"change"}, {"first"}]],
    "legs": [[{"prose"}, {"commas"}, {"plus"}, {"colons"}, {"lines"}]],
    "equations": [[{"equation"}, {"starred"}, {"spoken"}, {"steps", "right"}]],
    "clock": [[{"start", "end"}]],
    "filtering": [LISTS, [{"kept"}, {"do", "which"}]],
    "tastes": [[{"story"}, {"lines"}], [{"asked"}]],
    "angles": [[{"commas"}, {"prose"}, {"signs"}, {"degrees"}, {"lines"}], [{"shape"}, {"last"}]],
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_what_is_told_has_the_facts_of_its_task_and_is_new(domain: str) -> None:
    choices, items = WORDINGS[domain], TASKS[domain].items(seed=5, num_items=8)
    first, *others = NEEDED[domain]
    voices = choices.various
    assert len(set(voices)) == len(voices) >= 80
    for template in voices:
        for index in range(12):
            settled = settle(template, Random(index))
            facts = re.findall(r"\{(\w+)\}", settled)
            assert sum(option <= {*facts} for option in first) == 1, template
            assert all(any(option <= {*facts} for option in group) for group in others), template
            assert all(facts.count(each) == 1 for option in first for each in option & {*facts}), template
            question = settled.format_map(items[index % len(items)].facts)
            assert question == question.strip(), template
            assert not re.search(r"[{}|\\]|  ", question), question
    held_out = templates(choices, "held out")
    for template in voices:
        settled = settle(template, Random(0))
        assert not any(ratio(settled, each) >= 0.9 for each in held_out), template


def test_what_nobody_is_asked_for_is_told_with_an_answer() -> None:
    lines = told(OTHERS)
    assert len(set(lines)) == len(lines) >= 140
    for line in lines:
        request, answer = line.split(" ||| ")
        assert 2 <= len(answer.split()) <= 40, line
        assert not malformed(request), line
        for each in expansions(request):
            assert each == each.strip(), line
            assert not re.search(r"[{}]|  | [?!,;]", each), each


def test_alternatives_leave_no_bracket_in_the_data(files: Files) -> None:
    for record in [record for records in files.values() for record in records if record["kind"] != "base"]:
        question = text_of(record["messages"][-2])
        assert "|" not in question
        for mark in SURFACE_FORMS[record["wording"]].marks if record["kind"] == "composite" else ():
            question = question.replace(mark, "") if mark else question
        assert not re.search(r"\[(?!\d+(, \d+)*\])", question)  # but for a list of numbers in brackets


def test_added_wordings_leave_the_indices_of_files_alone() -> None:
    choices = Choices(("a", "b"), ("c",), ("d", "e"), ("f",), ("g", "h"), ("i", "j", "k"))
    assert [choices[index] for index in range(len(choices))] == [*"abcdefghijk"]
    assert choices.indices("train") == [0, 1, 3, 4, 8, 9, 10]
    assert choices.indices("val") == [0, 1]
    assert choices.indices("held out") == [2, 5, 6, 7]
    assert [choices.author(index) for index in choices.indices("held out")] == [0, 1, 2, 2]
    with pytest.raises(ValueError, match="index 8 is of nothing"):
        choices.author(8)


def test_half_of_what_is_drawn_in_training_is_various() -> None:
    choices, rng = Choices(("a", "b"), ("c",), ("d",), various=(*"efghijklmn",)), Random(0)
    drawn = Counter(choices[choices.draw("train", rng)] for _ in range(3000))
    assert {*drawn} == {*"abdefghijklmn"}
    assert 0.45 < sum(drawn[each] for each in "abd") / 3000 < 0.55
    assert {choices[choices.draw("val", rng)] for _ in range(100)} == {"a", "b"}
    assert {choices[choices.draw("held out", rng)] for _ in range(20)} == {"c"}


def test_openers_and_closers_stand_in_training_only(files: Files) -> None:
    held_out = "\n".join(
        text.lower()
        for texts in (
            forms("held out"),
            *(templates(each, "held out") for each in (*WORDINGS.values(), DOCUMENT_WORDINGS)),
            *(templates(each, "held out") for each in PASSAGE_WORDINGS.values()),
        )
        for text in texts
    )
    for frame in (*OPENERS, *CLOSERS):
        assert not re.search(rf"(?<!\w){re.escape(frame.lower())}(?!\w)", held_out), frame
    for name, records in files.items():
        tasks = [record for record in records if record["kind"] != "base"]
        share = sum(is_framed(text_of(record["messages"][-2])) for record in tasks) / max(len(tasks), 1)
        assert 0.1 < share < 0.7 if name.startswith("train") else share == 0, name


def test_histories_and_readings_are_of_both_kinds(files: Files) -> None:
    train = {one for passage in passages(held_out=False) for one in passage.sentences if len(one.split()) > 5}
    router = files["train_router.jsonl"]
    readings = [
        text_of(message)
        for name in files
        if name.startswith("train")
        for record in files[name]
        for message in record["messages"][:-2:2]
        if domain_of(message) is None
    ]
    is_prose = [any(one in text for one in train) for text in readings]
    assert 0.35 < sum(is_prose) / len(is_prose) < 0.65
    assert any(one in text_of(record["messages"][-2]) for record in router for one in train if record["kind"] == "base")


def test_tasks_stand_before_other_questions(files: Files, domains: tuple[str, ...]) -> None:
    records = [record for name in files if name.startswith("train") for record in files[name]]
    earlier = [[domain_of(message) for message in record["messages"][:-2:2]] for record in records]
    assert 0.3 < sum(map(bool, earlier)) / len(earlier) < 0.5
    assert {len(each) for each in earlier} == {0, 1, 2}
    assert {domain for each in earlier for domain in each} == {None, *domains}
    assert {record["kind"] for record, each in zip(records, earlier, strict=True) if each} == KINDS
    for index, record in enumerate(files["heldout_turns.jsonl"]):
        asked = [domain_of(message) for message in record["messages"][:-2:2]]
        assert None not in asked
        assert len(asked) == 1 + index // len(domains) % 2


@pytest.mark.parametrize("held_out", [False, True])
def test_passages_end_with_sentences_and_answer_what_is_asked(held_out: bool) -> None:
    found = passages(held_out=held_out)
    assert len({passage.text for passage in found}) == len(found) > 50
    for passage in found:
        text = passage.text
        assert MIN_WORDS <= len(text.split()) <= MAX_WORDS
        assert re.search(r"""[.!?]["']?$""", text)
        assert not text.endswith(("Mr.", "Mrs.", "Dr."))
        for asked in passage.asked:
            assert asked.kind in PASSAGE_WORDINGS
            assert len(asked.answer.split()) <= MAX_ANSWER_WORDS
            match asked.kind:
                case "first sentence":
                    assert text.startswith(asked.answer)
                case "last sentence":
                    assert text.endswith(asked.answer)
                case "continuation":
                    assert text.count(asked.cue) == 1
                    assert asked.answer.replace("...", asked.cue, 1) in text
                case "number of words":
                    num_words = int(re.findall(r"\d+", asked.answer)[0])
                    assert " ".join(text.split()[:num_words]) == passage.sentences[0]


def test_everyday_questions_fit_all_their_pairs() -> None:
    for kind in EVERYDAY:
        assert len(kind.pairs) == len(dict(kind.pairs)) >= 5
        assert all("{x}" in question for question in kind.questions)
        assert "{y}" in kind.answer


def test_parts_follow_the_tasks_and_end_with_their_answers(files: Files) -> None:
    for record in [record for records in files.values() for record in records]:
        *history, question, reply = record["messages"]
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"] * (1 + len(history) // 2)
        for message in history:
            assert isinstance(message["content"], list)
            assert len(message["content"]) == 1
        for question_before, reply_before in zip(history[::2], history[1::2], strict=True):
            assert domain_of(question_before) == domain_of(reply_before)
            assert ("\nAnswer: " in text_of(reply_before)) == (domain_of(reply_before) is not None)
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
            theirs = str(answer.split(", ")) if domain in ("sorting", "filtering") else answer
            assert verify(domain, item, f"{item.working}\nAnswer: {answer}") == (score(theirs, entry) == 1.0), answer
        assert verify(domain, item, f"Answer: {other.answer}\nNo, wait.\nAnswer: {item.answer}.\n")
        assert not verify(domain, item, item.answer)


def worked_out(domain: str, facts: Mapping[str, str]) -> str:
    """The answer to what a question shows, by other means than the generator's and the reader's."""
    match domain:
        case "equations":
            left, right = facts["starred"].split("=")
            return str(next(x for x in range(1000) if eval(left, {facts["variable"]: x}) == int(right)))
        case "clock":
            start, end = (datetime.strptime(facts[name], "%H:%M") for name in ("start", "end"))
            return (datetime.min + (end - start)).strftime("%H:%M")
        case "filtering":
            side = gt if "larger" in facts["which"] else lt
            keeps = facts["do"] == "keep only"
            numbers = map(int, facts["spaces"].split())
            return ", ".join(str(number) for number in numbers if side(number, int(facts["limit"])) == keeps)
        case "tastes":
            names: list[str] = re.findall(rf"(\S+) {re.escape(facts['asked'])}\.", facts["story"])
            assert len(names) == 1
            return names[0]
        case "angles":
            known = [int(angle) for angle in facts["commas"].split(", ")]
            return str({"triangle": 180, "quadrilateral": 360}[facts["shape"]] - sum(known))
    raise ValueError(f"no other means are known for {domain!r}")


def sample(domain: str) -> list[Item]:
    return TASKS[domain].items(seed=5, num_items=500)


@pytest.mark.parametrize("domain", [domain for domain in DOMAINS if domain not in DEMO])
def test_answers_are_right(domain: str) -> None:
    items = sample(domain)
    assert len(items) == 500
    for item in items:
        assert item.answer == worked_out(domain, item.facts), item
        assert verify(domain, item, item.reply)
        for one, sign, other, result in re.findall(r"(\d+) ([-+/]) (\d+) = (\d+)", item.working):
            assert {"+": add, "-": sub, "/": truediv}[sign](int(one), int(other)) == int(result), item


def test_every_form_of_an_equation_says_the_same() -> None:
    for item in sample("equations"):
        facts = item.facts
        words = {"times": "*", "plus": "+", "minus": "-", "equals": "="}
        spoken = " ".join(words.get(word, word) for word in facts["spoken"].split())
        assert spoken.replace(" * ", "*") == facts["starred"]
        assert facts["equation"] == facts["starred"].replace("*", "")
        factor, change, term = re.fullmatch(
            r"multiply it by (\d+) and (add|subtract|take that away from) (\d+)", facts["steps"]
        ).groups()  # type: ignore[union-attr]
        product = int(factor) * int(item.answer)
        changed = {"add": product + int(term), "subtract": product - int(term)}
        assert facts["right"] == str(changed.get(change, int(term) - product))


def test_every_form_of_a_filter_says_the_same() -> None:
    signs = {"larger": ">", "smaller": "<", "not larger": "<=", "not smaller": ">="}
    for item in sample("filtering"):
        kept, limit = item.facts["kept"].split(" than ")
        assert item.facts["sign"] == signs[kept]
        rest = [n for n in item.facts["spaces"].split() if eval(f"{n} {item.facts['sign']} {limit}")]
        assert item.answer == ", ".join(rest)
        side, limit, tests = re.fullmatch(r"(Above|Below) (\d+): (.+)\.", item.working).groups()  # type: ignore[union-attr]
        assert (side, limit) == ("Above" if item.facts["sign"] in (">", ">=") else "Below", item.facts["limit"])
        assert tests == ", ".join(f"{n} {'yes' if n in rest else 'no'}" for n in item.facts["spaces"].split())


def test_the_working_of_a_duration_leads_from_start_to_end() -> None:
    for item in sample("clock"):
        now = datetime.strptime(item.facts["start"], "%H:%M")
        for count, unit, reached in re.findall(r"(\d+) (hour|minute)s? to (\d\d:\d\d)", item.working):
            now += timedelta(**{f"{unit}s": int(count)})
            assert now.strftime("%H:%M") == reached
        assert now.strftime("%H:%M") == item.facts["end"]


def test_documents_are_prose_cut_between_sentences(found_documents: list[Document]) -> None:
    found = found_documents
    assert len(found) > 500
    assert len({document.body for document in found}) == len({document.summary for document in found}) == len(found)
    for document in found:
        assert document.num_words <= MAX_BODY_WORDS
        assert "\n" not in document.body
        assert document.body.endswith(".")


def test_words_that_are_not_common_are_asked_in_training_alone(files: Files) -> None:
    items = TASKS["words"].items(3, 60, 20)
    assert len({item.key for item in items}) == 60
    assert all(item.is_common for item in items[:20])
    assert not all(item.is_common for item in items[20:])
    assert {item.key for item in TASKS["words"].items(3, 60)} >= {item.key for item in items if not item.is_common}
    common = {item.answer for item in TASKS["words"].items(0, 5000) if item.is_common}
    asked = {name: {r["answer"] for r in records if r["domain"] == "words"} for name, records in files.items()}
    assert asked["heldout.jsonl"] | asked["val_words.jsonl"] <= common | {word[::-1] for word in common}
    assert not asked["train_words.jsonl"] <= common
