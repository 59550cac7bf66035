"""Blocks of one parent, found by the tokens that they begin with."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge


class Children:
    """Those that are complete, or belong to nobody who adds to them, are kept in the order of their tokens.

    So what agrees longest with some tokens stands beside the place where these would stand, however many there are.
    The others are as many as sequences run.
    """

    def __init__(self) -> None:
        self._growing: dict[int, list[int]] = {}
        self._settled: list[tuple[list[int], int]] = []

    def __len__(self) -> int:
        return len(self._growing) + len(self._settled)

    def add(self, number: int, token_ids: list[int]) -> None:
        """A block to whose tokens more may be added, in this list, until it settles."""
        self._growing[number] = token_ids

    def settle(self, number: int) -> None:
        """Its tokens change no more; it may have settled before."""
        token_ids = self._growing.pop(number, None)
        if token_ids is not None:
            insort(self._settled, (token_ids, number))

    def remove(self, number: int, token_ids: list[int]) -> None:
        if self._growing.pop(number, None) is None:
            del self._settled[bisect_left(self._settled, (token_ids, number))]

    def nearest(self, wanted: list[int]) -> Iterator[tuple[int, int]]:
        """All of them, each with how many of the wanted tokens it begins with, most of them first."""
        place = bisect_left(self._settled, (wanted, -1))
        growing = ((token_ids, number) for number, token_ids in self._growing.items())
        before = (self._settled[index] for index in range(place - 1, -1, -1))
        behind = (self._settled[index] for index in range(place, len(self._settled)))
        agreeing = sorted(_agreeing(growing, wanted), key=_fewest_last)
        return merge(agreeing, _agreeing(before, wanted), _agreeing(behind, wanted), key=_fewest_last)


def _agreeing(blocks: Iterable[tuple[list[int], int]], wanted: list[int]) -> Iterator[tuple[int, int]]:
    return ((number, _count_common(wanted, token_ids)) for token_ids, number in blocks)


def _fewest_last(found: tuple[int, int]) -> int:
    return -found[1]


def _count_common(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(index for index in range(length) if first[index] != second[index])
