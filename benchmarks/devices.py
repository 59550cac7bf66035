"""Train the same adapter on one device and on several, on the same rows, and compare what comes of it.

    python benchmarks/devices.py --data data/train_words.jsonl --out benchmarks/results/devices.json     # on two GPUs
    python benchmarks/devices.py --data configs/tiny.jsonl --domain letters --shape tiny --rows 2 --device cpu --steps 2

Each run is `python train.py fit`, on a model of random weights: on one device, on all by ddp, on all by fsdp2. Several
devices share out the rows that one has in a batch, and average the gradients of their own means. What is compared is
the adapter's weight updates, tokens a second and each device's peak of memory.
"""

import argparse
import csv
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from serving.figures import Report
from serving.machine import describe_machine
from torch import Tensor
from training import SHAPES

from molora.adapter import Adapter
from molora.tiny import make_tiny_base

SIDES = ("one", "ddp", "fsdp2")
LOG_EVERY = 10  # steps, at most
MOST_DIFFERENT = 0.5  # of weight updates, which a sum's order changes; strangers' differ by 1.4


def train(args: Namespace, base: Path, side: str, work: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What is logged last, and the adapter's weight updates by module path.

    Raises:
        SystemExit: training failed.
    """
    shape, every = SHAPES[args.shape], min(LOG_EVERY, args.steps)
    several = {} if side == "one" else {"devices": args.devices, "strategy": side}
    config = {
        "seed_everything": args.seed,
        "model": {
            "class_path": "molora.training.AdapterTraining",
            "init_args": {
                "name": args.domain,
                "output_dir": str(work / side),
                "base": str(base),
                "router_layer": shape.router_layer,
                "schedule": {"lr": 1e-3, "warmup_steps": args.steps // 4},
            },
        },
        "data": {
            "train": str(args.data),
            "row_length": 2 * shape.row_length,  # the tokens are bytes
            "rows": args.rows // (1 if side == "one" else args.devices),
        },
        "trainer": {
            "accelerator": "cpu" if args.device == "cpu" else "gpu",
            "devices": 1,
            **several,
            "max_steps": args.steps,
            "log_every_n_steps": every,
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(work / "log"), "name": side},
            },
        },
    }
    file = work / f"{side}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "fit", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}: training failed.\n{done.stderr[-4000:]}")
    (path,) = (work / "log" / side).rglob("metrics.csv")
    last: dict[str, float] = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        last |= {name: float(value) for name, value in row.items() if value}
    weights = Adapter.read(work / side / args.domain).weights
    return last, {module: each.b_OR.float() @ each.a_RI.float() for module, each in weights.items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of weight updates: the norm of the difference over that of theirs."""
    squares = [[(ours[path] - theirs[path]).square().sum(), theirs[path].square().sum()] for path in theirs]
    of_difference, of_theirs = torch.tensor(squares).sum(0).sqrt().tolist()
    return float(of_difference / of_theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="records, some of the domain")
    parser.add_argument("--domain", default="words")
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=64, help="of a batch, on all devices together")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file to write; a table in Markdown comes beside it")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.rows % args.devices:
        parser.error(f"{args.devices} devices cannot share out {args.rows} rows alike.")
    head = describe_machine(torch.device(args.device)) | {"shape": shape.name, "devices": args.devices}
    report = Report(head | {"dtype": "auto", "rows": args.rows, "steps": args.steps, "seed": args.seed}, args.out)
    report.suite = shape.name
    found: dict[str, tuple[dict[str, float], dict[str, Tensor]]] = {}
    with TemporaryDirectory() as folder:
        base = make_tiny_base(Path(folder) / "base", seed=args.seed, **shape.config)
        for side in SIDES:
            found[side] = train(args, base, side, Path(folder))
            (last, updates), (first, first_updates) = found[side], found["one"]
            if side == "one":
                continue
            off = difference(updates, first_updates)
            if not off <= MOST_DIFFERENT:
                raise SystemExit(f"wrong: {side}'s weight updates differ from one device's by {off:.3g} of their norm")
            report.checked(
                f"{side} learns the same",
                loss=last["train/loss"],
                loss_of_one=first["train/loss"],
                updates_difference=off,
            )
            speed = last["tokens_per_s"] / first["tokens_per_s"]
            report.add(f"{side}: tokens a second over one device's", speed, "x", tokens_per_s=last["tokens_per_s"])
            if "memory_gb" in last:
                memory = last["memory_gb"] / first["memory_gb"]
                report.add(f"{side}: memory of a device over one device's", memory, "x", memory_gb=last["memory_gb"])
    print(f"\n{head['device']}, {head['commit']}\n\n{report.table()}")


if __name__ == "__main__":
    main()
