"""What the model says from 1 to 1,000 GPUs and 10 to 100,000 adapters, and what it was held against."""

from dataclasses import replace
from typing import Any

import numpy as np

from molora.serving.cluster.config import RayConfig
from scaling.dealing import requests, share_of_busiest, share_that_stays
from scaling.measured import Measurements, compare
from scaling.model import Fleet
from scaling.outlook import Outlook, assess
from scaling.parts import ROUTINGS, Routing, Traffic
from scaling.popularity import Placement, Popularity
from scaling.prefixes import find_prefixes
from scaling.real_slots import same_hits
from scaling.returns import Returns
from scaling.search import at, gpus_needed, with_best_slots
from scaling.simulate import prefix_hit_rate, slot_hit_rate

GPUS = (1, 3, 10, 30, 100, 300, 1000)
ADAPTERS = (10, 100, 1000, 10_000, 100_000)
REQUESTS_PER_S_OF_A_GPU = 8.0
LOADS = (5.0, 50.0, 500.0, 5000.0)  # requests a second of all GPUs
SLOTS = (8, 16, 32, 64, 128, 256, 512)
MANY_KEYS = 4_000_000
DIGITS = 4
KEPT = (
    *("num_gpus", "routing", "num_slots", "slots_bytes", "kv_bytes", "num_asked_adapters", "slot_hit_rate", "loading"),
    *("load_bytes_per_s", "prefix_hit_rate", "batch", "token_s", "first_token_s", "computing"),
)


def with_adapters(fleet: Fleet, number: int, routing: Routing) -> Fleet:
    return replace(fleet, adapters=replace(fleet.adapters, number=number), routing=routing)


def sweep(fleet: Fleet) -> list[dict[str, Any]]:
    """Each GPU with `REQUESTS_PER_S_OF_A_GPU`, and with the slots that strain it least."""
    rows = []
    for routing in ROUTINGS:
        for number in ADAPTERS:
            for num_gpus in GPUS:
                loaded = at(with_adapters(fleet, number, routing), num_gpus * REQUESTS_PER_S_OF_A_GPU)
                rows.append(_row(with_best_slots(loaded, num_gpus), number))
    return rows


def needed(fleet: Fleet) -> list[dict[str, Any]]:
    """The fewest GPUs for loads."""
    return [
        {"requests_per_s": load, **_row(gpus_needed(at(with_adapters(fleet, number, routing), load)), number)}
        for routing in ROUTINGS
        for load in LOADS
        for number in ADAPTERS
    ]


def slots_against_cache(fleet: Fleet) -> list[dict[str, Any]]:
    """One GPU with ever more slots: what they take from the cache."""
    return [_row(assess(at(fleet, REQUESTS_PER_S_OF_A_GPU), 1, slots), fleet.adapters.number) for slots in SLOTS]


def points(measurements: Measurements) -> list[dict[str, Any]]:
    return [
        {
            "what": point.what,
            "unit": point.unit,
            "measured": _short(point.measured),
            "predicted": _short(point.predicted),
            "error": _short(point.error),
            "fitted": point.fitted,
        }
        for point in compare(measurements)
    ]


def slot_checks(seed: int) -> list[dict[str, Any]]:
    """Che's approximation against LRU, request by request: of single questions, and of conversations."""
    cases: list[tuple[int, int, float, int, Routing, int, float]] = [
        (100, 10, 1.0, 1, "affinity", 1, 0.0),
        (1000, 50, 1.0, 8, "round-robin", 1, 0.0),
        (1000, 50, 1.0, 1, "affinity", 4, 2.0),
        (1000, 50, 1.0, 1, "affinity", 4, 10.0),
        (1000, 200, 0.8, 1, "affinity", 4, 2.0),
        (1000, 50, 0.0, 4, "affinity", 4, 2.0),
        (1000, 50, 1.0, 8, "affinity", 4, 2.0),
        (1000, 50, 1.0, 2, "round-robin", 4, 2.0),
        (1000, 50, 1.0, 8, "round-robin", 4, 2.0),
        (10_000, 100, 1.2, 8, "affinity", 4, 2.0),
        (1000, 50, 1.0, 2, "prefix", 4, 2.0),
        (1000, 50, 1.0, 8, "prefix", 4, 2.0),
        (1000, 100, 1.0, 8, "prefix", 4, 20.0),
        (10_000, 100, 1.2, 8, "prefix", 4, 2.0),
    ]
    rows = []
    for number, num_slots, zipf, num_gpus, routing, turns, answer_s in cases:
        traffic = Traffic(requests_per_s=num_gpus, turns=turns)
        how: dict[str, Any] = {"number": number, "zipf": zipf, "num_gpus": num_gpus, "routing": routing}
        asked = requests(traffic, **how, answer_s=answer_s, num_requests=100_000, seed=seed)
        simulated = slot_hit_rate(asked, num_gpus=num_gpus, num_slots=num_slots, held_s=answer_s)
        placement = Placement.of(Popularity.zipf(number, zipf), num_gpus, routing)
        model = placement.slot_hit_rate(num_slots, Returns.of(traffic, answer_s, num_gpus, routing), 1.0)
        case = {"num_slots": num_slots, "turns": turns, "answer_s": answer_s}
        rows.append({**how, **case, **_pair(simulated, model)})
    return rows


