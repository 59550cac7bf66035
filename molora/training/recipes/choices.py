"""A set of ways to say one thing, divided between the splits."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from random import Random
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "val", "held out"]

VARIOUS_SHARE = 0.5  # of what is drawn in training where there is any
ALTERNATIVES = re.compile(r"\[([^][]*\|[^][]*)\]")


def settle(template: str, rng: Random) -> str:
    """Put one option in the place of each `[a|b]` of a template; nothing is drawn where it has none."""
    return ALTERNATIVES.sub(lambda found: rng.choice(found[1].split("|")), template)


@dataclass(frozen=True)
class Choices(Generic[T]):
    """Ways to say one thing.

    An index counts through these groups in their order, so that what is added to the last leaves the others' alone.

    Attributes:
        training: for the training and the validation files.
        held_out: for the held-out files.
        more: for the training files alone, maybe with alternatives: see `settle`.
        more_held_out: for the held-out files; written by somebody who had not seen the others.
        later_held_out: the same, by others still, when what had been wrong of the older ones had shaped training's.
        various: for the training files alone, many, of many voices, and half of what is drawn there: by other authors,
            maybe with alternatives, or put together by a program.
    """

    training: tuple[T, ...]
    held_out: tuple[T, ...]
    more: tuple[T, ...] = ()
    more_held_out: tuple[T, ...] = ()
    later_held_out: tuple[T, ...] = ()
    various: tuple[T, ...] = ()

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> T:
        return self._all[index]

    def indices(self, split: Split) -> list[int]:
        """The indices of what a split may use."""
        training, held_out, more, more_held_out, later_held_out, various = self._ranges
        match split:
            case "train":
                return [*training, *more, *various]
            case "val":
                return [*training]
            case "held out":
                return [*held_out, *more_held_out, *later_held_out]

    def draw(self, split: Split, rng: Random, *, fits: Callable[[T], bool] = lambda _: True) -> int:
        """An index of what a split may use: in training half of the time one of the various, where there are any.

        Args:
            fits: what may be drawn.
        """
        *_, various = self._ranges
        is_various = split == "train" and bool(various) and rng.random() < VARIOUS_SHARE
        chosen = [index for index in self.indices(split) if (index in various) == is_various]
        return rng.choice([index for index in chosen if fits(self[index])])

    def author(self, index: int) -> int:
        """Who wrote what is held out: 0 the first author, who wrote what training shows, too, 1 the next, 2 later ones.

        Raises:
            ValueError: it is not held out.
        """
        _, held_out, _, *others, _ = self._ranges
        for author, own in enumerate((held_out, *others)):
            if index in own:
                return author
        raise ValueError(f"index {index} is of nothing that is held out.")

    @cached_property
    def _all(self) -> tuple[T, ...]:
        return tuple(chain(*self._groups))

    @cached_property
    def _ranges(self) -> list[range]:
        ends = [*accumulate(map(len, self._groups), initial=0)]
        return [range(*pair) for pair in pairwise(ends)]

    @property
    def _groups(self) -> tuple[tuple[T, ...], ...]:
        return self.training, self.held_out, self.more, self.more_held_out, self.later_held_out, self.various
