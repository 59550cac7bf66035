"""Kill the training of a bank at random moments, go on, and compare what comes out with a run that was left alone.

    python benchmarks/kills.py --kills 50 --out benchmarks/results/kills-cpu.json

A tiny random base, two adapters and a router, on a CPU, with a checkpoint every other step, so that many moments are
in the middle of writing one. The command `molora train bank` is sent SIGKILL at a moment drawn evenly from the time
that it trains, and typed again, until it ends by itself; then all begins anew. A bank is equal if all its files are,
byte for byte. How many starts of a stage went on behind its first step is counted, since training that begins anew
comes to the same result, too.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from serving.machine import describe_machine

from molora.files import write_atomic

REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY / "configs" / "tiny.jsonl"
COMMAND = [sys.executable, "-c", "from molora.cli import app; app()", "train", "bank", "--config", "bank.yaml"]
MOST_S = 600.0  # for one start of the command
MANY = 5  # kills, of which one at least leaves something to go on from


def settings(steps: int) -> dict[str, Any]:
    trainer = {
        "accelerator": "cpu",
        "max_steps": steps,
        "enable_progress_bar": False,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
    }
    schedule = {"lr": 0.01, "warmup_steps": 5}
    return {
        "base": "tiny-random/llama",
        "output": "bank",
        "work": "work",
        "router_layer": 1,
        "checkpoint_every": 2,
        "adapters": {
            "domains": {name: {"train": str(DATA)} for name in ("letters", "digits")},
            "model": {"rank": 4, "alpha": 8, "schedule": schedule},
            "data": {"row_length": 256, "rows": 2},
            "trainer": trainer,
        },
        "router": {
            "model": {"router": {"hidden_dim": 16, "key_dim": 8, "lora_rank": 2}, "schedule": schedule},
            "data": {"train": str(DATA), "row_length": 256, "rows": 2},
            "trainer": trainer,
        },
    }


class Run:
    """A folder in which a bank is trained, by one start of the command or several."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "bank.yaml").write_text(yaml.safe_dump(settings(steps)))

    def start(self) -> subprocess.Popen[bytes]:
        """Begun, and so far that the stages' folders are there and training goes on."""
        work = self.folder / "work"
        before = len(list(work.rglob("csv-*")))  # each start of a stage has one of its own
        with (self.folder / "log").open("ab") as log:
            running = subprocess.Popen(COMMAND, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        end_s = time.monotonic() + MOST_S
        while running.poll() is None and len(list(work.rglob("csv-*"))) == before:
            if time.monotonic() > end_s:
                running.kill()
                raise SystemExit(f"the command hangs; see {self.folder / 'log'}")
            time.sleep(0.01)
        return running

    def bank(self) -> dict[str, str]:
        """Digests of its files."""
        bank = self.folder / "bank"
        return {
            str(path.relative_to(bank)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(bank.rglob("*"))
            if path.is_file()
        }

    def num_resumed(self) -> int:
        """Starts of a stage whose first step is not the first."""
        firsts = []
        for file in (self.folder / "work").rglob("metrics.csv"):
            with file.open() as lines:
                firsts += [int(row["step"]) for row in csv.DictReader(lines)][:1]
        return sum(first > 0 for first in firsts)

    def newest(self) -> str:
        """The file that was written last, digests of settings left out of its path."""
        files = [(path.stat().st_mtime_ns, path) for path in self.folder.rglob("*") if path.is_file()]
        path = max(files)[1].relative_to(self.folder)
        return "/".join(part.split("-")[0] for part in path.parts)


def finish(run: Run, running: subprocess.Popen[bytes]) -> None:
    if running.wait(MOST_S) != 0:
        raise SystemExit(f"the command failed: {(run.folder / 'log').read_text()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100, help="of each of the two stages")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.kills < 1:
        parser.error("--kills is 1 or more")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order, and no more than a core
    moments = random.Random(args.seed)
    kills: list[dict[str, Any]] = []
    equal: list[bool] = []  # of the banks whose training was killed
    num_resumed = 0
    with TemporaryDirectory() as scratch:
        alone = Run(Path(scratch) / "alone", args.steps)
        running = alone.start()
        begin_s = time.monotonic()
        finish(alone, running)
        length_s, wanted = time.monotonic() - begin_s, alone.bank()
        print(f"a run that is left alone trains for {length_s:.1f} s and writes {len(wanted)} files", flush=True)
        if not wanted:
            raise SystemExit("the run that was left alone has written nothing")
        while len(kills) < args.kills:
            run, before = Run(Path(scratch) / "killed", args.steps), len(kills)
            while True:
                running = run.start()
                moment_s = moments.uniform(0, length_s)
                try:
                    running.wait(moment_s if len(kills) < args.kills else MOST_S)
                    break
                except BaseException as error:
                    os.killpg(running.pid, signal.SIGKILL)
                    running.wait()
                    if not isinstance(error, subprocess.TimeoutExpired):
                        raise
                    kills.append({"after_s": round(moment_s, 3), "newest_file": run.newest()})
                    print(f"kill {len(kills)}, {moment_s:.2f} s after training began: {run.newest()}", flush=True)
            finish(run, running)
            num_resumed += run.num_resumed()
            if len(kills) > before:
                equal.append(run.bank() == wanted)
                print(f"bank {len(equal)}: {'equal' if equal[-1] else 'NOT EQUAL'}", flush=True)
            shutil.rmtree(run.folder)
    result = describe_machine(torch.device("cpu")) | {
        "seed": args.seed,
        "num_kills": len(kills),
        "num_banks": len(equal),
        "num_equal": sum(equal),
        "num_resumed": num_resumed,
        "length_s": round(length_s, 1),
        "kills": kills,
    }
    print(f"{len(kills)} kills, {num_resumed} starts went on, {sum(equal)} of {len(equal)} banks equal")
    if args.out is not None:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    if not all(equal) or (len(kills) >= MANY and not num_resumed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
