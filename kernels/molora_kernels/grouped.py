"""Any shape, any bank: the base GEMM by the library, then two gather-matmuls over tokens grouped by adapter.

The plan's order puts tokens with the same smallest id side by side; a tile is up to BLOCK_T of them and never crosses
into the next such run. With one adapter a token a tile meets one adapter; with more it walks from its smallest id to
its largest, multiplies the whole tile by each adapter present and keeps the rows that selected it, so that all k of
them blend in one float32 accumulator and y is read and written once. Nothing is atomic, every element is written once
and the order of each sum is fixed, so results are deterministic. Tokens without an adapter are in no tile.

`shrink` and `expand` stay two launches: ptxas before 13.3 can miscompile a pipelined Hopper matmul whose left operand
is in registers (triton issue 9433), which is what a dot after a fused shrink is.

Legend: T tokens, K top-k, E adapters, G sibling linears, R rank, C = G * R, I in-features, O out-features of all
siblings.
"""
# ruff: noqa: E741 (I and O are the legend's)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels.arithmetic import count_row_tiles, dot, find_rows, power_of_two, round_to

_EXPAND_PROGRAMS = 1056  # eight an SM of a large GPU: more would find the tokens of the same tiles over and over


@triton.jit
def find_tile(tile, offsets_ptr, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """The run of equal smallest ids that a tile lies in, its first place in the plan's order and the run's end.

    A tile past the last has no place: its end is 0.
    """
    adapter, place, end, seen = 0, 0, 0, 0
    for start in range(0, E, BLOCK_E):
        e_E = start + tl.arange(0, BLOCK_E)
        first_E = tl.load(offsets_ptr + e_E, mask=e_E < E, other=0)
        end_E = tl.load(offsets_ptr + e_E + 1, mask=e_E < E, other=0)
        tiles_E = tl.cdiv(end_E - first_E, BLOCK_T)
        before_E = seen + tl.cumsum(tiles_E, 0) - tiles_E
        mine_E = (before_E <= tile) & (tile < before_E + tiles_E)
        adapter += tl.sum(tl.where(mine_E, e_E, 0))
        place += tl.sum(tl.where(mine_E, first_E + (tile - before_E) * BLOCK_T, 0))
        end += tl.sum(tl.where(mine_E, end_E, 0))
        seen += tl.sum(tiles_E)
    return adapter, place, end


@triton.jit
def _load_tile(
    tile,
    order_ptr,
    offsets_ptr,
    ids_ptr,
    E,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The tile's tokens, as int64 so that offsets cannot overflow, whether each exists, and their ids (-1 if not)."""
    _, place, end = find_tile(tile, offsets_ptr, E, BLOCK_T, BLOCK_E)
    place_T = place + tl.arange(0, BLOCK_T)
    k_K = tl.arange(0, BLOCK_K)
    token_T = tl.load(order_ptr + place_T, mask=place_T < end, other=0).to(tl.int64)
    ids_TK = tl.load(
        ids_ptr + token_T[:, None] * K + k_K[None, :], mask=(place_T < end)[:, None] & (k_K < K)[None, :], other=-1
    )
    return token_T, place_T < end, ids_TK


@triton.jit
def _column(ids_TK, k, BLOCK_K: tl.constexpr):
    return tl.max(tl.where(tl.arange(0, BLOCK_K)[None, :] == k, ids_TK, -1), axis=1)


@triton.jit
def _shrink_fwd_kernel(
    x_ptr,
    a_ptr,
    scaling_ptr,
    gates_ptr,
    ids_ptr,
    order_ptr,
    offsets_ptr,
    h_ptr,
    x_stride_t,
    x_stride_i,
    a_stride_g,
    a_stride_e,
    a_stride_r,
    a_stride_i,
    E,
    R,
    C,
    I,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    EVEN_I: tl.constexpr,
):
    token_T, exists_T, ids_TK = _load_tile(
        tl.program_id(0), order_ptr, offsets_ptr, ids_ptr, E, K, BLOCK_T, BLOCK_K, BLOCK_E
    )
    last = tl.max(ids_TK).to(tl.int64)
    if last < 0:
        return
    first = tl.min(tl.where(ids_TK < 0, E, ids_TK)).to(tl.int64)
    num_blocks = tl.cdiv(R, BLOCK_R)
    sibling = tl.program_id(1) // num_blocks
    r_R = (tl.program_id(1) % num_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    a_ptr += sibling.to(tl.int64) * a_stride_g
    for e in range(first, last + 1):
        if tl.max((ids_TK == e).to(tl.int32)) > 0:
            acc_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for start in range(0, I, BLOCK_I):
                i_I = (start + tl.arange(0, BLOCK_I)).to(tl.int64)  # any strides: offsets may pass 2**31
                x_mask, a_mask = exists_T[:, None], (r_R < R)[None, :]
                if not EVEN_I:
                    x_mask, a_mask = x_mask & (i_I < I)[None, :], a_mask & (i_I < I)[:, None]
                x_TI = tl.load(
                    x_ptr + token_T[:, None] * x_stride_t + i_I[None, :] * x_stride_i, mask=x_mask, other=0.0
                )
                a_IR = tl.load(
                    a_ptr + e * a_stride_e + r_R[None, :].to(tl.int64) * a_stride_r + i_I[:, None] * a_stride_i,
                    mask=a_mask,
                    other=0.0,
                )
                acc_TR = dot(x_TI, a_IR, acc_TR)
            scaling = tl.load(scaling_ptr + e * (C // R) + sibling)
            for k in tl.static_range(K):
                selected_T = _column(ids_TK, k, BLOCK_K) == e
                gate_T = tl.load(gates_ptr + token_T * K + k, mask=selected_T, other=0.0)
                tl.store(
                    h_ptr + (token_T * K + k)[:, None] * C + sibling * R + r_R[None, :],
                    acc_TR * (gate_T * scaling)[:, None],
                    mask=selected_T[:, None] & (r_R < R)[None, :],
                )


@triton.jit
def _expand_fwd_kernel(
    h_ptr,
    b_ptr,
    ids_ptr,
    order_ptr,
    offsets_ptr,
    y_ptr,
    y_stride_t,
    b_stride_e,
    b_stride_o,
    b_stride_r,
    E,
    R,
    C,
    num_row_tiles,
    WIDTHS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    token_T, exists_T, ids_TK = _load_tile(
        tl.program_id(1), order_ptr, offsets_ptr, ids_ptr, E, K, BLOCK_T, BLOCK_K, BLOCK_E
    )
    last = tl.max(ids_TK).to(tl.int64)
    if last < 0:
        return
    first = tl.min(tl.where(ids_TK < 0, E, ids_TK)).to(tl.int64)
    for row_tile in range(tl.program_id(0), num_row_tiles, tl.num_programs(0)):
        sibling, start_o, end_o = find_rows(row_tile, WIDTHS, BLOCK_O)
        o_O = start_o + tl.arange(0, BLOCK_O)
        y_ptr_TO = y_ptr + token_T[:, None] * y_stride_t + o_O[None, :]
        y_mask_TO = exists_T[:, None] & (o_O < end_o)[None, :]
        acc_TO = tl.load(y_ptr_TO, mask=y_mask_TO, other=0.0).to(tl.float32)
        for e in range(first, last + 1):
            if tl.max((ids_TK == e).to(tl.int32)) > 0:
                for start in range(0, R, BLOCK_R):
                    r_R = start + tl.arange(0, BLOCK_R)
                    h_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
                    for k in tl.static_range(K):
                        selected_T = _column(ids_TK, k, BLOCK_K) == e
                        h_TR += tl.load(
                            h_ptr + (token_T * K + k)[:, None] * C + sibling * R + r_R[None, :],
                            mask=selected_T[:, None] & (r_R < R)[None, :],
                            other=0.0,
                        )
                    b_RO = tl.load(
                        b_ptr + e * b_stride_e + o_O[None, :].to(tl.int64) * b_stride_o + r_R[:, None] * b_stride_r,
                        mask=(o_O < end_o)[None, :] & (r_R < R)[:, None],
                        other=0.0,
                    )
                    acc_TO = dot(round_to(h_TR, b_RO.dtype), b_RO, acc_TO)
        tl.store(y_ptr_TO, round_to(acc_TO, y_ptr.dtype.element_ty), mask=y_mask_TO)


def grouped(
    x_TI: Tensor,
    w_OI: Tensor,
    bias_O: Tensor | None,
    a_GERI: Tensor,
    b_EOR: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    order_T: Tensor,
    offsets: Tensor,
    widths: tuple[int, ...],
) -> Tensor:
    """`routed_linears` for any number of tokens, E, R, dtype and strides; [T, O].

    Tokens without an active id get the library's base linear, bit for bit.
    """
    y_TO = F.linear(x_TI, w_OI, bias_O)
    if not y_TO.is_contiguous():
        y_TO = y_TO.contiguous()
    h_TKC = shrink(x_TI, a_GERI, scaling_EG, gates_TK, ids_TK, order_T, offsets)
    expand_(y_TO, h_TKC, b_EOR, ids_TK, order_T, offsets, widths)
    return y_TO


def shrink(
    x_TI: Tensor,
    a_GERI: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    order_T: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Each token's hidden ranks under each of its adapters, gated and scaled.

    Semantics:
        h[t, k, g * R + r] = gates[t, k] * scaling[e, g] * (a[g, e, r] . x[t]),  e = ids[t, k]

    Returns [T, K, C] float32; where the id is -1 it is left unwritten.
    """
    (T, I), (G, E, R, _), K = x_TI.shape, a_GERI.shape, ids_TK.shape[1]
    h_TKC = torch.empty(T, K, G * R, dtype=torch.float32, device=x_TI.device)
    block_t, block_r = block_of_tokens(T, E, at_most=64), power_of_two(R, at_most=64)
    block_i = power_of_two(I, at_most=(256 if block_t <= 32 else 128) // x_TI.element_size())
    _shrink_fwd_kernel[max_tiles(T, E, block_t), G * triton.cdiv(R, block_r)](
        x_TI,
        a_GERI,
        scaling_EG,
        gates_TK,
        ids_TK,
        order_T,
        offsets,
        h_TKC,
        *x_TI.stride(),
        *a_GERI.stride(),
        E,
        R,
        G * R,
        I,
        K=K,
        BLOCK_K=triton.next_power_of_2(K),
        BLOCK_E=power_of_two(E, at_most=128),
        BLOCK_T=block_t,
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        EVEN_I=I % block_i == 0,
        num_stages=4,
    )
    return h_TKC


def expand_(
    y_TO: Tensor,
    h_TKC: Tensor,
    b_EOR: Tensor,
    ids_TK: Tensor,
    order_T: Tensor,
    offsets: Tensor,
    widths: tuple[int, ...],
) -> None:
    """Add each token's adapters to y in place, all k of them in one float32 accumulator.

    Semantics:
        y[t, o] += sum_k b[e, o] . h[t, k, g * R : g * R + R],  e = ids[t, k], g the sibling of row o

    Rows without an active id are neither read nor written.
    """
    T, E, R, K = y_TO.shape[0], b_EOR.shape[0], b_EOR.shape[2], ids_TK.shape[1]
    size = y_TO.element_size()  # in float32 a larger tile would not fit into registers
    block_t, block_o = block_of_tokens(T, E, at_most=64), power_of_two(max(widths), at_most=256 // size)
    num_row_tiles, num_tiles = count_row_tiles(widths, block_o), max_tiles(T, E, block_t)
    num_programs = min(num_row_tiles, triton.cdiv(_EXPAND_PROGRAMS, max(1, num_tiles)))
    _expand_fwd_kernel[num_programs, num_tiles](
        h_TKC,
        b_EOR,
        ids_TK,
        order_T,
        offsets,
        y_TO,
        y_TO.stride(0),
        *b_EOR.stride(),
        E,
        R,
        h_TKC.shape[2],
        num_row_tiles,
        WIDTHS=widths,
        K=K,
        BLOCK_K=triton.next_power_of_2(K),
        BLOCK_E=power_of_two(E, at_most=128),
        BLOCK_T=block_t,
        BLOCK_R=power_of_two(R, at_most=128 // size),
        BLOCK_O=block_o,
        num_stages=1,  # the dot's left operand is in registers: see the top of the file
    )


def block_of_tokens(T: int, E: int, at_most: int) -> int:
    return power_of_two(T // E, at_most=at_most)


def max_tiles(T: int, E: int, block_t: int) -> int:
    """Each run of equal smallest ids ends with one tile that may not be full."""
    return int(triton.cdiv(T, block_t)) + min(E, T)
