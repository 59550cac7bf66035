"""Where a rising function reaches a value."""

from collections.abc import Callable

EXACT = 1e-6  # of the root
LARGEST = 1e15


def find_root(rising: Callable[[float], float], wanted: float) -> float:
    """The positive number at which a rising function reaches a value; `LARGEST` if it never does."""
    low, high = 0.0, 1.0
    while rising(high) < wanted:
        low, high = high, 2 * high
        if high > LARGEST:
            return LARGEST
    while high - low > EXACT * high:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return high
