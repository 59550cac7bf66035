"""A set of ways to say one thing, divided between the splits."""

import re
from dataclasses import dataclass
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

    An index counts through `training`, then `held_out`, then `more`: what is added keeps the indices that files hold.

    Attributes:
        training: for the training and the validation files.
        held_out: for the held-out files.
        more: for the training files alone, maybe with alternatives: see `settle`.
    """

    training: tuple[T, ...]
    held_out: tuple[T, ...]
    more: tuple[T, ...] = ()

    def __len__(self) -> int:
        return len(self.training) + len(self.held_out) + len(self.more)

    def __getitem__(self, index: int) -> T:
        return (*self.training, *self.held_out, *self.more)[index]

    def indices(self, split: Split) -> list[int]:
        """The indices of what a split may use."""
        num_training, num_more = len(self.training), len(self.more)
        training, held_out = range(num_training), range(num_training, len(self) - num_more)
        match split:
            case "train":
                return [*training, *range(len(self) - num_more, len(self))]
            case "val":
                return [*training]
            case "held out":
                return [*held_out]
