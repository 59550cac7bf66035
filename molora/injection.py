"""Putting routed linears and the router into any Hugging Face decoder, in place.

Nothing is forked per architecture: decoder layers are found by what they are, and linears by their module paths.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from molora.adapter import Adapter, layer_index
from molora.linear import RoutedLinear
from molora.router import KeyRouter, Router, TokenRangeRouter
from molora.routing import (
    NO_ADAPTER,
    Impl,
    RouteRequest,
    RouterInput,
    Routes,
    RoutingLayer,
    TokenTap,
    checkpoint_context_fn,
)

ATTENTION_KINDS = frozenset({"attention", "full_attention", "sliding_attention", "chunked_attention"})


class RoutedDecoder:
    """A causal language model whose linears have adapter slots, and the routes that they obey.

    Attributes:
        model: the Hugging Face model, changed in place; without a request it computes exactly what it did before.
        routes: obeyed by the linears from the router layer on.
        early_routes: obeyed by linears below the router layer: explicit routes, and the router's own LoRA, which has
            a slot behind the adapters' there.
        linears: the routed linears by module path.
        prepares: the router's own LoRA by module path; empty where it has none.
        routing_layer: the module that stands at the router layer.
    """

    def __init__(
        self,
        model: Any,
        modules: Collection[str],
        *,
        num_slots: int,
        max_rank: int,
        router_layer: int,
        router: Router | None = None,
        column_slots: Sequence[int] | None = None,
        num_versions: int = 1,
        dtype: torch.dtype | None = None,
        impl: Impl = "auto",
        routes: Routes | None = None,
    ) -> None:
        """
        Args:
            routes: what obeys the router instead of linears with slots.
        """
        self.model = model
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.router = router
        self.router_layer = router_layer
        layers = find_layers(model)
        if not 0 <= router_layer < len(layers):
            raise ValueError(
                f"router layer {router_layer} does not exist; the model has layers 0 to {len(layers) - 1}."
            )
        _check_router(router, column_slots, model, router_layer)
        self.prepares = router.lora if isinstance(router, KeyRouter) else {}
        linears = {path: find_linear(model, path) for path in sorted({*modules, *self.prepares})}
        self.routes = routes or Routes(num_slots, impl)
        self.early_routes = Routes(num_slots + bool(self.prepares), impl)
        self.linears: dict[str, RoutedLinear] = {}
        for path, linear in linears.items():
            is_early = layer_index(path) < router_layer
            routes = self.early_routes if is_early else self.routes
            rank = max([max_rank, *(weights.rank for weights in self.prepares.values())]) if is_early else max_rank
            routed = RoutedLinear(linear, routes, num_slots=routes.num_slots, max_rank=rank, dtype=dtype)
            model.set_submodule(path, routed)
            self.linears[path] = routed
        self.acts_early = any(layer_index(path) < router_layer for path in self.linears)
        device = layers[router_layer].parameters().__next__().device
        columns = None
        if column_slots is not None:
            row_C = torch.tensor([NO_ADAPTER, *column_slots], dtype=torch.int32, device=device)
            columns = row_C.repeat(num_versions, 1)
        if isinstance(router, nn.Module):
            router.to(device)
        if self.acts_early:
            router_slot = num_slots if self.prepares else None
            layers[0] = RoutingLayer(layers[0], self.early_routes, None, None, router_slot)
        self.routing_layer = RoutingLayer(layers[router_layer], self.routes, router, columns)
        layers[router_layer] = self.routing_layer
        with _beside(self.device):
            for path, weights in self.prepares.items():
                self.linears[path].set_slot(num_slots, weights)
        if isinstance(router, TokenRangeRouter):
            model.set_input_embeddings(TokenTap(model.get_input_embeddings(), self.routes))

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def top_k(self) -> int:
        """How many adapters the router gives a token at most."""
        return 1 if self.router is None else min(self.router.config.top_k, self.router.num_columns)

    @property
    def temperature(self) -> float:
        """The router's, which its probabilities are taken at."""
        return 1.0 if self.router is None else self.router.config.temperature

    def set_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Load an adapter into a slot; None empties it.

        Raises:
            ValueError: the adapter does not fit this base model or these slots; nothing was changed.
        """
        if adapter is not None:
            self.check_fits(adapter)
        with _beside(self.device):
            for path, linear in self.linears.items():
                linear.set_slot(slot, None if adapter is None else adapter.weights.get(path))

    def set_columns(self, version: int, slots: Sequence[int]) -> None:
        """In this version of the bank, the slots of the router's columns 1, 2, ...; without a router, nothing."""
        columns_VC = self.routing_layer.column_slots_VC
        if columns_VC is not None and self.router is not None:
            columns_VC[version] = torch.tensor([NO_ADAPTER, *slots], dtype=torch.int32)

    @contextmanager
    def requested(self, request: RouteRequest | None, *, early: bool = True) -> Iterator[None]:
        """Forwards inside obey `request`; None is the base model. The routes are the base's again afterwards.

        Args:
            early: False if nothing that the request names acts below the router layer.
        """
        both = (self.early_routes, self.routes)
        before = [routes.request for routes in both]
        for routes in both:
            routes.request = request if early or routes is self.routes else None
            routes.clear()
        try:
            yield
        finally:
            for routes, old in zip(both, before, strict=True):
                routes.request = old
                routes.clear()

    def router_input(self, request: RouteRequest | None = None, **inputs: Any) -> Tensor:
        """The hidden states [B, T, H] that enter the router layer; the layers behind it do not run.

        Args:
            request: where the router's own LoRA acts; None is nowhere, and without one it changes nothing.
        """
        self.routing_layer.stops_here = True
        try:
            with self.requested(request):
                self.model.get_decoder()(**inputs)
        except RouterInput as reached:
            return reached.hidden_states
        finally:
            self.routing_layer.stops_here = False
        raise AssertionError("the forward passed the router layer")

    def enable_gradient_checkpointing(self) -> None:
        """Recompute layers in the backward pass, each under the routes of its own forward (non-reentrant only)."""
        # The public call goes by another name in each release, and makes the embeddings require gradients, which would
        # send the backward pass through the base layers below the first adapter for nothing.
        contexts = checkpoint_context_fn(self.early_routes, self.routes)
        self.model._set_gradient_checkpointing(
            enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False, context_fn=contexts)
        )

    def check_fits(self, adapter: Adapter) -> None:
        """
        Raises:
            ValueError: the adapter does not fit this base model or these slots.
        """
        if adapter.max_rank > self.max_rank:
            raise ValueError(f"the adapter has rank {adapter.max_rank}, over the slots' maximum of {self.max_rank}.")
        for path, weights in adapter.weights.items():
            linear = self.linears.get(path)
            if linear is None:
                raise ValueError(f"the adapter acts on {path!r}, which has no adapter slots.")
            check_shape(path, (weights.b_OR.shape[0], weights.a_RI.shape[1]), linear)


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """On a GPU, on a stream of its own, after what was sent before it: others do not wait for this, but the caller."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's decoder, also where it is a part of a larger model's."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def cache_argument(model: Any) -> str:
    """What a model's forward calls its cache: transformers renamed it in version 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the `ModuleList` of `num_hidden_layers` checkpointable layers.

    Raises:
        ValueError: the architecture has none, or mixes in layers whose state cannot be routed safely.
    """
    config = text_config(model)
    num_layers = config.num_hidden_layers
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    if unknown := sorted(kinds - ATTENTION_KINDS):
        raise ValueError(
            f"{type(model).__name__} has layers of kind {', '.join(unknown)}; their state runs on from token to token, "
            "so packed conversations would leak into each other. Only attention layers are supported."
        )
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            plain = (layer.layer if isinstance(layer, RoutingLayer) else layer for layer in module)
            if all(isinstance(layer, GradientCheckpointingLayer) for layer in plain):
                return module
    raise ValueError(
        f"{type(model).__name__} has no list of {num_layers} checkpointable decoder layers; "
        "this architecture is not supported."
    )


def linears_of_layers(model: nn.Module) -> set[str]:
    """The module paths of every `nn.Linear` in the decoder's layers."""
    layers = set(find_layers(model))
    routers = {layer.router for layer in layers if isinstance(layer, RoutingLayer)}
    return {
        f"{name}.{path}"
        for name, module in model.named_modules()
        if module in layers
        for path, linear in _modules_outside(module, routers)
        if isinstance(linear, nn.Linear)
    }


