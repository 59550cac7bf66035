"""How a route reaches the linears: a module at the router layer decides, the linears above it obey.

There are no hooks, context variables or globals. `RoutingLayer` stands where a decoder layer stood; it runs the
router on the hidden states that enter, fills the `Routes` object that every `RoutedLinear` was built with, and calls
the layer. One plan is built per forward and shared by all linears that obey the same routes.

Legend: B sequences, T tokens of each, N = B * T, K adapters a token, H hidden size, C router columns, V versions of the
bank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from molora_kernels import Plan, make_plan
from molora_kernels.cpu import Token, find_token
from torch import Tensor, nn

from molora.router import Decision, Router

Impl = Literal["auto", "torch", "triton"]
NO_ADAPTER = -1


@dataclass(frozen=True)
class RouteRequest:
    """What one forward, or one generation, asks of the routes.

    Attributes:
        start: int64 [B, 1] or [B, T]: a token is active from this position on.
        auto: bool [B, 1] or [B, T]: the router decides; elsewhere the explicit slots act. None where nobody asks it.
        prepared: bool [B, 1] or [B, T]: the router's own LoRA acts below the router layer; None is `auto`. It also
            acts on tokens whose routes are explicit now because the router has decided them before.
        slots: int32 [B, 1, K] or [B, T, K], explicit slots, -1 for none. None where no route is explicit.
        gates: float32, the shape of `slots`: their weights, used as given.
        valid: bool [B, T], False on padding; None where there is none.
        version: int64 [B, 1] or [B, T], the row of the table of columns that the router's choices are looked up in;
            None is row 0.
    """

    start: Tensor
    auto: Tensor | None = None
    slots: Tensor | None = None
    gates: Tensor | None = None
    valid: Tensor | None = None
    version: Tensor | None = None
    prepared: Tensor | None = None

    def __post_init__(self) -> None:
        if self.auto is None and self.slots is None:
            raise ValueError("a route request needs the router or explicit slots; to run the base, make no request.")
        if (self.slots is None) != (self.gates is None):
            raise ValueError("explicit slots and their gates come together.")


@dataclass(frozen=True)
class RouteRecord:
    """What was decided in a forward: `slots` int32 [B, T, K] and `gates` float32 [B, T, K], and the router's side.

    `active` bool [B, T] says where adapters may act; `logits` float32 [B, T, C] are the router's scores, if it ran.
    """

    slots: Tensor
    gates: Tensor
    active: Tensor
    logits: Tensor | None


class Routes:
    """The routes of the forward that is running. Every `RoutedLinear` holds the one it obeys."""

    def __init__(self, num_slots: int, impl: Impl = "auto") -> None:
        self.num_slots = num_slots
        self.impl: Impl = impl
        self.request: RouteRequest | None = None
        self.token_ids: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """No adapter acts: the linears are the base linears."""
        self.plan: Plan | None = None
        self.gates_TK: Tensor | None = None
        self.token: Token | None = None
        self.record: RouteRecord | None = None

    def fill(self, record: RouteRecord) -> None:
        slots_TK = record.slots.flatten(0, 1)
        self.plan = make_plan(slots_TK, self.num_slots)
        self.gates_TK = record.gates.flatten(0, 1)
        self.token = None if self.impl == "triton" else find_token(self.plan, self.gates_TK)
        self.record = record

    @contextmanager
    def restored(self, plan: Plan | None, gates_TK: Tensor | None) -> Iterator[None]:
        """Obey an earlier forward's routes, as a checkpointed layer must when it is computed again."""
        now = self.plan, self.gates_TK, self.token
        self.plan, self.gates_TK, self.token = plan, gates_TK, None
        try:
            yield
        finally:
            self.plan, self.gates_TK, self.token = now


