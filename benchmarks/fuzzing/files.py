"""Readers of files that others wrote: adapters, banks and bases.

Each reader takes what a fuzzer makes up, puts it into a folder that is whole otherwise, and reads that as MoLoRA does.
"""

import json
import math
import operator
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, AdapterConfig
from molora.bank import BANK_FILE, ROUTER_FILE, Bank, BaseInfo, _read_key_router
from molora.checkpoint import load_base
from molora.digest import base_digest
from molora.router import KeyRouter, RouterConfig
from molora.tiny import make_tiny_base

Reader = Callable[[bytes], object]
MAX_DATA_BYTES = 1 << 20
MODULES = ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj")
BITS = {"F64": 64, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F4": 4, "C64": 64}
BITS |= {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F3": 3}


def safetensors_file(made: bytes, data: bytes) -> bytes:
    """A file with this header, and as much data as it asks for.

    After "=" comes a header whose tensors are laid out here, one behind the other, so that it is right more often; what
    begins with neither "=" nor "{" is the whole file.
    """
    if not made.startswith((b"{", b"=")):
        return made
    is_laid_out, header = made.startswith(b"="), made.removeprefix(b"=")
    try:
        tensors = json.loads(header)
        if is_laid_out:
            header = json.dumps(laid_out(tensors)).encode()
        num_bytes = max(each["data_offsets"][1] for each in json.loads(header).values() if "data_offsets" in each)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        num_bytes = len(data)
    if not isinstance(num_bytes, int) or not 0 <= num_bytes <= MAX_DATA_BYTES:
        num_bytes = len(data)
    return struct.pack("<Q", len(header)) + header + data[:num_bytes].ljust(num_bytes, b"\0")


def laid_out(tensors: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A header with the place of each tensor, by its type and shape."""
    end, out = 0, {}
    for name, each in tensors.items():
        if name == "__metadata__":
            out[name] = each
            continue
        begin, end = end, end + math.prod(map(operator.index, each["shape"])) * BITS[each["dtype"]] // 8
        out[name] = each | {"data_offsets": [begin, end]}
    return out


def split_file(file: bytes) -> tuple[bytes, bytes]:
    """A safetensors file's header and data."""
    end = 8 + struct.unpack_from("<Q", file)[0]
    return file[8:end].rstrip(), file[end:]


def some_adapter(modules: tuple[str, ...] = MODULES) -> Adapter:
    """A small one of rank 2."""
    config = AdapterConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], rank_pattern={r".*layers\.(1|2)\..*_proj": 2}
    )
    tensors: dict[str, Tensor] = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, 3)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(4, 2)
    return Adapter.from_tensors(config, tensors)


def headers_like(header: bytes) -> tuple[bytes, ...]:
    """A header, and others of each type of number, of sizes that no machine has, and of none."""
    whole = json.loads(header)
    changed = [whole]
    names = [name for name in whole if name != "__metadata__"]
    first = whole[names[0]]
    changed += [laid_out({name: whole[name] | {"dtype": dtype} for name in names}) for dtype in BITS]
    shapes = ([1 << 50], [1 << 40, 1 << 40], [0], [0, 1 << 62], [2, -1], [], [1.5], ["2"], None)
    offsets = ([0, 1 << 50], [8, 0], [0], [], [-8, 0], [0, 0])
    changed += [whole | {names[0]: first | {"shape": each}} for each in shapes]
    changed += [whole | {names[0]: first | {"data_offsets": each}} for each in offsets]
    changed += [{}, whole | {"__metadata__": {"format": "pt"}}, whole | {"__metadata__": 1}]
    headers = [json.dumps(each).encode() for each in changed]
    return (*headers, *(b"=" + header for header in headers))


def adapter_config(folder: Path) -> tuple[Reader, tuple[bytes, ...]]:
    """`adapter_config.json`, beside weights that fit."""
    some_adapter().write(folder)
    raw = json.loads((folder / CONFIG_FILE).read_text())
    patterns = (
        "q_proj",
        "(q|up)_proj",
        ".*",
        "layers.1",
        "(?i)q",
        r"(a)\1",
        "(a*)*b",
        ".?" * 60,
        "a{1,9}",
        "(",
        "[^x]$",
    )
    changed = [raw, raw | {"r": 3}, raw | {"use_rslora": True}, raw | {"alora_invocation_tokens": [1, 2]}]
    changed += [raw | {"rank_pattern": {each: 2}, "alpha_pattern": {each: 1e3}} for each in patterns]
    changed += [{name: value} for name, value in raw.items()]

    def read(made: bytes) -> object:
        (folder / CONFIG_FILE).write_bytes(made)
        return Adapter.read(folder).digest

    return read, tuple(json.dumps(each).encode() for each in changed)


