"""The recipe's training data, the joint LoRA's, and held-out items that no training shows."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from molora.files import write_atomic
from molora.training.recipes.build import RESERVED, build
from molora.training.recipes.conversations import Material
from molora.training.recipes.passages import passages
from molora.training.recipes.tasks import TASKS

HELD_OUT_SEED = 1000  # of the items' generators, beyond training's
KINDS = ("singles", "composites", "histories")


def make_data(args: Namespace) -> None:
    """Training files, and `KINDS`: one task, several tasks in one message, and one task behind an earlier exchange."""
    folder = args.work / "data"
    names = [f"train_{domain}.jsonl" for domain in args.domains]
    joint: list[dict[str, Any]] = []
    for name, records in build(args.data_seed, args.num_train, args.domains):
        if name.startswith(("train_", "val_")):
            write_records(folder / name, records)
        if name in names:
            joint += [without_domains(record) for record in records]
    Random(args.data_seed).shuffle(joint)
    write_records(folder / "joint.jsonl", joint)
    material = Material(
        Random(f"quality {args.data_seed}"), "held out", held_out_items(args), passages=passages(held_out=True)
    )
    singles = [material.single(domain, history=False) for _ in range(args.singles) for domain in args.domains]
    write_records(folder / "singles.jsonl", singles)
    several = [
        material.composite(some_domains(material.rng, args.domains), history=False) for _ in range(args.composites)
    ]
    write_records(folder / "composites.jsonl", several)
    later = [material.single(domain, history=True) for _ in range(args.histories) for domain in args.domains]
    write_records(folder / "histories.jsonl", later)


def held_out_items(args: Namespace) -> dict[str, Iterator[Any]]:
    """Those that `build` keeps out of training, and new ones of another seed."""
    found = {}
    for domain in args.domains:
        known = TASKS[domain].items(args.data_seed, 2 * RESERVED + args.num_train)
        keys = {item.key for item in known}
        num_wanted = args.singles + args.composites + args.histories
        others = TASKS[domain].items(HELD_OUT_SEED + args.data_seed, num_wanted)
        items = known[:RESERVED] + [item for item in others if item.key not in keys]
        print(f"{domain}: {len(items)} held-out items, {len(known) - 2 * RESERVED} in training")
        found[domain] = cycle(items)
    return found


def some_domains(rng: Random, domains: list[str]) -> list[str]:
    return rng.sample(domains, 3 if rng.random() < 0.2 else 2)


def without_domains(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the joint LoRA learns: the whole answer."""

    def text(content: Any) -> str:
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    return {"messages": [message | {"content": text(message["content"])} for message in record["messages"]]}


def write_records(file: Path, records: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
