"""Which replica has read which beginning of a conversation, and which one a request is sent to: for it, or else for the
adapters that it names.

A prompt is cut into pieces, and the key of a piece is a hash of the key before it and of its own bytes:

    key = H(parent's key, role, piece);   the key before the first piece = H(cache salt)

so equal keys mean the same text from its beginning on, under the same salt. A message ends a piece, and a long one is
cut every `PIECE_BYTES`; what follows the first `MAX_PIECES` does not count. This module knows nothing about Ray, and
nothing about tokens: a prompt is never rendered here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice, pairwise
from typing import Any, Generic, TypeVar

PIECE_BYTES = 512
MAX_PIECES = 1024  # so that no request makes others' beginnings be forgotten, or keeps them waiting
KEY_BYTES = 8
MIN_SHARE = 0.5  # of a prompt that a replica must hold; below it little is saved
OTHER_ROUTES = frozenset({"", "auto", "base"})  # that name no adapter; the first is of a model that names none

R = TypeVar("R", bound=Hashable)


@dataclass(frozen=True)
class Prefix:
    """The beginnings of a prompt, the shortest first.

    Attributes:
        keys: of each beginning.
        num_held: bytes of the prompt that a replica which has answered this beginning holds: its own, and the answer
            that follows it.
        num_bytes: of all of these pieces: of the whole prompt, if it is not a very long one.
    """

    keys: tuple[bytes, ...] = ()
    num_held: tuple[int, ...] = ()
    num_bytes: int = 0


NO_PREFIX = Prefix()
NO_ADAPTERS: frozenset[str] = frozenset()


def prefix_of(body: object) -> Prefix:
    """Of a request's JSON, which nobody has checked yet; of a list of prompts, the first one counts."""
    if not isinstance(body, dict):
        return NO_PREFIX
    parts = islice(_parts(body), MAX_PIECES)
    key = blake2b(_encode(body.get("cache_salt")), digest_size=KEY_BYTES).digest()
    keys: list[bytes] = []
    num_held: list[int] = []
    num_bytes = 0
    for (role, data), (next_role, next_data) in pairwise([*parts, ("", b"")]):
        for first in range(0, max(len(data), 1), PIECE_BYTES):
            if len(keys) == MAX_PIECES:
                return Prefix(tuple(keys), tuple(num_held), num_bytes)
            piece = data[first : first + PIECE_BYTES]
            key = blake2b(b"\0".join([key, _encode(role), piece]), digest_size=KEY_BYTES).digest()
            num_bytes += len(piece)
            keys.append(key)
            num_held.append(num_bytes)
        if next_role == "assistant":
            num_held[-1] += len(next_data)
    return Prefix(tuple(keys), tuple(num_held), num_bytes)


def adapters_of(body: object) -> frozenset[str]:
    """Those that a request's JSON, which nobody has checked yet, names as its route or else in its model's name."""
    if not isinstance(body, dict):
        return NO_ADAPTERS
    route, model = body.get("route"), body.get("model")
    if route is None and isinstance(model, str):
        route = model.partition(":")[2]
    names = route if isinstance(route, dict) else [route]
    return frozenset(name for name in names if isinstance(name, str) and name not in OTHER_ROUTES)


class PrefixMap(Generic[R]):
    """The replicas that have answered a beginning; the beginnings that were used least recently are forgotten."""

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._replicas: OrderedDict[bytes, set[R]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def __iter__(self) -> Iterator[bytes]:
        """The beginnings' keys, those that were used last first: in the order in which `record` takes them."""
        return reversed(self._replicas)

    def record(self, keys: Sequence[bytes], replica: R) -> None:
        """A replica answers a prompt of these beginnings; the longest are the first to be forgotten."""
        for key in reversed(keys):
            self._replicas.setdefault(key, set()).add(replica)
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._max_keys:
            self._replicas.popitem(last=False)

    def keep(self, replicas: Iterable[R]) -> None:
        """Forget all other replicas."""
        kept = set(replicas)
        for key, holders in list(self._replicas.items()):
            holders &= kept
            if not holders:
                del self._replicas[key]

    def num_held(self, prefix: Prefix) -> dict[R, int]:
        """How many bytes of the prompt each replica holds that holds any."""
        held: dict[R, int] = {}
        for key, num_bytes in zip(prefix.keys, prefix.num_held, strict=True):
            held |= dict.fromkeys(self._replicas.get(key, ()), num_bytes)
        return held


def choose(
    held: Mapping[R, int],
    num_bytes: int,
    loads: Mapping[R, int],
    max_imbalance: int,
    ready: Collection[R] = (),
) -> list[R]:
    """The replica that holds most of a prompt; where none holds enough, those that are ready, of which any will do.

    None are where load alone should decide.

    Args:
        held: bytes of the prompt that each replica holds.
        num_bytes: of the prompt.
        loads: requests that each replica works on; only these replicas may be chosen.
        max_imbalance: requests that a replica may have more than the one that has fewest.
        ready: the replicas that have the request's adapters in slots.
    """
    if not loads:
        return []
    most = min(loads.values()) + max_imbalance
    able = [replica for replica, load in loads.items() if load <= most]
    holders = [replica for replica in able if held.get(replica, 0)]
    best = max(holders, key=lambda replica: (held[replica], replica in ready, -loads[replica]), default=None)
    if best is not None and held[best] >= MIN_SHARE * num_bytes:
        return [best]
    return [replica for replica in able if replica in ready]


def _parts(body: dict[str, Any]) -> Iterator[tuple[object, bytes]]:
    """A role and bytes for each message, or the bytes of a text or of token ids."""
    messages, prompt = body.get("messages"), body.get("prompt")
    if isinstance(messages, list):
        for message in messages:
            if isinstance(message, dict):
                yield message.get("role"), _encode(message.get("content"))
        return
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if prompt:
        yield "", _encode(prompt)


def _encode(value: object) -> bytes:
    """Different bytes for different texts; what else JSON may hold there only has to give the same ones again."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "".join(part["text"] for part in value)
    text = value if isinstance(value, str) else "" if value is None else repr(value)
    return text.encode("utf-8", "surrogatepass")
