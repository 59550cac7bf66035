"""Packed batches: several conversations in each row, none of which sees another.

Positions begin again at 0 with each conversation, which is what keeps attention apart, and activation is given
token by token. Batch number i depends only on the data, the seed and i, so that a resumed run sees what an
uninterrupted one would have seen.

Legend: B rows, L tokens a row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora.training.examples import BASE, IGNORE, Example

NEVER = 1 << 30  # an activation start that no position reaches
OTHER = -1
MAX_STRAY_CHANCE = 0.5
NUM_SIGNS = 62  # ranks that a stranger's signs are drawn for; more have the same again


@dataclass
class Batch:  # not frozen: Lightning casts its fields where a trainer's precision asks for it
    """Packed rows, tensors [B, L] but for the last one.

    Attributes:
        input_ids, position_ids: int64; positions count from 0 within each conversation.
        targets: int64, the id that follows each token where it is learned, else -100.
        start: int64, the position from which the token's conversation is active.
        domains: int64, index of the token's domain in the loader's list, OTHER for one that is not in it, or -100
            where none is known.
        groups: int64, as `domains`, but base's tokens in a conversation whose task is known have that task's number
            there, which are behind the domains'.
        rest: bool, whether an adapter that is trained alone rests on the token.
        signs: int64, whose bits say which of its ranks act with the opposite sign there, as a stranger would.
        rows: int64 [B], numbers of the rows, the same in every epoch.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    start: Tensor
    domains: Tensor
    groups: Tensor
    rest: Tensor
    signs: Tensor
    rows: Tensor

    @classmethod
    def cat(cls, batches: Sequence[Batch]) -> Batch:
        return cls(**{name: torch.cat([vars(batch)[name] for batch in batches]) for name in vars(batches[0])})

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


