"""Which adapter lies in which slot, by content, and what the names of a bank mean to requests that begin now.

An adapter is loaded into a slot that nobody reads, then a new version of the names is published; requests that run keep
the version that they began with. So adapters are loaded, replaced and unloaded while requests run. It is safe to call
from several threads.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock, RLock

from molora.activation import Activation
from molora.adapter import Adapter
from molora.bank import Bank, check_base_name, check_name
from molora.digest import json_digest
from molora.generation import TokenRoute
from molora.injection import RoutedDecoder

NUM_VERSIONS = 16  # that requests may run on at once


class NoFreeSlotError(RuntimeError):
    """Every slot holds an adapter that is needed."""


@dataclass(frozen=True)
class ResolvedRoute:
    """A route by names: the router (`auto`), or explicit adapters with their weights (none of them: base)."""

    auto: bool
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def is_base(self) -> bool:
        return not self.auto and not self.names


BASE = ResolvedRoute(False)


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that requests may name.

    Attributes:
        digest: of its contents.
        routable: the router may pick it; then it is always in a slot.
        activation: its default policy.
        invocation_tokens: PEFT's `alora_invocation_tokens`, if it has any.
        acts_early: it has weights below the router layer.
        path: the folder that it was read from.
    """

    name: str
    digest: str
    routable: bool
    activation: Activation
    invocation_tokens: tuple[int, ...] | None
    acts_early: bool
    path: Path


@dataclass(frozen=True)
class BankVersion:
    """What names mean. It never changes; a request keeps the one that it began with.

    Attributes:
        number: its row in the decoder's table of columns.
        router: digest of the router and its layer; None without one.
        column_slots: the slots of the router's columns 1, 2, ...
    """

    number: int
    bank: str
    adapters: Mapping[str, AdapterInfo]
    router: tuple[str, int] | None
    column_slots: tuple[int, ...]

    def __getitem__(self, name: str) -> AdapterInfo:
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"the bank {self.bank!r} has no adapter {name!r}; its adapters are: {known}.")
        return self.adapters[name]

    def route_digest(self, route: ResolvedRoute) -> str:
        """Identity of a route by content: sorted (adapter digest, weight) pairs, or the router's and its columns'."""
        if not route.auto:
            pairs = zip(route.names, route.weights, strict=True)
            return json_digest(sorted((self[name].digest, weight) for name, weight in pairs))
        if self.router is None:
            raise ValueError(f"the bank {self.bank!r} has no router.")
        return json_digest([*self.router, [info.digest for info in self.adapters.values() if info.routable]])


@dataclass(frozen=True)
class Hold:
    """What a request keeps from being taken away, until it is released.

    Attributes:
        slots: of the explicit adapters, in the route's order.
        digests: the adapters that may act, by slot.
        names: what the request calls them, by digest.
        acts_early: one of them, or the router's own LoRA, acts below the router layer.
    """

    version: BankVersion
    slots: tuple[int, ...]
    digests: Mapping[int, str]
    names: Mapping[str, str]
    acts_early: bool

    def name(self, route: TokenRoute) -> TokenRoute:
        """A token's route by digests, in the request's names."""
        return tuple((self.names[digest], gate) for digest, gate in route)


