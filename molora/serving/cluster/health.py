"""Whether an engine still does what it is for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molora.serving.engine import Engine

STALL_S = 120.0  # the first step of its size may be compiled meanwhile


class Health:
    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._num_steps = -1
        self._moved_at = clock()

    def check(self) -> None:
        """
        Raises:
            RuntimeError: the engine has stopped, or requests run and none has come further for `STALL_S`.
        """
        if not self._engine.is_ready:
            raise RuntimeError("the engine has stopped")
        stats = self._engine.stats()
        if stats.num_steps != self._num_steps or not stats.num_running:
            self._num_steps, self._moved_at = stats.num_steps, self._clock()
        elif self._clock() - self._moved_at > STALL_S:
            raise RuntimeError(f"{stats.num_running} requests run, and no step ended for {STALL_S:g} s")
