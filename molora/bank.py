"""A bank: many adapters over one frozen base model, and the router that picks among them, as a folder::

    my-bank/
      molora.json                    format version, base model, router layer, policies, ordered adapters with digests
      router.safetensors             the learned router, if there is one
      adapters/<name>/...            one PEFT folder for each adapter

A `Bank` is what such a folder says, checked when it is read. Every change writes a whole new folder and swaps it
in, so that a reader finds the old bank or the new one, never a half.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from molora.activation import Activation, check_activation
from molora.adapter import Adapter, is_whole
from molora.digest import json_digest
from molora.files import atomic_directory, write_atomic
from molora.router import KeyRouter, Router, RouterConfig, TokenRangeRouter
from molora.safetensors_files import read_safetensors

FORMAT_VERSION = 1
BANK_FILE = "molora.json"
ROUTER_FILE = "router.safetensors"
RESERVED_NAMES = frozenset({"auto", "base"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class BaseInfo:
    """The base model that a bank's adapters were trained on: where to find it, and the digest of its weights."""

    name: str
    digest: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.digest, str):
            raise ValueError(f"base is {self!r}; expected a name and a digest, both text.")


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of a bank.

    Attributes:
        name: how requests name it.
        digest: of its contents; replacing the adapter changes it, whatever the name.
        routable: whether the router may pick it. Explicit-only adapters have no key.
        activation: the policy it was trained with, used where a request names none.
    """

    name: str
    digest: str
    routable: bool
    activation: Activation


@dataclass(frozen=True)
class RouterEntry:
    """The bank's router: its configuration and the digest of its weights and configuration."""

    config: RouterConfig
    digest: str


