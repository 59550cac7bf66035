"""Adapters that clients name by path: which folders may be read at all, and what is refused before it is used.

Nothing is fetched, nothing is unpickled, and no file outside the configured folders is opened.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Sequence
from pathlib import Path, PurePath

from molora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from molora.serving.config import Limits
from molora.serving.errors import InvalidRequestError

MAX_CONFIG_BYTES = 1 << 20


def check_adapter(path: str, folders: Sequence[str], limits: Limits) -> Path:
    """The real folder of an adapter that a client may load; its files have been read once, and are in order.

    Args:
        path: absolute, or relative to one of `folders`.

    Raises:
        InvalidRequestError: it lies outside (403), is not there (404), is too large (413), or is no adapter (400).
    """
    folder = _inside(path, [Path(each).resolve() for each in folders])
    num_bytes = {name: _size(folder / name, folder, folders) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    if num_bytes[CONFIG_FILE] > MAX_CONFIG_BYTES or sum(num_bytes.values()) > limits.max_adapter_bytes:
        limit = f"{limits.max_adapter_bytes} bytes, {MAX_CONFIG_BYTES} of them for {CONFIG_FILE}"
        raise _refused(f"the adapter is too large; this server reads at most {limit}", 413)
    try:
        adapter = Adapter.read(folder)
    except Exception as error:  # whatever a hostile file may do to its reader, the file is at fault
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} while reading it"
        raise _refused(f"this is no adapter that can be served: {what}", 400) from error
    if not all(math.isfinite(pair.scaling) for pair in adapter.weights.values()):
        raise _refused("its lora_alpha is infinite or not a number", 400)
    if limits.max_adapter_rank is not None and adapter.max_rank > limits.max_adapter_rank:
        raise _refused(f"the adapter has rank {adapter.max_rank}; at most {limits.max_adapter_rank} is served", 400)
    return folder


def _inside(path: str, folders: Sequence[Path]) -> Path:
    """The real folder; what lies outside is refused alike, whether it exists or not."""
    asked = PurePath(path)
    if "\0" in path or ".." in asked.parts:
        raise _refused("a path with '..' or a null character is not followed", 400)
    candidates = [Path(asked)] if asked.is_absolute() else [folder / asked for folder in folders]
    outside = True
    for candidate in candidates:
        try:
            real = candidate.resolve()
            if not any(real.is_relative_to(folder) for folder in folders):
                continue
            outside = False
            if real.is_dir():
                return real
        except (OSError, RuntimeError, ValueError):  # a name that is too long, a loop of links
            continue
    if outside:
        raise _refused("the path is outside the folders from which this server loads adapters", 403)
    raise _refused(f"there is no folder {path!r}", 404)


def _size(file: Path, folder: Path, folders: Sequence[str]) -> int:
    """Of a regular file that lies inside as well: a link in an adapter may lead out."""
    try:
        real = file.resolve()
        status = real.stat()
    except (OSError, RuntimeError):
        hint = "; pickled weights are not read, convert them to safetensors" if file.name == WEIGHTS_FILE else ""
        raise _refused(f"{folder.name} has no {file.name}{hint}", 404) from None
    if not any(real.is_relative_to(Path(each).resolve()) for each in folders):
        raise _refused(f"{file.name} leads out of the folders from which this server loads adapters", 403)
    if not stat.S_ISREG(status.st_mode):
        raise _refused(f"{file.name} is no regular file", 400)
    return status.st_size


def _refused(message: str, status: int) -> InvalidRequestError:
    return InvalidRequestError(f"lora_path: {message}", param="lora_path", status=status)
