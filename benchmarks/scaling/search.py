"""How many slots strain a GPU least, and how many GPUs a load needs."""

import math
from dataclasses import replace

from scaling.model import CACHE_SHARE, Fleet, kv_tokens
from scaling.outlook import Outlook, assess
from scaling.popularity import Placement, Popularity

MOST_GPUS = 100_000
NUM_SLOT_CHOICES = 32


def with_best_slots(fleet: Fleet, num_gpus: int) -> Outlook:
    """With the number of slots that strains a GPU least; of equal ones, the fewest.

    Raises:
        ValueError: not even one slot fits.
    """
    if num_gpus < 1:
        raise ValueError(f"there are {num_gpus} GPUs; give 1 or more, or none to be told how many are needed.")
    kv_tokens(fleet, 1)
    placement = Placement.of(Popularity.zipf(fleet.adapters.number, fleet.adapters.zipf), num_gpus, fleet.routing)
    free = fleet.gpu.memory_bytes - fleet.gpu.context_bytes - fleet.base.num_bytes
    needed = fleet.traffic.longest * fleet.base.token_bytes / CACHE_SHARE + 1
    most = max(1, min(math.ceil(placement.num_adapters), int((free - needed) // fleet.adapters.slot_bytes(fleet.base))))
    choices = {round(most ** (index / NUM_SLOT_CHOICES)) for index in range(NUM_SLOT_CHOICES + 1)}
    outlooks = [assess(fleet, num_gpus, slots) for slots in sorted(choices)]
    return min(outlooks, key=lambda each: (bool(each.problems), round(each.strain, 2), each.num_slots))


def gpus_needed(fleet: Fleet) -> Outlook:
    """The fewest GPUs that work, and their slots.

    Raises:
        ValueError: something does not fit, or no number of GPUs is enough.
    """
    low, best = 0, with_best_slots(fleet, 1)
    while best.problems:
        low = best.num_gpus
        if low >= MOST_GPUS:
            raise ValueError(f"{low:,} GPUs are not enough: {best.problems[0]}")
        best = with_best_slots(fleet, min(2 * low, MOST_GPUS))
    while best.num_gpus - low > 1:
        middle = with_best_slots(fleet, (low + best.num_gpus) // 2)
        if middle.problems:
            low = middle.num_gpus
        else:
            best = middle
    return best


def at(fleet: Fleet, requests_per_s: float) -> Fleet:
    """The same under another load, of all GPUs together."""
    return replace(fleet, traffic=replace(fleet.traffic, requests_per_s=requests_per_s))
