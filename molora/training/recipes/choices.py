"""A set of ways to say one thing, divided between the splits."""

import re
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from random import Random
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "val", "held out"]

ALTERNATIVES = re.compile(r"\[([^][]*\|[^][]*)\]")


def settle(template: str, rng: Random) -> str:
    """Put one option in the place of each `[a|b]` of a template; nothing is drawn where it has none."""
    return ALTERNATIVES.sub(lambda found: rng.choice(found[1].split("|")), template)


@dataclass(frozen=True)
class Choices(Generic[T]):
    """Ways to say one thing.

    An index counts through `training`, then `held_out`, then `more`, then `more_held_out`, then `later_held_out`.

    Attributes:
        training: for the training and the validation files.
        held_out: for the held-out files.
        more: for the training files alone, maybe with alternatives: see `settle`.
        more_held_out: for the held-out files; written by somebody who had not seen the others.
        later_held_out: the same, by a third author, when what had been wrong of the others had shaped training's.
    """

    training: tuple[T, ...]
    held_out: tuple[T, ...]
    more: tuple[T, ...] = ()
    more_held_out: tuple[T, ...] = ()
    later_held_out: tuple[T, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def __getitem__(self, index: int) -> T:
        return tuple(chain(*self._groups))[index]

    def indices(self, split: Split) -> list[int]:
        """The indices of what a split may use."""
        training, held_out, more, more_held_out, later_held_out = self._ranges
        match split:
            case "train":
                return [*training, *more]
            case "val":
                return [*training]
            case "held out":
                return [*held_out, *more_held_out, *later_held_out]

    def author(self, index: int) -> int:
        """Who wrote what is held out: 0 the first author, who also wrote what training shows, then 1 and 2."""
        *_, second, third = self._ranges
        return 2 if index in third else int(index in second)

    @property
    def _ranges(self) -> list[range]:
        ends = [*accumulate(map(len, self._groups), initial=0)]
        return [range(*pair) for pair in pairwise(ends)]

    @property
    def _groups(self) -> tuple[tuple[T, ...], ...]:
        return self.training, self.held_out, self.more, self.more_held_out, self.later_held_out
