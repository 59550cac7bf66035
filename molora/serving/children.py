"""Blocks of one parent, found by the tokens that they begin with."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


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

    def nearest(self, wanted: list[int]) -> tuple[int, int]:
        """One of those that begin with most of the wanted tokens, and with how many; there must be one at all."""
        place = bisect_left(self._settled, (wanted, -1))
        near = [*self._settled[max(0, place - 1) : place + 1], *((ids, each) for each, ids in self._growing.items())]
        common, number = max((_count_common(wanted, ids), each) for ids, each in near)
        return number, common


def _count_common(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(index for index in range(length) if first[index] != second[index])