@dataclass(frozen=True)
class BankConfig:
    """The contents of `molora.json`."""

    name: str
    base: BaseInfo
    router_layer: int
    max_rank: int
    activation: Activation = "turn"
    adapters: tuple[AdapterEntry, ...] = ()
    router: RouterEntry | None = None
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"the bank has format version {self.format_version}; this release reads version {FORMAT_VERSION}."
            )
        check_name(self.name)
        if not (is_whole(self.router_layer, 0) and is_whole(self.max_rank, 1)):
            raise ValueError(
                f"router_layer={self.router_layer!r} and max_rank={self.max_rank!r}: expected whole numbers of at "
                "least 0 and 1."
            )
        check_activation(self.activation)
        names = [entry.name for entry in self.adapters]
        if len(set(names)) != len(names):
            raise ValueError(f"the bank names an adapter twice: {names}.")
        for entry in self.adapters:
            check_name(entry.name)
            check_activation(entry.activation)

    @classmethod
    def from_json(cls, raw: dict[str, Any], *, source: str) -> Self:
        """Raises ValueError naming the file and the field that is missing, unknown or wrong."""
        try:
            raw = dict(raw)
            base = _build(BaseInfo, raw.pop("base"))
            adapters = tuple(_build(AdapterEntry, entry) for entry in raw.pop("adapters"))
            router = raw.pop("router")
            if router is not None:
                router = _build(RouterEntry, {**router, "config": RouterConfig.from_json(router["config"])})
            config: Self = _build(cls, {**raw, "base": base, "adapters": adapters, "router": router})
            return config
        except KeyError as error:
            raise ValueError(f"{source}: field {error.args[0]!r} is missing.") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Bank:
    """A bank on disk. The attributes are what `molora.json` says; the methods read and change the folder."""

    def __init__(self, path: Path, config: BankConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        name: str,
        base: BaseInfo,
        router_layer: int,
        max_rank: int,
        activation: Activation = "turn",
    ) -> Self:
        """Make an empty bank.

        Args:
            router_layer: index of the layer whose input the router reads; routable adapters act from it on.
            max_rank: the rank that every adapter slot is padded to; no adapter may exceed it.
            activation: the policy of the routed use.

        Raises:
            FileExistsError: there is something at `path` already.
        """
        path = Path(path)
        if path.exists():
            raise FileExistsError(f"{path} exists already; remove it or choose another folder.")
        check_name(name)
        config = BankConfig(name, base, router_layer, max_rank, activation)
        with atomic_directory(path) as folder:
            _write_config(folder, config)
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a bank's description; weights are read, and checked against their digests, when asked for.

        Raises:
            FileNotFoundError: no bank there.
            ValueError: `molora.json` is damaged, of another version, or has unknown fields.
        """
        path = Path(path)
        file = path / BANK_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; {path} is not a bank. Training makes one, and molora.Bank.create."
            )
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not valid JSON ({error}); restore it or build the bank again.") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{file} holds a {type(raw).__name__}; expected an object.")
        return cls(path, BankConfig.from_json(raw, source=str(file)))

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def adapters(self) -> tuple[AdapterEntry, ...]:
        return self.config.adapters

    @property
    def routable(self) -> tuple[AdapterEntry, ...]:
        """The adapters that the router may pick, in the order of its columns 1, 2, ..."""
        return tuple(entry for entry in self.adapters if entry.routable)

    @property
    def has_router(self) -> bool:
        return self.config.router is not None

    def __getitem__(self, name: str) -> AdapterEntry:
        for entry in self.adapters:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.adapters) or "none"
        raise ValueError(f"the bank {self.name!r} has no adapter {name!r}; its adapters are: {known}.")

    def __contains__(self, name: object) -> bool:
        return any(entry.name == name for entry in self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def adapter_folder(self, name: str) -> Path:
        return self.path / "adapters" / self[name].name

    def load_adapter(self, name: str) -> Adapter:
        """Read an adapter's weights.

        Raises:
            FileNotFoundError, ValueError: a file is missing, truncated, or not the one that the bank recorded.
        """
        adapter = Adapter.read(self.adapter_folder(name))
        if adapter.digest != self[name].digest:
            raise ValueError(
                f"adapter {name!r} in {self.adapter_folder(name)} is not the one that {BANK_FILE} recorded (digest "
                f"{adapter.digest}, expected {self[name].digest}); remove it from the bank and add it again."
            )
        return adapter

    def check(self) -> None:
        """Read every file, and hold it against what the bank says of it.

        Raises:
            FileNotFoundError, ValueError: a file is missing, truncated, not the one that the bank recorded, or does not
                fit the bank.
        """
        for entry in self.adapters:
            adapter = self.load_adapter(entry.name)
            self._check_adapter(entry.name, adapter)
            self._check_routable(entry.name, adapter, entry.routable, None, None)
        self.load_router()

    def load_router(self) -> Router | None:
        """Read the router; None if the bank has none.

        Raises:
            FileNotFoundError, ValueError: the file is missing, truncated, or not the one that the bank recorded.
        """
        entry = self.config.router
        if entry is None:
            return None
        router: KeyRouter | TokenRangeRouter
        if entry.config.kind == "token_ranges":
            router = TokenRangeRouter(entry.config, [adapter.name for adapter in self.routable])
        else:
            router = _read_key_router(self.path / ROUTER_FILE, entry.config)
        if router.digest != entry.digest:
            raise ValueError(f"{self.path / ROUTER_FILE} is not the router that {BANK_FILE} recorded; train it again.")
        if router.num_columns != len(self.routable) + 1:
            raise ValueError(
                f"the router has {router.num_columns} columns, but base and {len(self.routable)} routable adapters "
                f"need {len(self.routable) + 1}."
            )
        return router.eval().requires_grad_(False)

    def add(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        activation: Activation | None = None,
        routable: bool | None = None,
        key: Tensor | None = None,
    ) -> AdapterEntry:
        """Copy a PEFT LoRA or aLoRA folder into the bank.

        Args:
            name: how requests name it; the folder's name if None.
            activation: its default policy; if None, "invocation" where it has invocation tokens, else 0 (every token).
            routable: whether the router may pick it; if None, yes where it acts only from the router layer on and
                either the bank has no router yet or a `key` is given.
            key: the adapter's key [D], appended to a router that the bank has already.

        Raises:
            ValueError: the adapter cannot be used in this bank; nothing was changed.
        """
        name = Path(folder).resolve().name if name is None else name
        keys = None if key is None else {name: key}
        (entry,) = self.add_all({name: Adapter.read(folder)}, activation=activation, routable=routable, keys=keys)
        return entry

    def add_all(
        self,
        adapters: Mapping[str, Adapter],
        *,
        activation: Activation | None = None,
        routable: bool | None = None,
        keys: Mapping[str, Tensor] | None = None,
    ) -> tuple[AdapterEntry, ...]:
        """Write adapters into the bank by their names: all of them in one swap of its folder, or none.

        Args:
            activation, routable: of each adapter, as `add` takes them.
            keys: an adapter's key [D] by its name, as `add` takes it.

        Raises:
            ValueError: one of them cannot be used in this bank; nothing was changed.
        """
        router = self.load_router()
        entries = []
        for name, adapter in adapters.items():
            if check_name(name) in self:
                raise ValueError(f"the bank has an adapter {name!r} already; remove it first, or choose another name.")
            self._check_adapter(name, adapter)
            key = None if keys is None else keys.get(name)
            may_route = self._check_routable(name, adapter, routable, router, key)
            if key is not None:
                assert isinstance(router, KeyRouter)
                router.append_key(key)
            policy = activation
            if policy is None:
                policy = "invocation" if adapter.config.alora_invocation_tokens else 0
            entries.append(AdapterEntry(name, adapter.digest, may_route, check_activation(policy)))
        self._rewrite(replace(self.config, adapters=(*self.adapters, *entries)), router, added=adapters)
        return tuple(entries)

    def remove(self, name: str) -> None:
        """Drop an adapter and its key; no other adapter's scores change."""
        entry = self[name]
        router = self.load_router()
        if router is not None and entry.routable:
            if isinstance(router, KeyRouter):
                router.remove_column(1 + self.routable.index(entry))
            elif any(name == named for _, _, named in router.config.ranges):
                raise ValueError(f"the bank's token_ranges router names {name!r}; set another router first.")
        rest = tuple(other for other in self.adapters if other.name != name)
        self._rewrite(replace(self.config, adapters=rest), router)

    def set_router(self, router: Router | None, *, activation: Activation | None = None) -> None:
        """Write the router (or none) into the bank, and the policy it was trained with.

        Raises:
            ValueError: its columns are not base and the routable adapters.
        """
        if router is not None and router.num_columns != len(self.routable) + 1:
            raise ValueError(
                f"the router has {router.num_columns} columns; the bank needs {len(self.routable) + 1} "
                f"(base, {', '.join(entry.name for entry in self.routable)})."
            )
        config = self.config if activation is None else replace(self.config, activation=check_activation(activation))
        self._rewrite(config, router)

    def route_digest(self, route: Sequence[tuple[str, float]] | None) -> str:
        """Identity of a route by content: sorted (adapter digest, weight) pairs, or the router's for None."""
        if route is not None:
            return json_digest(sorted((self[name].digest, float(weight)) for name, weight in route))
        if self.config.router is None:
            raise ValueError(f"the bank {self.name!r} has no router.")
        columns = [entry.digest for entry in self.routable]
        # The router's own digest covers its gate mode, k and temperature.
        return json_digest([self.config.router.digest, self.config.router_layer, columns])

    def _check_adapter(self, name: str, adapter: Adapter) -> None:
        if adapter.max_rank > self.config.max_rank:
            raise ValueError(
                f"adapter {name!r} has rank {adapter.max_rank}; the bank's slots hold at most {self.config.max_rank}. "
                "Make a bank with a larger max_rank."
            )
        check_base_name(name, adapter, self.config.base.name)

    def _check_routable(
        self, name: str, adapter: Adapter, routable: bool | None, router: Router | None, key: Tensor | None
    ) -> bool:
        below = [layer for layer in adapter.layers if layer < self.config.router_layer]
        if key is not None and not isinstance(router, KeyRouter):
            raise ValueError(f"adapter {name!r} is given a key, but the bank has no router with keys; pass none.")
        if routable is None:
            routable = key is not None or (router is None and not below)
        if key is not None and not routable:
            raise ValueError(f"adapter {name!r} is given a key and routable=False; pass one or the other.")
        if routable and below:
            raise ValueError(
                f"adapter {name!r} acts in layer {below[0]}, below the router layer {self.config.router_layer}; it can "
                "only be used by explicit routes. Add it with routable=False."
            )
        if routable and router is not None and key is None:
            raise ValueError(
                f"the bank's router has no key for {name!r}; pass one, or add it with routable=False and train the "
                "router again."
            )
        return routable

    def _rewrite(self, config: BankConfig, router: Router | None, added: Mapping[str, Adapter] | None = None) -> None:
        """Write the bank anew beside the old one, if there is one, and swap them."""
        added = added or {}
        entry = None if router is None else RouterEntry(router.config, router.digest)
        config = replace(config, router=entry)
        with atomic_directory(self.path) as folder:
            copy_other_files(self.path, folder)
            for adapter in config.adapters:
                target = folder / "adapters" / adapter.name
                if adapter.name in added:
                    added[adapter.name].write(target)
                else:
                    shutil.copytree(self.adapter_folder(adapter.name), target)
            if isinstance(router, KeyRouter):
                tensors = {key: tensor.contiguous() for key, tensor in router.tensors().items()}
                write_atomic(folder / ROUTER_FILE, save(tensors, metadata={"format": "pt"}))
            _write_config(folder, config)
        self.config = config


