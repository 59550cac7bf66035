"""For the fused regime with many columns: x copied in the plan's order, and H made of it beforehand.

In that order few adapters meet in a block of tokens, so the GEMM's walk into their columns is short. Two launches: the
copy and beside it the hidden ranks as partial sums, by tiles that never cross adapters; and the sums' spread under the
columns of their adapters. One adapter a token only.

Legend: T tokens, K top-k, E adapters, G sibling linears, R rank, J = E * R, I in-features.
"""
# ruff: noqa: E741 (I is the legend's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels.arithmetic import dot, let_next_start, power_of_two, round_to, wait_for_previous
from molora_kernels.grouped import find_tile, max_tiles
from molora_kernels.plan_tables import BLOCK_T as SPAN


@triton.jit
def _copy(
    x_ptr, order_ptr, sorted_x_ptr, x_stride_t, first_i, end_i, T, I, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr
):
    place_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_T = tl.load(order_ptr + place_T, mask=place_T < T, other=0).to(tl.int64)
    for start in tl.range(first_i, end_i, BLOCK_I, num_stages=2):
        i_I = start + tl.arange(0, BLOCK_I)
        mask = (place_T < T)[:, None] & (i_I < end_i)[None, :]
        x_TI = tl.load(x_ptr + token_T[:, None] * x_stride_t + i_I[None, :], mask=mask, other=0.0)
        tl.store(sorted_x_ptr + place_T[:, None].to(tl.int64) * I + i_I[None, :], x_TI, mask=mask)