def adapter_weights(folder: Path) -> tuple[Reader, tuple[bytes, ...]]:
    """The header of `adapter_model.safetensors`, beside a configuration that fits."""
    some_adapter().write(folder)
    file = (folder / WEIGHTS_FILE).read_bytes()
    header, data = split_file(file)

    def read(made: bytes) -> object:
        (folder / WEIGHTS_FILE).write_bytes(safetensors_file(made, data))
        return Adapter.read(folder).digest

    return read, (*headers_like(header), file, file[:40])


def bank(folder: Path) -> tuple[Reader, tuple[bytes, ...]]:
    """`molora.json` of a bank with a router and two adapters."""
    made_bank = _make_bank(folder)
    raw = json.loads((made_bank.path / BANK_FILE).read_text())
    ranges = {"kind": "token_ranges", "ranges": [[0, 9, "left"], [9, 99, "right"]]}
    changed = [raw, raw | {"router": None}, raw | {"router": raw["router"] | {"config": ranges}}]
    changed += [raw | {"activation": each} for each in ("turn", "response", 3, -1, None)]
    changed += [{name: raw[name] for name in raw if name != left_out} for left_out in raw]
    for name, value in (("hidden_dim", 1 << 60), ("key_dim", 1 << 40), ("lora_rank", 4), ("temperature", 1e-300)):
        entry = raw["router"]
        changed.append(raw | {"router": entry | {"config": entry["config"] | {name: value}}})

    def read(made: bytes) -> object:
        (made_bank.path / BANK_FILE).write_bytes(made)
        opened = Bank.open(made_bank.path)
        opened.check()
        return opened.route_digest(None if opened.has_router else [])

    return read, tuple(json.dumps(each).encode() for each in changed)


def router_weights(folder: Path) -> tuple[Reader, tuple[bytes, ...]]:
    """The header of `router.safetensors`."""
    made_bank = _make_bank(folder)
    path = made_bank.path / ROUTER_FILE
    header, data = split_file(path.read_bytes())

    assert made_bank.config.router is not None
    config = made_bank.config.router.config

    def read(made: bytes) -> object:
        path.write_bytes(safetensors_file(made, data))
        router = _read_key_router(path, config)  # an author can give any router its digest
        router(torch.zeros(1, router.hidden_size), None)
        return router.digest

    return read, headers_like(header)


def base_weights(folder: Path) -> tuple[Reader, tuple[bytes, ...]]:
    """The header of a base's `model.safetensors`; what begins with "[" is taken for the index of its shards."""
    base = make_tiny_base(folder / "base", seed=0, vocab_size=259, hidden_size=8, intermediate_size=8,
                          num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8)  # fmt: skip
    path, index = base / "model.safetensors", base / "model.safetensors.index.json"
    whole = path.read_bytes()
    header, data = split_file(whole)

    def read(made: bytes) -> object:
        if made.startswith(b"["):
            path.write_bytes(whole)
            index.write_bytes(made[1:])
        else:
            index.unlink(missing_ok=True)
            path.write_bytes(safetensors_file(made, data))
        digest = base_digest(base)
        load_base(base, device="cpu")
        return digest

    names = list(json.loads(header))
    indices: list[object] = [{"weight_map": dict.fromkeys(names, each)} for each in (path.name, "other", 1, None, [])]
    indices += [{}, [], {"weight_map": []}, {"weight_map": None}]
    return read, (*headers_like(header), *(b"[" + json.dumps(each).encode() for each in indices))


def _make_bank(folder: Path) -> Bank:
    info = BaseInfo("tiny", "sha256:0")
    made = Bank.create(folder / "bank", name="some", base=info, router_layer=1, max_rank=4)
    made.add_all({"left": some_adapter(), "right": some_adapter(MODULES[:1])}, activation="turn")
    router = KeyRouter(RouterConfig(hidden_dim=4, key_dim=2, lora_rank=2), hidden_size=8, num_columns=3)
    router.lora = dict(some_adapter(("model.layers.0.self_attn.q_proj",)).weights)
    made.set_router(router)
    return made


FILES: Mapping[str, Callable[[Path], tuple[Reader, tuple[bytes, ...]]]] = {
    "adapter_config.json": adapter_config,
    "adapter_model.safetensors": adapter_weights,
    "molora.json": bank,
    "router.safetensors": router_weights,
    "a base's safetensors": base_weights,
}
