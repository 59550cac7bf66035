"""Check the base linear of few tokens against float64, then time a chain of a model's linears beside cuBLAS.

    python benchmarks/linear.py --out benchmarks/results/linear.json

Shapes are those of Llama-3.1-8B's layers, siblings merged. A chain is the four linears of one layer after the other, in
a CUDA graph over layers enough for the weights to come from memory; both chains are timed in turns.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.machine import describe_machine
from benchmarks.timing import Timer, quartiles
from molora_kernels import base_linear
from torch import Tensor

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate and up": (28672, 4096), "down": (4096, 14336)}  # (out, in)
NUM_LAYERS = 16
LIMIT = 3e-3  # of the relative error in bfloat16
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Layers:
    """Inputs of each linear, and the weights of all layers."""

    def __init__(self, num_tokens: int, weights: dict[str, list[Tensor]], rng: torch.Generator) -> None:
        self.num_tokens, self.weights = num_tokens, weights
        self.inputs = {
            name: torch.randn(num_tokens, width, generator=rng, dtype=torch.bfloat16, device=rng.device)
            for name, (_, width) in SHAPES.items()
        }

    def check(self) -> float:
        """The largest relative error against float64.

        Raises:
            ArithmeticError: it is over the limit.
        """
        errors = []
        for name, x in self.inputs.items():
            w = self.weights[name][0]
            expected = F.linear(x.double(), w.double())
            errors.append(float((base_linear(x, w, None).double() - expected).norm() / expected.norm()))
        if not max(errors) <= LIMIT:
            raise ArithmeticError(f"wrong for {self.num_tokens} tokens: errors are {errors}")
        return max(errors)

    def calls(self, linear: Linear) -> list[Callable[[], Any]]:
        """One for each layer."""

        def call(layer: int) -> Callable[[], Any]:
            return lambda: [linear(x, self.weights[name][layer], None) for name, x in self.inputs.items()]

        return [call(layer) for layer in range(NUM_LAYERS)]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--pause-ms", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU to time.")
    device = torch.device("cuda")
    rng = torch.Generator(device).manual_seed(args.seed)
    weights = {
        name: [torch.randn(shape, generator=rng, dtype=torch.bfloat16, device=device) for _ in range(NUM_LAYERS)]
        for name, shape in SHAPES.items()
    }
    num_bytes = sum(2 * out * width for out, width in SHAPES.values())
    timer = Timer(device, args.repeats, args.pause_ms / 1e3)
    result = describe_machine(device) | {"seed": args.seed, "repeats": args.repeats, "num_bytes": num_bytes}
    result["rows"] = []
    print("tokens  ours us  cuBLAS us  ours/cuBLAS  ours GB/s")
    for num_tokens in args.tokens:
        layers = Layers(num_tokens, weights, rng)
        error = layers.check()
        ours, cublas = (timer.load(layers.calls(linear), None) for linear in (base_linear, F.linear))
        pairs = timer.beside(cublas, {"ours": ours})["ours"]
        row: dict[str, Any] = {
            "num_tokens": num_tokens,
            "error": error,
            "ours_us": quartiles([mine for _, mine in pairs]),
            "cublas_us": quartiles([other for other, _ in pairs]),
            "ratio": quartiles([mine / other for other, mine in pairs]),
        }
        result["rows"].append(row)
        mine, other, ratio = (row[name]["median"] for name in ("ours_us", "cublas_us", "ratio"))
        print(f"{num_tokens:6}  {mine:7.1f}  {other:9.1f}  {ratio:11.3f}  {num_bytes / mine / 1e3:9.0f}")
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
