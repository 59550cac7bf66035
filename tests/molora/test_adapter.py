import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from molora import adapter as adapter_module
from molora.adapter import Adapter, AdapterConfig, layer_index

PATH = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def adapter(make_adapter) -> Adapter:
    return make_adapter(ends=("q_proj", "down_proj"))


@pytest.fixture
def folder(adapter, tmp_path) -> Path:
    adapter.write(tmp_path / "x")
    return tmp_path / "x"


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_is_written_is_read(adapter, folder):
    read = Adapter.read(folder)
    assert read.digest == adapter.digest
    assert read.layers == (1, 2, 3)
    assert set(read.weights) == set(adapter.weights)
    assert torch.equal(read.weights[PATH].a_RI, adapter.weights[PATH].a_RI)
    assert read.weights[PATH].scaling == 16.0
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_digest_is_of_what_an_adapter_computes(adapter, make_adapter):
    def with_config(**changes) -> str:
        return Adapter.from_tensors(replace(adapter.config, **changes), adapter.tensors()).digest

    assert with_config(base_model_name_or_path="elsewhere") == adapter.digest
    others = [
        make_adapter(seed=1, ends=("q_proj", "down_proj")).digest,
        with_config(lora_alpha=63),
        with_config(use_rslora=True),
        with_config(alpha_pattern={"q_proj": 1}),
        with_config(alora_invocation_tokens=[1, 2]),
    ]
    assert len({adapter.digest, *others}) == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.w"]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("init_lora_weights", "pissa_niter_4"),
        ("some_future_field", 1),
    ],
)
def test_a_field_that_is_not_reproduced_is_named(folder, field, value):
    edit_config(folder, **{field: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json: field '{field}' is "):
        Adapter.read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; a bank holds adapters of type 'LORA'"),
        ({"r": None}, "field 'r' is missing"),
        ({"target_modules": None}, "field 'target_modules' is missing"),
        ({"r": 0}, "field 'r' is 0; expected a positive integer"),
        ({"r": 5}, r"lora_A \(4, 128\) and lora_B \(64, 4\), but adapter_config.json gives it rank 5"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj' has lora_A \(4, 64\).* gives it rank 2"),
    ],
)
def test_a_config_that_is_wrong(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        Adapter.read(folder)


def test_a_config_that_is_no_object(folder):
    config = folder / "adapter_config.json"
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config\.json holds a list; expected an object"):
        Adapter.read(folder)
    config.write_text('{"r": 4')
    with pytest.raises(ValueError, match="is not valid JSON"):
        Adapter.read(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="is not a PEFT adapter folder"):
        Adapter.read(folder)


def test_missing_and_truncated_weights(folder):
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        weights.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or damaged"):
            Adapter.read(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors does not exist\."):
        Adapter.read(folder)
    (folder / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="pickled weights are not read: convert them to safetensors"):
        Adapter.read(folder)


def test_tensors_that_do_not_belong(folder):
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    partner = f"base_model.model.{PATH}.lora_B.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != partner}, weights)
    with pytest.raises(ValueError, match=rf"module '{PATH}' has lora_A but not its partner"):
        Adapter.read(folder)
    save_file({**tensors, "base_model.model.lm_head.lora_embedding_A": torch.zeros(1)}, weights)
    with pytest.raises(
        ValueError, match=r"tensor 'base_model\.model\.lm_head\.lora_embedding_A' is no lora_A or lora_B"
    ):
        Adapter.read(folder)
    save_file({}, weights)
    with pytest.raises(ValueError, match="holds no adapter weights"):
        Adapter.read(folder)


def test_a_write_that_fails_leaves_the_old_adapter(adapter, folder, make_adapter, monkeypatch):
    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make_adapter(seed=9).write(folder)
    monkeypatch.undo()
    assert Adapter.read(folder).digest == adapter.digest
    assert len(list(folder.iterdir())) == 2


def test_scalings():
    config = AdapterConfig(r=4, lora_alpha=8, target_modules=["q"], rank_pattern={"b.q": 16}, alpha_pattern={"q": 2})
    assert [config.scaling_of(path) for path in ("a.k", "a.q", "b.q", "bb.q")] == [2.0, 0.5, 0.125, 0.5]
    assert replace(config, use_rslora=True).scaling_of("b.q") == 0.5


def test_layer_index():
    assert layer_index("model.layers.12.mlp.up_proj") == 12
    assert layer_index("transformer.h.3.attn.c_attn") == 3
    with pytest.raises(ValueError, match="'lm_head' is outside the decoder layers"):
        layer_index("lm_head")


def test_weights_that_are_not_finite_are_refused() -> None:
    config = AdapterConfig(r=1, lora_alpha=1, target_modules=["q_proj"])
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    tensors = {f"{key}_A.weight": torch.ones(1, 2), f"{key}_B.weight": torch.tensor([[torch.nan]])}
    with pytest.raises(ValueError, match="q_proj"):
        Adapter.from_tensors(config, tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", True),
        ("r", 1 << 40),
        ("r", "8"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", [1]),
        ("target_modules", 5),
        ("target_modules", [1]),
        ("base_model_name_or_path", ["a"]),
        ("use_rslora", "yes"),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"(?=a)": 4}),
        ("rank_pattern", {r"(a)\1": 4}),
        ("rank_pattern", {"\ud800": 4}),
        ("rank_pattern", {"a{900}" * 30: 4}),
        ("rank_pattern", {"a" * 201: 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("layers_to_transform", "1"),
        ("alora_invocation_tokens", "text"),
        ("alora_invocation_tokens", [True]),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(name, value):
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], name: value}
    with pytest.raises(ValueError, match=f"here: field '{name}' is .*; expected "):
        AdapterConfig.from_peft(raw, source="here")


def test_json_without_end_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not valid JSON"):
        Adapter.read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64, torch.bool])
def test_weights_of_other_types_are_refused(folder, dtype):
    weights = folder / "adapter_model.safetensors"
    save_file({key: torch.zeros(tensor.shape, dtype=dtype) for key, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match=rf"has weights of {dtype} and {dtype}; expected torch\.float32, "):
        Adapter.read(folder)


def test_modules_and_patterns_may_not_be_too_many_together(make_adapter):
    adapter = make_adapter(seed=1)
    patterns = {f"m{number}": 4 for number in range(adapter_module.MAX_MATCHES // len(adapter.weights) + 1)}
    with pytest.raises(ValueError, match=r"patterns of adapter_config\.json are too many together"):
        Adapter.from_tensors(replace(adapter.config, rank_pattern=patterns), adapter.tensors())
