"""Who asks for which adapter, where adapters lie, and how often one is found in a slot.

Slots are LRU. Che's approximation (Che, Tung, Wang 2002, "Hierarchical Web Caching Systems", equations 1 to 5): an
adapter that is asked for at the rate r stays found with probability 1 - exp(-r T), where the characteristic time T is
the one at which as many are found, on average, as there are slots.

Requests are turns of conversations, each with one adapter, which begin independently of each other. A turn makes its
adapter stay found for T, or until the conversation's next one on this GPU: for m(T), on average. The chance that no
turn of others has asked for it is then exp(-r m(T)), as if r m(T) of them came independently, and a turn lacks its
adapter if its own conversation has left none, either. A running request holds its slot, and T counts from its end.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from scaling.parts import Routing
from scaling.returns import Returns
from scaling.roots import find_root

FloatArray = NDArray[np.float64]
NUM_EXACT = 1000  # of the most popular adapters; the others are put together by 1 % of their rank
GROWTH = 1.01


@dataclass(frozen=True)
class Popularity:
    """Legend: A adapters or groups of adapters that are alike.

    Attributes:
        shares_A: of all requests, of one adapter of each group.
        counts_A: adapters of each group.
    """

    shares_A: FloatArray
    counts_A: FloatArray

    @classmethod
    def zipf(cls, number: int, exponent: float) -> Self:
        """Shares of 1 / rank**exponent."""
        edges = [*range(1, min(number, NUM_EXACT) + 1)]
        while edges[-1] < number:
            edges.append(min(number, max(edges[-1] + 1, math.floor(edges[-1] * GROWTH))))
        last = np.array(edges, dtype=np.float64)
        counts_A = np.diff(last, prepend=0.0)
        middle = last - (counts_A - 1) / 2
        shares_A = middle**-exponent
        return cls(shares_A / (shares_A @ counts_A), counts_A)


@dataclass(frozen=True)
class Placement:
    """On how many GPUs each adapter is asked for, and so what one GPU is asked for, on average over GPUs.

    Attributes:
        hosts_A: GPUs that are asked for an adapter: all; with affinity as many as its share of the requests needs, and
            at least one.
        rates_A: requests for it, on a GPU that is asked for it at all, over all requests of that GPU.
        weights_A: adapters of each group that one GPU is asked for.
    """

    hosts_A: FloatArray
    rates_A: FloatArray
    weights_A: FloatArray

    @classmethod
    def of(cls, popularity: Popularity, num_gpus: int, routing: Routing) -> Self:
        everywhere = np.full_like(popularity.shares_A, num_gpus)
        hosts_A = np.ceil(num_gpus * popularity.shares_A) if routing == "affinity" else everywhere
        return cls(hosts_A, num_gpus * popularity.shares_A / hosts_A, popularity.counts_A * hosts_A / num_gpus)

    @property
    def num_adapters(self) -> float:
        """That one GPU is asked for."""
        return float(self.weights_A.sum())

    def num_asked(self, num_requests: float) -> float:
        """Different adapters among as many requests of one GPU, on average."""
        return float(self.weights_A @ -np.expm1(-self.rates_A * num_requests))

    def slot_hit_rate(self, num_slots: int, returns: Returns, requests_per_s: float) -> float:
        """Of the requests of one GPU, those that find their adapter in one of its slots; all where all adapters fit."""
        if num_slots >= self.num_adapters:
            return 1.0
        num_requests = find_root(self.num_asked, num_slots)

        def num_kept(lifetime_s: float) -> float:
            return requests_per_s * (returns.answer_s + returns.mean_kept_s(lifetime_s))

        lifetime_s = 0.0 if num_kept(0.0) >= num_requests else find_root(num_kept, num_requests)
        lacked_by_others = float((self.weights_A * self.rates_A) @ np.exp(-self.rates_A * num_requests))
        return 1 - returns.share_late(lifetime_s) * lacked_by_others
