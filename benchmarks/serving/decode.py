"""Suites `decode` and `plain`: tokens a second of sequences that decode side by side."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from molora.serving.request import Request
from serving import ceilings, routes
from serving.bench import Bench
from serving.clocks import NUM_STEADY_TOKENS, decode_steps, in_turns, ratios, wait_until_idle
from serving.figures import Report, spread
from serving.shapes import NUM_ADAPTERS

MOST_OVER_WEIGHT_FLOOR = 1.25
LEAST_OF_BANDWIDTH_FLOOR = 0.8
LEAST_ROUTED, LEAST_ROUTED_LARGE, LARGE = 0.9, 0.92, 32  # "large" is more sequences than that


class Decoding:
    """Sequences that go on after prompts which the base model has read: their keys and values are in the cache."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.prompts = [bench.ids(bench.sizes.context) for _ in range(bench.sizes.batches[-1])]
        bench.engine.generate([bench.request(ids, "base", 1) for ids in self.prompts])

    def requests(self, names: Sequence[str]) -> list[Request]:
        """One for each name; adapters act on all that is generated, and on nothing before."""
        length = self.bench.sizes.longest_answer
        return [self.bench.request(ids, name, length) for ids, name in zip(self.prompts, names, strict=False)]

    def step_s(self, names: Sequence[str]) -> float:
        """The median step."""
        steps = decode_steps(self.bench.engine, self.requests(names), self.bench.sizes.num_steps)
        return statistics.median(end - begin for begin, end in steps)


def decode(bench: Bench, report: Report) -> None:
    """Base against what the memory allows, and routed against base, with forced routes."""
    decoding = Decoding(bench)
    base_floors(decoding, report)
    for batch in bench.sizes.batches:
        counts: dict[str, Counter[str]] = {name: Counter() for name in routes.SHARES}

        def routed(name: str, batch: int = batch, counts: dict[str, Counter[str]] = counts) -> float:
            wait_until_idle(bench.engine)
            routes.force(bench.m, bench.forced[name])
            before = Counter(bench.engine.stats().num_adapter_tokens)
            seconds = decoding.step_s(["auto"] * batch)
            wait_until_idle(bench.engine)
            counts[name] += Counter(bench.engine.stats().num_adapter_tokens) - before
            return seconds

        sides: dict[str, Callable[[], float]] = {"base": lambda batch=batch: decoding.step_s(["base"] * batch)}
        sides |= {name: lambda name=name: routed(name) for name in routes.SHARES}
        times = in_turns(sides, bench.repeats)
        for name in routes.SHARES:
            report_against_base(report, f"routed, {name}", batch, times["base"], times[name], counts[name])
    wait_until_idle(bench.engine)
    routes.force(bench.m, bench.forced["uniform"])


def plain(bench: Bench, report: Report) -> None:
    """Plain LoRA, adapters in all layers, one to a sequence; nothing is stated for it, so nothing is to be reached."""
    decoding = Decoding(bench)
    for batch in bench.sizes.batches[::3]:
        names = {
            "uniform": [bench.adapters[index % NUM_ADAPTERS] for index in range(batch)],
            "zipf": deal(bench.adapters, routes.SHARES["zipf"], batch),
        }
        sides: dict[str, Callable[[], float]] = {"base": lambda batch=batch: decoding.step_s(["base"] * batch)}
        sides |= {kind: lambda kind=kind, names=names: decoding.step_s(names[kind]) for kind in names}
        times = in_turns(sides, bench.repeats)
        for kind, dealt in names.items():
            report_against_base(
                report, f"in all layers, {kind}", batch, times["base"], times[kind], Counter(dealt), has_target=False
            )


def base_floors(decoding: Decoding, report: Report) -> None:
    """Base decode against the time that the memory takes to read weights, and the sequences' keys and values."""
    bench, sizes, model = decoding.bench, decoding.bench.sizes, decoding.bench.m.model
    found = ceilings.bandwidth(bench.m.decoder.device, sizes.num_copied_bytes)
    best = max(found.values())
    for kind, value in found.items():
        report.add(f"memory, {kind}", value / 1e9, "GB/s")
    weights = ceilings.weight_bytes(model)
    largest = sizes.batches[-1]
    sides = {str(batch): lambda batch=batch: decoding.step_s(["base"] * batch) for batch in (1, largest)}
    times = in_turns(sides, bench.repeats)
    step_s, floor_s = statistics.median(times["1"]), weights / best
    report.add(
        "base, batch 1, over the weights' floor",
        step_s / floor_s,
        "x",
        at_most=MOST_OVER_WEIGHT_FLOOR,
        step_ms=1e3 * step_s,
        floor_ms=1e3 * floor_s,
        weight_bytes=weights,
        tokens_per_s=1 / step_s,
    )
    num_tokens = largest * (sizes.context + NUM_STEADY_TOKENS + sizes.num_steps // 2)
    cached = ceilings.cache_bytes(model, num_tokens)
    step_s, floor_s = statistics.median(times[str(largest)]), (weights + cached) / best
    report.add(
        f"base, batch {largest}, of the floor of weights and cache",
        floor_s / step_s,
        "x",
        at_least=LEAST_OF_BANDWIDTH_FLOOR,
        step_ms=1e3 * step_s,
        floor_ms=1e3 * floor_s,
        weight_bytes=weights,
        cache_bytes=cached,
        tokens_per_s=largest / step_s,
    )


def report_against_base(
    report: Report,
    what: str,
    batch: int,
    base_s: list[float],
    seconds: list[float],
    counts: Counter[str],
    *,
    has_target: bool = True,
) -> None:
    """counts: tokens by adapter, which show the routes that were forced."""
    found = spread(ratios(base_s, seconds))
    least = LEAST_ROUTED_LARGE if batch > LARGE else LEAST_ROUTED
    report.add(
        f"{what}, batch {batch}, of base's tokens/s",
        found["median"],
        "x",
        at_least=least if has_target else None,
        **found,
        base_step_ms=1e3 * statistics.median(base_s),
        step_ms=1e3 * statistics.median(seconds),
        shares={name: round(count / counts.total(), 3) for name, count in sorted(counts.items()) if count},
    )


def deal(adapters: Sequence[str], shares: Sequence[float], batch: int) -> list[str]:
    """An adapter to each sequence, as near to the shares as whole sequences come; the first ones get what is over."""
    total, sums = sum(shares), [0.0]
    for share in shares:
        sums.append(sums[-1] + share / total)
    dealt: list[str] = []
    for name, (_, end) in zip(adapters, pairwise(sums), strict=True):
        dealt += [name] * (math.ceil(end * batch - 1e-9) - len(dealt))
    return dealt
