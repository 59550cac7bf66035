"""Prometheus metrics, under vLLM's names with the prefix `molora:`.

What the engine counts is read from it when somebody asks; what concerns single requests is observed as they end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from molora.generation import FinishReason, Generation

if TYPE_CHECKING:
    from molora.serving.engine import Engine

ABORT = "abort"
TOKEN_COUNTS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
SHORT_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
LONG_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class Metrics:
    """One server's metrics, in a registry of their own; all have the label `model_name`, the bank's name."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._model_name = engine.m.bank.name
        self._registry.register(_EngineCollector(engine, self._model_name))
        self._success = Counter(
            "molora:request_success",
            "Answers by how they ended: stop, length, or abort (the client left).",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in (*get_args(FinishReason), ABORT):
            self._success.labels(self._model_name, reason)
        self._failures = Counter(
            "molora:request_failures",
            "Requests that the server failed on.",
            ("model_name",),
            registry=self._registry,
        ).labels(self._model_name)
        self._first_token = self._histogram("time_to_first_token_seconds", "Submission to first token.", LONG_S)
        self._between_tokens = self._histogram("inter_token_latency_seconds", "Between an answer's tokens.", SHORT_S)
        self._total = self._histogram("e2e_request_latency_seconds", "Submission to last token.", LONG_S)
        self._queue = self._histogram("request_queue_time_seconds", "Submission to first step.", LONG_S)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKEN_COUNTS)
        self._generated = self._histogram("request_generation_tokens", "Tokens of an answer.", TOKEN_COUNTS)

    def between_tokens(self, seconds: float) -> None:
        self._between_tokens.observe(seconds)

    def finished(self, result: Generation) -> None:
        """An answer came to its end."""
        self._success.labels(self._model_name, result.finish_reason).inc()
        self._first_token.observe(result.first_token_s)
        self._total.observe(result.total_s)
        self._queue.observe(result.queue_s)
        self._prompt.observe(result.num_prompt_tokens)
        self._generated.observe(result.num_generated_tokens)

    def unfinished(self, num_requests: int, *, failed: bool) -> None:
        """Requests did not come to their end: the engine failed, or the client left."""
        (self._failures if failed else self._success.labels(self._model_name, ABORT)).inc(num_requests)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"molora:{name}", description, ("model_name",), registry=self._registry, buckets=(*buckets, float("inf"))
        )
        return histogram.labels(self._model_name)


class _EngineCollector(Collector):
    """Reads the engine's counters when it is asked for them."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        used = 1 - stats.num_free_blocks / stats.num_blocks
        gauges = {
            "num_requests_running": (stats.num_running, "Requests that run."),
            "num_requests_waiting": (stats.num_waiting, "Requests that wait for room."),
            "kv_cache_usage_perc": (used, "The part of the cache's blocks that requests hold; 1 is all."),
        }
        counters = {
            "prefix_cache_queries": (stats.num_prompt_tokens, "Prompt tokens that were looked up in the cache."),
            "prefix_cache_hits": (stats.num_cached_tokens, "Prompt tokens that were found in the cache."),
            "num_preemptions": (stats.num_preemptions, "How often a request gave up its blocks for others."),
            "evicted_blocks": (stats.num_evicted_blocks, "Cached blocks that were given up for room."),
            "prompt_tokens": (stats.num_prompt_tokens, "Tokens of prompts."),
            "generation_tokens": (stats.num_generated_tokens, "Generated tokens."),
            "computed_tokens": (stats.num_computed_tokens, "Tokens that the model read."),
            "recomputed_tokens": (stats.num_recomputed_tokens, "Base tokens computed though they were cached: 0."),
            "reencoded_tokens": (stats.num_reencoded_tokens, "Active tokens that were computed once more as base."),
            "replayed_tokens": (stats.num_replayed_tokens, "Tokens computed again after a preemption."),
            "steps": (stats.num_steps, "Steps of the engine."),
            "failed_steps": (stats.num_failed_steps, "Steps that failed."),
        }
        for name, (value, description) in gauges.items():
            gauge = GaugeMetricFamily(f"molora:{name}", description, labels=("model_name",))
            gauge.add_metric((self._model_name,), value)
            yield gauge
        for name, (value, description) in counters.items():
            counter = CounterMetricFamily(f"molora:{name}", description, labels=("model_name",))
            counter.add_metric((self._model_name,), value)
            yield counter
        adapters = CounterMetricFamily(
            "molora:adapter_tokens",
            "Tokens on which an adapter, or the base alone, acted.",
            labels=("model_name", "adapter"),
        )
        for name, value in stats.num_adapter_tokens.items():
            adapters.add_metric((self._model_name, name), value)
        yield adapters
