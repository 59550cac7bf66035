"""Random problems, their answer in float64, and the memory that a checked call finds.

Legend: T tokens, K top-k, E adapters, G siblings, R rank, I in-features, O out-features of all siblings.
"""

import gc
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from molora_kernels import Plan, make_plan
from torch import Tensor

from benchmarks.shapes import Shape

LIMITS = {"float32": 1e-5, "float16": 5e-4, "bfloat16": 3e-3}  # relative error of ours
LOOSER = 2  # others may round base and adapters apart
COLD_BYTES = 2**28  # of base weights: several times the largest L2 cache
MIN_LAYERS, MAX_LAYERS = 4, 64


class Layer(NamedTuple):
    weight: Tensor  # [O, I]
    lora_a: Tensor  # [E, G * R, I]
    lora_b: Tensor  # [E, O, R], stored as [O, E, R] like a bank's


@dataclass(frozen=True)
class Problem:
    """One input and one route, and layers enough for their weights to come from memory."""

    shape: Shape
    x: Tensor  # [T, I]
    layers: list[Layer]
    scaling: Tensor  # [E], powers of two: folding them into B is exact
    gates: Tensor  # [T, K]
    ids: Tensor  # [T, K]
    plan: Plan

    @property
    def adapters_in_use(self) -> int:
        return len(set(self.ids.flatten().tolist()) - {-1})

    @property
    def routed(self) -> int:
        return int((self.ids >= 0).sum())


def draw_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, num_layers: int | None = None
) -> Problem:
    """`num_layers` is as many as keep the weights out of the caches, unless given."""
    torch.manual_seed(seed)
    num_out, num_siblings = sum(shape.out_features), len(shape.out_features)

    def draw(*sizes: int) -> Tensor:
        values = torch.randn(sizes, device=device) / math.sqrt(sizes[-1])
        return values.to(dtype)

    def draw_layer() -> Layer:
        weight = draw(num_out, shape.in_features)
        lora_a = draw(shape.adapters, num_siblings * shape.rank, shape.in_features)
        return Layer(weight, lora_a, draw(num_out, shape.adapters, shape.rank).transpose(0, 1))

    with torch.no_grad():
        ids = shape.draw_ids().to(device)
        layers = [draw_layer()]
        layers += [draw_layer() for _ in range((num_layers or _num_layers(layers[0], device)) - 1)]
        return Problem(
            shape,
            torch.randn(shape.tokens, shape.in_features, device=device).to(dtype),
            layers,
            2.0 ** torch.randint(-2, 1, (shape.adapters,), device=device),
            torch.rand(shape.tokens, shape.top_k, device=device) + 0.25,
            ids,
            make_plan(ids, shape.adapters),
        )


def _num_layers(layer: Layer, device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    wanted = min(max(MIN_LAYERS, math.ceil(COLD_BYTES / layer.weight.nbytes)), MAX_LAYERS)
    gc.collect()
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    affordable = free_bytes // (6 * sum(tensor.nbytes for tensor in layer))  # the methods keep copies of their own
    return max(1, min(wanted, affordable))


def solve(x: Tensor, layer: Layer, scaling: Tensor, gates: Tensor, ids: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The definition in float64, adapter by adapter over the tokens that select it; differentiable.

    Semantics:
        y[t] = weight @ x[t] + sum_k gates[t, k] * scaling[e] * lora_b[e] @ (lora_a[e] @ x[t]),  e = ids[t, k]
    """
    weight, lora_a, lora_b = (tensor.double() for tensor in layer)
    x = x.double()
    y_TO = x @ weight.t()
    for e in range(len(lora_a)):
        rows = (ids == e).any(dim=1).nonzero().squeeze(1)
        gate = torch.where(ids == e, gates.double(), 0).sum(dim=1)[rows] * scaling[e].double()
        h_TGR = (x[rows] @ lora_a[e].t() * gate[:, None]).view(len(rows), len(widths), lora_b.shape[2])
        parts = lora_b[e].split_with_sizes(list(widths))
        delta_TO = torch.cat([h_TGR[:, g] @ b_OR.t() for g, b_OR in enumerate(parts)], dim=1)
        y_TO.index_add_(0, rows, delta_TO)
    return y_TO


def relative_error(result: Tensor, expected: Tensor) -> float:
    """In the Frobenius norm; NaN if anything is."""
    return float((result.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def poison_free_memory(device: torch.device) -> None:
    """Fill what the GPU's allocator will hand out next, so that an element left unwritten shows.

    All bits are set, which is NaN in every floating-point dtype.
    """
    if device.type != "cuda":
        return
    free_bytes, _ = torch.cuda.mem_get_info(device)
    largest = min(30, (free_bytes // 16).bit_length() - 1)
    sizes = [2**power for power in range(9, largest + 1) for _ in range(4)]  # in bytes
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]
    del blocks
