"""How much of its prompt a turn of a conversation finds in the KV cache of its GPU, which is LRU.

A turn's blocks stay for the characteristic time T after its answer, or until a later turn of the same conversation on
the same GPU uses them again. T is the one at which what stays fills the cache (Che's approximation, with the lifetimes
of conversations in place of independent requests). The system message, which all begin with, is always there.

Turns go to the same GPU (affinity), or each to any of n alike, so that the next one that comes to this GPU is m turns
later with probability (1/n) (1 - 1/n)**(m-1). Pauses are exponential, m of them an Erlang distribution.
"""

import math
from dataclasses import dataclass

from scaling.parts import Traffic
from scaling.roots import find_root


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        hit_rate: of the prompts' tokens, those that are found.
        computed_tokens: of a turn's prompt, that are not, on average.
        prompt_tokens: of a turn, on average.
        lifetime_s: T, for which nobody's blocks are given up.
    """

    hit_rate: float
    computed_tokens: float
    prompt_tokens: float
    lifetime_s: float


def find_prefixes(
    traffic: Traffic, *, requests_per_s: float, cache_tokens: float, answer_s: float, num_gpus: int = 1
) -> Found:
    """
    Args:
        requests_per_s: of one GPU.
        cache_tokens: that its KV cache has room for.
        answer_s: from a request to the end of its answer.
        num_gpus: that a conversation's turns are dealt to at random; 1 is affinity.
    """
    stay = 1 / num_gpus
    turns = range(1, traffic.turns + 1)
    starts_per_s = requests_per_s / traffic.turns  # of conversations, by turns of each number that this GPU gets
    ends = [traffic.system_tokens + turn * traffic.turn_tokens for turn in turns]
    stale = 0 if traffic.keeps_active else traffic.turn_tokens  # what the next turn encodes anew, as base

    def occupied(lifetime_s: float) -> float:
        tokens = 0.0
        for turn, end in zip(turns, ends, strict=True):
            kept_s, share = 0.0, 1.0
            for later in range(1, traffic.turns - turn + 1):
                kept_s += share * stay * _kept_s(later, lifetime_s, traffic.think_s, answer_s)
                share *= 1 - stay
                if share == 0:
                    break
            kept_s += share * lifetime_s
            tokens += (end - traffic.system_tokens) * (answer_s + kept_s) + stale * (lifetime_s - kept_s)
        return starts_per_s * tokens + traffic.system_tokens

    lifetime_s = 0.0 if occupied(0.0) >= cache_tokens else find_root(occupied, cache_tokens)
    computed = prompts = 0.0
    for turn in turns:
        prompt = ends[turn - 1] - traffic.answer_tokens
        found, share = 0.0, 1.0
        for pauses in range(1, turn):
            there = _erlang(pauses, lifetime_s - (pauses - 1) * answer_s, traffic.think_s)
            kept = ends[turn - pauses - 1] - stale - traffic.system_tokens
            found += share * stay * there * kept
            share *= 1 - stay
        prompts += prompt
        computed += prompt - traffic.system_tokens - found
    mean = computed / traffic.turns
    return Found(1 - computed / prompts, mean, prompts / traffic.turns, lifetime_s)


def _kept_s(pauses: int, lifetime_s: float, think_s: float, answer_s: float) -> float:
    """How long blocks stay that are used again after as many pauses and the answers between, unless given up before.

    The mean of min(X, t) for an Erlang X of m stages is think_s times the sum of P(X_i < t), i = 1 .. m.
    """
    between_s = (pauses - 1) * answer_s
    rest_s = lifetime_s - between_s
    if rest_s <= 0:
        return lifetime_s
    return between_s + think_s * sum(_erlang(stages, rest_s, think_s) for stages in range(1, pauses + 1))


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
