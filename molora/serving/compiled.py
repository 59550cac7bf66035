"""Decoder layers through torch.compile: what stands between their products and attention becomes a kernel or two.

All layers that are alike share what was compiled, and sizes that vary are compiled once more, for any size. A model
that cannot be compiled runs as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from molora.injection import find_layers
from molora.routing import RoutingLayer
from molora.serving.attention import POOL, Pool

MAX_VARIANTS = 64  # of a layer: routed or not, of one token or any number, with and without adapters
T = TypeVar("T")
logger = logging.getLogger(__name__)


def compile_layers(model: nn.Module, backend: str) -> dict[nn.Module, Any]:
    """What to call in place of each decoder layer.

    Args:
        backend: torch.compile's.
    """
    layers = [layer.layer if isinstance(layer, RoutingLayer) else layer for layer in find_layers(model)]

    def options(layer: nn.Module) -> dict[str, Any] | None:
        return {"triton.enable_pdl": True} if backend == "inductor" and _may_overlap(layer) else None

    return {layer: torch.compile(layer._call_impl, backend=backend, options=options(layer)) for layer in layers}


def _may_overlap(layer: nn.Module) -> bool:
    """Whether launches may, as those of our own kernels do: each waits for the one before it and lets the next one
    start then.

    A compiled kernel that reads nothing does not wait, and what comes next would read too early. There are none in
    dense layers; where experts add to zeros there are.
    """
    return not any("expert" in name for name, _ in layer.named_modules())


class CompiledLayers:
    """Layers that are compiled in what `run` runs, and as they are for everybody else."""

    def __init__(self, calls: dict[nn.Module, Any], pools: Mapping[nn.Module, Pool], name: str) -> None:
        """
        Args:
            calls: of each layer; none, and `run` runs things as they are.
            pools: of the modules that attend, which know their own while they run: their numbers tell layers apart.
            name: of the model.
        """
        self._calls, self._pools, self._name = calls, pools, name

    def run(self, forward: Callable[[], T]) -> T:
        """Call what runs the model."""
        if not self._calls:
            return forward()
        try:
            with self._compiled():
                return forward()
        except TorchDynamoException:
            logger.exception("the layers of %s cannot be compiled, and run as they are", self._name)
            self._calls = {}
            return forward()

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS))
            for layer, call in self._calls.items():
                layer._compiled_call_impl = call  # what nn.Module.compile sets; calls look for it
                stack.callback(setattr, layer, "_compiled_call_impl", None)
            for module, pool in self._pools.items():
                module.__dict__[POOL] = pool
                stack.callback(module.__dict__.pop, POOL)
            yield
