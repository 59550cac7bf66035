"""Text of four domains, and documents that switch between them: Python code, prose, legal texts, messages.

python -m molora.training.recipes.texts --out data/texts --seed 0

Nobody is asked anything here: a bank's measure is its perplexity (`molora eval`), and the right route is not labelled.
One seed gives one set of bytes, for one version of Python and of the packages.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, TypedDict

from rich.console import Console

from molora.files import write_atomic
from molora.training.recipes.build import write_records
from molora.training.recipes.text_sources import MAX_CHARS, Source, legal_texts, messages, prose, python_code, words

MIN_CHARS = 150  # of a passage; MAX_CHARS at most
NUM_PARTS = 3  # passages in a document
RUN = 13  # words in a row that two passages may not share, as in GPT-3's search for test data in training data
HELD_OUT_SHARE, VAL_SHARE = 0.3, 0.1  # of a domain's passages
ROUTER_SHARE = 0.2  # the router's, which no adapter has read: on those that it has it would be trusted too far
SINGLE_SHARE = 0.4  # of the held-out passages in documents of one domain
NUM_ROUTER = 4000  # documents in train_router.jsonl

_PACKAGES = 'pip install -e ".[data]" installs what brings them'


@dataclass(frozen=True)
class Domain:
    """Where a domain's text comes from, what stands between its blocks, and what to do if there is none."""

    sources: Callable[[], Iterator[Source]]
    gap: str
    remedy: str


DOMAINS = {
    "python": Domain(python_code, "\n\n", "the sources of Python's standard library must be installed"),
    "prose": Domain(prose, "\n\n", "the sources of Python's standard library must be installed"),
    "legal": Domain(legal_texts, "\n\n", _PACKAGES),
    "messages": Domain(messages, "\n", _PACKAGES),
}


class Part(TypedDict):
    domain: str
    text: str


class Document(TypedDict):
    """Some passages with a blank line between them; `kind` is "mixed" or "single"."""

    text: str
    parts: list[Part]
    kind: str


@dataclass(frozen=True)
class Split:
    """One domain's passages, and which sources each part of them is from."""

    passages: dict[str, list[str]]
    sources: dict[str, list[Source]]


def split(name: str, seed: int) -> Split:
    """A domain's passages in "train", "router", "val" and "held out". A source is in one of them as a whole.

    Raises:
        ValueError: too little of the domain is installed.
    """
    domain, rng = DOMAINS[name], Random(f"texts {name} {seed}")
    sources = distinct_passages(distinct(domain.sources()), domain.gap)
    rng.shuffle(sources)
    num_passages = sum(len(found) for _, found in sources)
    shares = {"held out": HELD_OUT_SHARE, "val": VAL_SHARE, "router": ROUTER_SHARE, "train": 1.0}
    room = {part: int(share * num_passages) for part, share in shares.items()}
    result = Split({part: [] for part in room}, {part: [] for part in room})
    for source, found in sources:
        part = next(part for part in room if len(found) <= room[part])
        room[part] -= len(found)
        result.passages[part] += found
        result.sources[part].append(source)
    for texts in result.passages.values():
        rng.shuffle(texts)
    if not all(result.passages.values()):
        raise ValueError(f"too few texts of the domain {name!r} are installed: {domain.remedy}.")
    return result


def distinct(sources: Iterator[Source]) -> list[Source]:
    """Sources without the blocks that share `RUN` words in a row, or all of fewer, with one before them.

    One licence's words are in a hundred packages: what is left of them can be split by source.
    """
    seen: set[tuple[str, ...]] = set()
    kept: list[Source] = []
    for source in sources:
        blocks = []
        for block in source.blocks:
            runs = _runs(block)
            if seen.isdisjoint(runs):
                blocks.append(block)
                seen |= runs
        kept.append(Source(source.name, tuple(blocks)))
    return kept


def distinct_passages(sources: Sequence[Source], gap: str) -> list[tuple[Source, list[str]]]:
    """Sources with those of their passages that share no `RUN` words in a row with one before them, if there are any.

    Of distinct blocks, what one ends and the next begins with may still be found elsewhere.
    """
    seen: set[tuple[str, ...]] = set()
    kept = []
    for source in sources:
        own = []
        for text in passages(source, gap):
            runs = _runs(text)
            if seen.isdisjoint(runs):
                own.append(text)
            seen |= runs
        if own:
            kept.append((source, own))
    return kept


def _runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + RUN]) for start in range(max(1, len(found) - RUN + 1))}


