"""The ways to compute a problem's forward and backward pass, and the memory that they take.

Every method returns y and the gradients to x, lora_a, lora_b and gates. The base is frozen: it has the gradient to x.
PEFT has no gates; its loop multiplies them in on the rank here, so that all methods compute the same gradients.

Legend: T tokens, E adapters, R rank, I in-features, O out-features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from molora_kernels import routed_linear
from torch import Tensor

from benchmarks.methods import Impl, Kind, spread_gates
from benchmarks.problem import Layer, Problem
from benchmarks.timing import Call


@dataclass(frozen=True)
class TrainingMethod:
    name: str
    kind: Kind
    prepare: Callable[[Problem, Tensor], list[Call]]

    def named(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What a call returned, flat: y, dx, dgates, and as many parts of dA as of dB."""
        y, dx, dgates, *parts = results
        half = len(parts) // 2
        lora_a, lora_b = (torch.cat([part.flatten() for part in some]) for some in (parts[:half], parts[half:]))
        return {"y": y.flatten(), "x": dx.flatten(), "gates": dgates.flatten(), "lora_a": lora_a, "lora_b": lora_b}


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that a call holds above what was held before; None on a CPU."""
    if device.type != "cuda":
        return None
    call()  # its libraries take their workspaces
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _differentiate(y: Tensor, dy: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def base_training_calls(problem: Problem, dy: Tensor) -> list[Call]:
    x = _leaf(problem.x)

    def call(weight: Tensor) -> tuple[Tensor, ...]:
        return _differentiate(F.linear(x, weight), dy, x)

    return [partial(call, layer.weight) for layer in problem.layers]


def our_training(impl: Impl) -> TrainingMethod:
    def prepare(problem: Problem, dy: Tensor) -> list[Call]:
        x, gates = _leaf(problem.x), _leaf(problem.gates)

        def call(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, ...]:
            y = routed_linear(x, weight, None, lora_a, lora_b, problem.scaling, gates, problem.plan, impl=impl)
            return _differentiate(y, dy, x, gates, lora_a, lora_b)

        return [partial(call, layer.weight, _leaf(layer.lora_a), _leaf(layer.lora_b)) for layer in problem.layers]

    return TrainingMethod(impl, "ours", prepare)


def _prepare_k_concat(problem: Problem, dy: Tensor) -> list[Call]:
    """H = x A_all^T, masked by route and gate, then the base plus H B_all: all gradients are plain GEMMs."""
    shape, x, gates = problem.shape, _leaf(problem.x), _leaf(problem.gates)

    def call(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, ...]:
        gates_TE = spread_gates(gates, problem.ids, shape.adapters) * problem.scaling
        h_TER = F.linear(x, lora_a.flatten(0, 1)).view(shape.tokens, shape.adapters, shape.rank)
        h_TER = (h_TER * gates_TE[..., None]).to(x.dtype)
        b_all = lora_b.transpose(0, 1).flatten(1)
        y = torch.addmm(F.linear(x, weight), h_TER.flatten(1), b_all.t())
        return _differentiate(y, dy, x, gates, lora_a, lora_b)

    return [partial(call, layer.weight, _leaf(layer.lora_a), _leaf(layer.lora_b)) for layer in problem.layers]


def _prepare_peft_loop(problem: Problem, dy: Tensor) -> list[Call]:
    """PEFT's loop over adapters, each with an A and a B of its own, and index lists that lie on the device."""
    x, gates = _leaf(problem.x), _leaf(problem.gates)
    rows_of = [(problem.ids == e).any(dim=1).nonzero().squeeze(1) for e in range(problem.shape.adapters)]
    scaling = problem.scaling.tolist()

    def call(weight: Tensor, a_of: list[Tensor], b_of: list[Tensor]) -> tuple[Tensor, ...]:
        y = F.linear(x, weight)
        for rows, a_RI, b_OR, scale in zip(rows_of, a_of, b_of, scaling, strict=True):
            gate = (gates[rows] * scale).to(x.dtype)
            y[rows] += F.linear(F.linear(x[rows], a_RI) * gate, b_OR)
        return _differentiate(y, dy, x, gates, *a_of, *b_of)

    def unbind(layer: Layer) -> tuple[list[Tensor], list[Tensor]]:
        return [_leaf(a_RI) for a_RI in layer.lora_a], [_leaf(b_OR.contiguous()) for b_OR in layer.lora_b]

    return [partial(call, layer.weight, *unbind(layer)) for layer in problem.layers]


TRAINING_BASELINES = [
    TrainingMethod("k-concat", "baseline", _prepare_k_concat),
    TrainingMethod("peft-loop", "baseline", _prepare_peft_loop),
]
