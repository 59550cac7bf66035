"""Caches run request by request, against the closed forms: adapter slots, and blocks of keys and values.

`SlotCache` is LRU as `molora.slots.AdapterSlots` keeps it, whose own code is run on the same requests in
`real_slots.py`. Keys and values are kept by the engine's own `BlockManager`.
"""

import heapq
import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from molora.serving.block_manager import BlockManager, BlockTable, Source
from scaling.parts import Traffic
from scaling.popularity import FloatArray, Routing


@dataclass(frozen=True)
class Asked:
    """A request for an adapter, in the order of time."""

    time_s: float
    adapter: int
    gpu: int


def requests(
    *, number: int, zipf: float, num_gpus: int, routing: Routing, num_requests: int, seed: int
) -> Iterator[Asked]:
    """One request a second, on average, each independent of the others.

    With affinity the most popular adapters are placed first, each on as many GPUs as its share needs and there on those
    that are asked least so far.
    """
    draw = np.random.default_rng(seed)
    shares_A = zipf_shares(number, zipf)
    homes = place(shares_A, num_gpus) if routing == "affinity" else [list(range(num_gpus))] * number
    adapters = draw.choice(number, size=num_requests, p=shares_A)
    times = np.cumsum(draw.exponential(size=num_requests))
    for time_s, adapter in zip(times.tolist(), adapters.tolist(), strict=True):
        yield Asked(time_s, adapter, homes[adapter][int(draw.integers(len(homes[adapter])))])


def zipf_shares(number: int, zipf: float) -> FloatArray:
    shares_A = np.arange(1, number + 1, dtype=np.float64) ** -zipf
    normed_A: FloatArray = shares_A / shares_A.sum()
    return normed_A


def place(shares_A: FloatArray, num_gpus: int) -> list[list[int]]:
    """The GPUs of each adapter, most popular first."""
    loads = [(0.0, gpu) for gpu in range(num_gpus)]
    homes = []
    for share in shares_A:
        count = int(np.ceil(num_gpus * share))
        taken = [heapq.heappop(loads) for _ in range(count)]
        homes.append([gpu for _, gpu in taken])
        for load, gpu in taken:
            heapq.heappush(loads, (load + share / count, gpu))
    return homes


def share_of_busiest(number: int, zipf: float, num_gpus: int) -> float:
    """Of the requests, those of the busiest GPU, over an equal share."""
    shares_A = zipf_shares(number, zipf)
    loads = np.zeros(num_gpus)
    for share, homes in zip(shares_A, place(shares_A, num_gpus), strict=True):
        loads[homes] += share / len(homes)
    return float(loads.max() * num_gpus)


class SlotCache:
    """The slots of one GPU: a running request holds its adapter's, and of the others the first to be free goes."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def acquire(self, adapter: int) -> bool:
        """Whether it was found.

        Raises:
            RuntimeError: all slots are held.
        """
        found = adapter in self._users or adapter in self._idle
        if not found and len(self._users) + len(self._idle) >= self.num_slots:
            if not self._idle:
                raise RuntimeError(f"all {self.num_slots} slots are held.")
            self._idle.popitem(last=False)
        self._idle.pop(adapter, None)
        self._users[adapter] = self._users.get(adapter, 0) + 1
        return found

    def release(self, adapter: int) -> None:
        self._users[adapter] -= 1
        if not self._users[adapter]:
            del self._users[adapter]
            self._idle[adapter] = None


def slot_hit_rate(asked: list[Asked], *, num_gpus: int, num_slots: int, held_s: float = 0.0) -> float:
    """Of the second half of the requests; the first one fills the slots."""
    caches = [SlotCache(num_slots) for _ in range(num_gpus)]
    running: list[tuple[float, int, int]] = []
    num_found = num_counted = 0
    for index, request in enumerate(asked):
        while running and running[0][0] <= request.time_s:
            _, gpu, adapter = heapq.heappop(running)
            caches[gpu].release(adapter)
        found = caches[request.gpu].acquire(request.adapter)
        heapq.heappush(running, (request.time_s + held_s, request.gpu, request.adapter))
        if 2 * index >= len(asked):
            num_found += found
            num_counted += 1
    return num_found / num_counted


def prefix_hit_rate(
    traffic: Traffic,
    *,
    cache_tokens: int,
    block_size: int,
    answer_s: float,
    num_gpus: int,
    num_conversations: int,
    seed: int,
) -> float:
    """Of the prompts' tokens, those that the block managers find.

    The first half of the conversations fills the cache, and the last tenth keeps it full while the others end.

    traffic.requests_per_s is that of all GPUs. Turns are dealt to them at random; one GPU is affinity. An answer's last
    token is not in the cache, and a prompt's last one is computed whatever is found: both are among what is counted.
    """
    draw = random.Random(seed)
    managers = [BlockManager(cache_tokens // block_size, block_size) for _ in range(num_gpus)]
    system = [draw.randrange(1 << 30) for _ in range(traffic.system_tokens)]
    events: list[tuple[float, int, str, int, object]] = []
    time_s = 0.0
    for number in range(num_conversations):
        time_s += draw.expovariate(traffic.requests_per_s / traffic.turns)
        events.append((time_s, number, "begin", 1, list(system)))
    heapq.heapify(events)
    num_found = num_asked = 0
    while events:
        now_s, number, what, turn, state = heapq.heappop(events)
        if what == "begin":
            ids = [*state, *(draw.randrange(1 << 30) for _ in range(traffic.user_tokens))]  # type: ignore[misc]
            start = traffic.system_tokens if traffic.keeps_active else len(ids) - traffic.user_tokens
            manager = draw.choice(managers)
            table = manager.open(ids, Source(start, b"adapter"))
            if 0.5 <= number / num_conversations < 0.9:
                num_found += table.num_cached
                num_asked += len(ids)
            answer = [draw.randrange(1 << 30) for _ in range(traffic.answer_tokens)]
            manager.step += 1
            if not manager.grow(table, len(ids) + len(answer)):
                raise RuntimeError(f"a cache of {cache_tokens} tokens has no room for what runs at once.")
            heapq.heappush(events, (now_s + answer_s, number, "end", turn, (manager, table, ids + answer)))
        else:
            manager, table, ids = state  # type: ignore[misc]
            finish(manager, table, ids)
            if turn < traffic.turns:
                think_s = draw.expovariate(1 / traffic.think_s)
                heapq.heappush(events, (now_s + think_s, number, "begin", turn + 1, ids))
    return num_found / num_asked


def finish(manager: BlockManager, table: BlockTable, ids: list[int]) -> None:
    manager.copied(table)
    manager.commit(table, ids, len(ids))
    manager.close(table)
