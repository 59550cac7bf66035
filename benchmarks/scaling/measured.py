"""What was measured on one H100 with an 8B base (`benchmarks/results/serving-h100.json`): the costs that are fitted to
some of it, and the rest, which the model is held against."""

import json
import random
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling.base import Base
from scaling.model import Fleet, step_s
from scaling.parts import Adapters, Costs, Gpu, Traffic

RESULTS = Path(__file__).parents[1] / "results" / "serving-h100.json"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
FITTED_BATCHES = (1, 8, 64)
DECODED_FROM, STEADY = 1024, 4 + 24  # tokens of context, and those written until the median step
NUM_ADAPTERS, ROUTER_LAYER = 8, 8
BASE = Base(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
ROUTED, PLAIN = (Adapters(number=NUM_ADAPTERS, first_layer=layer, zipf=0) for layer in (ROUTER_LAYER, 0))
NUM_INVOKING = 16  # tokens that invoke an adapter
LOAD = "load", "slowest step of batch 32 during 4 loads, over the median"
MIXED = "mixed", "8 adapters and the router, 64 at once, of one adapter's tokens/s"


@dataclass(frozen=True)
class Point:
    """A measured value and the model's.

    Attributes:
        fitted: a constant was fitted to it, so that it says nothing of the model.
    """

    what: str
    unit: str
    measured: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """Of the measured value."""
        return self.predicted / self.measured - 1


class Measurements:
    """The figures of a result of `benchmarks/serving.py`, by suite and name."""

    def __init__(self, path: Path = RESULTS) -> None:
        self.result = json.loads(path.read_text(encoding="utf-8"))
        self._figures = {(each["suite"], each["name"]): each for each in self.result["figures"]}

    def value(self, suite: str, name: str) -> float:
        return float(self._figures[suite, name]["value"])

    def details(self, suite: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._figures[suite, name]["details"]
        return found

    def routed(self, kind: str, batch: int) -> dict[str, Any]:
        return self.details("decode", f"routed, {kind}, batch {batch}, of base's tokens/s")


def h100(measurements: Measurements) -> Gpu:
    """The GPU that was measured; what was not, by its specification."""
    bandwidth = max(measurements.value("decode", f"memory, {kind}") for kind in ("copy", "read"))
    return Gpu(
        memory_bytes=79 * 2**30,
        context_bytes=2e9,
        bytes_per_s=1e9 * bandwidth,
        storage_bytes_per_s=2e9,
    )


def fit(measurements: Measurements) -> Costs:
    """Five constants: of steps on the base's and uniformly routed ones of `FITTED_BATCHES`, of prompts on one of 8,192
    tokens, of loads on all four, which are alike."""
    gpu = h100(measurements)
    unexplained_s, adapted_s = [], []
    for batch in FITTED_BATCHES:
        found = measurements.routed("uniform", batch)
        base_s, routed_s = found["base_step_ms"] / 1e3, found["step_ms"] / 1e3
        num_bytes = BASE.step_bytes + _context(batch) * BASE.token_bytes
        unexplained_s.append(base_s - num_bytes / gpu.bytes_per_s)
        of_adapters = _num_different(found["shares"], batch) * ROUTED.num_bytes(BASE)
        adapted_s.append(routed_s - base_s - of_adapters / gpu.bytes_per_s)
    rows = np.array([[BASE.num_layers, batch] for batch in FITTED_BATCHES], dtype=float)
    (layer_s, sequence_s), *_ = np.linalg.lstsq(rows, np.array(unexplained_s), rcond=None)
    loads_ms = measurements.details(*LOAD)["load_ms"]
    return Costs(
        layer_s=float(layer_s),
        sequence_s=float(sequence_s),
        adapted_layer_s=statistics.fmean(adapted_s) / (BASE.num_layers - ROUTER_LAYER),
        flops_per_s=1e12 * measurements.value("invoke", "reading 8192 tokens again"),
        host_bytes_per_s=1e3 * PLAIN.num_bytes(BASE) / statistics.median(loads_ms),
    )


def compare(measurements: Measurements) -> list[Point]:
    """Every measured time that the model says something of."""
    points: list[Point] = []
    routed, plain = (_fleet(measurements, adapters) for adapters in (ROUTED, PLAIN))

    def add(what: str, measured_ms: float, predicted_s: float, *, fitted: bool = False) -> None:
        points.append(Point(what, "ms", measured_ms, 1e3 * predicted_s, fitted))

    for batch in BATCHES:
        measured_ms = measurements.routed("uniform", batch)["base_step_ms"]
        predicted_s = step_s(routed, batch=batch, kv_tokens=_context(batch), num_adapters=0)
        add(f"step, base, batch {batch}", measured_ms, predicted_s, fitted=batch in FITTED_BATCHES)
    for kind in ("uniform", "zipf"):
        for batch in BATCHES:
            found = measurements.routed(kind, batch)
            different = _num_different(found["shares"], batch)
            predicted_s = step_s(routed, batch=batch, kv_tokens=_context(batch), num_adapters=different)
            fitted = kind == "uniform" and batch in FITTED_BATCHES
            add(f"step, routed, {kind}, batch {batch}", found["step_ms"], predicted_s, fitted=fitted)
    for kind in ("uniform", "zipf"):
        for batch in (1, 8, 64):
            found = measurements.details("plain", f"in all layers, {kind}, batch {batch}, of base's tokens/s")
            num_adapters = len(found["shares"])  # here each sequence has one
            predicted_s = step_s(plain, batch=batch, kv_tokens=_context(batch), num_adapters=num_adapters)
            add(f"step, in all layers, {kind}, batch {batch}", found["step_ms"], predicted_s)
    found = measurements.details(*LOAD)
    predicted_s = step_s(plain, batch=32, kv_tokens=_context(32), num_adapters=NUM_ADAPTERS / 2)
    add("step while adapters are loaded, batch 32", found["median_step_ms"], predicted_s)
    add("loading an adapter", statistics.median(found["load_ms"]), _load_from_memory_s(plain), fitted=True)
    for length in (8192, 32768, 65536):
        flops = BASE.prompt_flops(length + NUM_INVOKING, 0)
        measured_ms = measurements.details("invoke", f"reading {length} tokens again")["first_token_ms"]
        add(f"a prompt of {length} tokens", measured_ms, flops / routed.costs.flops_per_s, fitted=length == 8192)
    for length in (8192, 32768, 65536):
        measured_ms = measurements.details("invoke", f"adapter after {length} tokens, times sooner")["first_token_ms"]
        predicted_s = step_s(routed, batch=1, kv_tokens=length + NUM_INVOKING, num_adapters=1)
        add(f"first token after {length} cached tokens", measured_ms, predicted_s)
    for how, together in (("in turn", 1), ("in parallel", 5)):
        measured_ms = measurements.details("conversation", f"5 adapters {how} on 32768 tokens, times faster")["ours_ms"]
        kv = together * (32768 + NUM_INVOKING + 8)
        predicted_s = 16 * 5 / together * step_s(routed, batch=together, kv_tokens=kv, num_adapters=together)
        add(f"5 answers of 16 tokens {how} after 32768", measured_ms, predicted_s)
    found = measurements.details(*MIXED)
    for who, num_adapters in (("one", 1), ("all", NUM_ADAPTERS)):
        measured_ms = 1e3 * found["num_new_tokens"] / found[f"{who}_tokens_per_s"]
        add(f"128 requests, 64 at once, {who} adapter{'s' * (who == 'all')}", measured_ms, replay(routed, num_adapters))
    return points


def replay(fleet: Fleet, num_adapters: int) -> float:
    """Seconds that the suite `mixed` takes: its own lengths, in steps of 64 sequences and 8192 tokens at most."""
    waiting = deque([prompt, 0, answer] for prompt, answer in mixed_lengths())
    running: list[list[int]] = []  # tokens to read, read and written, to be written
    total_s = 0.0
    while waiting or running:
        while waiting and len(running) < 64:
            running.append(waiting.popleft())
        room, flops = 8192 - len(running), 0.0
        for sequence in running:
            chunk = min(sequence[0], room)
            flops += fleet.base.prompt_flops(chunk, sequence[1])
            room -= chunk
            sequence[0] -= chunk
            sequence[1] += chunk
        writing = [sequence for sequence in running if not sequence[0]]
        kv = sum(sequence[1] for sequence in writing)
        total_s += step_s(fleet, batch=len(writing), kv_tokens=kv, num_adapters=num_adapters)
        total_s += flops / fleet.costs.flops_per_s
        for sequence in writing:
            sequence[1] += 1
            sequence[2] -= 1
        running = [sequence for sequence in running if sequence[2]]
    return total_s


def mixed_lengths() -> list[tuple[int, int]]:
    """Tokens of each prompt and answer, as benchmarks/serving/mixed.py draws them."""
    draw = random.Random(0)
    prompts = [draw.randint(64, 256) for _ in range(128)]
    return [(prompt, draw.randint(96, 288)) for prompt in prompts]


def _fleet(measurements: Measurements, adapters: Adapters) -> Fleet:
    return Fleet(
        gpu=h100(measurements),
        base=BASE,
        adapters=adapters,
        traffic=Traffic(requests_per_s=1),
        costs=fit(measurements),
    )


def _load_from_memory_s(fleet: Fleet) -> float:
    """A load of a file that was just written."""
    return fleet.adapters.num_bytes(fleet.base) / fleet.costs.host_bytes_per_s


def _context(batch: int) -> int:
    """Tokens in the cache of as many sequences, at the median step."""
    return batch * (DECODED_FROM + STEADY)


def _num_different(shares: dict[str, float], batch: int) -> float:
    """Adapters among the tokens of a step, each of which is drawn by these shares."""
    total = sum(shares.values())
    return sum(1 - (1 - share / total) ** batch for share in shares.values())
