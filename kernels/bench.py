"""Check every way to add adapters to a linear against float64, then time it beside the linear alone.

    python kernels/bench.py                                  # every row of the table of public kernels; tiny on a CPU
    python kernels/bench.py --suite tokens --out tokens.json
    python kernels/bench.py --shapes 32x4096x4096x16x8xuniform 8x4096x4096+1024+1024x16x8xzipfx2

On a GPU a call is timed by CUDA-graph replay over layers enough for the weights to come from memory, in turns with the
base, and public multi-LoRA kernels that are installed are timed too. On a CPU the clock is the host's.
"""

import argparse
import json
from pathlib import Path

import torch
from benchmarks.machine import describe_machine
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