def check_name(name: str) -> str:
    """Return a legal name of a bank or adapter.

    Raises:
        ValueError: it is reserved, or would not make a good folder name.
    """
    if name in RESERVED_NAMES or not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no legal name: use letters, digits, '.', '_' and '-' (at most 64), and not "
            f"{' or '.join(sorted(RESERVED_NAMES))}."
        )
    return name


def is_hub_name(name: str) -> bool:
    """Whether a base's name is of the form of the hub's, `owner/model`."""
    return _HUB_NAME.match(name) is not None


def check_base_name(name: str, adapter: Adapter, base: str) -> None:
    """Raise ValueError if an adapter names another base model on the hub than `base`.

    A local path says nothing of what it holds, so where either is one, the shapes have to tell.
    """
    made_for = adapter.config.base_model_name_or_path or ""
    if is_hub_name(made_for) and is_hub_name(base) and made_for != base:
        raise ValueError(f"adapter {name!r} was made for the base model {made_for!r}; this bank's is {base!r}.")


def copy_other_files(source: Path, target: Path) -> None:
    """Copy what lies in a bank's folder and is not the bank's own: a card, a license, results."""
    for path in source.iterdir() if source.is_dir() else ():
        if path.name not in (BANK_FILE, ROUTER_FILE, "adapters"):
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, target / path.name)


def _build(cls: Any, raw: dict[str, Any]) -> Any:
    fields = cls.__dataclass_fields__
    unknown = sorted(set(raw) - set(fields))
    if unknown:
        raise ValueError(f"unknown fields {unknown} of {cls.__name__}; this version knows {sorted(fields)}.")
    return cls(**raw)


def _write_config(folder: Path, config: BankConfig) -> None:
    write_atomic(folder / BANK_FILE, json.dumps(config.to_json(), indent=2) + "\n")


def _read_key_router(path: Path, config: RouterConfig) -> KeyRouter:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, but {BANK_FILE} names a router; train it again.")
    try:
        tensors = read_safetensors(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); copy it or train the router again.") from error
    try:
        return KeyRouter.from_tensors(config, tensors)
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path} does not hold a router of the shape that {BANK_FILE} gives ({error}).") from None
