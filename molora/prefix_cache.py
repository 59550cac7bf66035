"""Keys and values kept between requests, so that what the base has read is not read again.

An entry is one finished sequence: its token ids, where it was activated and by which route (a digest of contents,
never a name), its keys and values, and the routes of its tokens. A position may be reused by a new request when the
ids up to it agree and it was encoded the way the new request would: as base in both, or by the same route from the
same activation start. The store knows nothing of models and tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache

TokenRoute = list[tuple[str, float]]


@dataclass(frozen=True)
class Encoding:
    """How a sequence's tokens are encoded: base before `start`, by the route of `digest` from it on.

    A sequence that is all base has digest None, whatever its start.
    """

    start: int
    digest: str | None

    def base_length(self, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens are base."""
        return num_tokens if self.digest is None else min(self.start, num_tokens)


@dataclass(frozen=True, eq=False)
class CachedSequence:
    """Keys and values [1, heads, tokens, head size] of each layer, for the first `len(token_ids)` tokens."""

    token_ids: tuple[int, ...]
    encoding: Encoding
    routes: tuple[TokenRoute, ...]
    keys_values: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Reuse:
    """What a new request takes from the store.

    Attributes:
        cache: keys and values of the first `num_reused` tokens, as a cache of its own.
        routes: the routes those tokens took when they were encoded.
        num_reencoded: tokens that are cached as active but now stand before the activation start; they are
            computed once as base.
        num_recomputed: tokens whose live base entries are computed again all the same: 0 unless the store is wrong.
    """

    num_reused: int
    num_reencoded: int
    num_recomputed: int
    routes: tuple[TokenRoute, ...]
    cache: DynamicCache


class PrefixCache:
    """The last few finished sequences, least recently used first."""

    def __init__(self, max_sequences: int = 8) -> None:
        if max_sequences < 0:
            raise ValueError(f"max_sequences is {max_sequences}; expected 0 (keep nothing) or more.")
        self.max_sequences = max_sequences
        self._sequences: list[CachedSequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def clear(self) -> None:
        self._sequences.clear()

    def take(self, token_ids: Sequence[int], encoding: Encoding) -> Reuse:
        """The longest reusable prefix of a prompt. Its last token is always left to compute, for its logits."""
        limit = len(token_ids) - 1
        best: CachedSequence | None = None
        num_reused = 0
        for sequence in self._sequences:
            length = min(_reusable(sequence, token_ids, encoding), limit)
            if length > num_reused or best is None:
                best, num_reused = sequence, max(length, 0)
        cache = DynamicCache()
        routes: tuple[TokenRoute, ...] = ()
        num_base = max(num_reused, min(self._base_prefix(token_ids, encoding), limit))
        num_known = max(num_base, min(self._known_prefix(token_ids, encoding), limit))
        if best is not None and num_reused > 0:
            self._sequences.remove(best)
            self._sequences.append(best)
            routes = best.routes[:num_reused]
            for layer, (keys, values) in enumerate(best.keys_values):
                cache.update(keys[:, :, :num_reused], values[:, :, :num_reused], layer)
        return Reuse(num_reused, num_known - num_base, num_base - num_reused, routes, cache)

    def put(
        self, token_ids: Sequence[int], encoding: Encoding, routes: Sequence[TokenRoute], cache: DynamicCache
    ) -> None:
        """Keep a sequence as far as it has routes: a last sampled token has none, nor has a forward that failed.

        `cache` holds the keys and values of those tokens, and of no more than a failed forward added in some layers.
        """
        length = len(routes)
        if self.max_sequences == 0 or length == 0:
            return
        layers: list[Any] = cache.layers
        new = CachedSequence(
            tuple(token_ids[:length]),
            encoding,
            tuple(routes),
            tuple((layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in layers),
        )
        # A sequence that the new one continues unchanged has nothing to add to it.
        self._sequences = [
            old for old in self._sequences if _reusable(new, old.token_ids, old.encoding) < len(old.token_ids)
        ]
        self._sequences.append(new)
        del self._sequences[: -self.max_sequences]

    def _base_prefix(self, token_ids: Sequence[int], encoding: Encoding) -> int:
        """How many tokens this request needs as base are cached as base, counted from the first."""
        needed = encoding.base_length(len(token_ids))
        return max(
            (
                min(_common(old.token_ids, token_ids), old.encoding.base_length(len(old.token_ids)), needed)
                for old in self._sequences
            ),
            default=0,
        )

    def _known_prefix(self, token_ids: Sequence[int], encoding: Encoding) -> int:
        """How many tokens this request needs as base are cached at all, as base or as active."""
        needed = encoding.base_length(len(token_ids))
        return max((min(_common(old.token_ids, token_ids), needed) for old in self._sequences), default=0)


def _reusable(old: CachedSequence, token_ids: Sequence[int], encoding: Encoding) -> int:
    common = _common(old.token_ids, token_ids)
    if old.encoding == encoding:
        return common
    return min(common, old.encoding.base_length(common), encoding.base_length(common))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
