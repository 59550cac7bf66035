"""The files of a bank's data, the demo's or another's: which conversations go into each, and what they are made of.

One seed gives one set of bytes, for one version of Python and of reasoning-gym. `build` makes the records, `write`
puts them on disk; neither knows of tokenizers, models or masks.
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, TypedDict

from molora.files import write_atomic
from molora.training.recipes.conversations import Earlier, Material, Record
from molora.training.recipes.documents import documents
from molora.training.recipes.items import Item
from molora.training.recipes.passages import passages
from molora.training.recipes.tasks import DEMO, TASKS
from molora.training.recipes.unknown import unknown

NUM_VAL = 200  # records in each val_<domain>.jsonl
NUM_HELD_OUT = 200  # single items a domain in heldout.jsonl
NUM_HELD_OUT_COMPOSITES = 500
NUM_HELD_OUT_DOCUMENTS = 200
NUM_HELD_OUT_PROSE = 40  # single items a domain, and questions about passages, in heldout_prose.jsonl

COMPOSITE_SHARE = 0.7  # of an adapter's training records
ROUTER_COMPOSITES = 1.5  # for a single item: whose turn is next is what a router learns last
NUM_HELD_OUT_TURNS = 40  # single items a domain behind one or two other tasks, in heldout_turns.jsonl
HISTORY_SHARE = 0.4  # of all records in training and validation: one or two exchanges before the question
EVERYDAY_SHARE = 0.25  # of base records in training

RESERVED = 450  # items a domain for each of the validation and the held-out files


class Summary(TypedDict):
    """What recipe.json says of the files beside it."""

    command: str
    seed: int
    num_train: int
    python: str
    reasoning_gym: str
    note: str
    files: dict[str, dict[str, Any]]


def num_files(domains: Sequence[str] = DEMO) -> int:
    """How many files `build` makes."""
    return 2 * len(domains) + 7


def build(
    seed: int, num_train: int, domains: Sequence[str] = DEMO
) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Make every file's records, file by file.

    Args:
        seed: equal seeds give equal records.
        num_train: records in each adapter's training file; the router's follow from it.
        domains: the tasks, at least three; their order counts too.

    Yields:
        A file's name and its records.

    Raises:
        ValueError: `num_train` is too small to hold every kind of record, a domain is unknown or comes twice, there
            are fewer than three, or Python's sources are not installed.
    """
    _check(domains)
    if num_train < 20:
        raise ValueError(f"num_train is {num_train}: an adapter's training file needs at least 20 records")
    texts = documents()
    Random(f"documents {seed}").shuffle(texts)
    held_out_texts, texts = texts[:NUM_HELD_OUT_DOCUMENTS], texts[NUM_HELD_OUT_DOCUMENTS:]
    if not texts:
        raise ValueError("too few docstrings found: the sources of Python's standard library must be installed")
    items = {domain: TASKS[domain].items(seed, 2 * RESERVED + num_train, 2 * RESERVED) for domain in domains}

    def endless(start: int, stop: int | None) -> dict[str, Iterator[Item]]:
        return {domain: cycle(items[domain][start:stop]) for domain in domains}

    held_out = Material(Random(f"held out {seed}"), "held out", endless(0, RESERVED), held_out_texts)
    prose = Material(
        Random(f"held out prose {seed}"), "held out", endless(0, RESERVED), passages=passages(held_out=True)
    )
    turns = Material(Random(f"held out turns {seed}"), "held out", endless(0, RESERVED))
    val = Material(Random(f"val {seed}"), "val", endless(RESERVED, 2 * RESERVED), texts)
    train = Material(Random(f"train {seed}"), "train", endless(2 * RESERVED, None), texts, passages(held_out=False))
    yield (
        "heldout.jsonl",
        [
            held_out.single(domain, history=("reading",) if turn % 2 else ())
            for turn in range(NUM_HELD_OUT)
            for domain in domains
        ],
    )
    yield (
        "heldout_composite.jsonl",
        [held_out.composite(held_out.domains()) for _ in range(NUM_HELD_OUT_COMPOSITES)],
    )
    yield "heldout_base.jsonl", [held_out.document(text) for text in held_out_texts]
    yield (
        "heldout_prose.jsonl",
        [prose.single(domain, history=("reading",)) for _ in range(NUM_HELD_OUT_PROSE) for domain in domains]
        + [prose.reading() for _ in range(NUM_HELD_OUT_PROSE)],
    )
    yield (
        "heldout_turns.jsonl",
        [
            turns.single(domain, history=("task", "task") if turn % 2 else ("task",))
            for turn in range(NUM_HELD_OUT_TURNS)
            for domain in domains
        ],
    )
    for domain in domains:
        yield f"val_{domain}.jsonl", _singles(val, domain, NUM_VAL)
    for domain in domains:
        num_composites = round(COMPOSITE_SHARE * num_train)
        singles = _singles(train, domain, num_train - num_composites)
        yield f"train_{domain}.jsonl", _shuffled(train.rng, singles, _composites(train, num_composites, domain))
    yield (
        "train_router.jsonl",
        _shuffled(
            train.rng,
            *(_singles(train, domain, num_train // len(domains)) for domain in domains),
            _composites(train, round(ROUTER_COMPOSITES * num_train)),
            _base(train, num_train // 4),
        ),
    )
    yield (
        "train_unknown.jsonl",
        unknown(num_train // 4, seed, [*(text.body for text in texts), *(passage.text for passage in train.passages)]),
    )


def write(
    out: Path,
    files: Iterable[tuple[str, Sequence[Mapping[str, Any]]]],
    *,
    seed: int,
    num_train: int,
    domains: Sequence[str] = DEMO,
) -> Summary:
    """Write `build`'s files to the folder `out`, and recipe.json last, each in one step."""
    chosen = "" if tuple(domains) == DEMO else f" --domains {' '.join(domains)}"
    summary = Summary(
        command=f"python -m molora.training.recipes --seed {seed} --num-train {num_train}{chosen}",
        seed=seed,
        num_train=num_train,
        python=platform.python_version(),
        reasoning_gym=version("reasoning-gym"),
        note="The documents are docstrings of this Python's standard library: another version gives other bytes.",
        files={},
    )
    for name, records in files:
        summary["files"][name] = write_records(out / name, records)
    write_atomic(out / "recipe.json", json.dumps(summary, indent=2) + "\n")
    return summary


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write a .jsonl file in one step, and say what recipe.json says of it."""
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    write_atomic(path, data)
    return {"num_records": len(records), "sha256": hashlib.sha256(data).hexdigest()}


def _check(domains: Sequence[str]) -> None:
    if strange := [domain for domain in domains if domain not in TASKS]:
        raise ValueError(f"unknown domain {strange[0]!r}: the domains are {', '.join(TASKS)}")
    if len(set(domains)) < len(domains) or len(domains) < 3:
        raise ValueError(f"domains are {', '.join(domains)}: a composite needs three different ones to choose from")


def _singles(material: Material, domain: str, num_records: int) -> list[Record]:
    return [material.single(domain, history=_by_chance(material)) for _ in range(num_records)]


def _composites(material: Material, num_records: int, include: str | None = None) -> list[Record]:
    return [material.composite(material.domains(include), history=_by_chance(material)) for _ in range(num_records)]


def _base(material: Material, num_records: int) -> list[Record]:
    num_everyday = round(EVERYDAY_SHARE * num_records)
    everyday = [material.everyday(history=_by_chance(material)) for _ in range(num_everyday)]
    readings = [material.reading(history=_by_chance(material)) for _ in range(num_records - num_everyday)]
    return everyday + readings


def _by_chance(material: Material) -> tuple[Earlier, ...]:
    if material.rng.random() >= HISTORY_SHARE:
        return ()
    kinds: tuple[Earlier, ...] = ("reading", "task")
    return tuple(material.rng.choice(kinds) for _ in range(material.rng.choice((1, 2))))


def _shuffled(rng: Random, *groups: list[Record]) -> list[Record]:
    records = [record for group in groups for record in group]
    rng.shuffle(records)
    return records
