"""Linears that read one input (q, k and v; gate and up), merged: one product with their weights side by side,
and one product with all their adapters' A.

Each keeps its own module, whose weights become views of the merged ones: names, slots and state dicts stay as they are.
Which linears are siblings is seen in a forward, not looked up by architecture.

Legend: T tokens, G siblings, E slots, R padded rank, I in-features, O out-features of all siblings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from molora_kernels import routed_linears
from torch import Tensor, nn

from molora.injection import linears_of_layers
from molora.linear import RoutedLinear
from molora.routing import Routes


class Siblings:
    """Computes all when the first is called, and hands the others theirs."""

    def __init__(self, linears: Sequence[RoutedLinear]) -> None:
        """Merge linears that are called in this order, with one input.

        Raises:
            ValueError: they do not read inputs of one size, or obey different routes, or only some have a bias.
        """
        first = linears[0]
        if any(linear.in_features != first.in_features or linear.routes is not first.routes for linear in linears):
            raise ValueError("siblings read one input and obey one forward's routes.")
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        if len(biases) not in (0, len(linears)):
            raise ValueError("either all siblings have a bias, or none.")
        self.routes, self.base_linear = first.routes, first.base_linear
        self.out_features = [linear.out_features for linear in linears]
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = [None] * len(linears)
        with torch.no_grad():
            self.w_OI = torch.cat([linear.weight.detach() for linear in linears])
            self.bias_O = torch.cat(biases) if biases else None
            self.a_GERI = torch.stack([linear.lora_a_ERI.detach() for linear in linears])
            # By rows of O, as in `RoutedLinear`.
            b_OER = torch.cat([linear.lora_b_EOR.detach().transpose(0, 1) for linear in linears])
            self.b_EOR = b_OER.transpose(0, 1)
            self.scaling_EG = torch.stack([linear.scaling_E for linear in linears], 1)
            for g, (linear, w, b) in enumerate(
                zip(
                    linears,
                    self.w_OI.split_with_sizes(self.out_features),
                    b_OER.split_with_sizes(self.out_features),
                    strict=True,
                )
            ):
                linear.weight = nn.Parameter(w, requires_grad=False)
                linear.lora_a_ERI = nn.Parameter(self.a_GERI[g], requires_grad=False)
                linear.lora_b_EOR = nn.Parameter(b.transpose(0, 1), requires_grad=False)
                linear.scaling_E = self.scaling_EG[:, g]
                linear.siblings, linear.place = self, g

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """A sibling's result; None if it is called on its own."""
        if place == 0:
            self._input, self._outputs = x, list(self._compute(x))
        elif x is not self._input:
            return None
        y, self._outputs[place] = self._outputs[place], None
        if place == len(self._outputs) - 1:
            self._input = None
        return y

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        routes = self.routes
        if routes.plan is None or routes.gates_TK is None:
            return tuple(self.base_linear(x, self.w_OI, self.bias_O).split_with_sizes(self.out_features, -1))
        ys = routed_linears(
            x.reshape(-1, x.shape[-1]),
            self.w_OI,
            self.bias_O,
            self.a_GERI,
            self.b_EOR,
            self.scaling_EG,
            routes.gates_TK,
            routes.plan,
            out_features=self.out_features,
            impl=routes.impl,
        )
        return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys)


def merge_siblings(linears: Mapping[str, RoutedLinear], forward: Callable[[], Any]) -> list[Siblings]:
    """Merge those that one module holds and calls one after the other with one input.

    Args:
        linears: by module path.
        forward: runs the model.
    """
    calls: list[tuple[str, Tensor]] = []

    def note(path: str) -> Callable[..., None]:
        return lambda _, args: calls.append((path, args[0]))

    with ExitStack() as stack:
        for path, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(note(path)).remove)
        forward()
    return [Siblings([linears[path] for path in paths]) for paths in _groups(calls) if _agree(linears, paths)]


def with_others(model: nn.Module, linears: Mapping[str, RoutedLinear]) -> dict[str, RoutedLinear]:
    """Those and the other linears of the decoder's layers, by module path: these become routed ones without slots, so
    that they can be merged as well.
    """
    everyone, routes = dict(linears), Routes(0)
    for path in sorted(linears_of_layers(model)):
        linear = model.get_submodule(path)
        if type(linear) is nn.Linear:  # and none that computes in a way of its own
            everyone[path] = RoutedLinear(linear, routes, num_slots=0, max_rank=1)
            model.set_submodule(path, everyone[path])
    return everyone


def _groups(calls: Iterable[tuple[str, Tensor]]) -> list[list[str]]:
    """Runs of calls with one input and one parent."""
    groups: list[list[str]] = []
    before: tuple[str, Tensor] | None = None
    for path, x in calls:
        parent = path.rpartition(".")[0]
        if before is not None and x is before[1] and parent == before[0]:
            groups[-1].append(path)
        else:
            groups.append([path])
        before = parent, x
    return [group for group in groups if len(group) > 1 and len(set(group)) == len(group)]


def _agree(linears: Mapping[str, RoutedLinear], paths: Sequence[str]) -> bool:
    """Whether they can be merged, and are not yet: graphs may hold what is."""
    group = [linears[path] for path in paths]
    return len({linear.bias is None for linear in group}) == 1 and all(linear.siblings is None for linear in group)
