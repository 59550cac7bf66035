"""Routers: from a token to the adapters that act on it.

A router knows nothing of activation, caches or linears. It sees hidden states (or token ids) and answers with
columns: column 0 is the base model, column c > 0 is routable adapter c - 1. The model maps columns to slots.

Legend: T tokens, K top-k, C columns (routable adapters + 1), H hidden size, D key size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molora.adapter import DTYPES, LoraWeights, is_number, is_whole
from molora.digest import combine_digests, json_digest, tensor_digest

Gate = Literal["hard", "soft"]
_LORA = "lora."


@dataclass(frozen=True)
class RouterConfig:
    """How a router is built and how its scores become gates.

    Attributes:
        kind: "keys" learns one key vector a column; "token_ranges" maps ranges of token ids to adapters.
        gate: "hard" is top-1 at gate 1; "soft" gives each chosen column its softmax probability, not renormalized.
        top_k: columns chosen for each token, out of all C; more than 1 needs soft gates.
        temperature: divides the scores before the softmax; it changes soft gates, never the order.
        min_gate: a soft gate below it is left out, but for a token's largest one. Where the router is sure one adapter
            acts then, and only elsewhere several.
        hidden_dim: width of the query network (keys only).
        key_dim: size of a key (keys only).
        ranges: (first id, last id + 1, adapter name) of token ids (token_ranges only).
        lora_rank: of the router's own LoRA, which acts below the router layer on the tokens that it routes, so that
            what it reads there can tell whose they are; 0 is none (keys only).
        lora_alpha: its scaling is lora_alpha / lora_rank.
    """

    kind: Literal["keys", "token_ranges"] = "keys"
    gate: Gate = "hard"
    top_k: int = 1
    temperature: float = 1.0
    min_gate: float = 0.0
    hidden_dim: int = 256
    key_dim: int = 64
    ranges: tuple[tuple[int, int, str], ...] = ()
    lora_rank: int = 0
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", tuple((lo, hi, str(name)) for lo, hi, name in self.ranges))
        if self.kind not in ("keys", "token_ranges"):
            raise ValueError(f"router kind {self.kind!r} is unknown; expected 'keys' or 'token_ranges'.")
        if self.gate not in ("hard", "soft"):
            raise ValueError(f"router gate {self.gate!r} is unknown; expected 'hard' or 'soft'.")
        for name, low in (("top_k", 1), ("hidden_dim", 1), ("key_dim", 1), ("lora_rank", 0)):
            if not is_whole(value := getattr(self, name), low):
                raise ValueError(f"router {name} is {value!r}; expected a whole number from {low} on.")
        if self.gate == "hard" and self.top_k != 1:
            raise ValueError(f"top_k={self.top_k} with gate={self.gate!r}: hard gates are top-1; use gate='soft'.")
        if not (is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"router temperature is {self.temperature!r:.100}; expected a number above 0.")
        if not (is_number(self.min_gate) and 0 <= self.min_gate <= 1):
            raise ValueError(f"router min_gate is {self.min_gate!r:.100}; expected a number from 0 to 1.")
        if self.min_gate and self.gate == "hard":
            raise ValueError(f"min_gate={self.min_gate} with gate='hard', which has no gate but 1; use gate='soft'.")
        if not is_number(self.lora_alpha):
            raise ValueError(f"router lora_alpha is {self.lora_alpha!r:.100}; expected a number.")
        if self.lora_rank and self.kind != "keys":
            raise ValueError(f"router lora_rank is {self.lora_rank}; expected 0, or kind='keys'.")
        if self.kind == "token_ranges":
            _check_ranges(self.ranges)
            if self.gate != "hard":
                raise ValueError("router kind 'token_ranges' has no scores to make soft gates of; use gate='hard'.")
        elif self.ranges:
            raise ValueError("router field 'ranges' belongs to kind='token_ranges'.")

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        unknown = sorted(set(raw) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"router: unknown fields {unknown}; this version knows {sorted(cls.__dataclass_fields__)}."
            )
        return cls(**raw)

    def to_json(self) -> dict[str, Any]:
        """What came later is left out where it does nothing, so that digests of older routers stay what they were."""
        raw = asdict(self)
        if not self.lora_rank:
            del raw["lora_rank"], raw["lora_alpha"]
        if not self.min_gate:
            del raw["min_gate"]
        return raw


@dataclass(frozen=True)
class Decision:
    """What a router chose: `columns_TK` (int64), `gates_TK` (float32), and the scores `logits_TC` if it has any.

    Where column 0 (base) was chosen its gate is kept, but no adapter acts for it.
    """

    columns_TK: Tensor
    gates_TK: Tensor
    logits_TC: Tensor | None


class Router(Protocol):
    """Maps tokens to columns. Reads hidden states, token ids, or both; a decision depends on that token's alone."""

    config: RouterConfig

    @property
    def num_columns(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def __call__(self, h_TH: Tensor, token_ids_T: Tensor | None) -> Decision: ...


class Float32Module(nn.Module):
    """Keeps its parameters and buffers, made in float32, as they are where the model around it is cast to another type.

    Both moving and casting the model or this module (`to`, `half`, Lightning's precisions) only move them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class KeyRouter(Float32Module):
    """A query network and one key vector for base and for each routable adapter.

    Semantics:
        logits[t, c] = query(rms_norm(h[t])) . keys[c] / sqrt(D)

    All in float32, whatever the model's dtype. Adding an adapter appends a key and touches nothing else.

    Attributes:
        lora: the router's own LoRA by module path, all below the router layer; empty where its rank is 0.
    """

    keys_CD: nn.Parameter

    def __init__(self, config: RouterConfig, hidden_size: int, num_columns: int) -> None:
        super().__init__()
        self.config = config
        self.hidden = nn.Linear(hidden_size, config.hidden_dim, dtype=torch.float32)
        self.query = nn.Linear(config.hidden_dim, config.key_dim, dtype=torch.float32)
        self.keys_CD = nn.Parameter(torch.randn(num_columns, config.key_dim, dtype=torch.float32))
        self.lora: dict[str, LoraWeights] = {}

    @classmethod
    def from_tensors(cls, config: RouterConfig, tensors: Mapping[str, Tensor]) -> Self:
        """What `tensors` gave.

        Raises:
            KeyError, RuntimeError, IndexError: they are not a router's, not of the shapes that `config` gives, or not
                finite; or those that score are not float32.
        """
        for name, tensor in tensors.items():
            if tensor.dtype not in (DTYPES if name.startswith(_LORA) else DTYPES[:1]):
                raise RuntimeError(f"{name} is of {tensor.dtype}; expected torch.float32")
            if not torch.isfinite(tensor).all():
                raise RuntimeError(f"{name} has values that are infinite or not a number")
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_LORA)}
        with torch.device("meta"):  # no random weights, which would move the global generator
            router = cls(config, own["hidden.weight"].shape[1], own["keys_CD"].shape[0])
        router.load_state_dict(own, assign=True)
        paths = {name.removeprefix(_LORA).rpartition(".")[0] for name in tensors if name.startswith(_LORA)}
        for path in sorted(paths):
            a_RI, b_OR = tensors[f"{_LORA}{path}.lora_A"], tensors[f"{_LORA}{path}.lora_B"]
            if a_RI.shape[0] != config.lora_rank or b_OR.shape[1] != config.lora_rank:
                raise RuntimeError(f"{path} has a LoRA of rank {a_RI.shape[0]}, not {config.lora_rank}")
            router.lora[path] = LoraWeights(a_RI, b_OR, config.lora_alpha / config.lora_rank)
        if bool(router.lora) != bool(config.lora_rank):
            raise KeyError(f"a LoRA of rank {config.lora_rank}")
        return router

    def tensors(self) -> dict[str, Tensor]:
        """All that it has learned, by name."""
        tensors: dict[str, Tensor] = dict(self.state_dict())
        for path, weights in self.lora.items():
            tensors |= {f"{_LORA}{path}.lora_A": weights.a_RI, f"{_LORA}{path}.lora_B": weights.b_OR}
        return tensors

    @property
    def num_columns(self) -> int:
        return self.keys_CD.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.hidden.in_features

    @property
    def digest(self) -> str:
        return combine_digests(tensor_digest(self.tensors()), json_digest(self.config.to_json()))

    def queries(self, h_TH: Tensor) -> Tensor:
        """Queries `query_TD` in float32."""
        with torch.autocast(h_TH.device.type, enabled=False):
            h_TH = F.rms_norm(h_TH.float(), (h_TH.shape[-1],), eps=1e-6)
            query_TD: Tensor = self.query(F.gelu(self.hidden(h_TH)))
            return query_TD

    def scores(self, h_TH: Tensor) -> Tensor:
        """Scores `logits_TC` in float32."""
        with torch.autocast(h_TH.device.type, enabled=False):
            logits_TC: Tensor = self.queries(h_TH) @ self.keys_CD.T * self.config.key_dim**-0.5
            return logits_TC

    def forward(self, h_TH: Tensor, token_ids_T: Tensor | None = None) -> Decision:
        return choose(self.scores(h_TH), self.config, straight_through=self.training)

    @torch.no_grad()
    def append_key(self, key_D: Tensor) -> None:
        """Add a column for one more adapter; every score that existed stays as it was."""
        if key_D.shape != self.keys_CD.shape[1:]:
            raise ValueError(
                f"a key of this router has shape {tuple(self.keys_CD.shape[1:])}, not {tuple(key_D.shape)}."
            )
        self.keys_CD = nn.Parameter(torch.cat([self.keys_CD, key_D[None].to(self.keys_CD)]))

    @torch.no_grad()
    def remove_column(self, column: int) -> None:
        """Drop an adapter's column; the other columns keep their scores and close the gap."""
        if not 0 < column < self.num_columns:
            raise ValueError(f"column {column} is no adapter's; expected 1 to {self.num_columns - 1}.")
        keep = [c for c in range(self.num_columns) if c != column]
        self.keys_CD = nn.Parameter(self.keys_CD[keep])


class TokenRangeRouter(nn.Module):
    """Routes by token id, for vocabularies that hold several modalities. Ids outside every range go to base."""

    first_N: Tensor
    last_N: Tensor
    column_N: Tensor

    def __init__(self, config: RouterConfig, adapters: Sequence[str]) -> None:
        super().__init__()
        unknown = sorted({name for _, _, name in config.ranges} - set(adapters))
        if unknown:
            raise ValueError(f"router: ranges name {unknown}, but the routable adapters are {list(adapters)}.")
        self.config = config
        self._num_columns = len(adapters) + 1
        ranges = sorted(config.ranges)
        self.register_buffer("first_N", torch.tensor([lo for lo, _, _ in ranges]), persistent=False)
        self.register_buffer("last_N", torch.tensor([hi - 1 for _, hi, _ in ranges]), persistent=False)
        columns = torch.tensor([adapters.index(name) + 1 for _, _, name in ranges])
        self.register_buffer("column_N", columns, persistent=False)

    @property
    def num_columns(self) -> int:
        return self._num_columns

    @property
    def digest(self) -> str:
        return json_digest(self.config.to_json())

    def forward(self, h_TH: Tensor, token_ids_T: Tensor | None) -> Decision:
        if token_ids_T is None:
            raise ValueError("a token_ranges router needs token ids: call the model with input_ids, not inputs_embeds.")
        # The range that could hold an id is the last one that begins at or before it.
        index_T = torch.searchsorted(self.first_N, token_ids_T, right=True) - 1
        inside_T = (index_T >= 0) & (token_ids_T <= self.last_N[index_T.clamp(min=0)])
        columns_T = torch.where(inside_T, self.column_N[index_T.clamp(min=0)], 0)
        gates_T = torch.ones_like(columns_T, dtype=torch.float32)
        return Decision(columns_T[:, None], gates_T[:, None], None)


def prototype(mean_D: Tensor, keys_CD: Tensor) -> Tensor:
    """A key for tokens whose queries have this mean [..., D]: in its direction, as long as the keys are on average.

    Prototypical networks (Snell et al., arXiv 1703.05175), for scores that are products and not distances.
    """
    key_D: Tensor = F.normalize(mean_D, dim=-1) * keys_CD.norm(dim=-1).mean()
    return key_D


def choose(logits_TC: Tensor, config: RouterConfig, *, straight_through: bool = False) -> Decision:
    """Turn scores into columns and gates.

    Hard gates take the largest score (ties: the lowest column) at gate 1; with `straight_through` that gate carries
    the softmax probability's gradient (Bengio et al., arXiv 1308.3432). Soft gates are the top-k probabilities of
    all C columns, not renormalized, so that base's share adds nothing; one below `min_gate` is 0, on column 0.
    """
    if config.gate == "hard" and not straight_through:
        columns_TK = logits_TC.argmax(-1, keepdim=True)
        return Decision(columns_TK, torch.ones_like(columns_TK, dtype=torch.float32), logits_TC)
    probs_TC = torch.softmax(logits_TC.float() / config.temperature, -1)
    if config.gate == "hard":
        columns_TK = logits_TC.argmax(-1, keepdim=True)
        probs_TK = probs_TC.gather(-1, columns_TK)
        return Decision(columns_TK, 1.0 + (probs_TK - probs_TK.detach()), logits_TC)  # exactly 1: the bracket is 0
    top_k = min(config.top_k, logits_TC.shape[-1])
    # A stable sort, since topk leaves the order of ties open.
    columns_TK = logits_TC.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    gates_TK = probs_TC.gather(-1, columns_TK)
    if config.min_gate:
        too_small_TK = gates_TK < config.min_gate
        too_small_TK[:, 0] = False
        columns_TK, gates_TK = columns_TK.masked_fill(too_small_TK, 0), gates_TK.masked_fill(too_small_TK, 0.0)
    return Decision(columns_TK, gates_TK, logits_TC)


def _check_ranges(ranges: Sequence[tuple[int, int, str]]) -> None:
    if not ranges:
        raise ValueError("router: kind 'token_ranges' needs at least one range (first id, last id + 1, adapter).")
    for lo, hi, name in ranges:
        if not (is_whole(lo, 0) and is_whole(hi)):
            raise ValueError(f"router: range [{lo!r}, {hi!r}) of {name!r} is not of token ids.")
    previous = 0
    for lo, hi, name in sorted(ranges):
        if lo < previous or hi <= lo:
            raise ValueError(f"router: range [{lo}, {hi}) of {name!r} is empty, negative or overlaps another range.")
        previous = hi
