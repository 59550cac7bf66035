"""The recipe's training data, the joint LoRA's, and held-out items that no training shows."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from molora.training.recipes.build import RESERVED, build, write_records
from molora.training.recipes.conversations import Material
from molora.training.recipes.passages import passages
from molora.training.recipes.tasks import TASKS

HELD_OUT_SEED = 1000  # of the items' generators, beyond training's
LAST_FILE = "turns.jsonl"  # that `make_data` writes


def make_data(args: Namespace) -> None:
    """Training files, and held-out ones: one task, several in one message, one behind earlier exchanges."""
    folder = args.work / "data"
    folder.mkdir(parents=True, exist_ok=True)
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
        Random(f"quality {args.data_seed}"),
        "held out",
        held_out_items(args, args.domains),
        passages=passages(held_out=True),
    )
    singles = [material.single(domain) for _ in range(args.singles) for domain in args.domains]
    write_records(folder / "singles.jsonl", singles)
    several = [material.composite(some_domains(material.rng, args.domains)) for _ in range(args.composites)]
    write_records(folder / "composites.jsonl", several)
    write_newcomer(args, folder)
    later = [material.single(domain, history=("reading",)) for _ in range(args.histories) for domain in args.domains]
    write_records(folder / "histories.jsonl", later)
    turns = [
        material.single(domain, history=("task", "task") if number % 2 else ("task",))
        for number in range(args.turns)
        for domain in args.domains
    ]
    write_records(folder / LAST_FILE, turns)


def write_newcomer(args: Namespace, folder: Path) -> None:
    """What an adapter that comes later learns from, what a router that knows it learns from, and held-out items."""
    domains = [*args.domains, args.newcomer]
    for name, records in build(args.data_seed, args.num_train, domains):
        if name == f"train_{args.newcomer}.jsonl":
            write_records(folder / name, records)
        if name == "train_router.jsonl":
            write_records(folder / "train_router_newcomer.jsonl", records)
    rng = Random(f"newcomer {args.data_seed}")
    material = Material(rng, "held out", held_out_items(args, domains))
    own = [material.single(args.newcomer) for _ in range(args.singles)]
    others = [rng.sample(args.domains, 2 if rng.random() < 0.2 else 1) for _ in range(args.singles)]
    for each in others:
        each.insert(rng.randint(0, len(each)), args.newcomer)
    several = [material.composite(each) for each in others]
    write_records(folder / "newcomer.jsonl", own)
    write_records(folder / "newcomer_composites.jsonl", several)


def held_out_items(args: Namespace, domains: list[str]) -> dict[str, Iterator[Any]]:
    """Those that `build` keeps out of training, and new ones of another seed."""
    found = {}
    for domain in domains:
        known = TASKS[domain].items(args.data_seed, 2 * RESERVED + args.num_train, 2 * RESERVED)
        keys = {item.key for item in known}
        num_wanted = args.singles + args.composites + args.histories + 3 * args.turns
        others = TASKS[domain].items(HELD_OUT_SEED + args.data_seed, num_wanted, num_wanted)
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