@dataclass(frozen=True)
class ActivationMix:
    """Where training activates each conversation, so that an adapter works wherever it is activated.

    `first`, `before`, `turn`, `between` and `response` are the shares of conversations activated at the first token, at
    one drawn uniformly up to the last user turn, there, at one drawn uniformly between there and the generation prompt,
    and at that prompt; they add up to 1.

    An adapter that is trained alone also rests where a router may send tokens elsewhere: on the parts of other domains
    in the share `others_rest` of the conversations, and in the share `strays` on single tokens between the turn's start
    and the response, each with a chance drawn for the conversation between 0 and `MAX_STRAY_CHANCE`. In the share
    `strangers` it meets what other adapters may have written: on the parts of other domains, and from the turn's start
    to a token drawn uniformly before the response, each of its ranks acts with a random sign.
    """

    turn: float = 0.6
    response: float = 0.2
    between: float = 0.2
    first: float = 0.0
    before: float = 0.0
    others_rest: float = 0.5
    strays: float = 0.0
    strangers: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in vars(self).values()):
            raise ValueError(f"activation shares {self} must be between 0 and 1.")
        if not math.isclose(self.first + self.before + self.turn + self.between + self.response, 1):
            raise ValueError(f"activation shares {self}: first, before, turn, between and response must add up to 1.")

    def draw(self, example: Example, rng: random.Random) -> int:
        share = rng.random()
        if share < self.turn:
            return example.turn
        if share < self.turn + self.response:
            return example.response
        if share < self.turn + self.response + self.first:
            return 0
        if share < self.turn + self.response + self.first + self.before:
            return rng.randint(0, example.turn)
        return rng.randint(example.turn, example.response)

    def draw_others(
        self, example: Example, foreign: NDArray[np.bool_], rng: random.Random
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """For each token, `Batch.rest` and `Batch.signs`; `foreign` marks the parts of other domains."""
        others_rest = rng.random() < self.others_rest
        chance = rng.uniform(0, MAX_STRAY_CHANCE) if rng.random() < self.strays else 0.0
        signs = np.zeros(len(foreign), np.int64)
        if self.strangers and rng.random() < self.strangers:
            others_rest = False
            signs[foreign] = rng.getrandbits(NUM_SIGNS)
            signs[example.turn : rng.randint(example.turn, example.response)] = rng.getrandbits(NUM_SIGNS)
        rest = foreign & others_rest
        if chance:
            for i in range(example.turn, example.response):
                rest[i] = rest[i] or rng.random() < chance
        return rest, signs


class PackedLoader:
    """Endless batches of packed rows (or `num_batches` of them), from number `first_batch()` on.

    The conversations are shuffled and packed once, first fit, into rows of `row_length` tokens; each epoch shuffles
    the rows, and draws other activation points.
    """

    def __init__(
        self,
        data: Sequence[Example],
        domains: Sequence[str],
        *,
        row_length: int,
        rows: int,
        pad_id: int,
        mix: ActivationMix,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        first_batch: Callable[[], int] = lambda: 0,
        num_batches: int | None = None,
    ) -> None:
        self.data = data
        self.domains = {name: index for index, name in enumerate(domains)}
        tasks = sorted({example.task for example in data if example.task is not None})
        self.tasks = {name: index for index, name in enumerate(tasks, len(self.domains))}
        self.row_length, self.rows, self.pad_id = row_length, rows, pad_id
        self.mix, self.seed, self.rank, self.world_size = mix, seed, rank, world_size
        self.first_batch, self.num_batches = first_batch, num_batches
        self.packed = self._pack()
        self._read = cache(self._read_row)  # each row is served once an epoch

    def __iter__(self) -> Iterator[Batch]:
        begin = self.first_batch()
        epoch, order = -1, list[int]()
        numbers = count() if self.num_batches is None else range(self.num_batches)
        for number in numbers:
            first = ((begin + number) * self.world_size + self.rank) * self.rows
            rows = []
            for index in range(first, first + self.rows):
                wanted, place = divmod(index, len(self.packed))
                if wanted != epoch:
                    epoch, order = wanted, self._order(wanted)
                rows.append(self._row(order[place], index))
            yield Batch(**{name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]})

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.packed)))
        random.Random(f"{self.seed}/epoch/{epoch}").shuffle(order)
        return order

    def _pack(self) -> list[list[Example]]:
        order = list(self.data)
        random.Random(f"{self.seed}/pack").shuffle(order)
        rows: list[list[Example]] = []
        open_rows: list[tuple[int, list[Example]]] = []  # (free tokens, row), a few at a time
        for example in order:
            length = len(example.token_ids)
            for i, (free, row) in enumerate(open_rows):
                if length <= free:
                    row.append(example)
                    open_rows[i] = (free - length, row)
                    break
            else:
                row = [example]
                rows.append(row)
                open_rows.append((self.row_length - length, row))
                if len(open_rows) > 32:
                    open_rows.remove(min(open_rows, key=lambda item: item[0]))
        return rows

    def _row(self, row: int, index: int) -> dict[str, Any]:
        """Row `row` of the packed ones, as number `index` of all that are served."""
        rng = random.Random(f"{self.seed}/row/{index}")
        own = self._read(row)
        start, rest = np.full(self.row_length, NEVER), np.zeros(self.row_length, bool)
        signs = np.zeros(self.row_length, np.int64)
        foreign, begin = own["domains"] == OTHER, 0
        for example in self.packed[row]:
            end = begin + len(example.token_ids)
            start[begin:end] = self.mix.draw(example, rng)
            rest[begin:end], signs[begin:end] = self.mix.draw_others(example, foreign[begin:end], rng)
            begin = end
        drawn = {"start": start, "rest": rest, "signs": signs}
        return own | drawn | {"rows": np.int64(row)}

    def _read_row(self, row: int) -> dict[str, NDArray[np.int64]]:
        """What is the same whenever a row is served. Padding is one more conversation, of which nothing is learned."""
        out = {
            "input_ids": np.full(self.row_length, self.pad_id),
            "position_ids": np.zeros(self.row_length, np.int64),
            "targets": np.full(self.row_length, IGNORE),
            "domains": np.full(self.row_length, IGNORE),
            "groups": np.full(self.row_length, IGNORE),
        }
        begin = 0
        for example in self.packed[row]:
            end = begin + len(example.token_ids)
            ids = out["input_ids"][begin:end] = np.array(example.token_ids)
            out["position_ids"][begin:end] = np.arange(end - begin)
            out["targets"][begin : end - 1] = np.where(example.learned[1:], ids[1:], IGNORE)
            out["domains"][begin:end] = [IGNORE if d is None else self.domains.get(d, OTHER) for d in example.domains]
            out["groups"][begin:end] = [
                self.tasks[example.task] if d == BASE and example.task is not None else group
                for d, group in zip(example.domains, out["domains"][begin:end].tolist(), strict=True)
            ]
            begin = end
        out["position_ids"][begin:] = np.arange(self.row_length - begin)
        return out


@dataclass(frozen=True)
class SideBySide:
    """Batches of several loaders at once, one's rows after the other's: what each gives is what it gives alone."""

    loaders: Sequence[PackedLoader]

    def __iter__(self) -> Iterator[Batch]:
        for batches in zip(*self.loaders, strict=True):
            yield Batch.cat(batches)
