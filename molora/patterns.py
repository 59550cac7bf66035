"""PEFT's patterns of modules: names, or regular expressions for the end of a module's path.

They come from files that others wrote, and Python's `re` can take years over a short one; RE2 takes time in proportion
to the path. What only `re` has (look-around, references to groups) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import re2

MAX_CHARS = 200
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = 1 << 16  # which bounds what counted repeats unfold to


def is_pattern(value: object) -> bool:
    """Whether it is one that can be matched in short time."""
    if not isinstance(value, str) or len(value) > MAX_CHARS:
        return False
    try:
        _compiled(value)
    except (re2.error, UnicodeEncodeError):
        return False
    return True


def first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the value of the first pattern that matches the end of the module's path, from a dot on."""
    for pattern, value in patterns.items():
        if _compiled(pattern).match(module):
            return value
    return default


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    return re2.compile(rf"(.*\.)?({pattern})$", _OPTIONS)
