"""What the model says from 1 to 1,000 GPUs and 10 to 100,000 adapters, and what it was held against."""

from dataclasses import replace
from typing import Any

import numpy as np

from scaling.measured import Measurements, compare
from scaling.model import Fleet
from scaling.outlook import Outlook, assess
from scaling.parts import Traffic
from scaling.popularity import ROUTINGS, Placement, Popularity, Routing
from scaling.prefixes import find_prefixes
from scaling.real_slots import same_hits
from scaling.search import at, gpus_needed, with_best_slots
from scaling.simulate import prefix_hit_rate, requests, share_of_busiest, slot_hit_rate

GPUS = (1, 3, 10, 30, 100, 300, 1000)
ADAPTERS = (10, 100, 1000, 10_000, 100_000)
REQUESTS_PER_S_OF_A_GPU = 8.0
LOADS = (5.0, 50.0, 500.0, 5000.0)  # requests a second of all GPUs
SLOTS = (8, 16, 32, 64, 128, 256, 512)
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
    """Che's approximation against LRU, request by request."""
    cases: list[tuple[int, int, float, int, Routing, float]] = [
        (100, 10, 1.0, 1, "affinity", 0.0),
        (1000, 50, 1.0, 1, "affinity", 0.0),
        (1000, 50, 1.0, 1, "affinity", 10.0),
        (1000, 200, 0.8, 1, "affinity", 0.0),
        (1000, 50, 0.0, 4, "affinity", 0.0),
        (1000, 50, 1.0, 8, "affinity", 0.0),
        (1000, 50, 1.0, 8, "round-robin", 0.0),
        (10_000, 100, 1.2, 8, "affinity", 0.0),
    ]
    rows = []
    for number, num_slots, zipf, num_gpus, routing, held_s in cases:
        how: dict[str, Any] = {"number": number, "zipf": zipf, "num_gpus": num_gpus, "routing": routing}
        asked = list(requests(**how, num_requests=100_000, seed=seed))
        simulated = slot_hit_rate(asked, num_gpus=num_gpus, num_slots=num_slots, held_s=held_s)
        model = Placement.of(Popularity.zipf(number, zipf), num_gpus, routing).slot_hit_rate(num_slots)
        rows.append({**how, "num_slots": num_slots, "held_s": held_s, **_pair(simulated, model)})
    return rows


def prefix_checks(seed: int) -> list[dict[str, Any]]:
    """The closed form against the engine's block managers, on conversations of a small scale.

    The first case is of a cache that holds about ten conversations, the others of one that holds forty and more.
    """
    rows = []
    for keeps_active in (False, True):
        for requests_per_s, num_gpus, cache_tokens in (
            (1.0, 1, 3000),
            (4.0, 1, 12_000),
            (4.0, 1, 32_000),
            (4.0, 1, 80_000),
            (4.0, 4, 6000),
            (4.0, 4, 16_000),
        ):
            traffic = Traffic(
                requests_per_s=requests_per_s,
                system_tokens=16,
                user_tokens=24,
                answer_tokens=40,
                keeps_active=keeps_active,
            )
            how: dict[str, Any] = {"cache_tokens": cache_tokens, "answer_s": 5.0, "num_gpus": num_gpus}
            simulated = prefix_hit_rate(traffic, block_size=8, num_conversations=1600, seed=seed, **how)
            model = find_prefixes(traffic, requests_per_s=requests_per_s / num_gpus, **how).hit_rate
            case = {"requests_per_s": requests_per_s, "keeps_active": keeps_active}
            rows.append({**how, **case, **_pair(simulated, model)})
    return rows


def engine_slots(seed: int) -> dict[str, int]:
    how: dict[str, Any] = {"number": 40, "zipf": 1.0, "num_gpus": 1, "routing": "affinity"}
    return same_hits(list(requests(**how, num_requests=2000, seed=seed)), number=40, num_slots=12, held_s=4.0)


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
