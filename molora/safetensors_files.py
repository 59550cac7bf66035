"""Reading files of safetensors that may be missing, cut off or made by somebody who means harm."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

MAX_STRIDE, MAX_DIMS = 2**59, 64  # of a tensor of torch: beyond, 16 bytes for each step overflow 63 bits


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        SafetensorError: it is truncated or corrupt.
    """
    with safe_open(path, framework="pt") as opened:
        _check_shapes(opened)
    return load_file(path)


def safetensors_files(folder: Path) -> list[Path]:
    """The `*.safetensors` of a model folder, sorted.

    Raises:
        ValueError: there are none, or a shard that the folder's index names is missing.
    """
    if missing := missing_safetensors(folder):
        raise ValueError(f"{folder} lacks {', '.join(missing)}: download the model, or save it as safetensors, again")
    return sorted(folder.glob("*.safetensors"))


def missing_safetensors(folder: Path) -> list[str]:
    """What a model folder lacks of its weights: the shards its index names, or any "*.safetensors" at all.

    Raises:
        ValueError: the index is damaged.
    """
    found = {path.name for path in folder.glob("*.safetensors")}
    named: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            named.update(map(os.fspath, files))  # a TypeError if one is no text
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is no index of safetensors ({error!r:.200}): download it again") from error
    return sorted(named - found) if found or named else ["*.safetensors"]


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """`safetensors.safe_open` on the CPU, after a check that the file has the length its header states, and shapes
    that torch can hold.

    Raises:
        ValueError: the file is missing, truncated or corrupt.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: download or save it again")
    try:
        opened = safe_open(path, framework="pt")
        _check_shapes(opened)
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or corrupt ({error}): "
            "delete it and download or save it again"
        ) from error
    with opened as file:
        yield file


def _check_shapes(opened: Any) -> None:
    """
    Raises:
        SafetensorError: a tensor, which then is empty or of one value, has a shape that torch cannot hold.
    """
    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
        shape = opened.get_slice(name).get_shape()
        if math.prod(max(size, 1) for size in shape) > MAX_STRIDE or len(shape) > MAX_DIMS:
            raise SafetensorError(f"tensor {name!r} has the shape {shape!r:.100}")
