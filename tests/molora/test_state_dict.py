"""The state dict of a model with adapters and a router is its base's, and so is what `save_pretrained` writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora import MoLoRA, RouterConfig
from molora.checkpoint import load_base
from molora.digest import base_digest
from molora.router import KeyRouter
from molora.siblings import merge_siblings, with_others

LORA = RouterConfig(hidden_dim=32, key_dim=16, lora_rank=4)
RANGES = RouterConfig(kind="token_ranges", ranges=((0, 128, "x"), (128, 259, "y")))
OVERRIDES: list[tuple[RouterConfig, dict[str, Any]]] = [
    (LORA, {}),
    (RANGES, {}),
    (RANGES, {"tie_word_embeddings": True}),
    (LORA, {"architecture": "qwen3", "tie_word_embeddings": True, "attention_bias": True}),
    (LORA, {"architecture": "gemma3_text"}),
]


@pytest.fixture(params=OVERRIDES, ids=["key router with a LoRA", "token ranges", "tied", "biases", "gemma"])
def m(request: pytest.FixtureRequest, load_model: Callable[..., MoLoRA]) -> MoLoRA:
    router, overrides = request.param
    return load_model(router=router, **overrides)


def tensors(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict())


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_it_is_the_bases(m: MoLoRA) -> None:
    base, _ = load_base(m.base_dir, device="cpu", dtype="float32")
    assert_equal(tensors(m.model), tensors(base))
    assert m.model.state_dict()._metadata.keys() >= base.state_dict()._metadata.keys()


def test_what_is_saved_is_the_base(m: MoLoRA, tmp_path: Path, random_ids: Callable[..., list[int]]) -> None:
    for folder in (tmp_path / "whole", tmp_path / "sharded"):
        m.model.save_pretrained(folder, max_shard_size="50GB" if folder.name == "whole" else "100KB")
        m.tokenizer.save_pretrained(folder)
        assert base_digest(folder) == m.base_digest
        saved, _ = load_base(folder, device="cpu", dtype="float32")
        ids = torch.tensor([random_ids(12)])
        with torch.inference_mode():
            assert torch.equal(saved(ids).logits, m.model(ids).logits)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("assign", [False, True])
def test_the_bases_loads_into_it_and_touches_nothing_else(
    make_bank: Callable[..., Any], key_router: Callable[..., KeyRouter], tmp_path: Path, assign: bool
) -> None:
    m = molora.load(make_bank(tmp_path, router=key_router(LORA)), device="cpu", dtype="float32")
    other, _ = load_base(m.base_dir, device="cpu", dtype="float32")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    router, linears = m.decoder.router, m.decoder.linears
    assert isinstance(router, KeyRouter)
    own = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    slots = {path: linear.get_slot(0, 4) for path, linear in linears.items()}
    keys = m.model.load_state_dict(other.state_dict(), assign=assign)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert_equal(tensors(m.model), tensors(other))
    assert_equal(dict(router.state_dict()), own)
    for path, linear in linears.items():
        assert torch.equal(linear.get_slot(0, 4).a_RI, slots[path].a_RI)
        assert torch.equal(linear.get_slot(0, 4).b_OR, slots[path].b_OR)


def test_what_does_not_belong_there_is_an_error(m: MoLoRA) -> None:
    state = tensors(m.model)
    left_out = next(name for name in state if ".layers.1." in name)
    for wrong in (
        {name: tensor for name, tensor in state.items() if name != left_out},
        state | {"model.layers.1.router.keys_CD": torch.zeros(1)},
        state | {left_out.replace("layers.1.", "layers.1.layer."): torch.zeros(1)},
    ):
        with pytest.raises(RuntimeError, match=r"(Missing|Unexpected) key\(s\) in state_dict"):
            m.model.load_state_dict(wrong)


def test_merged_siblings_are_saved_apart(
    make_bank: Callable[..., Any], key_router: Callable[..., KeyRouter], tmp_path: Path
) -> None:
    m = molora.load(make_bank(tmp_path, router=key_router(LORA)), device="cpu", dtype="float32")
    merged = merge_siblings(
        with_others(m.model, m.decoder.linears), lambda: m.model(torch.zeros(1, 2, dtype=torch.long))
    )
    assert len(merged) == 8  # q, k and v, and gate and up, of four layers
    m.model.save_pretrained(tmp_path / "saved")
    m.tokenizer.save_pretrained(tmp_path / "saved")
    assert base_digest(tmp_path / "saved") == m.base_digest