def _modules_outside(module: nn.Module, others: Collection[Any], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if child not in others:
            yield prefix + name, child
            yield from _modules_outside(child, others, f"{prefix}{name}.")


def find_linear(model: nn.Module, path: str) -> nn.Linear:
    """The `nn.Linear` at a module path.

    Raises:
        ValueError: there is no such module, or it is not an `nn.Linear`: the adapter is for another base model.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the base model has no module {path!r}; this adapter is for another base model.") from None
    if not isinstance(module, nn.Linear):
        raise ValueError(f"module {path!r} is a {type(module).__name__}; only nn.Linear layers can be adapted.")
    return module


def check_shape(path: str, shape: tuple[int, int], linear: nn.Linear | RoutedLinear) -> None:
    """Raise ValueError unless an adapter of (out, in) `shape` fits the linear."""
    expected = (linear.out_features, linear.in_features)
    if shape != expected:
        raise ValueError(
            f"module {path!r}: the adapter is made for a linear of {shape[1]} -> {shape[0]}, the base model's is "
            f"{expected[1]} -> {expected[0]}; this adapter is for another base model."
        )


def check_adapters(model: nn.Module, adapters: Mapping[str, Adapter]) -> set[str]:
    """Check that every adapter fits the unmodified base model; returns the module paths that they act on.

    Raises:
        ValueError: one does not fit; the message names the adapter and the module.
    """
    modules: set[str] = set()
    for name, adapter in adapters.items():
        for path, weights in adapter.weights.items():
            try:
                check_shape(path, (weights.b_OR.shape[0], weights.a_RI.shape[1]), find_linear(model, path))
            except ValueError as error:
                raise ValueError(f"adapter {name!r}: {error}") from None
        modules |= set(adapter.weights)
    return modules


def _check_router(router: Router | None, column_slots: Sequence[int] | None, model: Any, router_layer: int) -> None:
    if router is None:
        return
    num_columns = 1 + len(column_slots or ())
    if router.num_columns != num_columns:
        raise ValueError(
            f"the router has {router.num_columns} columns; base and the routable adapters are {num_columns}."
        )
    hidden_size = getattr(router, "hidden_size", None)
    model_hidden_size = text_config(model).hidden_size
    if hidden_size not in (None, model_hidden_size):
        raise ValueError(
            f"the router reads hidden states of size {hidden_size}; the base model's are {model_hidden_size}."
        )
    for path in router.lora if isinstance(router, KeyRouter) else ():
        if layer_index(path) >= router_layer:
            raise ValueError(f"the router's LoRA acts on {path!r}, which is not below its layer, {router_layer}.")


def slots_tensor(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of slots of unequal length as int32 [B, 1, K], padded with -1."""
    return torch.tensor(_padded(rows, NO_ADAPTER), dtype=torch.int32, device=device)[:, None]


def gates_tensor(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Rows of gates of unequal length as float32 [B, 1, K], padded with 0."""
    return torch.tensor(_padded(rows, 0.0), dtype=torch.float32, device=device)[:, None]


def _padded(rows: Sequence[Sequence[float]], value: float) -> list[list[float]]:
    width = max((len(row) for row in rows), default=1) or 1
    return [[*row, *[value] * (width - len(row))] for row in rows]
