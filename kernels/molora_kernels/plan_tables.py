"""The plan's tables, built on the device: one launch for up to 128 tokens, two for more.

A counting sort by the smallest active id, stable, so that the order of tokens never depends on timing. A program takes
128 tokens and compares each with each; programs meet only through the counts that the first launch leaves.

Legend: T tokens, K top-k, E adapters, N blocks of BLOCK_T tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels.arithmetic import power_of_two

BLOCK_T = 128
_BLOCK_E = 64


@triton.jit
def _load_ids(
    raw_ptr, ids_ptr, stride_t, stride_k, T, E, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The block's ids with those out of range as -1, also stored; and each token's smallest: E if it has none."""
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k_K = tl.arange(0, BLOCK_K)
    exists_TK = (t_T < T)[:, None] & (k_K < K)[None, :]
    ids_TK = tl.load(raw_ptr + t_T[:, None].to(tl.int64) * stride_t + k_K[None, :] * stride_k, mask=exists_TK, other=-1)
    ids_TK = tl.where((ids_TK >= 0) & (ids_TK < E), ids_TK, -1)
    tl.store(ids_ptr + t_T[:, None].to(tl.int64) * K + k_K[None, :], ids_TK, mask=exists_TK)
    smallest_T = tl.min(tl.where(ids_TK < 0, E, ids_TK), axis=1)
    return t_T, ids_TK, tl.where(t_T < T, smallest_T, E + 1)


@triton.jit
def _store_span(spans_ptr, ids_TK, E):
    """The lowest and the highest id of the block; (E, -1) if it has none."""
    tl.store(spans_ptr + 2 * tl.program_id(0), tl.min(tl.where(ids_TK < 0, E, ids_TK)))
    tl.store(spans_ptr + 2 * tl.program_id(0) + 1, tl.max(ids_TK))


@triton.jit
def _rank(smallest_T, BLOCK_T: tl.constexpr):
    """How many earlier tokens of the block share the token's smallest id."""
    place_T = tl.arange(0, BLOCK_T)
    alike = (smallest_T[None, :] == smallest_T[:, None]) & (place_T[None, :] < place_T[:, None])
    return tl.sum(alike.to(tl.int32), axis=1)


