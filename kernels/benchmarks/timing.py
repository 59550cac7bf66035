"""Clocks. On a GPU a burst of calls is one CUDA graph, and base and method are timed in turns.

A GPU under load lowers its clock by power and temperature, so a time is only comparable to one taken right beside it:
every sample of a method has a neighbouring sample of the base.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

BURST_US = 400  # long enough to hide the start of a graph, short enough not to heat


class Burst:
    """Calls that run back to back, each on its own layer; `output` is that of the last one."""

    output: Any

    def __init__(self, calls: Sequence[Call], rounds: int, device: torch.device) -> None:
        self._calls = [*calls] * rounds
        self.num_calls = len(self._calls)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._graph = self._capture(calls, device)
        self.replay()

    def _capture(self, calls: Sequence[Call], device: torch.device) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for call in (*calls, calls[0]):  # compile and warm up, on the stream that is captured
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in self._calls:
                self.output = call()
        return graph

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            for call in self._calls:
                self.output = call()


class Timer:
    """Takes samples, in microseconds a call."""

    def __init__(self, device: torch.device, repeats: int, pause_s: float) -> None:
        self.device, self.repeats, self.pause_s = device, repeats, pause_s

    def load(self, calls: Sequence[Call], floor_us: float | None) -> Burst:
        """`floor_us`, the least that a call can take, says how often to go round the layers; None is once."""
        rounds = 1 if floor_us is None else max(1, round(BURST_US / (len(calls) * floor_us)))
        return Burst(calls, rounds, self.device)

    def alone(self, burst: Burst) -> list[float]:
        return [self._sample([burst])[0] for _ in range(self.repeats)]

    def beside(self, base: Burst, others: dict[str, Burst]) -> dict[str, list[tuple[float, float]]]:
        """For each of the others, (base, other) of every repeat, taken one right after the other."""
        turns = [burst for other in others.values() for burst in (base, other)]
        pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
        for _ in range(self.repeats):
            samples = iter(self._sample(turns))
            for name in others:
                pairs[name].append((next(samples), next(samples)))
        return pairs

    def _sample(self, bursts: list[Burst]) -> list[float]:
        if self.pause_s:
            time.sleep(self.pause_s)
        if self.device.type != "cuda":
            return [self._host_sample(burst) for burst in bursts]
        bursts[0].replay()  # untimed: while it runs, the host gets ahead of the GPU and stays there
        marks = []
        for burst in bursts:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            burst.replay()
            end.record()
            marks.append((start, end, burst.num_calls))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) * 1e3 / num_calls for start, end, num_calls in marks]

    def _host_sample(self, burst: Burst) -> float:
        start_s = time.perf_counter()
        burst.replay()
        return (time.perf_counter() - start_s) * 1e6 / burst.num_calls


def quartiles(samples: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q25": low, "q75": high}
