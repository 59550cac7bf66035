"""Check every way to add adapters to a linear against float64, then time it beside the linear alone.

    python kernels/bench.py                                  # every row of the table of public kernels; tiny on a CPU
    python kernels/bench.py --suite tokens --out tokens.json
    python kernels/bench.py --shapes 32x4096x4096x16x8xuniform 8x4096x4096+1024+1024x16x8xzipfx2

On a GPU a call is timed by CUDA-graph replay over layers enough for the weights to come from memory, in turns with the
base, and public multi-LoRA kernels that are installed are timed too. On a CPU the clock is the host's.
"""

import argparse
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.measure import Bench, WrongResultError
from benchmarks.peers import installed_peers
from benchmarks.problem import LIMITS
from benchmarks.report import tables
from benchmarks.roofline import Roofline
from benchmarks.shapes import SUITES, SYNTAX, Case, forward_cases
from benchmarks.timing import Timer


def parse_arguments(on_gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--suite", nargs="+", choices=list(SUITES), default=["peers" if on_gpu else "tiny"])
    what.add_argument("--shapes", nargs="+", default=[], metavar="SHAPE", help=SYNTAX)
    parser.add_argument("--impls", nargs="+", choices=["auto", "torch", "triton"], default=["auto"], help="of ours")
    parser.add_argument("--dtypes", nargs="+", choices=list(LIMITS), default=["bfloat16" if on_gpu else "float32"])
    parser.add_argument("--repeats", type=int, default=50, help="samples of each method (default 50)")
    parser.add_argument("--pause-ms", type=float, default=2.0, help="idle time before each repeat (default 2)")
    parser.add_argument("--bandwidth", type=float, default=4.25, metavar="TB/S", help="roofline (default: an H200's)")
    parser.add_argument("--peak", type=float, default=790.0, metavar="TFLOP/S", help="roofline (default: an H200's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2: quartiles are reported")
    try:
        chosen = [("shapes", case) for case in forward_cases(args.shapes)]
    except ValueError as error:
        parser.error(str(error))
    args.cases = chosen or [(suite, case) for suite in args.suite for case in SUITES[suite]]
    return args


def describe_machine(device: torch.device, peers: list[str]) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in ("torch", "triton", *peers)},
        },
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (changes := _git("status", "--porcelain")) is None else bool(changes),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """None where git or the repository is missing."""
    try:
        ran = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    args = parse_arguments(on_gpu)
    cases: list[tuple[str, Case]] = args.cases
    public = installed_peers() if on_gpu else []
    roofline = Roofline(args.bandwidth * 1e12, args.peak * 1e12) if on_gpu else None
    timer = Timer(device, args.repeats, args.pause_ms / 1e3)
    bench = Bench(timer, roofline, args.impls, public, args.seed)
    result = describe_machine(device, [method.name for method in public])
    result |= {name: getattr(args, name) for name in ("seed", "repeats", "pause_ms", "bandwidth", "peak")}
    result["rows"] = []
    for suite, case in cases:
        for dtype_name in args.dtypes:
            try:
                row = bench.measure(case, dtype_name)
            except WrongResultError as error:
                raise SystemExit(f"wrong: {error}") from None
            result["rows"].append({"suite": suite, **row})
            if args.out:  # after every row: a long run may be cut short
                args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{result['device']}\n\n{tables(result['rows'])}")


if __name__ == "__main__":
    main()
