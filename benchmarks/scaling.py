"""How many GPUs, how many adapter slots, which hit rates: a model of a fleet, held against what one GPU measured.

    python benchmarks/scaling.py plan --adapters 2000 --requests-per-s 50            # how many GPUs?
    python benchmarks/scaling.py plan --adapters 2000 --requests-per-s 50 --gpus 8   # what do eight give?
    python benchmarks/scaling.py plan --adapters 100 --requests-per-s 20 --base path/to/config.json --zipf 0.8
    python benchmarks/scaling.py check                                               # predicted against measured
    python benchmarks/scaling.py all --out benchmarks/results/scaling.json --plots docs

A plan is for GPUs like the H100 that was measured, unless it is told of others. docs/scaling.md says what is modelled.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from scaling import pages
from scaling.arguments import add_plan_arguments, outlook_of
from scaling.measured import Measurements, compare, fit


def plan(args: argparse.Namespace) -> int:
    """Prints it; 1 if the load is too much for the GPUs that were given."""
    outlook = outlook_of(args)
    print(json.dumps(outlook.to_json(), indent=2) if args.json else pages.describe(outlook))
    return 1 if outlook.problems else 0


def check(args: argparse.Namespace) -> int:
    measurements = Measurements()
    print(json.dumps(asdict(fit(measurements)), indent=2))
    print(pages.compare(compare(measurements)))
    return 0


def write_all(args: argparse.Namespace) -> int:
    from scaling import results  # PyTorch and Matplotlib take seconds to import

    results.write(args.out, args.plots, args.seed)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    planning = commands.add_parser(
        "plan", help="one's own case", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_plan_arguments(planning)
    planning.set_defaults(run=plan)
    checking = commands.add_parser("check", help="the model against what was measured")
    checking.set_defaults(run=check)
    writing = commands.add_parser("all", help="the grid, the checks and simulations, as JSON, Markdown and pictures")
    writing.add_argument("--out", type=Path, required=True, help="a JSON file; a page in Markdown comes beside it")
    writing.add_argument("--plots", type=Path, required=True, help="a folder")
    writing.add_argument("--seed", type=int, default=0)
    writing.set_defaults(run=write_all)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
