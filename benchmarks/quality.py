"""Train a bank on verifiable tasks, and measure its router against every other way to use the same adapters.

    python benchmarks/quality.py data --work runs/quality                     # needs reasoning-gym, and no GPU
    python benchmarks/quality.py train --work runs/quality                    # the bank, and one LoRA for all tasks
    python benchmarks/quality.py eval --work runs/quality --out benchmarks/results/quality.json

Held-out items have wordings that training never shows, and keys that no training item has. Single items ask one task,
composites two or three in one message, answered in one reply; a composite is right if all of it is.

    base, <adapter>     for everything
    best single         the oracle's choice of one adapter for the whole sequence: right if any adapter alone is
    sequence            one adapter for the whole sequence, by the router's scores over the user's turn
    uniform             all adapters at once, in equal shares (the average of their weight updates)
    ties, dare, dare_ties   PEFT's merges of the adapters' A and B, density 0.5, weights 1
    random              a router of random weights
    auto                the learned router, one adapter a token
    top-2, soft         the same scores as soft gates, not renormalized: of the two likeliest columns, and of
                        all, or the eight likeliest
    given               the right adapter on every token: of the user's turn by its labels, of the answer part by part
    joint               one LoRA of the adapters' total rank, trained on all tasks at once, on as many tokens
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import torch
from serving.machine import describe_machine

import molora
from molora.adapter import Adapter, AdapterConfig
from molora.bank import Bank
from molora.files import write_atomic
from molora.model import MoLoRA
from molora.router import KeyRouter
from molora.training.bank import AdapterStage, BankSettings, Domain, RouterStage, train_adapters, train_bank
from molora.training.evaluate import Question, best_single, evaluate, paired_difference, score
from molora.training.examples import read_records
from molora.training.recipes.build import RESERVED, build
from molora.training.recipes.conversations import Material
from molora.training.recipes.tasks import TASKS

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DOMAINS = tuple(TASKS)[:8]
RANK = 8
MERGES = ("ties", "dare", "dare_ties")
DENSITY = 0.5
MAX_TOP_K = 8  # the most adapters that the kernels give a token
MAX_NEW_TOKENS = 128
HELD_OUT_SEED = 1000  # of the items' generators, beyond training's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["data", "train", "eval"])
    parser.add_argument("--work", type=Path, required=True, help="a folder for data, checkpoints and banks")
    parser.add_argument("--base", default=BASE, help="a local folder, or a hub name")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=int, default=12000, help="records of each adapter")
    parser.add_argument("--steps", type=int, default=1000, help="of the adapters, 16 rows of 512 tokens each")
    parser.add_argument("--router-steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--router-layer", type=int, default=8)
    parser.add_argument("--singles", type=int, default=500, help="held-out items of each domain")
    parser.add_argument("--composites", type=int, default=1500)
    parser.add_argument("--limit", type=int, help="only the first so many held-out items of either kind")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="of eval: a JSON file to write")
    args = parser.parse_args()
    {"data": make_data, "train": train, "eval": measure}[args.stage](args)


def make_data(args: argparse.Namespace) -> None:
    """The recipe's files, the joint LoRA's, and the held-out items."""
    folder = args.work / "data"
    names = [f"train_{domain}.jsonl" for domain in args.domains]
    joint: list[dict[str, Any]] = []
    for name, records in build(args.seed, args.num_train, args.domains):
        if name.startswith(("train_", "val_")):
            write_records(folder / name, records)
        if name in names:
            joint += [without_domains(record) for record in records]
    Random(args.seed).shuffle(joint)
    write_records(folder / "joint.jsonl", joint)
    material = Material(Random(f"quality {args.seed}"), "held out", held_out_items(args))
    singles = [material.single(domain, history=False) for _ in range(args.singles) for domain in args.domains]
    write_records(folder / "singles.jsonl", singles)
    several = [
        material.composite(some_domains(material.rng, args.domains), history=False) for _ in range(args.composites)
    ]
    write_records(folder / "composites.jsonl", several)


def held_out_items(args: argparse.Namespace) -> dict[str, Iterator[Any]]:
    """Those that `build` keeps out of training, and new ones of another seed."""
    found = {}
    for domain in args.domains:
        known = TASKS[domain].items(args.seed, 2 * RESERVED + args.num_train)
        keys = {item.key for item in known}
        others = TASKS[domain].items(HELD_OUT_SEED + args.seed, args.singles + args.composites)
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


def train(args: argparse.Namespace) -> None:
    train_bank(settings(args))
    together = joint_settings(args)
    (joint,) = train_adapters(together).values()
    shipped = Bank.open(args.work / "bank")
    folder = args.work / "joint"
    shutil.rmtree(folder, ignore_errors=True)
    bank = Bank.create(
        folder,
        name="joint",
        base=shipped.config.base,
        router_layer=shipped.config.router_layer,
        max_rank=RANK * len(args.domains),
        activation="turn",
    )
    bank.add(joint, name="joint", activation="turn", routable=False)


def settings(args: argparse.Namespace) -> BankSettings:
    data = args.work / "data"
    return BankSettings(
        base=args.base,
        output=str(args.work / "bank"),
        work=str(args.work / "stages"),
        seed=args.seed,
        router_layer=args.router_layer,
        adapters=AdapterStage(
            domains={domain: Domain(str(data / f"train_{domain}.jsonl")) for domain in args.domains},
            model={"rank": RANK, "alpha": 2 * RANK, "schedule": {"lr": 0.002, "warmup_steps": 50}},
            data={"row_length": 512, "rows": args.rows, "activation": {"strays": 0.5}},
            trainer=trainer(args, args.steps),
        ),
        router=RouterStage(
            model={
                "router": {"kind": "keys", "gate": "hard", "hidden_dim": 256, "key_dim": 64, "lora_rank": RANK},
                "losses": {"label": 1.0, "given": 1.0, "drift": 0.03, "z": 1e-4},
                "schedule": {"lr": 0.001, "warmup_steps": 50, "weight_decay": 0.01},
            },
            data={
                "train": str(data / "train_router.jsonl"),
                "row_length": 512,
                "rows": 2 * args.rows,
                "activation": {"turn": 0.7, "response": 0.2, "between": 0.1},
            },
            trainer=trainer(args, args.router_steps),
        ),
    )


def joint_settings(args: argparse.Namespace) -> BankSettings:
    """One LoRA of the total rank, on as many tokens as all adapters together; the same scaling, 2."""
    own, rank = settings(args), RANK * len(args.domains)
    return BankSettings(
        **{name: getattr(own, name) for name in ("base", "output", "work", "seed", "router_layer", "router")},
        adapters=AdapterStage(
            domains={"joint": Domain(str(args.work / "data" / "joint.jsonl"))},
            model=own.adapters.model | {"rank": rank, "alpha": 2 * rank},
            data={"row_length": 512, "rows": args.rows * len(args.domains)},
            trainer=own.adapters.trainer,
        ),
    )


def trainer(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    device = {"accelerator": "cpu"} if args.device == "cpu" else {}
    return {
        **device,
        "max_steps": steps,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 50,
        "enable_progress_bar": False,
    }


def measure(args: argparse.Namespace) -> None:
    options: dict[str, Any] = {"base": args.base, "device": args.device, "dtype": args.dtype}
    m = molora.load(args.work / "bank", num_extra_slots=len(MERGES), **options)
    head = describe_machine(m.decoder.device) | {"seed": args.seed, "domains": args.domains, "steps": args.steps}
    asked = {
        kind: [Question.from_record(each, m.tokenizer) for each in read_records(args.work / "data" / f"{kind}.jsonl")][
            : args.limit
        ]
        for kind in ("singles", "composites")
    }
    rows: dict[str, dict[str, Any]] = {kind: {} for kind in asked}

    def add(model: MoLoRA, way: str, label: str) -> None:
        begin_s = time.perf_counter()
        for kind, questions in asked.items():
            (found,) = evaluate(model, questions, [way], max_new_tokens=MAX_NEW_TOKENS)
            rows[kind][label] = found[1]
        report(args, head, asked, rows)
        found_by_kind = "  ".join(f"{kind} {rows[kind][label]['accuracy']:.4f}" for kind in rows)
        print(f"{label:>12}  {found_by_kind}  {time.perf_counter() - begin_s:.0f} s", flush=True)

    for way in ("auto", "given", "base", "sequence", "uniform", *args.domains):
        add(m, way, way)
    for kind, questions in asked.items():
        alone = best_single([rows[kind][name]["by_item"] for name in args.domains])
        rows[kind]["best single"] = score(questions, [digit == "1" for digit in alone])
    for kind in MERGES:
        folder = args.work / "merged" / kind
        merge([m.bank.load_adapter(name) for name in args.domains], kind, args.seed).write(folder)
        m.engine.load_adapter(kind, folder, activation="turn")
        add(m, kind, kind)
    randomize(m, args.seed)
    add(m, "auto", "random")
    m.engine.close()
    for label, top_k in (("top-2", 2), ("soft", min(MAX_TOP_K, len(args.domains) + 1))):
        soft = molora.load(with_soft_gates(args.work, label, top_k), **options)
        add(soft, "auto", label)
        soft.engine.close()
    joint = molora.load(args.work / "joint", **options)
    add(joint, "joint", "joint")


def report(
    args: argparse.Namespace,
    head: Mapping[str, Any],
    asked: Mapping[str, list[Question]],
    rows: Mapping[str, dict[str, Any]],
) -> None:
    for found in rows.values():
        for row in found.values():
            row["auto_minus_this"] = paired_difference(found["auto"]["by_item"], row["by_item"])
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figures = {**head, "num_items": {kind: len(questions) for kind, questions in asked.items()}, "rows": rows}
        write_atomic(args.out, json.dumps(figures, indent=2) + "\n")


def merge(adapters: list[Adapter], kind: str, seed: int) -> Adapter:
    """As PEFT's `add_weighted_adapter` does: A and B each by themselves."""
    from peft.utils import merge_utils

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = torch.ones(len(adapters))
        tensors = {}
        for key in adapters[0].tensors():
            own = [adapter.tensors()[key].float() for adapter in adapters]
            match kind:
                case "ties":
                    merged = merge_utils.ties(own, weights, DENSITY)
                case "dare":
                    merged = merge_utils.dare_linear(own, weights, DENSITY)
                case _:
                    merged = merge_utils.dare_ties(own, weights, DENSITY)
            tensors[key] = merged.to(adapters[0].tensors()[key].dtype)
    config: AdapterConfig = adapters[0].config
    return Adapter.from_tensors(config, tensors)


def with_soft_gates(work: Path, label: str, top_k: int) -> Path:
    """A copy of the bank whose router blends."""
    folder = work / "gates" / label
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "bank", folder)
    bank = Bank.open(folder)
    router = bank.load_router()
    assert isinstance(router, KeyRouter)
    router.config = replace(router.config, gate="soft", top_k=top_k)
    bank.set_router(router)
    return folder


def randomize(m: MoLoRA, seed: int) -> None:
    """Other weights at the same addresses; what the router's routes have cached is forgotten."""
    router = m.decoder.router
    assert isinstance(router, KeyRouter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router.load_state_dict(KeyRouter(router.config, router.hidden_size, router.num_columns).state_dict())
    m.engine.clear_cache()


if __name__ == "__main__":
    main()
