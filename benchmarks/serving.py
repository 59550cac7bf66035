"""Check that the engine answers as full forwards do, then time it, and hold the figures against their targets.

    python benchmarks/serving.py                                     # every suite: a GPU's there, cpu on a CPU
    python benchmarks/serving.py --suite decode --suite mixed --out serving.json
    python benchmarks/serving.py --suite invoke --shape tiny --device cpu

The suite `cpu` runs the demo's bank on SmolLM2 in float32. The others run a Llama of random weights, made on the device
with 8 adapters of rank 16, so nothing is downloaded:

    decode        base against what the memory allows; routed against base, with forced routes
    mixed         requests to 8 adapters and the router against the same requests to one adapter
    invoke        time to the first token of an adapter on a long history in the cache, against reading it again
    conversation  five adapters on one long conversation, against plain LoRA
    counters      history tokens computed again: none
    load          decode steps while an adapter is loaded
    plain         adapters in all layers, one to a sequence, against base

Sides that are compared take turns, and a figure is the median of the turns' ratios. On a machine that others use as
well, give --repeats 9 or more.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from serving.bench import Bench, random_bench
from serving.checks import WrongAnswerError, check_against_forwards
from serving.conversation import conversation
from serving.counters import counters
from serving.cpu import DEMO, TINY, cpu
from serving.decode import decode, plain
from serving.figures import Report
from serving.invoke import invoke
from serving.load import load
from serving.machine import describe_machine
from serving.mixed import mixed
from serving.models import random_model
from serving.plain import Plain
from serving.shapes import SHAPES

import molora
from molora.checkpoint import DTYPES, load_base
from molora.demo import DOCUMENT, demo_bank_path
from molora.serving.engine import Engine

Suite = Callable[[Bench, Report], None]
WITH_ROUTER: dict[str, Suite] = {
    "decode": decode,
    "mixed": mixed,
    "invoke": invoke,
    "conversation": conversation,
    "counters": counters,
}
IN_ALL_LAYERS: dict[str, Suite] = {"load": load, "plain": plain}
RANDOM = {**WITH_ROUTER, **IN_ALL_LAYERS}


def parse_arguments(on_gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=["cpu", *RANDOM], help="may be given several times")
    parser.add_argument("--shape", choices=list(SHAPES), help="of the random model (default 8b); cpu takes only tiny")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="of all suites but cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="likewise (default bfloat16, float32 on a CPU)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each measurement (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file to write; a table in Markdown comes beside it")
    args = parser.parse_args()
    args.suite = args.suite or (list(RANDOM) if on_gpu else ["cpu"])
    if args.repeats < 2:
        parser.error("--repeats must be at least 2: quartiles are reported")
    if "cpu" in args.suite and args.shape not in (None, "tiny"):
        parser.error(f"the suite cpu runs SmolLM2, or --shape tiny; --shape {args.shape} is for the other suites")
    return args


def main() -> None:
    args = parse_arguments(torch.cuda.is_available())
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    only_cpu = set(args.suite) == {"cpu"}
    head = describe_machine(torch.device("cpu") if only_cpu else device)
    head |= {"dtype": "float32" if only_cpu else str(dtype).removeprefix("torch.")}
    head |= {"shape": args.shape or ("SmolLM2" if only_cpu else "8b"), "seed": args.seed, "repeats": args.repeats}
    report = Report(head, args.out)
    try:
        if "cpu" in args.suite:
            run_cpu(args, report)
        for suites, has_router in ((WITH_ROUTER, True), (IN_ALL_LAYERS, False)):
            chosen = {name: suite for name, suite in suites.items() if name in args.suite}
            if chosen:
                run_random(args, report, chosen, device, dtype, has_router=has_router)
    except WrongAnswerError as error:
        raise SystemExit(f"wrong: {error}") from None
    print(f"\n{head['device']}, {head['commit']}\n\n{report.table()}")


def run_random(
    args: argparse.Namespace,
    report: Report,
    suites: dict[str, Suite],
    device: torch.device,
    dtype: torch.dtype,
    *,
    has_router: bool,
) -> None:
    shape = SHAPES[args.shape or "8b"]
    report.has_targets = shape.targets
    with random_bench(shape, device, dtype, has_router=has_router, repeats=args.repeats, seed=args.seed) as bench:
        report.suite = next(iter(suites))
        check_against_forwards(bench, report, prompt_length=min(200, shape.sizes.context), num_new=8)
        for name, suite in suites.items():
            report.suite = name
            suite(bench, report)
    del bench
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_cpu(args: argparse.Namespace, report: Report) -> None:
    report.suite, report.has_targets = "cpu", args.shape is None
    with cpu_bench(args) as (bench, alone):
        check_against_forwards(bench, report, prompt_length=64 if args.shape is None else 16, num_new=8)
        cpu(bench, report, alone, DEMO if args.shape is None else TINY)


@contextmanager
def cpu_bench(args: argparse.Namespace) -> Iterator[tuple[Bench, Plain]]:
    """The demo's bank with an engine as a user gets it, and its base model as transformers alone runs it."""
    device, dtype = torch.device("cpu"), torch.float32
    if args.shape == "tiny":
        shape = SHAPES["tiny"]
        with random_bench(shape, device, dtype, has_router=True, repeats=args.repeats, seed=args.seed) as bench:
            yield bench, Plain(random_model(shape, device, dtype, args.seed))
        return
    m = molora.load(demo_bank_path(), device=device, dtype="float32")
    text_ids = m.tokenizer(DOCUMENT, add_special_tokens=False)["input_ids"]
    engine = Engine(m)
    try:
        with TemporaryDirectory() as folder:
            bench = Bench(m, engine, None, Path(folder), args.repeats, args.seed, text_ids=text_ids)
            yield bench, Plain(load_base(m.base_dir, device=device, dtype="float32")[0])
    finally:
        engine.close()


if __name__ == "__main__":
    main()
