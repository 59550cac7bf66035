import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from molora.digest import base_digest, combine_digests, json_digest, tensor_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int8, torch.bool]


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "c.scalar": torch.tensor(2.5),
        "d.empty": torch.empty(0, 4),
    }


def test_form_and_fixed_value():
    digest = tensor_digest({"x": torch.arange(4, dtype=torch.float32)})
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
    # Stored in banks: this value may change only with the bank's format version.
    assert digest == "sha256:e7ee34574adc6fb9ee1c70181439f6fc4d2eb27bf4fce999d6f777c211b18b03"
    assert (
        json_digest({"b": 1, "a": [None, "é"]})
        == "sha256:b73e2138dd7c689ad5502e451d4620a3bfedb0f837a4f9a0531fc1b7cf9cde73"
    )


def test_order_and_strides_make_no_difference():
    tensors = make_tensors()
    digest = tensor_digest(tensors)
    assert tensor_digest(dict(reversed(tensors.items()))) == digest
    tensors["a"] = tensors["a"].t().contiguous().t().requires_grad_()
    assert not tensors["a"].is_contiguous()
    assert tensor_digest(tensors) == digest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_makes_a_difference(dtype):
    tensor = torch.zeros(4, 3).to(dtype)
    flipped = tensor.clone()
    flipped.view(torch.uint8).view(-1)[-1] ^= 1
    assert tensor_digest({"x": tensor}) != tensor_digest({"x": flipped})


def test_name_shape_dtype_and_presence_make_a_difference():
    zeros = torch.zeros(2, 6)
    variants = [
        {"x": zeros},
        {"y": zeros},
        {"x": zeros.view(3, 4)},
        {"x": zeros.view(12)},
        {"x": zeros.view(torch.int32)},
        {"x": zeros, "z": torch.empty(0)},
        {"x": torch.tensor(0.0)},
        {"x": torch.zeros(1)},
        {"x": -zeros},
        {},
    ]
    assert len({tensor_digest(variant) for variant in variants}) == len(variants)


def save_shards(folder: Path, shards: list[dict[str, torch.Tensor]], metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir()
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number}-of-{len(shards)}.safetensors", metadata=metadata)
    return folder


def test_base_digest_does_not_depend_on_sharding(tmp_path):
    tensors = make_tensors()
    items = sorted(tensors.items(), reverse=True)
    one = save_shards(tmp_path / "one", [tensors], metadata={"format": "pt"})
    two = save_shards(tmp_path / "two", [dict(items[:2]), dict(items[2:])])
    (two / "config.json").write_text("{}")
    assert base_digest(one) == base_digest(two) == tensor_digest(tensors)
    tensors["b"].view(torch.uint8)[3] ^= 1
    assert base_digest(save_shards(tmp_path / "three", [tensors])) != base_digest(one)


def test_base_digest_refuses_a_name_held_twice(tmp_path):
    folder = save_shards(tmp_path / "base", [make_tensors(), {"a": torch.zeros(1)}])
    with pytest.raises(ValueError, match="both hold a tensor 'a'"):
        base_digest(folder)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_base_digest_names_a_truncated_file(tmp_path, num_bytes):
    folder = save_shards(tmp_path / "base", [make_tensors()])
    path = folder / "model-0-of-1.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"model-0-of-1\.safetensors .* truncated or corrupt .*delete it and download"):
        base_digest(folder)


def test_base_digest_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"lacks \*\.safetensors"):
        base_digest(tmp_path)
    folder = save_shards(tmp_path / "base", [{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])
    index = {"weight_map": {"a": "model-0-of-2.safetensors", "b": "model-1-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    base_digest(folder)
    (folder / "model-1-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-1-of-2\.safetensors: download"):
        base_digest(folder)


def test_json_digest_is_canonical():
    assert json_digest({"a": 1, "b": [1, 2]}) == json_digest({"b": [1, 2], "a": 1})
    assert json_digest([1, 2]) != json_digest([2, 1])
    assert json_digest("1") != json_digest(1)
    with pytest.raises(TypeError):
        json_digest(Path("x"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_digest(float("nan"))


def test_combine_digests_keeps_order_and_grouping():
    one, two = json_digest(1), json_digest(2)
    combined = [
        combine_digests(),
        combine_digests(one),
        combine_digests(one, two),
        combine_digests(two, one),
        combine_digests(combine_digests(one), two),
    ]
    assert len({one, two, *combined}) == 7
    with pytest.raises(ValueError, match="'my-adapter' is not a digest"):
        combine_digests(one, "my-adapter")


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": []}}', "[" * 10**5],
)
def test_an_index_that_is_none_is_named(tmp_path, index):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of safetensors"):
        base_digest(tmp_path)


def test_a_tensor_of_a_type_that_torch_has_not(tmp_path):
    header = b'{"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(ValueError, match="tensor 'a' cannot be read"):
        base_digest(tmp_path)
