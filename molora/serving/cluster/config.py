"""What Ray Serve is told: the section `ray` of a server's configuration. It imports no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from molora.serving.config import ServeConfig, build_section, check_int, check_text, read_values


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """
    Attributes:
        address: of a cluster to join, as for `ray.init`; None starts one on this machine.
        min_replicas, max_replicas: of the engine; between them Ray Serve decides by the requests that there are.
        target_ongoing_requests: of a replica; with more there are more replicas, with fewer fewer. None is 16, or
            `max_ongoing_requests` where that is less.
        upscale_delay_s, downscale_delay_s: how long it has to be so before.
        max_ongoing_requests: that a replica has at once; further ones wait in the ingress for whichever is free first.
        max_queued_requests: that wait in one ingress; one more is answered by 429.
        max_imbalance: requests that a replica may have more than the least loaded one and still get those whose prefix
            it holds.
        max_prefix_keys: beginnings of prompts of which an ingress remembers who holds them.
        num_ingresses: processes that take HTTP requests and pass them on.
        num_cpus, num_gpus: of one replica.
        health_check_period_s, health_check_timeout_s: between two questions, and for the answer; a replica that gives
            none three times in a row is replaced.
    """

    address: str | None = None
    min_replicas: int = 1
    max_replicas: int = 2
    target_ongoing_requests: int | None = None
    upscale_delay_s: int = 30
    downscale_delay_s: int = 600
    max_ongoing_requests: int = 64
    max_queued_requests: int = 256
    max_imbalance: int = 8
    max_prefix_keys: int = 65536
    num_ingresses: int = 1
    num_cpus: int = 1
    num_gpus: int = 0
    health_check_period_s: int = 5
    health_check_timeout_s: int = 30

    def __post_init__(self) -> None:
        if self.address is not None:
            check_text("ray.address", self.address)
        names = [each.name for each in fields(self) if each.name != "address"]
        if self.target_ongoing_requests is None:
            names.remove("target_ongoing_requests")
        for name in names:
            low = 0 if name in ("upscale_delay_s", "downscale_delay_s", "max_imbalance", "num_gpus") else 1
            check_int(f"ray.{name}", getattr(self, name), low=low)
        for low_name, low, high_name in (
            ("min_replicas", self.min_replicas, "max_replicas"),
            ("target_ongoing_requests", self.target, "max_ongoing_requests"),
        ):
            if low > (high := getattr(self, high_name)):
                raise ValueError(f"ray.{low_name} is {low}, over ray.{high_name}, {high}.")

    @property
    def target(self) -> int:
        """Ongoing requests of a replica that there are to be, whether the file says how many or not."""
        if self.target_ongoing_requests is None:
            return min(16, self.max_ongoing_requests)
        return self.target_ongoing_requests


@dataclass(frozen=True)
class ClusterConfig:
    """Attributes: server, of each replica; ray, how many there are and who gets which request."""

    server: ServeConfig
    ray: RayConfig


def read_cluster_config(file: str | Path | None, flags: Mapping[str, Any]) -> ClusterConfig:
    """A server's file with a section `ray`, which may be missing; flags override the file, as for `read_config`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML mapping, a key is unknown, or a value is wrong.
    """
    values, source = read_values(file, flags)
    try:
        ray = build_section(RayConfig, values.pop("ray", None), "ray.")
        if "max_connections" in values:
            raise ValueError("max_connections is not supported on Ray; leave it out, and see ray.max_queued_requests.")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return ClusterConfig(ServeConfig.build(values, source=source), ray)
