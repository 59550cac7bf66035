"""The ways to compute a problem in the forward pass: the base alone, ours, and plain torch.

A method prepares what a server would prepare once, when it loads its weights or plans a forward, and returns one call
for each layer. Knows nothing about clocks or public kernels.

Legend: T tokens, E adapters, G siblings, R rank, I in-features, O out-features of all siblings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from molora_kernels import routed_linear, routed_linears
from torch import Tensor

from benchmarks.problem import Layer, Problem
from benchmarks.shapes import Shape
from benchmarks.timing import Call

Impl = Literal["auto", "torch", "triton"]
Kind = Literal["ours", "baseline", "public"]


@dataclass(frozen=True)
class Method:
    """`gated` ones honour gates and several adapters a token; the others take one adapter a token, at gate 1."""

    name: str
    kind: Kind
    gated: bool
    prepare: Callable[[Problem], list[Call]]


def base_calls(problem: Problem) -> list[Call]:
    return [partial(F.linear, problem.x, layer.weight) for layer in problem.layers]


def our_method(impl: Impl) -> Method:
    def prepare(problem: Problem) -> list[Call]:
        widths = problem.shape.out_features
        scaling_EG = problem.scaling[:, None].expand(-1, len(widths)).contiguous()

        def call(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor | tuple[Tensor, ...]:
            tensors = (problem.x, weight, None, lora_a, lora_b)
            if len(widths) == 1:
                return routed_linear(*tensors, problem.scaling, problem.gates, problem.plan, impl=impl)
            routing = (scaling_EG, problem.gates, problem.plan)
            return routed_linears(*tensors, *routing, out_features=widths, impl=impl)

        def by_sibling(lora_a: Tensor) -> Tensor:
            if len(widths) == 1:
                return lora_a
            return lora_a.unflatten(1, (len(widths), -1)).transpose(0, 1).contiguous()  # [G, E, R, I]

        return [partial(call, layer.weight, by_sibling(layer.lora_a), layer.lora_b) for layer in problem.layers]

    return Method(impl, "ours", True, prepare)


def spread_gates(gates_TK: Tensor, ids_TK: Tensor, num_adapters: int) -> Tensor:
    """[T, E] gates, zero where a token does not select the adapter; differentiable."""
    column_TK = torch.where(ids_TK < 0, num_adapters, ids_TK).long()
    return gates_TK.new_zeros(len(ids_TK), num_adapters + 1).scatter_add(1, column_TK, gates_TK)[:, :-1]


def columns_of_siblings(shape: Shape) -> list[slice]:
    return [slice(*ends) for ends in pairwise(accumulate(shape.out_features, initial=0))]


def scaled_b(layer: Layer, scaling: Tensor) -> Tensor:
    """[E, O, R], contiguous."""
    return (layer.lora_b * scaling[:, None, None]).to(layer.lora_b.dtype).contiguous()


def _prepare_k_concat(problem: Problem) -> list[Call]:
    """One GEMM of [x | H] with [W | B_all] by cuBLAS; x lies where its columns are expected."""
    shape, x = problem.shape, problem.x
    num_siblings = len(shape.out_features)
    gates_TE = spread_gates(problem.gates, problem.ids, shape.adapters)
    xh = x.new_empty(shape.tokens, shape.in_features + num_siblings * shape.adapters * shape.rank)
    xh[:, : shape.in_features] = x
    h_TGER = xh[:, shape.in_features :].view(shape.tokens, num_siblings, shape.adapters, shape.rank)

    def merge(layer: Layer) -> tuple[Tensor, Tensor]:
        """A of all siblings and adapters by rows, and W beside every B; a sibling's B is zero in the others' rows."""
        a_EGRI = layer.lora_a.view(shape.adapters, num_siblings, shape.rank, shape.in_features)
        wb = F.pad(layer.weight, (0, xh.shape[1] - shape.in_features))
        b_OGER = wb[:, shape.in_features :].view(len(wb), num_siblings, shape.adapters, shape.rank)
        b_OER = scaled_b(layer, problem.scaling).transpose(0, 1)
        for g, part in enumerate(columns_of_siblings(shape)):
            b_OGER[part, g] = b_OER[part]
        return a_EGRI.transpose(0, 1).flatten(0, 2), wb

    def call(a_all: Tensor, wb: Tensor) -> Tensor:
        torch.mul(F.linear(x, a_all).view_as(h_TGER), gates_TE[:, None, :, None], out=h_TGER)
        return F.linear(xh, wb)

    return [partial(call, *merge(layer)) for layer in problem.layers]


def _prepare_peft_loop(problem: Problem) -> list[Call]:
    """PEFT's mixed batch: adapter by adapter, x gathered and y scattered; its index lists lie on the device."""
    shape, x = problem.shape, problem.x
    columns = columns_of_siblings(shape)
    rows_of = {e: (problem.ids == e).any(dim=1).nonzero().squeeze(1) for e in range(shape.adapters)}
    rows_of = {e: rows for e, rows in rows_of.items() if len(rows)}
    scaling = problem.scaling.tolist()

    def call(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        y = F.linear(x, weight)
        for e, rows in rows_of.items():
            a_of_siblings = lora_a[e].split_with_sizes([shape.rank] * len(columns))
            for part, a_RI in zip(columns, a_of_siblings, strict=True):
                delta = F.linear(F.linear(x[rows], a_RI), lora_b[e, part])
                y[:, part][rows] += delta * scaling[e]
        return y

    return [partial(call, layer.weight, layer.lora_a, layer.lora_b.contiguous()) for layer in problem.layers]


BASELINES = [
    Method("k-concat", "baseline", True, _prepare_k_concat),
    Method("peft-loop", "baseline", False, _prepare_peft_loop),
]
