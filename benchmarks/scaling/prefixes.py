"""How much of its prompt a turn of a conversation finds in the KV cache of its GPU, which is LRU.

A turn's blocks stay for the characteristic time T after its answer, or until a later turn of the same conversation on
the same GPU uses them again. T is the one at which what stays fills the cache (Che's approximation, with the lifetimes
of conversations in place of independent requests). The system message, which all begin with, is always there.
"""

from dataclasses import dataclass

from scaling.parts import Traffic
from scaling.returns import Returns
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


def find_prefixes(traffic: Traffic, returns: Returns, *, requests_per_s: float, cache_tokens: float) -> Found:
    """
    Args:
        requests_per_s: of one GPU.
        cache_tokens: that its KV cache has room for.
    """
    turns = range(1, traffic.turns + 1)
    starts_per_s = requests_per_s / traffic.turns  # of conversations, by turns of each number that this GPU gets
    ends = [traffic.system_tokens + turn * traffic.turn_tokens for turn in turns]
    stale = 0 if traffic.keeps_active else traffic.turn_tokens  # what the next turn encodes anew, as base

    def occupied(lifetime_s: float) -> float:
        tokens = 0.0
        for turn, end in zip(turns, ends, strict=True):
            kept_s = returns.kept_s(traffic.turns - turn, lifetime_s)
            tokens += (end - traffic.system_tokens) * (returns.answer_s + kept_s) + stale * (lifetime_s - kept_s)
        return starts_per_s * tokens + traffic.system_tokens

    lifetime_s = 0.0 if occupied(0.0) >= cache_tokens else find_root(occupied, cache_tokens)
    computed = prompts = 0.0
    for turn in turns:
        prompt = ends[turn - 1] - traffic.answer_tokens
        found = 0.0
        for pauses, chance in returns.chances(turn - 1):
            kept = ends[turn - pauses - 1] - stale - traffic.system_tokens
            found += chance * returns.within(pauses, lifetime_s) * kept
        prompts += prompt
        computed += prompt - traffic.system_tokens - found
    mean = computed / traffic.turns
    return Found(1 - computed / prompts, mean, prompts / traffic.turns, lifetime_s)
