"""Files of safetensors whose headers say what no tensor can be."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from molora.adapter import WEIGHTS_FILE, read_weights
from molora.bank import _read_key_router
from molora.checkpoint import load_base
from molora.digest import base_digest
from molora.router import RouterConfig
from molora.safetensors_files import open_safetensors, read_safetensors
from molora.tiny import make_tiny_base

SHAPES = [[0, 2**63], [0, 0, 2**64 - 1], [0] * 65, [0, 0, 2**32, 2**31, 0]]


def with_shape(path: Path, shape: list[int]) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shape_that_no_tensor_can_have_is_damage(shape: list[int], tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    with_shape(path, shape)
    with pytest.raises(SafetensorError, match="tensor 'x' has the shape"):
        read_safetensors(path)
    with pytest.raises(ValueError, match="truncated or corrupt"), open_safetensors(path):
        pass
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_weights(tmp_path)
    with pytest.raises(ValueError, match="truncated or damaged"):
        _read_key_router(path, RouterConfig())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_such_a_base_is_refused(shape: list[int], tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", seed=0)
    with_shape(base / "more.safetensors", shape)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        base_digest(base)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load_base(base, device="cpu")


@pytest.mark.parametrize("shape", [(0, 3), (), (1,) * 64, (2, 3), (0, 2**20, 2**20)], ids=str)
def test_what_torch_can_hold_is_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    path, x = tmp_path / "x.safetensors", torch.randn(shape)
    save_file({"x": x}, path)
    assert torch.equal(read_safetensors(path)["x"], x)
    with open_safetensors(path) as opened:
        assert torch.equal(opened.get_tensor("x"), x)
