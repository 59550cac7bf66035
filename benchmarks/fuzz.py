"""Inputs made up to reach as much code as possible, for all that reads what others wrote, by libFuzzer (atheris).

    pip install -e ".[fuzz]"
    python benchmarks/fuzz.py --minutes 60 --out benchmarks/results/fuzz-cpu.json

The targets take turns, each in a process of its own: `adapter_config.json`, `molora.json`, headers of safetensors of
adapters, of a bank's router and of a base, chat messages up to the prompt and its activation points, and grammars up to
an answer's first tokens. Each input has to end in a documented error or in none, within 5 s of computing and 512 MB of
memory beyond what the first hundred take. The inputs that reach new code are kept in --corpus, if it is given.
"""

import argparse
import base64
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fuzzing import DOCUMENTED, LIMIT_S, TARGETS
from serving.machine import describe_machine

from molora.files import write_atomic

ONE = Path(__file__).with_name("fuzzing") / "one.py"
GRACE_S = 120  # to start, and for the last input
SHORTEST_S = 2


def fuzz(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """One target for a time, started again where an input ends its process."""
    end_s, results, fatal = time.monotonic() + seconds, [], []
    while (left_s := end_s - time.monotonic()) > SHORTEST_S:
        with TemporaryDirectory(dir=folder) as place:
            (Path(place) / "corpus").symlink_to(folder / "corpus")
            begun_s = time.monotonic()
            options = ("--seconds", str(int(left_s)), "--seed", str(len(results) + 1))
            done = subprocess.run(
                [sys.executable, str(ONE), name, place, *options],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=left_s + GRACE_S,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=False,
            )
            state = Path(place) / "state.json"
            if not state.exists():
                raise SystemExit(f"{name}: {done.stderr[-3000:]}")
            results.append(json.loads(state.read_text()) | progress(done.stderr))
            if done.returncode:
                fatal.append(end_of(done, Path(place)))
                if time.monotonic() - begun_s < SHORTEST_S:
                    break
    found = {(each["error"], each["where"]): each for result in results for each in result["found"]}
    return {
        "seconds": round(seconds),
        "executions": sum(result["executions"] for result in results),
        "accepted": sum(result["accepted"] for result in results),
        "starts": len(results),
        "coverage": max(result["coverage"] for result in results),
        "coverage_of_seeds": min(result["coverage_of_seeds"] for result in results),
        "features": max(result["features"] for result in results),
        "inputs_kept": max(result["inputs_kept"] for result in results),
        "peak_memory_mb": max(result["peak_memory_mb"] for result in results),
        "first_memory_mb": results[0]["first_memory_mb"],
        "found": [*found.values(), *fatal],
    }


def progress(log: str) -> dict[str, int]:
    """libFuzzer's counts: edges of our code that some input has reached, at first and at last."""
    lines = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log)
    first, last = (lines[0], lines[-1]) if lines else (("0",) * 3,) * 2
    return {
        "coverage_of_seeds": int(first[0]),
        "coverage": int(last[0]),
        "features": int(last[1]),
        "inputs_kept": int(last[2]),
    }


def end_of(done: "subprocess.CompletedProcess[str]", place: Path) -> dict[str, str]:
    """How a process ended that should not have, and the input that libFuzzer left, if it was that."""
    inputs = [path for kind in ("timeout", "crash", "oom") for path in place.glob(f"{kind}-*")]
    places = re.findall(r'/(molora/[\w/]+\.py)", line (\d+)', done.stderr)
    kind = inputs[0].name.partition("-")[0] if inputs else f"status {done.returncode}: {done.stderr[-500:]}"
    made = inputs[0].read_bytes() if inputs else b""
    return {"error": kind, "where": ":".join(places[-1]) if places else "", "input": base64.b64encode(made).decode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="of all targets together")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; repeatable")
    parser.add_argument("--corpus", type=Path, help="a folder that keeps what reaches new code, for the next time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    results: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        for name in names:
            folder = Path(scratch) / re.sub(r"\W+", "-", name)
            folder.mkdir()
            if args.corpus is not None:
                kept = args.corpus.resolve() / folder.name
                kept.mkdir(parents=True, exist_ok=True)
                (folder / "corpus").symlink_to(kept)
            else:
                (folder / "corpus").mkdir()
            results[name] = fuzz(name, folder, 60 * args.minutes / len(names))
            counts = {key: value for key, value in results[name].items() if key != "found"}
            print(name, counts, flush=True)
            for each in results[name]["found"]:
                print(f"  {each['error']} in {each['where']}: {base64.b64decode(each['input'])[:200]!r}", flush=True)
    result = describe_machine(torch.device("cpu")) | {
        "minutes": args.minutes,
        "limit_s": LIMIT_S,
        "documented": [error.__name__ for error in DOCUMENTED],
        "num_found": sum(len(each["found"]) for each in results.values()),
        "targets": results,
    }
    if args.out is not None:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    if result["num_found"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
