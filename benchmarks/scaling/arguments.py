"""A fleet, as a command line describes it."""

import argparse
from dataclasses import replace
from pathlib import Path

from scaling.base import ITEM_BYTES, LINEARS, Base
from scaling.measured import BASE, Measurements, fit, h100
from scaling.model import Fleet
from scaling.outlook import Outlook, assess
from scaling.parts import ROUTINGS, Adapters, Traffic
from scaling.search import gpus_needed, with_best_slots

BASES = {
    "8b": BASE,
    "1b": Base(
        num_layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128256,
        tied=True,
    ),
}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--requests-per-s", type=float, required=True, help="of all GPUs together")
    add("--adapters", type=int, required=True, help="that may be asked for")
    add("--gpus", type=int, help="the fewest that carry the load if not given")
    add("--slots", type=int, help="adapter slots of a GPU; those that strain it least if not given")
    add("--routing", choices=ROUTINGS, default="prefix", help="conversations stay, adapters too, or neither")
    add("--base", default="8b", help="8b, 1b (Llama's shapes), or a config.json")
    add("--dtype", choices=list(ITEM_BYTES), default="bfloat16")
    add("--rank", type=int, default=16)
    add("--first-layer", type=int, default=0, help="that adapters act in")
    add("--targets", nargs="+", choices=LINEARS, default=list(LINEARS))
    add("--zipf", type=float, default=1.0, help="popularity is 1 / rank**ZIPF; 0 is all alike")
    add("--system-tokens", type=int, default=200, help="that all conversations begin with")
    add("--user-tokens", type=int, default=150, help="of each turn")
    add("--answer-tokens", type=int, default=200, help="of each turn")
    add("--turns", type=int, default=4, help="of a conversation")
    add("--think-s", type=float, default=30.0, help="from an answer to the next turn, on average")
    add("--keeps-active", action="store_true", help="adapters act on the whole conversation, not on its last turn only")
    add("--max-sequences", type=int, default=64, help="that run at once on a GPU")
    add("--gpu-memory-gb", type=float)
    add("--gpu-gb-per-s", type=float, help="read from the GPU's memory")
    add("--storage-gb-per-s", type=float, help="of the disk or network that adapters come from")
    add("--json", action="store_true", help="print all figures as JSON")


def read_fleet(args: argparse.Namespace) -> Fleet:
    """
    Raises:
        ValueError, FileNotFoundError: a value is impossible, or there is no such base.
    """
    measurements = Measurements()
    given = {
        "memory_bytes": args.gpu_memory_gb,
        "bytes_per_s": args.gpu_gb_per_s,
        "storage_bytes_per_s": args.storage_gb_per_s,
    }
    base = BASES.get(args.base)
    return Fleet(
        gpu=replace(h100(measurements), **{name: 1e9 * value for name, value in given.items() if value is not None}),
        base=replace(base, dtype=args.dtype) if base else Base.read(Path(args.base), dtype=args.dtype),
        adapters=Adapters(
            number=args.adapters,
            rank=args.rank,
            first_layer=args.first_layer,
            targets=tuple(args.targets),
            zipf=args.zipf,
        ),
        traffic=Traffic(
            requests_per_s=args.requests_per_s,
            system_tokens=args.system_tokens,
            user_tokens=args.user_tokens,
            answer_tokens=args.answer_tokens,
            turns=args.turns,
            think_s=args.think_s,
            keeps_active=args.keeps_active,
        ),
        costs=fit(measurements),
        routing=args.routing,
        max_sequences=args.max_sequences,
    )


def outlook_of(args: argparse.Namespace) -> Outlook:
    """What is asked for: of the GPUs and slots that are given, or of the fewest.

    Raises:
        ValueError, FileNotFoundError: a value is impossible, something does not fit, or there is no such base.
    """
    fleet = read_fleet(args)
    if args.gpus is None:
        if args.slots is not None:
            raise ValueError("--slots is for a given number of GPUs; give --gpus as well, or leave it away.")
        return gpus_needed(fleet)
    return with_best_slots(fleet, args.gpus) if args.slots is None else assess(fleet, args.gpus, args.slots)