def prefix_checks(seed: int) -> list[dict[str, Any]]:
    """The closed form against the engine's block managers, on conversations of a small scale.

    The first case is of a cache that holds about ten conversations, the others of one that holds forty and more.
    """
    cases: list[tuple[float, int, Routing, int]] = [
        (1.0, 1, "affinity", 3000),
        (4.0, 1, "affinity", 12_000),
        (4.0, 1, "affinity", 32_000),
        (4.0, 1, "affinity", 80_000),
        (4.0, 4, "round-robin", 6000),
        (4.0, 4, "round-robin", 16_000),
        (4.0, 4, "prefix", 16_000),
        (16.0, 4, "prefix", 32_000),
    ]
    rows = []
    for keeps_active in (False, True):
        for requests_per_s, num_gpus, routing, cache_tokens in cases:
            traffic = Traffic(
                requests_per_s=requests_per_s,
                system_tokens=16,
                user_tokens=24,
                answer_tokens=40,
                keeps_active=keeps_active,
            )
            how: dict[str, Any] = {"num_gpus": num_gpus, "answer_s": 5.0}
            asked = requests(traffic, **how, number=1, zipf=1.0, routing=routing, num_requests=8000, seed=seed)
            simulated = prefix_hit_rate(traffic, asked, **how, cache_tokens=cache_tokens, block_size=8, seed=seed)
            returns = Returns.of(traffic, 5.0, num_gpus, routing)
            own_per_s = requests_per_s / num_gpus
            model = find_prefixes(traffic, returns, requests_per_s=own_per_s, cache_tokens=cache_tokens).hit_rate
            case = {"requests_per_s": requests_per_s, "keeps_active": keeps_active, "routing": routing}
            rows.append({**how, **case, "cache_tokens": cache_tokens, **_pair(simulated, model)})
    return rows


def stays(seed: int) -> list[dict[str, Any]]:
    """Later turns that the Ray router's code sends where the one before went, with what it remembers by default and
    with more; each GPU has `REQUESTS_PER_S_OF_A_GPU`.
    """
    rows = []
    for num_gpus in (4, 16, 64):
        for max_keys in (RayConfig().max_prefix_keys, MANY_KEYS):
            traffic = Traffic(requests_per_s=num_gpus * REQUESTS_PER_S_OF_A_GPU)
            how: dict[str, Any] = {"num_gpus": num_gpus, "number": 1, "zipf": 1.0, "routing": "prefix"}
            num_requests = round(300 * traffic.requests_per_s)
            asked = requests(traffic, **how, answer_s=1.7, num_requests=num_requests, seed=seed, max_keys=max_keys)
            rows.append({"num_gpus": num_gpus, "max_keys": max_keys, "stays": _short(share_that_stays(asked))})
    return rows


def engine_slots(seed: int) -> dict[str, int]:
    how: dict[str, Any] = {"number": 40, "zipf": 1.0, "num_gpus": 1, "routing": "affinity"}
    asked = requests(Traffic(requests_per_s=1), **how, answer_s=4.0, num_requests=2000, seed=seed)
    return same_hits(asked, number=40, num_slots=12, held_s=4.0)


def balance() -> list[dict[str, Any]]:
    """The busiest GPU's requests over the mean's, where each adapter's are shared out alike over its GPUs."""
    return [
        {"num_gpus": num_gpus, "number": number, "busiest": _short(share_of_busiest(number, 1.0, num_gpus))}
        for num_gpus in (10, 100, 1000)
        for number in (10, 100, 1000, 10_000)
    ]


def _pair(simulated: float, model: float) -> dict[str, float]:
    return {"simulated": _short(simulated), "model": _short(model), "difference": _short(model - simulated)}


def _row(outlook: Outlook, number: int) -> dict[str, Any]:
    values = outlook.to_json()
    return {
        "number": number,
        **{name: _short(values[name]) for name in KEPT},
        "works": not outlook.problems,
    }


def _short(value: Any) -> Any:
    return float(np.format_float_positional(value, DIGITS, fractional=False)) if isinstance(value, float) else value
