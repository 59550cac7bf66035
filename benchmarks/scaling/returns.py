"""When the next turn of a conversation comes to the same GPU, and so finds there what the one before it left.

Turns stay on a GPU, or each goes to any of n alike, so that the next one that comes to this GPU is m turns later with
probability (1/n) (1 - 1/n)**(m-1). Pauses are exponential, m of them an Erlang distribution.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from scaling.parts import Routing, Traffic


@dataclass(frozen=True)
class Returns:
    """
    Attributes:
        turns: of a conversation.
        think_s: from an answer to the next turn, on average.
        answer_s: from a request to the end of its answer.
        num_gpus: that turns are dealt to at random; 1 where a conversation stays.
    """

    turns: int
    think_s: float
    answer_s: float
    num_gpus: int

    @classmethod
    def of(cls, traffic: Traffic, answer_s: float, num_gpus: int, routing: Routing) -> Self:
        return cls(traffic.turns, traffic.think_s, answer_s, num_gpus if routing == "round-robin" else 1)

    def chances(self, most: int) -> Iterator[tuple[int, float]]:
        """Of the next turn on this GPU, that it is so many turns later; of the one before, that it was so many ago."""
        stay = 1 / self.num_gpus
        share = stay
        for pauses in range(1, most + 1):
            yield pauses, share
            share *= 1 - stay
            if share == 0:
                break

    def within(self, pauses: int, time_s: float) -> float:
        """That the turn after as many pauses, and the answers between, has come so soon after an answer."""
        return _erlang(pauses, time_s - (pauses - 1) * self.answer_s, self.think_s)

    def kept_s(self, left: int, lifetime_s: float) -> float:
        """How long what an answer leaves stays until a turn uses it again, unless it is given up before, on average.

        The mean of min(X, t) for an Erlang X of m stages is think_s times the sum of P(X_i < t), i = 1 .. m.

        Args:
            left: turns that the conversation still has.
            lifetime_s: after which it is given up.
        """
        kept_s, never = 0.0, 1.0
        for pauses, chance in self.chances(left):
            between_s = min((pauses - 1) * self.answer_s, lifetime_s)
            stages = range(1, pauses + 1)
            pause_s = self.think_s * sum(_erlang(each, lifetime_s - between_s, self.think_s) for each in stages)
            kept_s += chance * (between_s + pause_s)
            never -= chance
        return kept_s + never * lifetime_s

    def mean_kept_s(self, lifetime_s: float) -> float:
        """On average over the turns of a conversation."""
        return sum(self.kept_s(left, lifetime_s) for left in range(self.turns)) / self.turns

    def share_late(self, lifetime_s: float) -> float:
        """Of the turns, those that find nothing of the conversation's own: first ones, and after too long a time."""
        found = (
            chance * self.within(pauses, lifetime_s)
            for before in range(self.turns)
            for pauses, chance in self.chances(before)
        )
        return 1 - sum(found) / self.turns


def _erlang(stages: int, time_s: float, mean_s: float) -> float:
    """That as many exponential pauses are over by then."""
    if time_s <= 0:
        return 0.0
    x = time_s / mean_s
    term = total = math.exp(-x) if x < 700 else 0.0
    for index in range(1, stages):
        term *= x / index
        total += term
    return 1 - total
