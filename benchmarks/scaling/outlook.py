"""What comes of a load, on average over the GPUs that share it, and whether that works."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from scaling.model import Fleet, kv_tokens, load_s, settle
from scaling.parts import Routing
from scaling.popularity import Placement, Popularity

MOST_COMPUTING = 0.8  # of what a GPU can answer: a burst of 1.25 times the requests is to be answered
MOST_LOADING = 0.5  # of a server's time: one adapter is loaded at a time


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Of one GPU of num_gpus, on average over them.

    Attributes:
        kv_tokens: that its cache has room for.
        num_asked_adapters: that it is ever asked for.
        slot_hit_rate: of the requests, those that find their adapter in a slot.
        loads_per_s, load_s: adapters that are read, and how long each takes.
        loading: share of the time in which an adapter is being loaded.
        load_bytes_per_s: read from disk or network, and copied to the GPU.
        num_busy_slots: that running requests hold, on average.
        prefix_hit_rate: of the prompts' tokens, those whose keys and values are found.
        batch: sequences that run at once.
        token_s: between two tokens of an answer, with steps that read prompts.
        first_token_s: from a request to its first token, the wait for adapters included; infinite where requests come
            faster than they are answered, or adapters than they are loaded.
        max_requests_per_s: that it can answer, if only its computing counts, with as much found in the cache as now.
        computing: requests over the most.
        problems: why it does not work; empty if it does.
    """

    num_gpus: int
    num_slots: int
    routing: Routing
    base_bytes: float
    slots_bytes: float
    kv_bytes: float
    kv_tokens: int
    requests_per_s: float
    num_asked_adapters: float
    slot_hit_rate: float
    loads_per_s: float
    load_s: float
    loading: float
    load_bytes_per_s: float
    num_busy_slots: float
    prefix_hit_rate: float
    computed_tokens: float
    batch: float
    token_s: float
    first_token_s: float
    tokens_per_s: float
    max_requests_per_s: float
    computing: float
    problems: tuple[str, ...]

    @property
    def strain(self) -> float:
        """Of computing and loading together, each over the most that is to be planned with."""
        return self.computing / MOST_COMPUTING + self.loading / MOST_LOADING

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: it is None."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}


def assess(fleet: Fleet, num_gpus: int, num_slots: int) -> Outlook:
    """What comes of a load.

    Raises:
        ValueError: something does not fit, however small the load.
    """
    if num_gpus < 1 or num_slots < 1:
        raise ValueError(f"there must be a GPU and a slot at least, got {num_gpus} and {num_slots}.")
    adapters, base, room = fleet.adapters, fleet.base, kv_tokens(fleet, num_slots)
    placement = Placement.of(Popularity.zipf(adapters.number, adapters.zipf), num_gpus, fleet.routing)
    requests_per_s = fleet.traffic.requests_per_s / num_gpus
    steady = settle(fleet, placement, requests_per_s=requests_per_s, room=room, num_gpus=num_gpus)
    burst_per_s = requests_per_s / MOST_COMPUTING
    burst = settle(fleet, placement, requests_per_s=burst_per_s, room=room, num_gpus=num_gpus)
    computing = requests_per_s / steady.max_requests_per_s
    hit_rate = placement.slot_hit_rate(num_slots, steady.returns, requests_per_s)
    loads_per_s, each_s = requests_per_s * (1 - hit_rate), load_s(fleet)
    loading, busy = loads_per_s * each_s, placement.num_asked(steady.batch)
    first_s = math.inf
    if loading < 1 and computing < 1:
        wait_s = loading * each_s / 2 / (1 - loading)  # M/D/1: until one's own is loaded
        reading_s = steady.reading_s / (1 - requests_per_s * steady.reading_s)
        first_s = (1 - hit_rate) * (wait_s + each_s) + reading_s + steady.token_s
    problems = []
    if burst_per_s > burst.max_requests_per_s:
        problems.append(
            f"a GPU gets {requests_per_s:.3g} requests a second, and a burst of {burst_per_s:.3g} is more than the "
            f"{burst.max_requests_per_s:.3g} that it can answer then. Take more GPUs."
        )
    if loading > MOST_LOADING:
        problems.append(
            f"adapters are being loaded in {loading:.0%} of the time, one after the other; {MOST_LOADING:.0%} are to "
            "be planned with. Take more slots or GPUs, or adapters of a lower rank."
        )
    if num_slots < placement.num_adapters and busy + 3 * math.sqrt(busy) > num_slots:
        problems.append(
            f"running requests hold {busy:.0f} of {num_slots} slots on average, so that some find none free. Take more."
        )
    return Outlook(
        num_gpus=num_gpus,
        num_slots=num_slots,
        routing=fleet.routing,
        base_bytes=base.num_bytes,
        slots_bytes=num_slots * adapters.slot_bytes(base),
        kv_bytes=room * base.token_bytes,
        kv_tokens=room,
        requests_per_s=requests_per_s,
        num_asked_adapters=placement.num_adapters,
        slot_hit_rate=hit_rate,
        loads_per_s=loads_per_s,
        load_s=each_s,
        loading=loading,
        load_bytes_per_s=loads_per_s * adapters.num_bytes(base),
        num_busy_slots=busy,
        prefix_hit_rate=steady.found.hit_rate,
        computed_tokens=steady.found.computed_tokens,
        batch=steady.batch,
        token_s=steady.token_s,
        first_token_s=first_s,
        tokens_per_s=min(requests_per_s, steady.max_requests_per_s) * fleet.traffic.answer_tokens,
        max_requests_per_s=steady.max_requests_per_s,
        computing=computing,
        problems=tuple(problems),
    )
