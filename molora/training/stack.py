"""Adapters in a model that is trained: side by side, each on rows of its own, or blended on the same rows.

Side by side, every adapter has as many rows of a batch as any other, one's after the other's, so that its products are
one of a batched GEMM's. Blended, all are one adapter of their ranks together, with a gate for each token and rank. All
that is trained is one matrix, a row for each adapter: it is cast, clipped and stepped at once.

Legend: E adapters, B rows of a batch, L tokens a row, N = B * L / E tokens an adapter, P values an adapter, R rank,
K ranks of all adapters together, I in-features, O out-features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from molora.adapter import LoraWeights
from molora.training.batches import NUM_SIGNS

Lora = tuple[Tensor, Tensor, Tensor]
"""A [E, R, I], B [E, O, R] and gates [E, N, 1 or R], the scaling included."""


class LoraStack(nn.Module):
    """The adapters' weights, and the linears of a model that they act on.

    Attributes:
        rank: the largest of the adapters'; what a smaller one has beyond its own is 0, and stays so: where A and B are
            0, neither has a gradient.
        values: float32 (or what the trainer casts it to) [E, P], for each linear by path A and then B, flattened.
        linears: by module path.
    """

    scalings_E: Tensor

    def __init__(
        self, model: nn.Module, paths: Collection[str], *, ranks: Sequence[int], alphas: Sequence[float]
    ) -> None:
        """Put `StackedLinear`s into the model; no adapter acts until `act`.

        Args:
            ranks, alphas: of each adapter; its scaling is alpha / rank.
        """
        super().__init__()
        self.ranks, self.rank = tuple(ranks), max(ranks)
        self.scalings = [alpha / rank for alpha, rank in zip(alphas, ranks, strict=True)]
        self.linears: dict[str, StackedLinear] = {}
        for path in sorted(paths):
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            self.linears[path] = StackedLinear(linear)
            model.set_submodule(path, self.linears[path])
        self._sizes = [size for linear in self.linears.values() for size in self._shapes(linear)]
        device = next(iter(self.linears.values())).weight.device
        num_values = sum(map(math.prod, self._sizes))
        self.values = nn.Parameter(torch.zeros(len(ranks), num_values, dtype=torch.float32, device=device))
        self.register_buffer("scalings_E", torch.tensor(self.scalings, device=device), persistent=False)
        self._blended: tuple[object, list[tuple[Tensor, Tensor]]] = None, []  # of frozen values, and which these were

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """As PEFT begins: A uniform (Kaiming, a = sqrt(5)), B zero; the same values in each adapter of a rank."""
        self.values.zero_()
        for rank in sorted(set(self.ranks)):
            generator = torch.Generator().manual_seed(seed)
            own = [index for index, each in enumerate(self.ranks) if each == rank]
            for linear, (a_ERI, _) in zip(self.linears.values(), self.pairs(), strict=True):
                bound = 1 / math.sqrt(linear.in_features)
                a_RI = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
                a_ERI[own, :rank] = a_RI.to(a_ERI)

    def act(self, active_BL: Tensor, signs_BL: Tensor | None = None) -> None:
        """In the forwards from now on, the adapters act on these tokens, the first one on the first B / E rows.

        Args:
            signs_BL: int64, `Batch.signs`.
        """
        dtype = next(iter(self.linears.values())).weight.dtype
        gates = active_BL.to(dtype).reshape(len(self.values), -1, 1) * self.scalings_E.to(dtype)[:, None, None]
        if signs_BL is not None:
            bits_R = torch.arange(self.rank, device=signs_BL.device) % NUM_SIGNS
            is_opposite_ENR = (signs_BL.reshape(len(self.values), -1, 1) >> bits_R) & 1
            gates = gates * (1 - 2 * is_opposite_ENR).to(dtype)
        for linear, (a_ERI, b_EOR) in zip(self.linears.values(), self._pairs(self.values.to(dtype)), strict=True):
            linear.lora = a_ERI, b_EOR, gates

    def blend(self, gates_NE: Tensor) -> None:
        """In the forwards from now on, every adapter acts on every token by its gate; gradients reach the gates."""
        dtype = next(iter(self.linears.values())).weight.dtype
        gates_1NK = (gates_NE * self.scalings_E).to(dtype).repeat_interleave(self.rank, dim=1)[None]
        for linear, (a_1KI, b_1OK) in zip(self.linears.values(), self._one_adapter(dtype), strict=True):
            linear.lora = a_1KI, b_1OK, gates_1NK

    def rest(self) -> None:
        """In the forwards from now on, no adapter acts."""
        for linear in self.linears.values():
            linear.lora = None

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """A [E, R, I] and B [E, O, R] of each linear, as views of what is trained."""
        return self._pairs(self.values.detach())

    @torch.no_grad()
    def load(self, adapter: int, weights: Mapping[str, LoraWeights]) -> None:
        """Take an adapter's pairs by module path, of the stack's rank or less; their scaling goes into B."""
        for path, (a_ERI, b_EOR) in zip(self.linears, self.pairs(), strict=True):
            a_ERI[adapter].zero_()
            b_EOR[adapter].zero_()
            if (own := weights.get(path)) is not None:
                a_ERI[adapter, : own.rank].copy_(own.a_RI)
                b_EOR[adapter, :, : own.rank].copy_(own.b_OR.float() * (own.scaling / self.scalings[adapter]))

    def weights(self, adapter: int) -> dict[str, LoraWeights]:
        """An adapter's pairs by module path, on the CPU."""
        pairs, rank = self._pairs(self.values.detach()[adapter : adapter + 1].cpu()), self.ranks[adapter]
        return {
            path: LoraWeights(a_ERI[0, :rank].clone(), b_EOR[0, :, :rank].clone(), self.scalings[adapter])
            for path, (a_ERI, b_EOR) in zip(self.linears, pairs, strict=True)
        }

    def clip_gradients(self, most: float) -> None:
        """Each adapter's gradient is scaled down to a norm of at most `most`, as it would be if it were alone."""
        gradient = self.values.grad
        if gradient is not None:
            norms_E1 = gradient.norm(dim=1, keepdim=True)
            gradient.mul_((most / (norms_E1 + 1e-6)).clamp(max=1.0))  # torch's clip_grad_norm_

    def _one_adapter(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """A [1, K, I] and B [1, O, K] of each linear, of all adapters; kept for as long as nobody changes them."""
        which = dtype, self.values.device, self.values._version
        found, pairs = self._blended
        if found != which or self.values.requires_grad:
            with torch.inference_mode(False):  # they outlive a validation run
                pairs = [
                    (a_ERI.flatten(0, 1)[None], b_EOR.transpose(0, 1).flatten(1)[None])
                    for a_ERI, b_EOR in self._pairs(self.values.to(dtype))
                ]
            self._blended = (None, []) if self.values.requires_grad else (which, pairs)
        return pairs

    def _shapes(self, linear: StackedLinear) -> list[tuple[int, int]]:
        return [(self.rank, linear.in_features), (linear.out_features, self.rank)]

    def _pairs(self, values_EP: Tensor) -> list[tuple[Tensor, Tensor]]:
        pieces = values_EP.split_with_sizes([math.prod(size) for size in self._sizes], dim=1)
        views = [piece.view(-1, *size) for piece, size in zip(pieces, self._sizes, strict=True)]
        return list(zip(views[::2], views[1::2], strict=True))


class StackedLinear(nn.Module):
    """Stands where an `nn.Linear` stood.

    Attributes:
        lora: what acts; None is the base linear.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.lora: Lora | None = None
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.lora is None:
            return F.linear(x, self.weight, self.bias)
        x = x.to(self.weight.dtype)  # under autocast it may come in another one
        y: Tensor = _StackedLora.apply(x, self.weight, self.bias, *self.lora)  # type: ignore[no-untyped-call]
        return y


class _StackedLora(torch.autograd.Function):
    """y = W x + b + B (gate (A x)), for each adapter on its own tokens; gradients to x, A, B and the gates."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a_ERI: Tensor, b_EOR: Tensor, gates: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x_ENI = x.reshape(len(a_ERI), -1, x.shape[-1])
            h_ENR = torch.bmm(x_ENI, a_ERI.mT)
            y = _add_product(F.linear(x, weight, bias), h_ENR * gates, b_EOR.mT)
        ctx.save_for_backward(x_ENI, weight, a_ERI, b_EOR, gates, h_ENR)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x_ENI, weight, a_ERI, b_EOR, gates, h_ENR) = gradients, ctx.saved_tensors
        of_x, _, _, of_a, of_b, of_gates = ctx.needs_input_grad
        dx, da, db, dgates = None, None, None, None
        with torch.autocast(dy.device.type, enabled=False):
            dy_ENO = dy.reshape(len(a_ERI), -1, dy.shape[-1])
            g_ENR = torch.bmm(dy_ENO, b_EOR)
            if of_gates:
                dgates = (g_ENR * h_ENR).sum_to_size(gates.shape)
            g_ENR.mul_(gates)
            if of_x:
                dx = _add_product(dy @ weight, g_ENR, a_ERI)
            if of_a:
                da = torch.bmm(g_ENR.mT, x_ENI)
            if of_b:
                db = torch.bmm(dy_ENO.mT, h_ENR * gates)
        return dx, None, None, da, db, dgates


