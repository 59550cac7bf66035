"""Conversations as they come, and to which GPU each of their turns goes."""

import heapq
from dataclasses import dataclass

import numpy as np

from molora.serving.cluster.config import RayConfig
from scaling.by_prefix import PrefixGateway
from scaling.parts import Routing, Traffic
from scaling.popularity import FloatArray


@dataclass(frozen=True)
class Asked:
    """A request for an adapter: a turn of a conversation, counted from 1."""

    time_s: float
    adapter: int
    gpu: int
    conversation: int
    turn: int


def requests(
    traffic: Traffic,
    *,
    number: int,
    zipf: float,
    num_gpus: int,
    routing: Routing,
    answer_s: float,
    num_requests: int,
    seed: int,
    max_keys: int = RayConfig().max_prefix_keys,
) -> list[Asked]:
    """The first ones of all conversations, in the order of time. Conversations begin independently of each other.

    With affinity the most popular adapters are placed first, each on as many GPUs as its share needs and there on those
    that are asked least so far; a conversation stays on one of them. By prefix, the Ray router's own code decides.
    """
    draw = np.random.default_rng(seed)
    shares_A = zipf_shares(number, zipf)
    homes = place(shares_A, num_gpus)
    gateway = PrefixGateway(traffic, num_gpus, answer_s, draw, max_keys)
    adapters = draw.choice(number, size=num_requests, p=shares_A).tolist()
    begins_s = np.cumsum(draw.exponential(traffic.turns / traffic.requests_per_s, size=num_requests)).tolist()
    coming: list[tuple[float, int, int, int]] = [(begins_s[0], 0, 1, -1)]
    asked: list[Asked] = []
    while len(asked) < num_requests:
        time_s, conversation, turn, gpu = heapq.heappop(coming)
        adapter = adapters[conversation]
        if turn == 1 and conversation + 1 < num_requests:
            heapq.heappush(coming, (begins_s[conversation + 1], conversation + 1, 1, -1))
        if routing == "round-robin":
            gpu = int(draw.integers(num_gpus))
        elif routing == "prefix":
            gpu = gateway.gpu_of(time_s, conversation, turn)
        elif turn == 1:
            gpu = int(draw.choice(homes[adapter]))
        asked.append(Asked(time_s, adapter, gpu, conversation, turn))
        if turn < traffic.turns:
            next_s = time_s + answer_s + float(draw.exponential(traffic.think_s))
            heapq.heappush(coming, (next_s, conversation, turn + 1, gpu))
    return asked


def share_that_stays(asked: list[Asked]) -> float:
    """Of the later turns in the second half, those that go where the one before went."""
    before: dict[int, int] = {}
    stays = []
    for request in asked:
        stays.append(before.get(request.conversation) == request.gpu if request.turn > 1 else None)
        before[request.conversation] = request.gpu
    later = [each for each in stays[len(asked) // 2 :] if each is not None]
    return sum(later) / len(later)


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
