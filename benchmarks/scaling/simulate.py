"""Caches run request by request, against the closed forms: adapter slots, and blocks of keys and values.

`SlotCache` is LRU as `molora.slots.AdapterSlots` keeps it, whose own code is run on the same requests in
`real_slots.py`. Keys and values are kept by the engine's own `BlockManager`.
"""

import heapq
import random
from collections import OrderedDict, deque

from molora.serving.block_manager import BlockManager, BlockTable, Source
from scaling.dealing import Asked
from scaling.parts import Traffic


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
    asked: list[Asked],
    *,
    num_gpus: int,
    cache_tokens: int,
    block_size: int,
    answer_s: float,
    seed: int,
) -> float:
    """Of the prompts' tokens of the second half of the requests, those that the block managers find.

    An answer's last token is not in the cache, and a prompt's last one is computed whatever is found: both are among
    what is counted.
    """
    draw = random.Random(seed)
    managers = [BlockManager(cache_tokens // block_size, block_size) for _ in range(num_gpus)]

    def drawn(num_tokens: int) -> list[int]:
        return [draw.randrange(1 << 30) for _ in range(num_tokens)]

    system = drawn(traffic.system_tokens)
    said: dict[int, list[int]] = {}
    running: deque[tuple[float, int, BlockTable, list[int]]] = deque()
    num_found = num_counted = 0
    for index, request in enumerate(asked):
        while running and running[0][0] <= request.time_s:
            _, gpu, table, ids = running.popleft()
            finish(managers[gpu], table, ids)
        manager = managers[request.gpu]
        ids = said.pop(request.conversation, system) + drawn(traffic.user_tokens)
        start = traffic.system_tokens if traffic.keeps_active else len(ids) - traffic.user_tokens
        table = manager.open(ids, Source(start, b"adapter"))
        if 2 * index >= len(asked):
            num_found += table.num_cached
            num_counted += len(ids)
        ids = ids + drawn(traffic.answer_tokens)
        manager.step += 1
        if not manager.grow(table, len(ids)):
            raise RuntimeError(f"a cache of {cache_tokens} tokens has no room for what runs at once.")
        running.append((request.time_s + answer_s, request.gpu, table, ids))
        if request.turn < traffic.turns:
            said[request.conversation] = ids
    return num_found / num_counted


def finish(manager: BlockManager, table: BlockTable, ids: list[int]) -> None:
    manager.copied(table)
    manager.commit(table, ids, len(ids))
    manager.close(table)
