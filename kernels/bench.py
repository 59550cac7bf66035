"""Check every implementation against float64, then time it beside the base linear alone.

    PYTHONPATH=kernels python kernels/bench.py --out result.json

On a GPU a call is timed by CUDA-graph replay over several layers, so that each layer's weights come from memory and
not from a cache. On a CPU the clock is the host's, and the default shape is tiny.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from molora_kernels import Plan, make_plan, routed_linear
from torch import Tensor

SYNTAX = "TOKENSxINxOUTxRANKxADAPTERSxROUTES, where routes are uniform, zipf, one or none"
CPU_SHAPES = ["1x256x256x8x4xuniform", "64x256x256x8x4xuniform"]
GPU_SHAPES = ["1x4096x4096x16x8xuniform", "32x4096x4096x16x8xuniform", "256x4096x4096x64x32xzipf"]
GPU_SHAPES += ["1024x4096x4096x16x8xuniform", "4096x4096x4096x16x8xone", "4096x4096x4096x64x32xzipf"]
LIMITS = {"float32": 1e-5, "float16": 5e-4, "bfloat16": 3e-3}
COLD_BYTES = 2**28  # several times the largest L2 cache


@dataclass(frozen=True)
class Shape:
    tokens: int
    in_features: int
    out_features: int
    rank: int
    adapters: int
    routes: str

    @classmethod
    def parse(cls, text: str) -> "Shape":
        *sizes, routes = text.split("x")
        if (
            len(sizes) != 5
            or not all(size.isdigit() for size in sizes)
            or routes not in ("uniform", "zipf", "one", "none")
        ):
            raise SystemExit(f"--shapes: {text!r} is not {SYNTAX}")
        return cls(*map(int, sizes), routes)

    def draw_ids(self, top_k: int) -> Tensor:
        weights = {"uniform": torch.ones(self.adapters), "zipf": 1 / torch.arange(1, self.adapters + 1)}
        if self.routes in weights:
            ids = torch.multinomial(weights[self.routes], self.tokens * top_k, replacement=True)
        else:
            ids = torch.full((self.tokens * top_k,), 0 if self.routes == "one" else -1)
        return ids.view(self.tokens, top_k).int()


Layer = tuple[Tensor, Tensor, Tensor]  # weight, lora_a, lora_b


def draw_layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> Layer:
    def draw(*sizes: int) -> Tensor:
        return (torch.randn(sizes, device=device) / sizes[-1] ** 0.5).to(dtype)

    sizes_a, sizes_b = (shape.rank, shape.in_features), (shape.out_features, shape.rank)
    return draw(shape.out_features, shape.in_features), draw(shape.adapters, *sizes_a), draw(shape.adapters, *sizes_b)


def exact(x: Tensor, layer: Layer, scaling: Tensor, gates: Tensor, plan: Plan) -> Tensor:
    """The definition, adapter by adapter in float64."""
    weight, lora_a, lora_b = (tensor.double() for tensor in layer)
    y = x.double() @ weight.t()
    for e in range(plan.num_adapters):
        gate = (gates.double() * (plan.ids == e)).sum(dim=1, keepdim=True)
        y += gate * scaling[e].double() * (x.double() @ lora_a[e].t() @ lora_b[e].t())
    return y


def time_per_layer(calls: list[Callable[[], Tensor]], device: torch.device, repeats: int) -> float:
    """Median microseconds of one call, each on its own layer."""
    for call in calls:
        call()  # compile and warm up
    samples = []
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3)
    else:
        for _ in range(repeats):
            start_s = time.perf_counter()
            for call in calls:
                call()
            samples.append((time.perf_counter() - start_s) * 1e6)
    return statistics.median(samples) / len(calls)


def measure(name: str, dtype_name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    shape, dtype, limit = Shape.parse(name), getattr(torch, dtype_name), LIMITS[dtype_name]
    layers = [draw_layer(shape, dtype, device)]
    num_bytes = sum(tensor.nbytes for tensor in layers[0])
    num_layers = max(4, math.ceil(COLD_BYTES / num_bytes)) if device.type == "cuda" else 2
    layers += [draw_layer(shape, dtype, device) for _ in range(num_layers - 1)]
    x = torch.randn(shape.tokens, shape.in_features, device=device).to(dtype)
    scaling = torch.rand(shape.adapters, device=device) + 0.5
    gates = torch.rand(shape.tokens, args.top_k, device=device)
    plan = make_plan(shape.draw_ids(args.top_k).to(device), shape.adapters)

    def adapted(layer: Layer, impl: str) -> Callable[[], Tensor]:
        weight, lora_a, lora_b = layer
        return lambda: routed_linear(x, weight, None, lora_a, lora_b, scaling, gates, plan, impl)

    errors, micros = {}, {}
    expected = exact(x, layers[0], scaling, gates, plan)
    for impl in args.impls:
        errors[impl] = float((adapted(layers[0], impl)().double() - expected).norm() / expected.norm())
        print(f"{name} {dtype_name} {impl}: relative error {errors[impl]:.2e}", flush=True)
        if not errors[impl] < limit:
            raise SystemExit(f"{impl} is wrong: the relative error must be below {limit:.0e}")
    micros["base"] = time_per_layer([lambda w=layer[0]: F.linear(x, w) for layer in layers], device, args.repeats)
    for impl in args.impls:
        micros[impl] = time_per_layer([adapted(layer, impl) for layer in layers], device, args.repeats)
    facts = {"shape": name, **asdict(shape), "dtype": dtype_name, "num_layers": num_layers}
    return facts | {"relative_error": errors, "time_us": micros}


def describe_machine(device: torch.device) -> dict[str, Any]:
    triton = sys.modules.get("triton")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "command": " ".join(sys.argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "triton": getattr(triton, "__version__", None)},
        "commit": commit.stdout.strip() or None,
    }


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--shapes", nargs="+", default=GPU_SHAPES if on_gpu else CPU_SHAPES, metavar="SHAPE", help=SYNTAX
    )
    parser.add_argument("--impls", nargs="+", choices=["torch", "triton"], default=["torch", "triton"][: 1 + on_gpu])
    parser.add_argument("--dtypes", nargs="+", choices=list(LIMITS), default=["bfloat16" if on_gpu else "float32"])
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with torch.inference_mode():
        pairs = itertools.product(args.shapes, args.dtypes)
        rows = [measure(shape, dtype, device, args) for shape, dtype in pairs]
    result = describe_machine(device) | {"seed": args.seed, "top_k": args.top_k, "repeats": args.repeats, "rows": rows}
    args.out.write_text(json.dumps(result, indent=2) + "\n")

    columns = ["base", *args.impls]
    print(f"\nmicroseconds per layer on {result['device']}")
    print(f"{'shape':<34}{'dtype':>10}" + "".join(f"{column:>10}" for column in columns))
    for row in rows:
        times = "".join(f"{row['time_us'][column]:>10.1f}" for column in columns)
        print(f"{row['shape']:<34}{row['dtype']:>10}{times}")


if __name__ == "__main__":
    main()