class AdapterSlots:
    """The slots of a decoder and the names that stand for them.

    Attributes:
        current: the version of requests that begin now.
    """

    def __init__(self, decoder: RoutedDecoder, bank: Bank, adapters: Mapping[str, Adapter]) -> None:
        """Put a bank's adapters into the first slots, in its order."""
        self._decoder = decoder
        self._base = bank.config.base.name
        self._lock = RLock()
        self._reading = Lock()  # of those who read what was dropped, one after the other; the others go on beside them
        self._slot_of: dict[str, int] = {}  # by digest
        self._idle: OrderedDict[int, None] = OrderedDict((slot, None) for slot in range(decoder.num_slots))
        self._released: deque[Hold] = deque()
        self._num_users: Counter[int] = Counter()
        self._num_on_version: Counter[int] = Counter()
        self._versions: dict[int, BankVersion] = {}
        infos: dict[str, AdapterInfo] = {}
        for entry in bank.adapters:
            adapter = adapters[entry.name]
            infos[entry.name] = self._info(
                entry.name, adapter, entry.activation, bank.adapter_folder(entry.name), routable=entry.routable
            )
            self._put(adapter)
        config = bank.config.router
        router = None if config is None else (config.digest, bank.config.router_layer)
        self.current = BankVersion(0, bank.name, {}, router, ())
        self._publish(infos)

    def resident(self, name: str) -> bool:
        """Whether an adapter is in a slot now."""
        with self._lock:
            return self.current[name].digest in self._slot_of

    def residents(self) -> list[str]:
        """All adapters that are in slots now."""
        with self._lock:
            return [name for name, info in self.current.adapters.items() if info.digest in self._slot_of]

    def acquire(self, route: ResolvedRoute) -> Hold:
        """Keep what a route needs; an explicit adapter that was dropped from its slot is read again.

        Routes whose adapters are in slots do not wait for those that are being read.

        Raises:
            NoFreeSlotError: there is no slot for it now.
            ValueError, FileNotFoundError: its folder has changed, or is gone.
        """
        read: dict[str, Adapter] = {}
        hold = self._hold(route, read)
        if hold is None:
            with self._reading:  # until it is in its slot: whoever waits for the same one finds it there
                while (hold := self._hold(route, read)) is None:
                    read |= {
                        info.digest: _read(info.name, info.path, info.digest) for info in self._missing(route, read)
                    }
        return hold

    def _missing(self, route: ResolvedRoute, read: Mapping[str, Adapter]) -> list[AdapterInfo]:
        """What a route needs and is neither in a slot nor read."""
        with self._lock:
            infos = [self.current[name] for name in route.names]
            return [info for info in infos if info.digest not in self._slot_of and info.digest not in read]

    def _hold(self, route: ResolvedRoute, read: Mapping[str, Adapter]) -> Hold | None:
        """`acquire`, of what is in slots or was read; None if something is missing."""
        with self._lock:
            self._settle()
            if self._missing(route, read):
                self._check_idle()
                return None
            return self._take(route, read)

    def _take(self, route: ResolvedRoute, read: Mapping[str, Adapter]) -> Hold:
        version = self.current
        infos = [version[name] for name in route.names]
        taken: list[int] = []
        try:
            for info in sorted(infos, key=lambda info: info.digest not in self._slot_of):  # those in slots stay there
                slot = self._slot_of.get(info.digest)
                taken.append(self._put(read[info.digest]) if slot is None else slot)
                self._num_users[taken[-1]] += 1  # at once: the next one must not take it
                self._idle.pop(taken[-1], None)
        except BaseException:
            self._num_users.subtract(taken)
            self._find_idle()
            raise
        slots = tuple(self._slot_of[info.digest] for info in infos)
        self._num_on_version[version.number] += 1
        if route.auto:
            infos = [info for info in version.adapters.values() if info.routable]
        of_slots = version.column_slots if route.auto else slots
        return Hold(
            version,
            slots,
            {slot: info.digest for slot, info in zip(of_slots, infos, strict=True)},
            {info.digest: info.name for info in infos},
            any(info.acts_early for info in infos) or bool(route.auto and self._decoder.prepares),
        )

    def release(self, hold: Hold) -> None:
        """It never waits: while an adapter is being loaded, the next call settles it."""
        self._released.append(hold)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Count what was released."""
        while self._released:
            hold = self._released.popleft()
            self._num_users.subtract(hold.slots)
            number = hold.version.number
            self._num_on_version[number] -= 1
            if number != self.current.number and not self._num_on_version[number]:
                del self._versions[number]
        self._find_idle()

    def load(
        self,
        name: str,
        folder: str | Path,
        *,
        activation: Activation | None = None,
        replaces: bool = False,
        digest: str | None = None,
    ) -> AdapterInfo:
        """Let requests that begin from now on name the adapter of a PEFT folder.

        Args:
            activation: its default policy; None takes "invocation" where it has invocation tokens, else 0, or that of
                the adapter which it replaces.
            replaces: an adapter of that name may be there; its place in the router passes on.
            digest: what the folder must hold; None takes what it holds.

        Raises:
            ValueError: a bad name, one that is taken, or an adapter that does not fit or has another digest; nothing
                was changed.
            FileNotFoundError: no adapter there.
            NoFreeSlotError: no slot, or too many versions are in use; nothing was changed.
        """
        check_name(name)
        adapter = Adapter.read(folder) if digest is None else _read(name, folder, digest)
        self._decoder.check_fits(adapter)
        check_base_name(name, adapter, self._base)
        with self._lock:
            self._settle()
            old = self.current.adapters.get(name)
            if old is not None and not replaces:
                raise ValueError(f"there is an adapter {name!r} already; unload it first, or ask to replace it.")
            if old is not None and activation is None:
                activation = old.activation
            if activation is None:
                activation = "invocation" if adapter.config.alora_invocation_tokens else 0
            info = self._info(name, adapter, activation, Path(folder), routable=old is not None and old.routable)
            if info.routable and info.acts_early:
                raise ValueError(f"adapter {name!r} acts below the router layer, so it cannot replace a routable one.")
            if info.digest not in self._slot_of:
                self._put(adapter)
            self._publish({**self.current.adapters, name: info})
            self._settle()  # what was released meanwhile
            return info

    def unload(self, name: str) -> None:
        """Requests that begin from now on cannot name the adapter; those that run keep it.

        Raises:
            ValueError: there is none of that name, or the router may pick it.
        """
        with self._lock:
            if self.current[name].routable:
                raise ValueError(
                    f"adapter {name!r} has a column of the router; take it out of the bank by `molora bank remove` and "
                    "start again."
                )
            self._publish({other: info for other, info in self.current.adapters.items() if other != name})

    def _info(
        self, name: str, adapter: Adapter, activation: Activation, folder: Path, *, routable: bool
    ) -> AdapterInfo:
        tokens = adapter.config.alora_invocation_tokens
        return AdapterInfo(
            name,
            adapter.digest,
            routable,
            activation,
            None if tokens is None else tuple(tokens),
            any(layer < self._decoder.router_layer for layer in adapter.layers),
            folder,
        )

    def _check_idle(self) -> None:
        if not self._idle:
            raise NoFreeSlotError(
                f"all {self._decoder.num_slots} adapter slots are in use; try again when requests have ended, or start "
                "with more slots."
            )

    def _put(self, adapter: Adapter) -> int:
        """Into a slot that nobody uses: the one that was used least recently."""
        self._check_idle()
        slot = next(iter(self._idle))
        self._slot_of = {digest: other for digest, other in self._slot_of.items() if other != slot}
        self._decoder.set_adapter(slot, adapter)
        self._slot_of[adapter.digest] = slot
        self._idle.move_to_end(slot)
        return slot

    def _publish(self, adapters: Mapping[str, AdapterInfo]) -> None:
        routable = [info for info in adapters.values() if info.routable]
        column_slots = tuple(self._slot_of[info.digest] for info in routable)
        old = self.current
        number = old.number
        if column_slots != old.column_slots or old.number not in self._versions:
            free = [n for n in range(NUM_VERSIONS) if n not in self._versions]
            if not free:
                raise NoFreeSlotError(f"requests run on {NUM_VERSIONS} versions of the bank; try again in a while.")
            number = free[0]
            self._decoder.set_columns(number, column_slots)
        version = replace(old, number=number, adapters=dict(adapters), column_slots=column_slots)
        if number != old.number and not self._num_on_version[old.number]:
            self._versions.pop(old.number, None)
        self._versions[number] = self.current = version
        self._find_idle()

    def _find_idle(self) -> None:
        """The slots that may be overwritten: of no request that runs, and of no router's columns in a live version."""
        needed = {slot for version in self._versions.values() for slot in version.column_slots}
        needed |= {slot for slot, count in self._num_users.items() if count > 0}
        for slot in range(self._decoder.num_slots):
            if slot in needed:
                self._idle.pop(slot, None)
            elif slot not in self._idle:
                self._idle[slot] = None


def _read(name: str, folder: str | Path, digest: str) -> Adapter:
    adapter = Adapter.read(folder)
    if adapter.digest != digest:
        raise ValueError(
            f"adapter {name!r} in {folder} is not the one that was loaded; load it again, and keep a folder as it is "
            "while it is served."
        )
    return adapter


def read_route(slots: Sequence[int], gates: Sequence[float], digests: Mapping[int, str]) -> TokenRoute:
    """The adapters that act on a token, by digest."""
    return tuple([(digests[slot], gate) for slot, gate in zip(slots, gates, strict=True) if slot >= 0])