def _add_product(y: Tensor, left_EMK: Tensor, right_EKN: Tensor) -> Tensor:
    """A new y plus the product of each adapter, by its rows."""
    if torch.compiler.is_compiling():  # then the sum is taken by whoever reads it next
        return y + torch.bmm(left_EMK, right_EKN).view_as(y)
    y.view(*left_EMK.shape[:2], y.shape[-1]).baddbmm_(left_EMK, right_EKN)
    return y


def recompute(layer: Any, *, compiled: bool) -> None:
    """Have a decoder layer computed again in the backward pass, with what acted on it in its own forward.

    transformers' own way, inside of the layer's forward, would be inside of what is compiled, too.
    """
    linears = [module for module in layer.modules() if isinstance(module, StackedLinear)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _restored([(linear, linear.lora) for linear in linears])

    forward: Callable[..., Any] = MethodType(type(layer).forward, layer)  # not what an earlier call has put there
    if compiled:
        forward = torch.compile(forward, dynamic=False)
    layer.forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


@contextmanager
def _restored(then: Sequence[tuple[StackedLinear, Lora | None]]) -> Iterator[None]:
    now = [(linear, linear.lora) for linear, _ in then]
    try:
        for linear, lora in then:
            linear.lora = lora
        yield
    finally:
        for linear, lora in now:
            linear.lora = lora


def linears_named(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of the linears whose last component is one of these."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rsplit(".", 1)[-1] in names
    ]
