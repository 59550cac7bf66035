"""The application on Ray Serve, and what `serve.py --ray` does: start it, wait, drain it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, DeploymentActorConfig, HTTPOptions, RequestRouterConfig
from ray.serve.request_router import RequestRouter
from ray.serve.schema import LoggingConfig

from molora.bank import Bank
from molora.serving.cli import print_address
from molora.serving.cluster.config import ClusterConfig, RayConfig
from molora.serving.cluster.ingress import Ingress
from molora.serving.cluster.replica import STORE, Replica
from molora.serving.cluster.rollout import LEASE_S, RolloutStore
from molora.serving.cluster.router import PrefixRouter
from molora.serving.config import ServeConfig
from molora.serving.tracing import Tracer

APP = "molora"
GRACE_S = 5  # beyond drain_s, in which an ingress passes on the replicas' last words
NUM_REFUSED = 256  # requests that an ingress has beside those with a place; without any, they would wait in the proxy
OBJECT_STORE_BYTES = 256 << 20  # of a cluster that is started here; nothing large is passed
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
JSON = ray.LoggingConfig(encoding="JSON", log_level="WARNING")  # lines come here as they are, without a word before
STATISTICS_PERIOD_S = 2.0  # how often replicas say whose prefixes they hold


def application(config: ClusterConfig, *, router: type[RequestRouter] = PrefixRouter) -> serve.Application:
    """What `serve.run` takes.

    Args:
        router: picks the replica of a request.
    """
    server, ray_config = _with_whole_paths(config.server), config.ray
    common: dict[str, Any] = dict(
        logging_config=QUIET,
        health_check_period_s=ray_config.health_check_period_s,
        health_check_timeout_s=ray_config.health_check_timeout_s,
    )
    replicas: Any = serve.deployment(
        Replica,
        **_scale(ray_config),
        **common,
        ray_actor_options={"num_cpus": ray_config.num_cpus, "num_gpus": ray_config.num_gpus},
        max_ongoing_requests=ray_config.max_ongoing_requests,
        max_queued_requests=ray_config.max_queued_requests,
        graceful_shutdown_timeout_s=server.drain_s,
        request_router_config=_routing(ray_config, router),
        deployment_actors=[
            DeploymentActorConfig(
                name=STORE,
                actor_class=ray.remote(RolloutStore),
                actor_options={"num_cpus": 0},
                init_kwargs={"learn_s": LEASE_S},
            )
        ],
    )
    ingress: Any = serve.deployment(
        Ingress,
        num_replicas=ray_config.num_ingresses,
        **common,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=ray_config.max_replicas * ray_config.max_ongoing_requests
        + ray_config.max_queued_requests
        + NUM_REFUSED,
        graceful_shutdown_timeout_s=server.drain_s + GRACE_S,
    )
    bound: serve.Application = ingress.bind(server, replicas.bind(server))
    return bound


def serve_on_ray(config: ClusterConfig) -> int:
    """Serve until told to stop, then let running requests finish.

    Raises:
        FileNotFoundError, ValueError: there is no such bank, or it is damaged.
        RuntimeError: the replicas do not start; their log, which is printed, says why.
    """
    server = config.server
    if config.ray.address is None:
        Bank.open(server.bank)  # each replica would try several times
    if server.otlp_endpoint is not None:
        Tracer.to_endpoint(server.otlp_endpoint).close()  # or OpenTelemetry is missing, which is known now
    start_ray(config.ray.address, log_format=server.log_format)
    try:
        print(f"Starting {config.ray.min_replicas} replicas of {server.bank} ...", flush=True)
        serve.start(http_options=http_options(server), logging_config=QUIET)
        try:
            serve.run(application(config), name=APP, route_prefix="/")
        except BaseException as error:
            if config.ray.address is not None:
                serve.delete(APP, _blocking=False)  # the cluster goes on, and would go on trying to start it
            if isinstance(error, RuntimeError):
                raise RuntimeError(f"the replicas do not start, and what they say above is why: {error}") from error
            raise
        with _told_to_stop() as told:
            print_address(server.host, server.port)
            told.wait()
            print(f"Finishing what runs, for up to {server.drain_s} s. Ctrl-C again stops now.", flush=True)
            stop(config)
    finally:
        ray.shutdown()
    return 0


def start_ray(address: str | None, *, log_format: str = "plain") -> None:
    """Join a cluster, or start one on this machine, which tells nobody of itself."""
    logs: dict[str, Any] = {"logging_level": logging.WARNING}
    if log_format == "json":
        logs["logging_config"] = JSON
    if address is not None:
        ray.init(address=address, **logs)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **logs)


def stop(config: ClusterConfig) -> None:
    """Drain the application: nothing of it is left, and nothing of Ray Serve where the cluster was started here."""
    serve.delete(APP, _blocking=False)  # what blocks gives up after a minute
    deadline = time.monotonic() + config.server.drain_s + 2 * GRACE_S
    while APP in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.1)
    if config.ray.address is None:
        serve.shutdown()  # type: ignore[no-untyped-call]


def http_options(server: ServeConfig) -> HTTPOptions:
    return HTTPOptions(host=server.host, port=server.port, keep_alive_timeout_s=server.keep_alive_s)


def _routing(config: RayConfig, router: type[RequestRouter]) -> RequestRouterConfig:
    options: dict[str, Any] = {
        "request_router_class": router,
        "request_routing_stats_period_s": STATISTICS_PERIOD_S,
    }
    if router is PrefixRouter:
        own = {"max_prefix_keys": config.max_prefix_keys, "max_imbalance": config.max_imbalance}
        options["request_router_kwargs"] = own
    return RequestRouterConfig(**options)


def _scale(config: RayConfig) -> dict[str, Any]:
    if config.min_replicas == config.max_replicas:
        return {"num_replicas": config.min_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
        )
    }


def _with_whole_paths(server: ServeConfig) -> ServeConfig:
    """Replicas start in folders of their own."""

    def whole(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).is_dir() else name

    return replace(
        server,
        bank=whole(server.bank),
        base=None if server.base is None else whole(server.base),
        adapter_folders=tuple(whole(folder) for folder in server.adapter_folders),
    )


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set it, in the place of what Ray does at them; a second SIGINT is a KeyboardInterrupt."""
    told = threading.Event()

    def note(number: int, frame: object) -> None:
        if told.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