@triton.jit
def _small_plan_kernel(
    raw_ptr,
    ids_ptr,
    order_ptr,
    offsets_ptr,
    spans_ptr,
    groups_ptr,
    num_groups_ptr,
    stride_t,
    stride_k,
    T,
    E,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t_T, ids_TK, smallest_T = _load_ids(raw_ptr, ids_ptr, stride_t, stride_k, T, E, K, BLOCK_K, BLOCK_T)
    _store_span(spans_ptr, ids_TK, E)
    less_T = tl.sum((smallest_T[None, :] < smallest_T[:, None]).to(tl.int32), axis=1)
    tl.store(order_ptr + less_T + _rank(smallest_T, BLOCK_T), t_T, mask=t_T < T)
    num_groups = 0
    for start in range(0, E + 1, BLOCK_E):
        e_E = start + tl.arange(0, BLOCK_E)
        offset_E = tl.sum((smallest_T[None, :] < e_E[:, None]).to(tl.int32), axis=1)
        tl.store(offsets_ptr + e_E, offset_E, mask=e_E <= E)
        present_E = tl.zeros((BLOCK_E,), tl.int32)
        for k in tl.static_range(K):
            id_T = tl.max(tl.where(tl.arange(0, BLOCK_K)[None, :] == k, ids_TK, -1), axis=1)
            present_E = tl.maximum(present_E, tl.max((id_T[None, :] == e_E[:, None]).to(tl.int32), axis=1))
        tl.store(groups_ptr + num_groups + tl.cumsum(present_E, 0) - 1, e_E, mask=present_E > 0)
        num_groups += tl.sum(present_E)
    tl.store(num_groups_ptr, num_groups)


@triton.jit
def _count_kernel(
    raw_ptr,
    ids_ptr,
    spans_ptr,
    counts_ptr,
    stride_t,
    stride_k,
    T,
    E,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    _, ids_TK, smallest_T = _load_ids(raw_ptr, ids_ptr, stride_t, stride_k, T, E, K, BLOCK_K, BLOCK_T)
    _store_span(spans_ptr, ids_TK, E)
    for start in range(0, E + 1, BLOCK_E):
        e_E = start + tl.arange(0, BLOCK_E)
        count_E = tl.sum((smallest_T[None, :] == e_E[:, None]).to(tl.int32), axis=1)
        tl.store(counts_ptr + tl.program_id(0) * (E + 1) + e_E, count_E, mask=e_E <= E)


@triton.jit
def _place_kernel(
    ids_ptr,
    order_ptr,
    offsets_ptr,
    counts_ptr,
    T,
    E,
    N,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t_T, _, smallest_T = _load_ids(ids_ptr, ids_ptr, K, 1, T, E, K, BLOCK_K, BLOCK_T)
    place_T = _rank(smallest_T, BLOCK_T)
    offset = 0
    for start in range(0, E + 1, BLOCK_E):
        e_E = start + tl.arange(0, BLOCK_E)
        total_E, before_E = tl.zeros((BLOCK_E,), tl.int32), tl.zeros((BLOCK_E,), tl.int32)
        for first in range(0, N, BLOCK_N):
            n_N = first + tl.arange(0, BLOCK_N)
            count_NE = tl.load(
                counts_ptr + n_N[:, None] * (E + 1) + e_E[None, :],
                mask=(n_N < N)[:, None] & (e_E <= E)[None, :],
                other=0,
            )
            total_E += tl.sum(count_NE, axis=0)
            before_E += tl.sum(tl.where((n_N < tl.program_id(0))[:, None], count_NE, 0), axis=0)
        offset_E = offset + tl.cumsum(total_E, 0) - total_E
        if tl.program_id(0) == 0:
            tl.store(offsets_ptr + e_E, offset_E, mask=e_E <= E)
        mine_TE = smallest_T[:, None] == e_E[None, :]
        place_T += tl.sum(tl.where(mine_TE, (offset_E + before_E)[None, :], 0), axis=1)
        offset += tl.sum(total_E)
    tl.store(order_ptr + place_T, t_T, mask=t_T < T)


def build_tables(raw_ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids [T, K], order [T], offsets [E + 1], spans [N, 2], groups, num_groups [1], all int32: see `Plan`."""
    (T, K), E, N = raw_ids.shape, num_adapters, triton.cdiv(raw_ids.shape[0], BLOCK_T)

    def table(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=raw_ids.device)

    ids, order, offsets, spans = table(T, K), table(T), table(E + 1), table(N, 2)
    small = T <= BLOCK_T
    groups, num_groups = (table(min(E, T * K)), table(1)) if small else (table(0), table(0))
    blocks = {"K": K, "BLOCK_K": triton.next_power_of_2(K), "BLOCK_E": power_of_two(E + 1, at_most=_BLOCK_E)}
    if T == 0:
        offsets.zero_(), num_groups.zero_()
    elif small:
        _small_plan_kernel[(1,)](
            raw_ids,
            ids,
            order,
            offsets,
            spans,
            groups,
            num_groups,
            *raw_ids.stride(),
            T,
            E,
            BLOCK_T=power_of_two(T),
            **blocks,
        )
    else:
        counts = table(N, E + 1)
        _count_kernel[(N,)](raw_ids, ids, spans, counts, *raw_ids.stride(), T, E, BLOCK_T=BLOCK_T, **blocks)
        _place_kernel[(N,)](
            ids, order, offsets, counts, T, E, N, BLOCK_T=BLOCK_T, BLOCK_N=power_of_two(N, at_most=64), **blocks
        )
    return ids, order, offsets, spans, groups, num_groups
