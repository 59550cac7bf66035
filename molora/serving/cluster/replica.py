"""A replica: one engine and the app in front of it, as a deployment of Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from starlette.types import ASGIApp

from molora.serving.cli import load_engine
from molora.serving.cluster.health import Health
from molora.serving.cluster.http_call import REPLICA_HEADER, VERSION_HEADER, HttpCall, HttpHead, answer
from molora.serving.cluster.prefixes import PrefixMap
from molora.serving.cluster.rollout import Failure, Rollout
from molora.serving.cluster.router import PREFIX_KEYS, RESIDENTS
from molora.serving.cluster.telemetry import start_telemetry
from molora.serving.config import ServeConfig
from molora.serving.errors import UnavailableError, error_response
from molora.serving.protocol import Error

STORE = "rollouts"  # the deployment's actor that runs a RolloutStore
MAX_REPORTED_KEYS = 1024  # Ray hands them to every ingress when they change


class Replica:
    """
    Ray Serve calls `check_health` and `record_routing_stats` now and then, and `__del__` when the replica is drained.
    """

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]  # Ray Serve waits for it
        # These import torch, which the process that deploys does without.
        from molora.serving.app import create_app
        from molora.serving.cluster.follower import Follower

        self._name = serve.get_replica_context().replica_id.unique_id
        self._tracer = start_telemetry(config, replica=self._name)
        self._prefixes: PrefixMap[str] = PrefixMap(MAX_REPORTED_KEYS)
        self._engine = load_engine(config)
        self._health = Health(self._engine)
        self._follower = Follower(self._engine, _RemoteStore(), self._name)
        self._app = create_app(self._engine, config, loader=self._follower, tracer=self._tracer)
        await self._follower.start()

    async def answer(self, call: HttpCall) -> AsyncGenerator[HttpHead | bytes]:
        """The head of the app's answer, then the parts of its body."""
        self._prefixes.record(call.prefix.keys, self._name)
        app: ASGIApp = self._app
        if call.adapters_version > self._follower.rollout.version:
            try:
                await self._follower.catch_up()
            except UnavailableError as error:
                app = error_response(503, Error(message=str(error), type="server_error"))
        version = b"%d" % self._follower.rollout.version
        async with aclosing(answer(app, call)) as parts:
            async for part in parts:
                if isinstance(part, HttpHead):
                    part = part.with_headers((VERSION_HEADER, version), (REPLICA_HEADER, self._name.encode()))
                yield part

    async def metrics(self) -> tuple[str, str]:
        """This replica's name, and its metrics in Prometheus' text format."""
        return self._name, self._app.state.service.metrics.text().decode()

    async def check_health(self) -> None:
        self._health.check()

    async def record_routing_stats(self) -> dict[str, Any]:
        residents = await asyncio.to_thread(self._engine.m.slots.residents)  # which waits while one is being loaded
        return {PREFIX_KEYS: list(self._prefixes), RESIDENTS: residents}

    def __del__(self) -> None:
        if hasattr(self, "_follower"):  # Ray Serve calls it, too, where the constructor has failed
            self._follower.stop()
            self._engine.close()
            if self._tracer is not None:
                self._tracer.close()


class _RemoteStore:
    """The store where it runs; Ray Serve may have started it anew since it was last asked."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def follow(self, replica: str, have: Rollout, failure: Failure, wait_s: float) -> Rollout:
        rollout: Rollout = await self._call("follow", replica, have, failure, wait_s)
        return rollout

    async def roll_out(self, rollout: Rollout, wait_s: float) -> dict[str, str] | None:
        failures: dict[str, str] | None = await self._call("roll_out", rollout, wait_s)
        return failures

    async def _call(self, method: str, *args: object) -> Any:
        try:
            if self._actor is None:
                self._actor = serve.get_deployment_actor(STORE)
            return await getattr(self._actor, method).remote(*args)
        except (RayActorError, ValueError) as error:  # it died, or is not there yet
            self._actor = None
            raise UnavailableError("the versions of the adapters cannot be reached; ask again in a while") from error
