"""One adapter in exactly PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

This module knows nothing of banks, routers or models. It reads a folder, refuses what MoLoRA cannot
reproduce, and hands out the weights by module path together with each module's scaling.

Legend: R rank, I in-features, O out-features.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from molora.digest import combine_digests, json_digest, tensor_digest
from molora.files import write_atomic
from molora.patterns import first_match, is_pattern
from molora.safetensors_files import read_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(?P<index>\d+)\.")

# Fields that change what the adapter computes and that MoLoRA honours.
_HONOURED = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
# Fields that say nothing about what a trained adapter computes.
_IRRELEVANT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
MAX_ALPHA = 1e6
MAX_MATCHES = 500_000  # of modules and patterns: it takes about 10 us to hold one against the other
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# These initializations change the base model's own weights, so the adapter alone is not enough.
_BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraWeights:
    """One module's pair: `a_RI` (shape [R, I]) and `b_OR` (shape [O, R]), and the factor on their product."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]


@dataclass(frozen=True)
class AdapterConfig:
    """The part of PEFT's `LoraConfig` that says what an adapter computes.

    `rank_pattern` and `alpha_pattern` map a module's name, or a regular expression for the end of it, to its own
    rank or alpha. `scaling` is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
    """

    r: int
    lora_alpha: float
    target_modules: list[str] | str
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    alora_invocation_tokens: list[int] | None = None

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], *, source: str) -> Self:
        """Read PEFT's JSON.

        Raises:
            ValueError: the adapter is no LoRA, or uses a field that MoLoRA does not reproduce; the message names it.
        """
        if raw.get("peft_type") != "LORA":
            raise ValueError(f"{source}: peft_type is {raw.get('peft_type')!r}; a bank holds adapters of type 'LORA'.")
        for name, value in raw.items():
            _check_supported(name, value, source)
        for name in ("r", "lora_alpha", "target_modules"):
            if raw.get(name) is None:
                raise ValueError(f"{source}: field {name!r} is missing; PEFT writes it, so the file is incomplete.")
        for name, (is_right, expected) in _FIELDS.items():
            value = raw.get(name)
            if value is not None and not is_right(value):
                raise ValueError(f"{source}: field {name!r} is {value!r:.100}; expected {expected}.")
        return cls(
            r=raw["r"],
            lora_alpha=raw["lora_alpha"],
            target_modules=raw["target_modules"],
            base_model_name_or_path=raw.get("base_model_name_or_path"),
            use_rslora=bool(raw.get("use_rslora")),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            layers_to_transform=raw.get("layers_to_transform"),
            layers_pattern=raw.get("layers_pattern"),
            exclude_modules=raw.get("exclude_modules"),
            alora_invocation_tokens=raw.get("alora_invocation_tokens"),
        )

    def to_peft(self) -> dict[str, Any]:
        """The JSON that PEFT's `PeftModel.from_pretrained` reads."""
        return {
            "alora_invocation_tokens": self.alora_invocation_tokens,
            "alpha_pattern": dict(self.alpha_pattern),
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "exclude_modules": self.exclude_modules,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "layers_pattern": self.layers_pattern,
            "layers_to_transform": self.layers_to_transform,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "target_modules": self.target_modules,
            "task_type": "CAUSAL_LM",
            "use_rslora": self.use_rslora,
        }

    def rank_of(self, module: str) -> int:
        return int(first_match(self.rank_pattern, module, self.r))

    def scaling_of(self, module: str) -> float:
        alpha = float(first_match(self.alpha_pattern, module, self.lora_alpha))
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in memory: its configuration and, for each module path of the base model, its pair."""

    config: AdapterConfig
    weights: Mapping[str, LoraWeights]

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read a PEFT folder.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, or the adapter uses what MoLoRA does not reproduce.
        """
        folder = Path(folder)
        config = AdapterConfig.from_peft(read_config(folder), source=str(folder / CONFIG_FILE))
        tensors = read_weights(folder)
        return cls.from_tensors(config, tensors, source=str(folder / WEIGHTS_FILE))

    @classmethod
    def from_tensors(cls, config: AdapterConfig, tensors: Mapping[str, Tensor], *, source: str = "adapter") -> Self:
        """Build from PEFT's state dict (`base_model.model.<module>.lora_A.weight` and `...lora_B.weight`)."""
        sides: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            match = _KEY.match(key)
            if match is None:
                raise ValueError(f"{source}: tensor {key!r} is no lora_A or lora_B weight of a linear layer.")
            sides.setdefault(match["module"], {})[match["side"]] = tensor
        if not sides:
            raise ValueError(f"{source}: the file holds no adapter weights.")
        num_patterns = len(config.rank_pattern) + len(config.alpha_pattern)
        if len(sides) * num_patterns > MAX_MATCHES:
            raise ValueError(
                f"{source}: {len(sides)} modules and {num_patterns} patterns of {CONFIG_FILE} are too many together; "
                f"expected a product of at most {MAX_MATCHES}. Write patterns that stand for several modules."
            )
        weights = {}
        for module, pair in sorted(sides.items()):
            if set(pair) != {"A", "B"}:
                raise ValueError(f"{source}: module {module!r} has lora_{next(iter(pair))} but not its partner.")
            a_RI, b_OR = pair["A"], pair["B"]
            if not (a_RI.dtype in DTYPES and b_OR.dtype in DTYPES):
                expected = ", ".join(map(str, DTYPES))
                raise ValueError(
                    f"{source}: module {module!r} has weights of {a_RI.dtype} and {b_OR.dtype}; expected {expected}."
                )
            if not (torch.isfinite(a_RI).all() and torch.isfinite(b_OR).all()):
                raise ValueError(f"{source}: module {module!r} has weights that are infinite or not a number.")
            rank = config.rank_of(module)
            if a_RI.ndim != 2 or b_OR.ndim != 2 or a_RI.shape[0] != rank or b_OR.shape[1] != rank:
                raise ValueError(
                    f"{source}: module {module!r} has lora_A {tuple(a_RI.shape)} and lora_B {tuple(b_OR.shape)}, "
                    f"but {CONFIG_FILE} gives it rank {rank}."
                )
            weights[module] = LoraWeights(a_RI, b_OR, config.scaling_of(module))
        return cls(config, weights)

    @property
    def max_rank(self) -> int:
        return max(pair.rank for pair in self.weights.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers in which the adapter acts, in order."""
        return tuple(sorted({layer_index(module) for module in self.weights}))

    @property
    def digest(self) -> str:
        """Digest of what the adapter computes by, its weights by module, their scalings and its invocation tokens."""
        scalings = {module: pair.scaling for module, pair in self.weights.items()}
        return combine_digests(
            tensor_digest(self.tensors()), json_digest([scalings, self.config.alora_invocation_tokens])
        )

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's state dict."""
        out: dict[str, Tensor] = {}
        for module, pair in self.weights.items():
            out[f"base_model.model.{module}.lora_A.weight"] = pair.a_RI.contiguous()
            out[f"base_model.model.{module}.lora_B.weight"] = pair.b_OR.contiguous()
        return out

    def write(self, folder: str | Path) -> None:
        """Write a folder that PEFT loads as it is. Each file appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / WEIGHTS_FILE, save(self.tensors(), metadata={"format": "pt"}))
        write_atomic(folder / CONFIG_FILE, json.dumps(self.config.to_peft(), indent=2, sort_keys=True) + "\n")


def layer_index(module: str) -> int:
    """The decoder layer of a module path such as `model.layers.8.self_attn.q_proj`.

    Raises:
        ValueError: the path is outside the decoder layers (an embedding or the language model head).
    """
    match = _LAYER.search(module)
    if match is None:
        raise ValueError(f"module {module!r} is outside the decoder layers; only linears inside them can be adapted.")
    return int(match["index"])


def target_suffixes(modules: Iterable[str]) -> list[str]:
    """PEFT's `target_modules` for these module paths: their last components, sorted."""
    return sorted({module.rsplit(".", 1)[-1] for module in modules})


def is_whole(value: object, low: int = 1) -> bool:
    """Whether it is a whole number of at least `low`, of 32 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 1 << 31


def check_whole(name: str, value: object, low: int = 1) -> None:
    """
    Raises:
        ValueError: it is no whole number of at least `low`.
    """
    if not is_whole(value, low):
        raise ValueError(f"{name} is {value!r}; expected a whole number of {low} or more.")


def check_above_zero(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: it is no finite number above 0.
    """
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} is {value!r}; expected a number above 0.")


