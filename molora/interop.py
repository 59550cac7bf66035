"""Adapters of other projects into a bank, and a bank's adapters out to them.

In: PEFT folders, alone or many in one folder, and the adapters of an X-LoRA checkpoint. Out: what vLLM loads. Whatever
does not come along is said in a line. This module reads and writes folders, and loads no model.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.nn.functional import pad

from molora.activation import Activation
from molora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, AdapterConfig, LoraWeights, read_config, read_weights
from molora.bank import AdapterEntry, Bank, BankConfig, BaseInfo, check_base_name, check_name, is_hub_name
from molora.checkpoint import resolve_base
from molora.digest import base_digest
from molora.files import atomic_directory

# What vLLM takes for --max-lora-rank: MaxLoRARanks of its vllm/config/lora.py.
VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
XLORA_CLASSIFIER_FILE = "xlora_classifier.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_XLORA_PREFIX = "base_model.lora_model.model."


@dataclass(frozen=True)
class Import:
    """What an import did: the bank, whether it is a new one, its new entries, and a line for each thing left out."""

    bank: Bank
    is_new: bool
    entries: tuple[AdapterEntry, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Export:
    """What an export did: a line for each thing that is lost or other than in the bank, and how to serve the rest."""

    notes: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class _Found:
    name: str
    folder: Path
    adapter: Adapter


def import_adapters(
    path: str | Path,
    source: str | Path,
    *,
    name: str | None = None,
    base: str | None = None,
    router_layer: int | None = None,
    activation: Activation | None = None,
) -> Import:
    """Copy the adapters of a folder into a bank, all or none, and make the bank if there is nothing at `path`.

    Args:
        source: a PEFT LoRA or aLoRA folder; a folder of these, each by its folder's name; or an X-LoRA checkpoint,
            whose adapters keep their names there.
        name: of the adapter, where there is only one.
        base: a new bank's base, a folder or a hub name; the one that the adapters name if None.
        router_layer: a new bank's; the first layer that an adapter acts in if None, so that a router may pick any.
        activation: of each adapter, as `Bank.add` takes it.

    Raises:
        FileNotFoundError, ValueError: something is missing, unsupported or in disagreement; nothing was written.
    """
    path, source = Path(path), Path(source)
    is_new = not path.exists()
    if not is_new and (base is not None or router_layer is not None):
        raise ValueError(f"{path} exists already, with a base and a router layer; give neither.")
    if is_new:
        check_name(path.resolve().name)
    bank = None if is_new else Bank.open(path)
    found, left_out = _find(source)
    if name is not None:
        if len(found) > 1:
            raise ValueError(f"{source} holds {len(found)} adapters, and one name cannot be for all; give none.")
        found = [replace(found[0], name=name)]
    dropped = [each.name for each in found if read_config(each.folder).get("lora_dropout")]
    if dropped:
        left_out.append(f"lora_dropout of {', '.join(dropped)}: it acts in training only")
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{source} has the name of a folder in it, so that two adapters would be {names[0]!r}.")
    named = _named_base(found, with_paths=is_new and base is None)
    try:
        if bank is None:
            bank = _new_bank(path, found, named if base is None else base, router_layer)
        entries = bank.add_all({each.name: each.adapter for each in found}, activation=activation)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return Import(bank, is_new, entries, tuple(left_out))


def export_for_vllm(bank: Bank, out: str | Path, names: Sequence[str] | None = None) -> Export:
    """Write adapters as plain LoRAs, `out/<name>/`, which vLLM and PEFT load: each acts from the first token on.

    Args:
        names: which; all of the bank's if None or empty.

    Raises:
        FileExistsError: `out` is a folder with something in it.
        ValueError: there is no such adapter, or one is of a larger rank than vLLM takes.
    """
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; remove it or choose another folder.")
    entries = [bank[name] for name in dict.fromkeys(names)] if names else list(bank.adapters)
    if not entries:
        raise ValueError(f"the bank {bank.name!r} has no adapters.")
    adapters = {entry.name: bank.load_adapter(entry.name) for entry in entries}
    base = bank.config.base.name
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    largest = max(adapters, key=lambda name: adapters[name].max_rank)
    max_rank = next((rank for rank in VLLM_MAX_RANKS if rank >= adapters[largest].max_rank), None)
    if max_rank is None:
        raise ValueError(
            f"adapter {largest!r} has rank {adapters[largest].max_rank}; vLLM takes at most {VLLM_MAX_RANKS[-1]}."
        )
    with atomic_directory(out) as folder:
        for name, adapter in adapters.items():
            plain_lora(adapter, base).write(folder / name)
    modules = [f"{name}={out.resolve() / name}" for name in adapters]
    options = ["--enable-lora", "--lora-modules", *modules, "--max-lora-rank", str(max_rank)]
    return Export(tuple(_notes(bank, entries, adapters)), shlex.join(["vllm", "serve", base, *options]))


def plain_lora(adapter: Adapter, base: str) -> Adapter:
    """The same low-rank update without invocation tokens, and with one rank and one scaling for all modules.

    Semantics, where modules differ in rank or scaling:
        A' = [A; 0], B' = [scaling * B, 0], so that B' A' = scaling * B A

    Other adapters keep their weights as they are.
    """
    config = replace(adapter.config, alora_invocation_tokens=None, base_model_name_or_path=base)
    if not _has_patterns(adapter):
        return replace(adapter, config=config)
    rank = adapter.max_rank
    config = replace(config, r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={})
    weights = {}
    for module, pair in adapter.weights.items():
        missing = rank - pair.rank
        b_OR = pad(pair.b_OR * pair.scaling, (0, missing))
        weights[module] = LoraWeights(pad(pair.a_RI, (0, 0, 0, missing)), b_OR, scaling=1.0)
    return Adapter(config, weights)


def _find(source: Path) -> tuple[list[_Found], list[str]]:
    """The adapters of a folder, in order, and a line for each thing that is left out of them."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder; expected one of PEFT's, or one that holds such folders.")
    is_adapter = (source / CONFIG_FILE).is_file()
    raw = read_config(source) if is_adapter else {}
    if raw.get("peft_type") == "XLORA":
        return _find_xlora(source, raw), _left_out_of_xlora(raw)
    # PEFT writes the adapter "default" into the folder itself, and others beside it, into folders of their names.
    inner = [each for each in sorted(source.iterdir()) if (each / CONFIG_FILE).is_file() and each.name[0] != "."]
    earlier = [each for each in inner if is_adapter and _CHECKPOINT.fullmatch(each.name)]
    inner = [each for each in inner if each not in earlier]
    if not (is_adapter or inner):
        raise ValueError(f"{source} holds no adapter: neither it nor a folder in it has an {CONFIG_FILE}.")
    found = [_Found(source.resolve().name, source, Adapter.read(source))] if is_adapter else []
    found += [_Found(each.name, each, Adapter.read(each)) for each in inner]
    left_out = [f"{each.name}: what a Trainer had learned earlier" for each in earlier]
    # X-LoRA checkpoints from before it was part of PEFT have no configuration of PEFT's.
    if (source / XLORA_CLASSIFIER_FILE).is_file():
        left_out += _left_out_of_xlora({})
    return found, left_out