@triton.jit
def _note_span(first, ids_ptr, order_ptr, offsets_ptr, spans_ptr, E, SPAN: tl.constexpr):
    last = tl.minimum(first + SPAN, tl.load(offsets_ptr + E)) - 1
    some = last >= first
    lowest = tl.load(ids_ptr + tl.load(order_ptr + first), mask=some, other=E)
    highest = tl.load(ids_ptr + tl.load(order_ptr + last, mask=some, other=0), mask=some, other=-1)
    tl.store(spans_ptr + 2 * (first // SPAN), lowest)
    tl.store(spans_ptr + 2 * (first // SPAN) + 1, highest)


@triton.jit
def _sort_and_shrink_fwd_kernel(
    x_ptr,
    a_ptr,
    ids_ptr,
    order_ptr,
    offsets_ptr,
    sorted_x_ptr,
    spans_ptr,
    partial_ptr,
    x_stride_t,
    a_stride_g,
    a_stride_e,
    a_stride_r,
    T,
    E,
    I,
    R,
    G,
    per_split,
    COPY_T: tl.constexpr,
    COPY_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The first programs copy x in the plan's order; the others sum each token's hidden ranks, over a part of I.

    Of those that copy, some also note the lowest and the highest id of each span of the order. (A tile that stored what
    it reads would multiply out of registers: the top of `grouped.py` says why not.)
    """
    wait_for_previous()  # only then let the next kernels start: whatever earlier ones wrote is there for them to read
    let_next_start()
    split, block = tl.program_id(1), tl.program_id(2)
    first_i, end_i = split * per_split, tl.minimum(split * per_split + per_split, I)
    num_copies = tl.cdiv(T, COPY_T)
    if tl.program_id(0) < num_copies:
        if block == 0:
            _copy(x_ptr, order_ptr, sorted_x_ptr, x_stride_t, first_i, end_i, T, I, COPY_T, COPY_I)
            if (split == 0) & (tl.program_id(0) % (SPAN // COPY_T) == 0):
                _note_span(tl.program_id(0) * COPY_T, ids_ptr, order_ptr, offsets_ptr, spans_ptr, E, SPAN)
        return
    adapter, place, end = find_tile(tl.program_id(0) - num_copies, offsets_ptr, E, BLOCK_T, BLOCK_E)
    if place < end:
        num_blocks = tl.cdiv(R, BLOCK_R)
        sibling = block // num_blocks
        r_R = block % num_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        place_T = place + tl.arange(0, BLOCK_T)
        token_T = tl.load(order_ptr + place_T, mask=place_T < end, other=0).to(tl.int64)
        a_ptr += sibling.to(tl.int64) * a_stride_g + adapter.to(tl.int64) * a_stride_e
        acc_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for start in range(first_i, end_i, BLOCK_I):
            i_I = start + tl.arange(0, BLOCK_I)
            mask = (place_T < end)[:, None] & (i_I < I)[None, :]
            x_TI = tl.load(x_ptr + token_T[:, None] * x_stride_t + i_I[None, :], mask=mask, other=0.0)
            a_IR = tl.load(
                a_ptr + r_R[None, :] * a_stride_r + i_I[:, None],
                mask=(r_R < R)[None, :] & (i_I < I)[:, None],
                other=0.0,
            )
            acc_TR = dot(x_TI, a_IR, acc_TR)
        row_T = (split * T + place_T).to(tl.int64) * (G * R) + sibling * R
        tl.store(
            partial_ptr + row_T[:, None] + r_R[None, :],
            acc_TR,
            mask=(place_T < end)[:, None] & (r_R < R)[None, :],
        )


@triton.jit
def _spread_fwd_kernel(
    partial_ptr,
    scaling_ptr,
    gates_ptr,
    ids_ptr,
    order_ptr,
    spans_ptr,
    h_ptr,
    h_stride_t,
    T,
    G,
    R,
    J,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Add up the partial sums and lay them under their adapter's columns, zeros beside them, where tiles will read."""
    wait_for_previous()
    let_next_start()
    span = tl.program_id(0) * BLOCK_T // SPAN
    first = tl.load(spans_ptr + 2 * span) * R // BLOCK_J
    end = tl.cdiv(tl.minimum((tl.load(spans_ptr + 2 * span + 1) + 1) * R, J), BLOCK_J)
    sibling = tl.program_id(1)
    place_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_T = tl.load(order_ptr + place_T, mask=place_T < T, other=0)
    id_T = tl.load(ids_ptr + token_T, mask=place_T < T, other=-1)
    gate_T = tl.load(gates_ptr + token_T, mask=id_T >= 0, other=0.0)
    gate_T *= tl.load(scaling_ptr + id_T * G + sibling, mask=id_T >= 0, other=0.0)
    for block in range(first + tl.program_id(2), end, tl.num_programs(2)):
        j_J = block * BLOCK_J + tl.arange(0, BLOCK_J)
        mine_TJ = id_T[:, None] == (j_J // R)[None, :]
        sum_TJ = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
        for split in tl.static_range(SPLITS):
            row_T = (split * T + place_T).to(tl.int64) * (G * R) + sibling * R
            sum_TJ += tl.load(partial_ptr + row_T[:, None] + (j_J % R)[None, :], mask=mine_TJ, other=0.0)
        h_TJ = tl.where(mine_TJ, sum_TJ * gate_T[:, None], 0.0)
        tl.store(
            h_ptr + place_T[:, None].to(tl.int64) * h_stride_t + (sibling * J + j_J)[None, :],
            round_to(h_TJ, h_ptr.dtype.element_ty),
            mask=(place_T < T)[:, None] & (j_J < J)[None, :],
        )


def sort_and_shrink(
    x_TI: Tensor, a_GERI: Tensor, ids_TK: Tensor, order_T: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x in the plan's order [T, I], that order's spans, and partial sums of the hidden ranks [splits, T, G * R]."""
    (T, I), (G, E, R, _), device = x_TI.shape, a_GERI.shape, x_TI.device
    block_t, block_r = power_of_two(2 * T // E, at_most=64), power_of_two(R, at_most=64)
    num_tiles, num_blocks = max_tiles(T, E, block_t), G * triton.cdiv(R, block_r)
    wanted = 264 // (triton.cdiv(T, block_t) * num_blocks)  # two programs an SM
    per_split = triton.cdiv(triton.cdiv(I, power_of_two(wanted, at_least=1, at_most=16)), 128) * 128
    num_splits = triton.cdiv(I, per_split)
    sorted_x = torch.empty(T, I, dtype=x_TI.dtype, device=device)
    partials = torch.empty(num_splits, T, G * R, dtype=torch.float32, device=device)
    spans = torch.empty(triton.cdiv(T, SPAN), 2, dtype=torch.int32, device=device)
    _sort_and_shrink_fwd_kernel[triton.cdiv(T, 32) + num_tiles, num_splits, num_blocks](
        x_TI,
        a_GERI,
        ids_TK,
        order_T,
        offsets,
        sorted_x,
        spans,
        partials,
        x_TI.stride(0),
        *a_GERI.stride()[:3],
        T,
        E,
        I,
        R,
        G,
        per_split,
        COPY_T=32,
        COPY_I=256,
        BLOCK_T=block_t,
        BLOCK_I=64 if block_t == 64 else 128,
        BLOCK_R=block_r,
        BLOCK_E=power_of_two(E, at_most=128),
        SPAN=SPAN,
        num_stages=4,
        launch_pdl=True,
    )
    return sorted_x, spans, partials


def spread_(
    h_TC: Tensor,
    partials: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    order_T: Tensor,
    spans: Tensor,
) -> None:
    """Fill those columns of H [T, G * E * R] that tiles of the sorted tokens will read."""
    (num_splits, T, GR), (E, G) = partials.shape, scaling_EG.shape
    num_blocks = triton.cdiv(T, 32) * G
    _spread_fwd_kernel[triton.cdiv(T, 32), G, power_of_two(512 // num_blocks, at_least=1, at_most=16)](
        partials,
        scaling_EG,
        gates_TK,
        ids_TK,
        order_T,
        spans,
        h_TC,
        h_TC.stride(0),
        T,
        G,
        GR // G,
        E * GR // G,
        SPLITS=num_splits,
        BLOCK_T=32,
        BLOCK_J=64,
        SPAN=SPAN,
        launch_pdl=True,
    )