def is_number(value: object) -> bool:
    """Whether it is a finite number of a size that a scaling may have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_ALPHA


def _is_list(of: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(each) is of for each in value)


def _is_map(is_value: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, dict) and all(is_pattern(key) and is_value(each) for key, each in value.items())
    )


def _is_text_or(other: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) or other(value)


_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (is_whole, "a positive integer"),
    "lora_alpha": (is_number, f"a number of at most {MAX_ALPHA:g}"),
    "target_modules": (_is_text_or(_is_list(str)), "a name, or a list of names"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a name"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (_is_map(is_whole), "an object of simple expressions and positive integers"),
    "alpha_pattern": (_is_map(is_number), f"an object of simple expressions and numbers of at most {MAX_ALPHA:g}"),
    "layers_to_transform": (lambda value: type(value) is int or _is_list(int)(value), "a layer, or a list of layers"),
    "layers_pattern": (_is_text_or(_is_list(str)), "a name, or a list of names"),
    "exclude_modules": (_is_text_or(_is_list(str)), "a name, or a list of names"),
    "alora_invocation_tokens": (_is_list(int), "a list of token ids"),
}


def _check_supported(name: str, value: Any, source: str) -> None:
    if name in _HONOURED or name in _IRRELEVANT:
        return
    if name == "init_lora_weights":
        if isinstance(value, str) and value.lower().startswith(_BASE_CHANGING_INIT):
            raise ValueError(
                f"{source}: field 'init_lora_weights' is {value!r}, which changes the base model's weights. "
                "Convert the adapter first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)."
            )
        return
    if value in (None, False, "none", {}, []):
        return
    raise ValueError(f"{source}: field {name!r} is {value!r}, which MoLoRA does not support; only its default works.")


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON of a PEFT folder as it is, of whatever `peft_type`.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {folder} is not a PEFT adapter folder.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write the adapter again.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}; expected an object of PEFT's LoraConfig fields.")
    return raw


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder as they are.

    Raises:
        FileNotFoundError, ValueError: there are none, or the file is truncated.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        hint = " (pickled weights are not read: convert them to safetensors)" if list(folder.glob("*.bin")) else ""
        raise FileNotFoundError(f"{path} does not exist{hint}.")
    try:
        return read_safetensors(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); copy or write the adapter again.") from error


def random_adapter(
    modules: Mapping[str, tuple[int, int]], *, rank: int, alpha: float, generator: torch.Generator, std: float = 0.02
) -> Adapter:
    """An adapter with random weights on `modules`, a map from module path to (out-features, in-features)."""
    config = AdapterConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=target_suffixes(modules),
        layers_to_transform=sorted({layer_index(module) for module in modules}),
    )
    tensors: dict[str, Tensor] = {}
    for module, (num_out, num_in) in modules.items():
        key = f"base_model.model.{module}.lora"
        tensors[f"{key}_A.weight"] = torch.randn(rank, num_in, generator=generator) * std
        tensors[f"{key}_B.weight"] = torch.randn(num_out, rank, generator=generator) * std
    return Adapter.from_tensors(config, tensors)
