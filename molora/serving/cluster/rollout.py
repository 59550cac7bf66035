"""Which adapters all replicas have beside the bank's own, by version, and the one place that knows the newest version.

A replica follows the store: it waits there for a version newer than its own, brings its engine to it, and says so when
it comes back. So those that start later have what the others have. One version is rolled out at a time, until all have
it or, because one cannot, none: the store sees to that, whatever becomes of the replica that asked for it. A store that
starts again learns the newest version from the replicas that come. This module knows nothing about Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from molora.activation import Activation

LEASE_S = 3.0  # a replica that has not come for so long is gone


@dataclass(frozen=True)
class LoadedAdapter:
    """
    Attributes:
        path: of a PEFT folder, which every replica can read.
        digest: of its contents.
        activation: its default policy; None is what the adapter itself says.
    """

    path: str
    digest: str
    activation: Activation | None = None


@dataclass(frozen=True)
class Rollout:
    """What all replicas are to have.

    Attributes:
        version: counts from 0, the bank as it is.
        adapters: that were loaded or replaced, by name.
        removed: the bank's own that were unloaded.
    """

    version: int = 0
    adapters: Mapping[str, LoadedAdapter] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()

    def load(self, name: str, adapter: LoadedAdapter) -> Rollout:
        return Rollout(self.version + 1, {**self.adapters, name: adapter}, self.removed - {name})

    def unload(self, name: str, *, of_bank: bool) -> Rollout:
        rest = {other: adapter for other, adapter in self.adapters.items() if other != name}
        return Rollout(self.version + 1, rest, self.removed | {name} if of_bank else self.removed)

    def again(self, version: int) -> Rollout:
        """The same adapters, as a later version."""
        return Rollout(version, self.adapters, self.removed)


@dataclass(frozen=True)
class Failure:
    """A replica could not be brought to a version; no version and no words where it could."""

    version: int = 0
    reason: str = ""


@dataclass(frozen=True)
class _Report:
    version: int
    failure: Failure
    until: float


class RolloutStore:
    """One for all replicas; it lives in one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, learn_s: float = 0.0) -> None:
        """
        Args:
            learn_s: so long after it began a replica waits for one that knows of a newer version; there may have been a
                store before this one.
        """
        self._clock = clock
        self._learned_at = clock() + learn_s
        self._rollout = Rollout()
        self._is_rolling_out = False
        self._reports: dict[str, _Report] = {}
        self._changed = asyncio.Condition()

    async def follow(self, replica: str, have: Rollout, failure: Failure, wait_s: float) -> Rollout:
        """What a replica is to have: at once where it is newer than what it has, else when it is, or after `wait_s`."""
        wait_s = max(wait_s, self._learned_at - self._clock())
        async with self._changed:
            if have.version > self._rollout.version:
                self._rollout = have
            self._reports[replica] = _Report(have.version, failure, self._clock() + wait_s + LEASE_S)
            self._changed.notify_all()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait_for(lambda: self._rollout.version > have.version)
            return self._rollout

    async def roll_out(self, rollout: Rollout, wait_s: float) -> dict[str, str] | None:
        """Make it the newest version, and wait until all have it; where one has not, take it back on all.

        What is taken back is a version of its own, since some may be at the one that failed.

        Returns:
            As `settled`; None if another one is under way, or has been since the one that this one changes.
        """
        if self._is_rolling_out or rollout.version != self._rollout.version + 1:
            return None
        before = self._rollout
        self._is_rolling_out = True
        try:
            await self._make_newest(rollout)
            if failures := await self.settled(rollout.version, wait_s):
                again = before.again(rollout.version + 1)
                await self._make_newest(again)
                await self.settled(again.version, LEASE_S)  # but for a replica that hangs, none has it any more
            return failures
        finally:
            self._is_rolling_out = False

    async def _make_newest(self, rollout: Rollout) -> None:
        async with self._changed:
            self._rollout = rollout
            self._changed.notify_all()

    async def settled(self, version: int, wait_s: float) -> dict[str, str]:
        """Wait until every replica that lives is at a version or has failed to reach it.

        Returns:
            Why, by replica, for those that are not at it.
        """
        deadline = self._clock() + wait_s
        async with self._changed:
            while True:
                now = self._clock()
                self._reports = {name: report for name, report in self._reports.items() if report.until > now}
                behind = {name: report for name, report in self._reports.items() if report.version < version}
                waited_for = [name for name, report in behind.items() if report.failure.version < version]
                if not waited_for or now >= deadline:
                    return {name: report.failure.reason or "no answer" for name, report in behind.items()}
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(0.1, deadline - now)):  # leases end without a word
                        await self._changed.wait()