class RouterInput(Exception):  # noqa: N818 - it carries a result, and is no error
    """Ends a forward at the router layer with the hidden states [B, T, H] that entered it."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


class StandIn(nn.Module):
    """Stands where a module of the base stood. A state dict holds that module alone, under the names that it had."""

    stands_for: ClassVar[str]
    """The submodule that stood here."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.get_submodule(self.stands_for).state_dict(*args, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        given = {name.removeprefix(prefix): state_dict.pop(name) for name in [*state_dict]}
        state_dict |= {f"{prefix}{self.stands_for}.{name}": value for name, value in given.items()}
        for name, child in self.named_children():
            if name != self.stands_for:  # it is ours, and stays as it is
                state_dict |= child.state_dict(prefix=f"{prefix}{name}.", keep_vars=True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RoutingLayer(StandIn):
    """A decoder layer, preceded by the decision which adapters act on each of its tokens.

    Without a router, only explicit slots act (the layer in front of an adapter that acts below the router layer), and
    `router_slot` on the tokens that a router's own LoRA prepares.
    """

    stands_for = "layer"

    def __init__(
        self,
        layer: nn.Module,
        routes: Routes,
        router: Router | None,
        column_slots_VC: Tensor | None,
        router_slot: int | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.routes = routes
        self.router = router
        self.router_slot = router_slot
        self.stops_here = False
        self.column_slots_VC: Tensor | None
        self.register_buffer("column_slots_VC", column_slots_VC, persistent=False)

    def __getattr__(self, name: str) -> Any:
        # Decoders read attributes of their layers (`attention_type`, for one).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.stops_here:
            raise RouterInput(hidden_states)
        request = self.routes.request
        if request is None:
            self.routes.clear()
        else:
            self.routes.fill(self.decide(request, hidden_states, _positions(hidden_states, kwargs)))
        self.routes.token_ids = None  # they were this forward's; one that is given embeddings has none
        return self.layer(hidden_states, *args, **kwargs)

    def decide(self, request: RouteRequest, hidden_states: Tensor, positions: Tensor) -> RouteRecord:
        """Choose slots and gates for hidden states [B, T, H] at positions [B or 1, T]."""
        num_seqs, num_tokens, _ = hidden_states.shape
        if len(request.start) != num_seqs:
            raise ValueError(
                f"this batch has {num_seqs} sequences, but activation starts and routes were given for "
                f"{len(request.start)}; give one of each for every sequence of the batch."
            )
        active = (positions >= request.start).expand(num_seqs, num_tokens)
        if request.valid is not None:
            active = active & request.valid
        slots, gates, logits = None, None, None
        if request.slots is not None and request.gates is not None:
            slots = request.slots.expand(num_seqs, num_tokens, -1)
            gates = request.gates.expand(num_seqs, num_tokens, -1)
        if request.auto is not None:
            decision = self._ask_router(hidden_states)
            if decision is not None:
                routed_slots, routed_gates, logits = self._on_slots(decision, request.version, num_seqs, num_tokens)
                slots, gates = _merge(request.auto, (routed_slots, routed_gates), (slots, gates))
            elif self.router_slot is not None:
                own = torch.full_like(hidden_states[..., :1], self.router_slot, dtype=torch.int32)
                prepared = request.auto if request.prepared is None else request.prepared
                none = torch.full_like(own, NO_ADAPTER), torch.zeros_like(own, dtype=torch.float32)
                explicit = none if slots is None else (slots, gates)
                slots, gates = _merge(prepared, (own, torch.ones_like(own, dtype=torch.float32)), explicit)
        if slots is None or gates is None:  # the router is asked, but sits in a later layer
            slots = torch.full((num_seqs, num_tokens, 1), NO_ADAPTER, dtype=torch.int32, device=hidden_states.device)
            gates = torch.zeros(slots.shape, device=hidden_states.device)
        slots = torch.where(active[..., None], slots, NO_ADAPTER).to(torch.int32)
        return RouteRecord(slots, gates, active, logits)

    def _ask_router(self, hidden_states: Tensor) -> Decision | None:
        if self.router is None:
            return None
        token_ids = self.routes.token_ids
        return self.router(hidden_states.flatten(0, 1), None if token_ids is None else token_ids.flatten())

    def _on_slots(
        self, decision: Decision, version: Tensor | None, num_seqs: int, num_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self.column_slots_VC is not None
        shape = (num_seqs, num_tokens, -1)
        if version is None:
            slots = self.column_slots_VC[0][decision.columns_TK].reshape(shape)
        else:
            row_T1 = version.expand(num_seqs, num_tokens).reshape(-1, 1)
            slots = self.column_slots_VC[row_T1, decision.columns_TK].reshape(shape)
        logits = None if decision.logits_TC is None else decision.logits_TC.reshape(shape)
        return slots, decision.gates_TK.reshape(shape), logits


class TokenTap(StandIn):
    """Stands where the input embedding stood and notes the token ids for a router that reads them."""

    stands_for = "embedding"

    def __init__(self, embedding: nn.Module, routes: Routes) -> None:
        super().__init__()
        self.embedding = embedding
        self.routes = routes

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Any:
        self.routes.token_ids = input_ids
        return self.embedding(input_ids)


def checkpoint_context_fn(
    *routes: Routes,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """A `context_fn` for `torch.utils.checkpoint` that restores several routes at once."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        saved = [(each, each.plan, each.gates_TK) for each in routes]

        @contextmanager
        def recompute() -> Iterator[None]:
            with ExitStack() as stack:
                for each, plan, gates_TK in saved:
                    stack.enter_context(each.restored(plan, gates_TK))
                yield

        return nullcontext(), recompute()

    return contexts


def _positions(hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor):
        positions = kwargs.get("cache_position")
    if not isinstance(positions, Tensor):
        raise ValueError(
            "this architecture does not pass position_ids to its decoder layers, so activation cannot be placed; "
            "it is not supported."
        )
    return positions.to(hidden_states.device).reshape(-1, hidden_states.shape[1])


def _merge(
    auto: Tensor, routed: tuple[Tensor, Tensor], explicit: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The router's slots where `auto`, the explicit ones elsewhere, padded to a common K."""
    slots, gates = explicit
    if slots is None or gates is None:
        return routed
    num_columns = max(slots.shape[-1], routed[0].shape[-1])
    auto = auto[..., None]
    return (
        torch.where(auto, _pad(routed[0], num_columns, NO_ADAPTER), _pad(slots, num_columns, NO_ADAPTER)),
        torch.where(auto, _pad(routed[1], num_columns, 0.0), _pad(gates, num_columns, 0.0)),
    )


def _pad(x: Tensor, size: int, value: float) -> Tensor:
    return nn.functional.pad(x, (0, size - x.shape[-1]), value=value)
