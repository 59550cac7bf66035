"""The tokens of a step in one row: what each sequence's part of it says, as arrays. It imports no torch.

Legend: N tokens, S sequences, D rows that draw, K adapters a token, M blocks of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molora.generation import TokenRoute
from molora.routing import NO_ADAPTER
from molora.slots import Hold, ResolvedRoute

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """A sequence's part of a step.

    Attributes:
        token_ids: of the tokens to run; the first one stands at position `first`.
        blocks: the sequence's, up to the last of these tokens.
        draws: the next token is drawn.
        writes: their keys and values are kept; False for a token that runs for its logits alone.
        activation_start: the first active token of the sequence.
        hold: what its route may use; None for base.
        follows: the last of these tokens is not known yet: it is what draw of this number in the step before gives.
            -1 if it is known.
        known: the routes, by digests, of the first of these tokens, which were routed before: they take them again.
        next_ids: where log-probabilities of a prompt are asked for, the tokens that follow these, beginning with the
            one of number `first_next`; else empty.
        num_top: how many of the most likely tokens are reported beside each.
    """

    token_ids: Sequence[int]
    first: int
    blocks: Sequence[int]
    draws: bool
    writes: bool
    activation_start: int
    route: ResolvedRoute
    hold: Hold | None
    follows: int = -1
    known: Sequence[TokenRoute] = ()
    next_ids: Sequence[int] = ()
    first_next: int = 0
    num_top: int = 0

    @property
    def is_active(self) -> bool:
        """Whether an adapter may act on any of its tokens."""
        return self.hold is not None and self.first + len(self.token_ids) > self.activation_start


class Span(NamedTuple):
    """A sequence's tokens in the packed row, and its keys: those of the step included."""

    first: int
    end: int
    num_keys: int


@dataclass(frozen=True)
class Packed:
    """
    Attributes:
        places_N: block * block size + offset of each token's key and value; `nobodys` where they are not to be kept.
        kept: the tokens whose logits are needed; never none, since a head that computes nothing is not what models are
            tested for.
        drawn: the places among them of those that draw.
        follows_N: for tokens that are not known yet, which draw of the step before gives them; -1 for others.
        routes: what the routes are asked for; None if no token is active, which the host knows.
    """

    ids_N: Ints
    positions_N: Ints
    places_N: Ints
    tables_SM: Ints
    spans: list[Span]
    kept: list[int]
    drawn: list[int]
    follows_N: Ints
    routes: PackedRoutes | None


@dataclass(frozen=True)
class PackedRoutes:
    """`RouteRequest`, as arrays.

    Attributes:
        prepared_N: where the router decides, or has decided before.
        asks_router: a sequence is routed by it, if only to say how sure it is of a token that was routed before.
        acts_early: something that is named acts below the router layer.
    """

    start_N: Ints
    auto_N: NDArray[np.bool_]
    version_N: Ints
    slots_NK: Ints
    gates_NK: NDArray[np.float32]
    prepared_N: NDArray[np.bool_]
    asks_router: bool
    acts_early: bool


def pack(rows: Sequence[Row], block_size: int, nobodys: int) -> Packed:
    """The rows side by side.

    Args:
        nobodys: the place of what is not to be kept.
    """
    sizes = np.array([len(row.token_ids) for row in rows])
    ends = sizes.cumsum()
    firsts = np.array([row.first for row in rows])
    ids_N = np.array([token for row in rows for token in row.token_ids])
    positions_N = np.arange(len(ids_N)) + (firsts - (ends - sizes)).repeat(sizes)
    tables_SM = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int64)
    for table_M, row in zip(tables_SM, rows, strict=True):
        table_M[: len(row.blocks)] = row.blocks
    index_N, offset_N = np.divmod(positions_N, block_size)
    places_N = tables_SM[np.arange(len(rows)).repeat(sizes), index_N] * block_size + offset_N
    places_N[~_of_rows([row.writes for row in rows], sizes)] = nobodys
    spans = [
        Span(end - size, end, first + size)
        for end, size, first in zip(ends.tolist(), sizes.tolist(), firsts.tolist(), strict=True)
    ]
    kept: list[int] = []
    drawn: list[int] = []
    for row, (first, end, _) in zip(rows, spans, strict=True):
        kept += range(first + row.first_next, first + row.first_next + len(row.next_ids))
        if row.draws:
            drawn.append(len(kept))
            kept.append(end - 1)
    routes = _pack_routes(rows, sizes, spans) if any(row.is_active for row in rows) else None
    follows_N = np.full(len(ids_N), -1)
    follows_N[ends - 1] = [row.follows for row in rows]
    return Packed(ids_N, positions_N, places_N, tables_SM, spans, kept or [0], drawn, follows_N, routes)


def _pack_routes(rows: Sequence[Row], sizes: Ints, spans: Sequence[Span]) -> PackedRoutes:
    width = max(1, *(len(row.route.names) for row in rows), *(len(route) for row in rows for route in row.known))
    slots_SK = np.full((len(rows), width), NO_ADAPTER)
    gates_SK = np.zeros((len(rows), width), np.float32)
    for s, row in enumerate(rows):
        if row.hold is not None and row.route.names:
            slots_SK[s, : len(row.hold.slots)] = row.hold.slots
            gates_SK[s, : len(row.hold.slots)] = row.route.weights
    slots_NK, gates_NK = slots_SK.repeat(sizes, 0), gates_SK.repeat(sizes, 0)
    prepared_N = _of_rows([row.route.auto for row in rows], sizes)
    auto_N = prepared_N.copy()
    for row, span in zip(rows, spans, strict=True):
        if row.hold is None or not row.route.auto or not row.known:
            continue
        slot_of = {digest: slot for slot, digest in row.hold.digests.items()}
        auto_N[span.first : span.first + len(row.known)] = False
        for t, route in enumerate(row.known, span.first):
            slots_NK[t, : len(route)] = [slot_of[digest] for digest, _ in route]
            gates_NK[t, : len(route)] = [gate for _, gate in route]
    return PackedRoutes(
        _of_rows([row.activation_start for row in rows], sizes),
        auto_N,
        _of_rows([0 if row.hold is None else row.hold.version.number for row in rows], sizes),
        slots_NK,
        gates_NK,
        prepared_N,
        any(row.route.auto and row.is_active for row in rows),
        any(row.hold is not None and row.hold.acts_early for row in rows),
    )


def _of_rows(values: Sequence[int], sizes: Ints) -> NDArray[Any]:
    """What is said of each row, for each of its tokens."""
    return np.array(values).repeat(sizes)  # np.repeat takes ten times as long to find out what it was given