def passages(source: Source, gap: str) -> list[str]:
    """Blocks of a source that follow one another, as many together as `MAX_CHARS` has room for."""
    found = [""]
    for block in source.blocks:
        longer = f"{found[-1]}{gap}{block}" if found[-1] else block
        if len(longer) <= MAX_CHARS:
            found[-1] = longer
        else:
            found.append(block)
    return [text for text in found if len(text) >= MIN_CHARS]


def document(parts: Sequence[tuple[str, str]]) -> Document:
    """A document of (domain, text) pairs."""
    return {
        "text": "\n\n".join(text for _, text in parts),
        "parts": [{"domain": domain, "text": text} for domain, text in parts],
        "kind": "single" if len({domain for domain, _ in parts}) == 1 else "mixed",
    }


def documents(found: dict[str, list[str]], rng: Random) -> list[Document]:
    """Documents of one domain and mixed ones, with each passage in one of them at most.

    Every domain gives equally many passages, as many as the smallest has.
    """
    size = min(map(len, found.values()))
    num_single = int(SINGLE_SHARE * size) // NUM_PARTS
    made, left = [], {}
    for domain, texts in found.items():
        parts = [(domain, text) for text in texts[:size]]
        made += [document(parts[NUM_PARTS * i : NUM_PARTS * (i + 1)]) for i in range(num_single)]
        left[domain] = parts[NUM_PARTS * num_single :]
    while len(domains := [domain for domain, parts in left.items() if parts]) >= NUM_PARTS:
        made.append(document([left[domain].pop() for domain in rng.sample(domains, NUM_PARTS)]))
    rng.shuffle(made)
    return made


def completion(text: str, rng: Random, domain: str | None = None) -> dict[str, str]:
    """A text to go on from its first fifth to half: a record for training."""
    border = max(1, text.rfind(" ", 0, rng.randint(len(text) // 5, len(text) // 2)))
    record = {"prompt": text[:border], "completion": text[border:]}
    return record if domain is None else {**record, "domain": domain}


def build(seed: int) -> tuple[dict[str, list[Any]], dict[str, Split]]:
    """Every file's records, and what they were made of.

    The router's are mixed documents without labels: which adapter helps, the losses must find.

    Raises:
        ValueError: too little of a domain is installed.
    """
    splits = {name: split(name, seed) for name in DOMAINS}
    rng = Random(f"texts {seed}")
    held_out = {name: found.passages["held out"] for name, found in splits.items()}
    files: dict[str, list[Any]] = {"heldout.jsonl": documents(held_out, rng)}
    for part in ("val", "train"):
        for name, found in splits.items():
            files[f"{part}_{name}.jsonl"] = [completion(text, rng, name) for text in found.passages[part]]
    endless = {name: cycle(found.passages["router"]) for name, found in splits.items()}
    files["train_router.jsonl"] = [
        completion(document([(name, next(endless[name])) for name in rng.sample([*DOMAINS], NUM_PARTS)])["text"], rng)
        for _ in range(NUM_ROUTER)
    ]
    return files, splits


def write(out: Path, seed: int) -> dict[str, Any]:
    """Build all files into the folder `out`, and recipe.json, which says of what."""
    files, splits = build(seed)
    summary = {
        "command": f"python -m molora.training.recipes.texts --seed {seed}",
        "seed": seed,
        "python": platform.python_version(),
        "note": "The texts are what is installed: other versions of Python or of the packages give other bytes.",
        "files": {name: write_records(out / name, records) for name, records in files.items()},
        "sources": {
            name: {
                part: {source.name: source.sha256 for source in sorted(sources, key=lambda source: source.name)}
                for part, sources in found.sources.items()
            }
            for name, found in splits.items()
        },
    }
    write_atomic(out / "recipe.json", json.dumps(summary, indent=2) + "\n")
    return summary


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line (or `arguments`), write the files and say how many records each holds."""
    parser = argparse.ArgumentParser(
        prog="python -m molora.training.recipes.texts",
        description=f"Collect text of the domains {', '.join(DOMAINS)} from what is installed: records to train on, "
        "and held-out documents of one domain and of several, for `molora eval`.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal bytes (default: 0)")
    options = parser.parse_args(arguments)
    try:
        summary = write(options.out, options.seed)
    except ValueError as error:
        parser.error(str(error))
    for name, file in summary["files"].items():
        Console().print(f"{file['num_records']:6,}  {options.out / name}", highlight=False)


if __name__ == "__main__":
    main()