def _find_xlora(source: Path, raw: dict[str, Any]) -> list[_Found]:
    """An X-LoRA checkpoint names its adapters, and where each came from; PEFT saves them as folders `0`, `1`, ...

    Where they were trained with the classifier only the saved ones are right. Elsewhere what they came from is
    preferred, since saved ones may be incomplete (see `_read_saved_by_xlora`).
    """
    adapters = raw.get("adapters")
    is_map = isinstance(adapters, dict) and all(isinstance(where, str) and where for where in adapters.values())
    if not adapters or not is_map:
        raise ValueError(f"{source / CONFIG_FILE}: field 'adapters' is {adapters!r:.100}; expected names and folders.")
    found = []
    for index, (name, where) in enumerate(adapters.items()):
        saved = source / str(index)
        folders = [saved]
        if not raw.get("use_trainable_adapters"):
            folders.insert(0, Path(where).expanduser())
            if not name.isdecimal():  # the layout on the hub: each in a folder of its name
                folders.insert(0, source / check_name(name))
        folder = next((each for each in folders if (each / CONFIG_FILE).is_file()), None)
        if folder is None:
            raise FileNotFoundError(
                f"{source}: its adapter {name!r} is neither in {' nor in '.join(map(str, folders))}; put it there."
            )
        others = [other for other in range(len(adapters)) if other != index]
        adapter = _read_saved_by_xlora(folder, others) if folder == saved else Adapter.read(folder)
        found.append(_Found(name, folder, adapter))
    return found


