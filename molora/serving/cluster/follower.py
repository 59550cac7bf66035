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
    async def roll_out(self, rollout: Rollout, wait_s: float) -> dict[str, str] | None: ...


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
        self._last_error: tuple[int, Exception | None] = 0, None  # and the version that could not be loaded for it
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
        digest = Adapter.read(path).digest

        def change(rollout: Rollout) -> Rollout:
            info = self._known().get(name)
            if info is not None and not replace:
                raise ValueError(f"there is an adapter {name!r} already; unload it first, or ask to replace it.")
            policy = info.activation if info is not None and activation is None else activation
            return rollout.load(name, LoadedAdapter(str(path), digest, policy))

        self._roll_out(change)
        return self._known()[name]

    def unload_adapter(self, name: str) -> None:
        """`Engine.unload_adapter` on every replica.

        Raises:
            as `load_adapter`.
        """

        def change(rollout: Rollout) -> Rollout:
            if name not in self._known():
                raise ValueError(f"there is no adapter {name!r}; it has been unloaded already.")
            return rollout.unload(name, of_bank=name in self._bank)

        self._roll_out(change)

    def _known(self) -> dict[str, AdapterInfo]:
        return {info.name: info for info in self._engine.adapters()}

    def _roll_out(self, change: Callable[[Rollout], Rollout]) -> None:
        asyncio.run_coroutine_threadsafe(self._change(change), self._loop).result()

    async def _change(self, change: Callable[[Rollout], Rollout]) -> None:
        async with self._changing:  # the engine is at `rollout`, and stays there meanwhile
            wanted = change(self.rollout)
        failures = await self._store.roll_out(wanted, SETTLE_S)
        if failures is None:
            raise UnavailableError("another adapter is being rolled out; ask again in a while")
        version, error = self._last_error
        if failures and error is not None and version == wanted.version:
            raise error
        if failures:
            reasons = "; ".join(sorted(set(failures.values())))
            raise UnavailableError(f"{len(failures)} replicas could not follow, so it was taken back: {reasons}")

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
        living = asyncio.create_task(self._say_that_it_lives())
        try:
            await asyncio.to_thread(self._change_engine, wanted)
        except Exception as error:
            failure = Failure(wanted.version, one_line(error))
            if failure != self._failure:
                logger.error("version %d of the adapters cannot be loaded: %s", wanted.version, failure.reason)
            self._failure, self._last_error = failure, (wanted.version, error)
            raise
        finally:
            living.cancel()
        self.rollout, self._failure = wanted, Failure()

    async def _say_that_it_lives(self) -> None:
        """To read a large adapter takes longer than a replica that says nothing is waited for."""
        while True:
            await asyncio.sleep(POLL_S)
            with suppress(UnavailableError):
                await self._store.follow(self._replica, self.rollout, self._failure, 0)

    def _change_engine(self, wanted: Rollout) -> None:
        targets = {**self._bank, **wanted.adapters}
        for name in wanted.removed:
            targets.pop(name, None)
        known = self._known()
        for name in known.keys() - targets.keys():
            self._engine.unload_adapter(name)
        for name, target in targets.items():
            info = known.get(name)
            if info is None or info.digest != target.digest or target.activation not in (None, info.activation):
                self._engine.load_adapter(
                    name, target.path, activation=target.activation, replace=True, digest=target.digest
                )
