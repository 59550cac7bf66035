"""A base model's shape, and what its weights and its cache take."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DENSE = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"}  # whose linears and norms are counted here


@dataclass(frozen=True, kw_only=True)
class Base:
    """A dense decoder: gated MLPs, grouped queries, no biases.

    Attributes:
        dtype: of weights, keys and values, and of adapters in their slots.
        tied: the head is the embedding.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: str = "bfloat16"
    tied: bool = False

    def __post_init__(self) -> None:
        check_positive(self)
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(ITEM_BYTES)}.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, dtype: str = "bfloat16") -> Self:
        """From the fields of a Hugging Face config.json.

        Raises:
            ValueError: it is of a model whose weights are not counted here, or lacks a field.
        """
        kind = config.get("model_type", "llama")
        if kind not in DENSE:
            raise ValueError(f"the config is of a {kind}; its weights are not counted here, only {sorted(DENSE)}.")
        try:
            hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
            return cls(
                num_layers=config["num_hidden_layers"],
                hidden_size=hidden_size,
                intermediate_size=config["intermediate_size"],
                num_heads=num_heads,
                num_kv_heads=config.get("num_key_value_heads") or num_heads,
                head_dim=config.get("head_dim") or hidden_size // num_heads,
                vocab_size=config["vocab_size"],
                dtype=dtype,
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise ValueError(f"the config has no field {error}.") from None

    @classmethod
    def read(cls, path: Path, *, dtype: str = "bfloat16") -> Self:
        """From a config.json, or the folder that holds one.

        Raises:
            FileNotFoundError, ValueError: there is none, or it is not of a model that is counted here.
        """
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{path} is no config.json and no folder with one.")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{file} holds a {type(config).__name__}; expected a model's configuration.")
        return cls.from_config(config, dtype=dtype)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) features of a layer's linears."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
        return dict(zip(LINEARS, [*shapes, (inner, hidden), (inner, hidden), (hidden, inner)], strict=True))

    @cached_property
    def num_layer_weights(self) -> int:
        """Of the linears of all layers: what a prompt's tokens are multiplied with."""
        return self.num_layers * sum(out * width for out, width in self.linears.values())

    @cached_property
    def step_bytes(self) -> int:
        """Weights that a step reads: all but the embedding, of which it reads a few rows."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return (self.num_layer_weights + norms + self.vocab_size * self.hidden_size) * self.item_bytes

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        embedding = 0 if self.tied else self.vocab_size * self.hidden_size * self.item_bytes
        return self.step_bytes + embedding

    @cached_property
    def token_bytes(self) -> int:
        """Of a token's keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.item_bytes

    def prompt_flops(self, num_new: float, num_before: float) -> float:
        """Of reading num_new tokens after num_before: products with the layers' weights, and causal attention."""
        pairs = num_new * num_before + num_new**2 / 2
        return 2 * self.num_layer_weights * num_new + 4 * self.num_layers * self.num_heads * self.head_dim * pairs


def check_positive(of: Any) -> None:
    """Raise ValueError unless every number of a dataclass is above 0."""
    for each in fields(of):
        value = getattr(of, each.name)
        if not isinstance(value, str | bool) and not value > 0:
            raise ValueError(f"{each.name} is {value}; expected more than 0.")
