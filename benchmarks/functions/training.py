"""Drafts, the functions as activated and as plain LoRAs, and the bank that has both beside the drafting adapters."""

import gc
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import molora
from molora.activation import Activation
from molora.adapter import Adapter
from molora.bank import Bank
from molora.model import MoLoRA
from molora.training.bank import AdapterStage, BankSettings, Domain, RouterStage, train_adapters
from molora.training.recipes.functions import write_verdicts
from molora.training.recipes.verdicts import INVOCATIONS

NOWHERE = {"first": 0.0, "before": 0.0, "turn": 0.0, "between": 0.0, "response": 0.0}
WAYS: dict[str, tuple[str, Activation, dict[str, float]]] = {
    "activated": ("", "invocation", NOWHERE | {"turn": 1.0}),
    "plain": ("-plain", 0, NOWHERE | {"first": 1.0}),
}
"""For each way to train: how its adapters' names end, where they act in the bank, and where in training."""


@contextmanager
def loaded(args: Namespace, bank: Path) -> Iterator[MoLoRA]:
    m = molora.load(bank, base=args.base, device=args.device, dtype=args.dtype, engine={"max_sequences": 256})
    try:
        yield m
    finally:
        m.engine.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def draft_answers(args: Namespace) -> None:
    """The recipe's second half: drafts of the bank's adapters, and what the functions learn from them."""
    with loaded(args, args.bank) as m:
        files = write_verdicts(args.work / "data", m, seed=args.seed, temperature=args.temperature, limit=args.limit)
    for name, file in files.items():
        print(f"{file['num_records']:6,}  {name}", flush=True)


def train(args: Namespace) -> None:
    """The functions in both ways, and `<work>/bank`, which has them beside the drafting adapters and their router."""
    folders = {way: train_adapters(settings(args, way)) for way in WAYS}
    source, target = Bank.open(args.bank), args.work / "bank"
    shutil.rmtree(target, ignore_errors=True)
    config = source.config
    bank = Bank.create(
        target,
        name="functions",
        base=config.base,
        router_layer=config.router_layer,
        max_rank=max(config.max_rank, args.rank),
        activation=config.activation,
    )
    for entry in source.adapters:
        bank.add_all(
            {entry.name: source.load_adapter(entry.name)}, activation=entry.activation, routable=entry.routable
        )
    bank.set_router(source.load_router())
    for way, (ending, activation, _) in WAYS.items():
        adapters = {name + ending: Adapter.read(folder) for name, folder in folders[way].items()}
        bank.add_all(adapters, activation=activation, routable=False)


def settings(args: Namespace, way: str) -> BankSettings:
    """What `train_adapters` reads; there is no router to train."""
    data = args.work / "data"
    trainer: dict[str, Any] = {"accelerator": "cpu"} if args.device == "cpu" else {}
    return BankSettings(
        base=args.base,
        output="",
        work=str(args.work / "stages" / way),
        seed=args.seed,
        router_layer=Bank.open(args.bank).config.router_layer,
        adapters=AdapterStage(
            domains={name: Domain(str(data / f"train_{name}.jsonl")) for name in INVOCATIONS},
            model={
                "rank": args.rank,
                "alpha": 2 * args.rank,
                "invocation": INVOCATIONS,
                "schedule": {"lr": args.lr, "warmup_steps": 50},
            },
            data={"row_length": 512, "rows": args.rows, "activation": WAYS[way][2]},
            trainer=trainer
            | {
                "max_steps": args.steps,
                "gradient_clip_val": 1.0,
                "log_every_n_steps": 50,
                "enable_progress_bar": False,
            },
        ),
        router=RouterStage(data={}),
    )
