"""Changes of JSON that leave it JSON: most of what a fuzzer changes byte by byte is none, and is refused at once."""

import copy
import json
from itertools import islice
from random import Random
from typing import Any

MAX_PLACES, MAX_CHARS = 500, 1000
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 1 << 31, 1 << 32, 1 << 53, 1 << 63, 1 << 64, -(1 << 63), 10**400, 0.5, -0.0),
    *(1e-308, 1e308, float("inf"), float("nan"), "", "a", "F8_E4M3", "\0", "\ud800", "é😀", "..", "/", "x" * 300),
    *([], {}, [[]], [0], [None], {"": None}, {"a": {}}, ["a", "b"]),
)


def mutated(value: Any, draw: Random) -> Any:
    """A copy with one to four parts replaced, moved, repeated or taken out."""
    root = {"": copy.deepcopy(value)}
    for _ in range(draw.randint(1, 4)):
        places = list(islice(_places(root), MAX_PLACES))
        parent, key = draw.choice(places)
        other_parent, other_key = draw.choice(places)
        match draw.randrange(6):
            case 0 | 1:
                parent[key] = copy.deepcopy(draw.choice(VALUES))
            case 2:
                parent[key] = copy.deepcopy(other_parent[other_key])
            case 3 if parent is not root:
                del parent[key]
            case 4 if isinstance(parent, dict) and parent is not root:
                parent[str(draw.choice((other_key, key * 2, *VALUES)))] = parent.pop(key)
            case _ if isinstance(parent, list):
                parent[key:key] = [copy.deepcopy(parent[key]) for _ in range(draw.choice((1, 2, 5)))]
            case _:
                parent[key] = [parent[key]] if draw.random() < 0.5 else _stretched(parent[key], draw)
    return root[""]


def mutated_json(made: bytes, draw: Random) -> bytes | None:
    """None where it is no JSON."""
    try:
        value = json.loads(made)
        return json.dumps(mutated(value, draw), ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None


def _places(value: Any) -> Any:
    """Each part of it, as what holds it and where."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _stretched(value: Any, draw: Random) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    if isinstance(value, str):
        at = draw.randint(0, len(value))
        value = value[:MAX_CHARS]
        return value[:at] + draw.choice(("", "\0", "é", ".", "*", "(", "\\", value, value[at:] * 9)) + value[at:]
    return draw.choice((value + 1, value - 1, -value, str(value), value // 2))
