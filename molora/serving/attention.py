"""Attention over a paged cache: what transformers' attention interface calls in a step of the engine.

A step's tokens are packed in one row [1, N], sequence after sequence. Each token's key and value are written to its
place in the pool, then each sequence attends to its own blocks. This module knows tensors and tables; not who owns a
block.

On a CPU torch's own attention runs on each sequence's keys, gathered where they do not stand side by side: exactly as
many as there are, so that what an earlier owner left in a block is never read. On a GPU it is `paged_attention.py`.

Legend: N tokens, S sequences, M blocks a sequence, P blocks of the pool, B tokens a block, H heads, D head size,
L keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from molora.serving.packing import Span

POOL = "_molora_pool"  # a module's own attribute, while layers run compiled
NAME = "molora_pages"  # transformers gives names that hold "flash", "sdpa", "flex_attention" or "paged|" a mask


class Pool(NamedTuple):
    """A layer's keys and values, [P, B, H, D] each; contiguous on a GPU, head after head on a CPU."""

    keys: Tensor
    values: Tensor


@dataclass
class Pages:
    """Where the tokens of a step are kept.

    Attributes:
        pools: of each layer by its index.
        places_N: int64, block * B + offset. Tokens that are not to be kept go to the pool's last block, nobody's.
        tables_SM: int32, the blocks of each sequence.
        spans: of each sequence; not used on a GPU.
        cu_queries_S1, num_keys_S: int32, the spans on the device; None on a CPU.
    """

    pools: dict[int, Pool]
    places_N: Tensor
    tables_SM: Tensor
    spans: Sequence[Span]
    cu_queries_S1: Tensor | None = None
    num_keys_S: Tensor | None = None
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _blocks: dict[tuple[int, int], slice | Tensor] = field(default_factory=dict)

    def read(self, index: int, pool: Pool) -> tuple[Tensor, Tensor]:
        """The keys and values of a sequence, [H, L, D] each; not copied where its blocks follow one another."""
        num_keys, block_size = self.spans[index].num_keys, pool.keys.shape[1]
        blocks = self._blocks.get((index, block_size))
        if blocks is None:
            blocks_M = self.tables_SM[index, : -(-num_keys // block_size)]
            first, last = int(blocks_M[0]), int(blocks_M[-1])
            follow = bool((blocks_M.diff() == 1).all())
            self._blocks[index, block_size] = blocks = slice(first, last + 1) if follow else blocks_M
        keys, values = (of.permute(2, 0, 1, 3)[:, blocks].flatten(1, 2)[:, :num_keys] for of in pool)
        return keys, values

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """Which keys each query of a sequence sees, bool [n, L]; None if it sees them all."""
        first, end, num_keys = self.spans[index]
        num_queries = end - first
        if num_queries == 1 and (window is None or num_keys <= window):
            return None
        key = (index, window)
        if key not in self._masks:
            position_n1 = torch.arange(num_keys - num_queries, num_keys)[:, None]
            position_L = torch.arange(num_keys)
            mask = position_L <= position_n1
            if window is not None:
                mask &= position_L > position_n1 - window
            self._masks[key] = mask
        return self._masks[key]


class PoolShape(NamedTuple):
    """What one token's keys and values of a layer look like."""

    num_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype


class PoolShapes(dict[int, PoolShape]):
    """Of each layer by its index, noted by a forward that only asks for them; how often it attended, and in what."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls: Counter[int] = Counter()
        self.modules: dict[int, torch.nn.Module] = {}


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    pages: Pages | PoolShapes | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function behind `NAME`: query [1, Hq, N, D], key and value [1, H, N, D]; returns [1, N, Hq, D].

    Args:
        pages: the step's; or what notes each layer's shape.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(pages, PoolShapes):
        layer: int = module.layer_idx  # type: ignore[assignment]
        pages.modules[layer] = module
        pages.num_calls[layer] += 1
        pages[layer] = PoolShape(key.shape[1], key.shape[3], value.shape[3], key.dtype)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    if pages is None:
        raise ValueError(f"attention {NAME!r} is for the engine's steps; it needs their pages.")
    # A compiler is to see layers that are alike, so it must not see their numbers.
    pool: Pool = module.__dict__.get(POOL) or pages.pools[module.layer_idx]  # type: ignore[index]
    if pages.cu_queries_S1 is not None:
        from molora.serving import paged_attention  # Triton is no part of a CPU's path

        return paged_attention.attend(pages, pool, query, key, value, scale, sliding_window, softcap, s_aux), None
    key_NHD, value_NHD = key[0].transpose(0, 1), value[0].transpose(0, 1)
    pool.keys.flatten(0, 1).index_copy_(0, pages.places_N, key_NHD)
    pool.values.flatten(0, 1).index_copy_(0, pages.places_N, value_NHD)
    out_HND = query.new_empty(query.shape[1], query.shape[2], value.shape[3])
    for index, (first, end, num_keys) in enumerate(pages.spans):
        if end - first == num_keys:  # nothing came before: what was just made is all there is
            k_HLD, v_HLD = key[0, :, first:end], value[0, :, first:end]
        else:
            k_HLD, v_HLD = pages.read(index, pool)
        q_HnD = query[0, :, first:end]
        mask_nL = pages.mask(index, sliding_window)
        if mask_nL is not None:
            # An active token may overflow, and what is masked counts 0 times: 0 * inf would reach base tokens.
            k_HLD, v_HLD = torch.nan_to_num(k_HLD, 0.0, 0.0, 0.0), torch.nan_to_num(v_HLD, 0.0, 0.0, 0.0)
        if softcap is None and s_aux is None:
            out = F.scaled_dot_product_attention(
                q_HnD[None], k_HLD[None], v_HLD[None], attn_mask=mask_nL, scale=scale, enable_gqa=True
            )[0]
        else:
            out = _attend_by_hand(q_HnD, k_HLD, v_HLD, mask_nL, scale, softcap, s_aux)
        out_HND[:, first:end] = out
    return out_HND.transpose(0, 1)[None], None


def _attend_by_hand(
    q_HnD: Tensor,
    k_GLD: Tensor,
    v_GLD: Tensor,
    mask_nL: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """With scores capped to (-softcap, softcap), or a score for each head that takes its share and adds nothing."""
    num_heads, num_queries, _ = q_HnD.shape
    q_GrnD = q_HnD.reshape(k_GLD.shape[0], -1, num_queries, q_HnD.shape[2])
    scores = (q_GrnD @ k_GLD[:, None].mT).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask_nL is not None:
        scores = scores.masked_fill(~mask_nL, -torch.inf)
    if sinks_H is not None:
        sinks = sinks_H.float().view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    probs = scores.softmax(-1)[..., : k_GLD.shape[1]].to(v_GLD.dtype)
    out: Tensor = (probs @ v_GLD[:, None]).reshape(num_heads, num_queries, -1)
    return out


AttentionInterface.register(NAME, attend)


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """Forwards of the model of this configuration inside go through `attend`."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
