"""The notes on a sequence's tokens. It imports no torch and knows nothing of what they say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Notes(Generic[T]):
    """One on each token, from the first on. Those of whole blocks stay as they are: a history is long."""

    def __init__(self, blocks: Sequence[Sequence[T]] = ()) -> None:
        """blocks: the notes of whole blocks, all of one size, which the sequence begins with."""
        self._blocks = blocks
        self._size = len(blocks[0]) if blocks else 1
        self._num_in_blocks = len(blocks) * self._size
        self._others: list[T] = []

    def __len__(self) -> int:
        return self._num_in_blocks + len(self._others)

    @property
    def last(self) -> T:
        return (self._others or self._blocks[-1])[-1]

    def __iadd__(self, notes: Iterable[T]) -> Self:
        self._others += notes
        return self

    def __getitem__(self, tokens: slice) -> list[T]:
        num_in_blocks = self._num_in_blocks
        first, end, step = tokens.indices(num_in_blocks + len(self._others))
        assert step == 1
        if end <= first:
            return []
        if first >= num_in_blocks:
            return self._others[first - num_in_blocks : end - num_in_blocks]
        index, offset = divmod(first, self._size)
        in_blocks = list(chain.from_iterable(self._blocks[index : -(-end // self._size)]))
        return in_blocks[offset : offset + end - first] + self._others[: max(0, end - num_in_blocks)]
