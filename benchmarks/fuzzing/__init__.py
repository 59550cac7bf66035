"""What is fuzzed: readers of files and of requests, each with inputs to begin with, and what they may do."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fuzzing.files import FILES
from fuzzing.requests import REQUESTS

LIMIT_S = 5.0  # of computing, for one input: a grammar may take a second on a fast machine
DOCUMENTED = (ValueError, FileNotFoundError)
TARGETS: Mapping[str, Callable[..., tuple[Callable[[bytes], object], tuple[bytes, ...]]]] = {**FILES, **REQUESTS}


class SlowError(AssertionError):
    """An input took longer than `LIMIT_S`."""


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        read: what is fuzzed; it raises `DOCUMENTED` errors, or returns something.
        seeds: inputs to begin with.
    """

    name: str
    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]

    @classmethod
    def make(cls, name: str, folder: Path) -> "Target":
        """
        Args:
            folder: an empty one, for the files that are read.
        """
        return cls(name, *TARGETS[name](folder))

    def check(self, made: bytes) -> bool:
        """Whether an input is accepted.

        Raises:
            SlowError: it takes too long.
            BaseException: whatever is not documented.
        """
        begun_s = time.process_time()
        try:
            self.read(made)
            accepted = True
        except DOCUMENTED:
            accepted = False
        seconds = time.process_time() - begun_s
        if seconds > LIMIT_S:
            raise SlowError(f"{seconds:.1f} s")
        return accepted
