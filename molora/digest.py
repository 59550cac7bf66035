"""Digests of what tensors and settings contain: never of names of files, paths, times or storage layout.

A digest is the string "sha256:<64 hex digits>". Digests decide which cached keys and values may be used again, so
equal digests must mean equal contents, and each part is hashed with its length or shape before it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from molora.safetensors_files import open_safetensors, safetensors_files


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of named tensors: names, dtypes, shapes and bytes, in the order of their names.

    Order, device, strides and requires_grad make no difference; one bit of one value does.
    """
    return _digest_tensors(tensors, tensors.__getitem__)


def base_digest(folder: Path) -> str:
    """Digest of all tensors in a model folder's `*.safetensors`, equal to `tensor_digest` of them all.

    How the tensors are spread over files makes no difference. One tensor is in memory at a time; a modern CPU
    reads about 1 GB/s.

    Raises:
        ValueError: a file is missing, truncated or corrupt, two files hold a tensor of the same name, or one is of a
            type that torch has not.
    """
    with ExitStack() as stack:
        owners: dict[str, tuple[Path, Any]] = {}
        for path in safetensors_files(folder):
            file = stack.enter_context(open_safetensors(path))
            for name in file.keys():  # noqa: SIM118 (a file of safetensors is no mapping)
                if name in owners:
                    raise ValueError(
                        f"{owners[name][0]} and {path} both hold a tensor {name!r}: "
                        "remove the file that does not belong to the model"
                    )
                owners[name] = path, file

        def read(name: str) -> Tensor:
            path, file = owners[name]
            try:
                tensor: Tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{path}: tensor {name!r} cannot be read ({error})") from error
            return tensor

        return _digest_tensors(owners, read)


def json_digest(value: Any) -> str:
    """Digest of a JSON value in canonical form: sorted keys, no spaces, ASCII; the order of keys makes no difference.

    Raises:
        TypeError: the value has something JSON has not, such as a Path.
        ValueError: a number is not finite.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return _name(hashlib.sha256(text.encode()))


def combine_digests(*digests: str) -> str:
    """One digest of several, in the order given.

    Raises:
        ValueError: an argument is not a digest.
    """
    for digest in digests:
        algorithm, _, digits = digest.partition(":")
        if algorithm != "sha256" or len(digits) != 64:
            raise ValueError(f"{digest!r} is not a digest: expected sha256: and 64 hex digits")
    return json_digest(digests)


def _digest_tensors(names: Iterable[str], get: Callable[[str], Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(names):
        tensor = get(name).detach().cpu().contiguous()
        header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode()
        sha256.update(len(header).to_bytes(8, "little") + header)
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return _name(sha256)


def _name(sha256: "hashlib._Hash") -> str:
    return f"sha256:{sha256.hexdigest()}"