def _read_saved_by_xlora(folder: Path, others: Iterable[int]) -> Adapter:
    """Read what PEFT saved of one adapter of an X-LoRA model: its tensors, among the base model's.

    PEFT knows the adapters there by number, and leaves out what has another one's number in its path: of two adapters
    the first loses layer 1, and the second layer 0, unless it acts in later layers only.

    Raises:
        ValueError: layers are missing in this way.
    """
    tensors = read_weights(folder)
    if not any(key.startswith(_XLORA_PREFIX) for key in tensors):
        return Adapter.read(folder)
    config = AdapterConfig.from_peft(read_config(folder), source=str(folder / CONFIG_FILE))
    modules = {key.removeprefix(_XLORA_PREFIX): tensor for key, tensor in tensors.items()}
    own = {f"base_model.model.{key}": tensor for key, tensor in modules.items() if ".lora_" in key}
    adapter = Adapter.from_tensors(config, own, source=str(folder / WEIGHTS_FILE))
    wanted = config.layers_to_transform
    if isinstance(wanted, int):
        wanted = [wanted]
    missing = [layer for layer in others if layer not in adapter.layers and (wanted is None or layer in wanted)]
    if missing:
        raise ValueError(
            f"{folder} lacks layers {', '.join(map(str, missing))}: PEFT took their numbers for other adapters' names "
            "when it saved the X-LoRA model. Import the folders that its adapters came from instead."
        )
    return adapter


def _left_out_of_xlora(raw: dict[str, Any]) -> list[str]:
    lines = [
        "X-LoRA's classifier: it weighs all adapters after a pass of its own through the base; train a router instead"
    ]
    if raw.get("global_scaling_weight", 1) != 1:
        lines.append(f"global_scaling_weight {raw['global_scaling_weight']}: each adapter acts at its own scale")
    return lines


def _named_base(found: Sequence[_Found], *, with_paths: bool) -> str | None:
    """The base that the adapters name, if any does. A local path says nothing elsewhere, so it may be left aside."""
    named: dict[str, _Found] = {}
    for each in found:
        name = each.adapter.config.base_model_name_or_path
        if name and (with_paths or is_hub_name(name)):
            named.setdefault(name, each)
    if len(named) > 1:
        (name, one), (other_name, other) = list(named.items())[:2]
        raise ValueError(
            f"{one.folder} was made for the base {name!r}, and {other.folder} for {other_name!r}; a bank has one base."
        )
    return next(iter(named), None)


def _new_bank(path: Path, found: Sequence[_Found], base: str | None, router_layer: int | None) -> Bank:
    """A bank that is not on disk yet."""
    if base is None:
        raise ValueError("no adapter names its base model; give it (--base).")
    for each in found:
        check_base_name(check_name(each.name), each.adapter, base)
    if router_layer is None:
        router_layer = min(each.adapter.layers[0] for each in found)
    config = BankConfig(
        name=path.resolve().name,
        base=BaseInfo(base, base_digest(resolve_base(base))),
        router_layer=router_layer,
        max_rank=max(each.adapter.max_rank for each in found),
    )
    return Bank(path, config)


def _notes(bank: Bank, entries: Sequence[AdapterEntry], adapters: dict[str, Adapter]) -> list[str]:
    notes = []
    late: dict[Activation, list[str]] = {}
    for entry in entries:
        if entry.activation != 0:
            late.setdefault(entry.activation, []).append(entry.name)
    if late:
        policies = "; ".join(f"{policy} of {', '.join(names)}" for policy, names in late.items())
        notes.append(
            f"lost: activation ({policies}): in vLLM an adapter acts from the first token, so it reads again what the "
            "base has read, and answers may differ"
        )
    what = "the router and blends" if bank.has_router else "blends"
    notes.append(f"lost: {what}: in vLLM a request names one adapter, or the base, for all of its tokens")
    folded = [name for name, adapter in adapters.items() if _has_patterns(adapter)]
    if folded:
        notes.append(
            f"changed: ranks and scalings of {', '.join(folded)}: one rank each, the rest zeros, and scalings in B; "
            "the maths is the same"
        )
    base = bank.config.base
    for name, adapter in adapters.items():
        made_for = adapter.config.base_model_name_or_path
        if made_for and made_for != base.name:
            notes.append(f"changed: the base that {name} names, from {made_for} to the bank's {base.name}")
    notes.append(f"not checked by vLLM: that the base is the bank's, with digest {base.digest}")
    return notes


def _has_patterns(adapter: Adapter) -> bool:
    return bool(adapter.config.rank_pattern or adapter.config.alpha_pattern)
