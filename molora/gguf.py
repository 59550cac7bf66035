"""A base model in a GGUF file, as a folder in Hugging Face's format."""

import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora.files import atomic_directory
from molora.progress import quiet_transformers

_AutoModel: Any = AutoModelForCausalLM  # transformers types its loading functions only in part


def convert_gguf(gguf: Path, folder: Path, *, chat_template: str | None = None) -> None:
    """Make a base model's folder of a GGUF file: bfloat16 safetensors, config, tokenizer.

    Args:
        chat_template: Jinja, for a model that comes without one; it takes the place of the file's own.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: the folder is there already.
        ValueError: it is no GGUF file, or of an architecture that transformers does not read.
        ModuleNotFoundError: gguf or accelerate is not installed.
    """
    if not gguf.is_file():
        raise FileNotFoundError(f"{gguf} does not exist, or is no file.")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it, or name another folder.")
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{gguf} is no GGUF file.")
    check_reader()
    with atomic_directory(folder, replace=False) as scratch:
        convert(gguf, scratch)
        if chat_template is not None:
            (scratch / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def check_reader() -> None:
    """
    Raises:
        ModuleNotFoundError: what reads GGUF files is not installed.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f'reading the quantized weights needs {package}: run pip install "molora[demo]"', name=package
            )


def convert(gguf: Path, folder: Path) -> None:
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
