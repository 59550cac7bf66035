"""A replica's engine, kept at the newest rollout; it also begins rollouts, where a client loads an adapter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from molora.activation import Activation
from molora.adapter import Adapter
from molora.display import one_line
from molora.serving.cluster.rollout import Failure, LoadedAdapter, Rollout
from molora.serving.errors import UnavailableError
from molora.slots import AdapterInfo, NoFreeSlotError

if TYPE_CHECKING:
    from molora.serving.engine import Engine

POLL_S = 1.0  # how long a replica waits at the store at a time
SETTLE_S = 30.0  # how long a rollout waits for the slowest replica

logger = logging.getLogger(__name__)


class Store(Protocol):
    """`RolloutStore`, wherever it is; where it cannot be reached, its calls raise UnavailableError."""

    async def follow(self, replica: str, have: Rollout, failure: Failure, wait_s: float) -> Rollout: ...
    async def publish(self, rollout: Rollout) -> bool: ...
    async def settled(self, version: int, wait_s: float) -> dict[str, str]: ...


class Follower:
    """Loads and unloads adapters in the place of an engine: on all replicas, or on none.

    Its methods for that are called from threads; everything else belongs to one event loop.

    Attributes:
        rollout: what the engine has.
    """

    def __init__(self, engine: Engine, store: Store, replica: str) -> None:
        """
        Args:
            engine: as it was loaded: with the bank's own adapters.
            replica: a name that no other one has.
        """
        self.rollout = Rollout()
        self._engine = engine
        self._store = store
        self._replica = replica
        self._bank = {
            info.name: LoadedAdapter(str(info.path), info.digest, info.activation) for info in engine.adapters()
        }
        self._failure = Failure()
        self._changing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bring the engine to the newest version, and keep it there.

        Raises:
            ValueError, FileNotFoundError: an adapter is no longer what was rolled out.
            UnavailableError: the store cannot be reached.
        """
        await self._look()
        self._following = asyncio.create_task(self._follow())

    def stop(self) -> None:
        if self._following is not None:
            self._following.cancel()

    async def catch_up(self) -> None:
        """Bring the engine to the newest version now.

        Raises:
            UnavailableError: that cannot be done.
        """
        try:
            await self._look()
        except (ValueError, OSError, NoFreeSlotError) as error:
            raise UnavailableError(f"this replica lacks the newest adapters: {one_line(error)}") from error

    def load_adapter(
        self, name: str, path: str | Path, *, activation: Activation | None = None, replace: bool = False
    ) -> AdapterInfo:
        """`Engine.load_adapter` on every replica.

        Raises:
            what that raises; nothing was changed.
            UnavailableError: another rollout is under way, or a replica could not follow; it was taken back.
        """
        known = {info.name: info for info in self._engine.adapters()}
        if name in known and not replace:
            raise ValueError(f"there is an adapter {name!r} already; unload it first, or ask to replace it.")
        if name in known and activation is None:
            activation = known[name].activation
        adapter = LoadedAdapter(str(path), Adapter.read(path).digest, activation)
        self._roll_out(lambda rollout: rollout.load(name, adapter))
        return next(info for info in self._engine.adapters() if info.name == name)

    def unload_adapter(self, name: str) -> None:
        """`Engine.unload_adapter` on every replica.

        Raises:
            as `load_adapter`.
        """
        self._roll_out(lambda rollout: rollout.unload(name, of_bank=name in self._bank))

    def _roll_out(self, change: Callable[[Rollout], Rollout]) -> None:
        asyncio.run_coroutine_threadsafe(self._publish(change), self._loop).result()

    async def _publish(self, change: Callable[[Rollout], Rollout]) -> None:
        async with self._changing:
            before = self.rollout
            wanted = change(before)
            if not await self._store.publish(wanted):
                raise UnavailableError("another adapter is being rolled out; ask again in a while")
            try:
                await self._apply(wanted)
            except Exception:
                await self._take_back(before, wanted)
                raise
        failures = await self._store.settled(wanted.version, SETTLE_S)
        if failures:
            async with self._changing:
                await self._take_back(before, wanted)
            reasons = "; ".join(sorted(set(failures.values())))
            raise UnavailableError(f"{len(failures)} replicas could not follow, so it was taken back: {reasons}")

    async def _take_back(self, before: Rollout, wanted: Rollout) -> None:
        """What was there, as a version of its own: some replicas may be at the one that failed."""
        again = before.again(wanted.version + 1)
        if await self._store.publish(again):
            with suppress(Exception):  # the first failure is what the client is told; the next look tries again
                await self._apply(again)

    async def _follow(self) -> None:
        while True:
            try:
                await self._look(POLL_S)
            except Exception:
                await asyncio.sleep(POLL_S)

    async def _look(self, wait_s: float = 0) -> None:
        wanted = await self._store.follow(self._replica, self.rollout, self._failure, wait_s)
        async with self._changing:
            if wanted.version > self.rollout.version:
                await self._apply(wanted)

    async def _apply(self, wanted: Rollout) -> None:
        try:
            await asyncio.to_thread(self._change_engine, wanted)
        except Exception as error:
            failure = Failure(wanted.version, one_line(error))
            if failure != self._failure:
                logger.error("version %d of the adapters cannot be loaded: %s", wanted.version, failure.reason)
            self._failure = failure
            raise
        self.rollout, self._failure = wanted, Failure()

    def _change_engine(self, wanted: Rollout) -> None:
        targets = {**self._bank, **wanted.adapters}
        for name in wanted.removed:
            targets.pop(name, None)
        known = {info.name: info for info in self._engine.adapters()}
        for name in known.keys() - targets.keys():
            self._engine.unload_adapter(name)
        for name, target in targets.items():
            info = known.get(name)
            if info is None or info.digest != target.digest or target.activation not in (None, info.activation):
                self._engine.load_adapter(
                    name, target.path, activation=target.activation, replace=True, digest=target.digest
                )
