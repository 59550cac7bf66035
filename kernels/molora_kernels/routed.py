"""Triton kernels: a gather-matmul over tiles of tokens that mostly share an adapter.

A program takes BLOCK_T consecutive entries of the plan's order and walks the adapters between the lowest and the
highest id of its tile. For each one present it multiplies the whole tile and keeps the rows that selected it. Nothing
is atomic, every element is written once and the order of each sum is fixed, so results are deterministic. A tile
without an active token returns at once.

`shrink` and `expand` stay two launches: ptxas before 13.3 can miscompile a pipelined Hopper matmul whose left operand
is in registers (triton issue 9433), which is what a dot after a fused shrink is.

Legend: T tokens, K top-k, E adapters, G sibling linears, R rank, C = G * R, I in-features, O out-features of a sibling.
"""
# ruff: noqa: E741 (I and O are the legend's)

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # as TRITON_INTERPRET stands now, for @triton.jit below


@triton.jit
def _load_tile(order_ptr, ids_ptr, T, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile's tokens, as int64 so that offsets cannot overflow, and their ids: -1 past the end."""
    place_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k_K = tl.arange(0, BLOCK_K)
    token_T = tl.load(order_ptr + place_T, mask=place_T < T, other=0).to(tl.int64)
    exists_TK = (place_T < T)[:, None] & (k_K < K)[None, :]
    return token_T, tl.load(ids_ptr + token_T[:, None] * K + k_K[None, :], mask=exists_TK, other=-1)


@triton.jit
def _column(ids_TK, k, BLOCK_K: tl.constexpr):
    return tl.max(tl.where(tl.arange(0, BLOCK_K)[None, :] == k, ids_TK, -1), axis=1)


@triton.jit
def _dot(left, right, acc):
    if INTERPRETED:  # the interpreter holds bfloat16 as uint16 and would multiply those
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _round(value, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates: round to nearest even before it does
        bits = value.to(tl.uint32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _shrink_fwd_kernel(
    x_ptr,
    a_ptr,
    scaling_ptr,
    gates_ptr,
    ids_ptr,
    order_ptr,
    h_ptr,
    x_stride_t,
    x_stride_i,
    a_stride_e,
    a_stride_c,
    a_stride_i,
    T,
    E,
    R,
    C,
    I,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    token_T, ids_TK = _load_tile(order_ptr, ids_ptr, T, K, BLOCK_T, BLOCK_K)
    first = tl.min(tl.where(ids_TK < 0, E, ids_TK)).to(tl.int64)
    last = tl.max(ids_TK).to(tl.int64)
    if last < 0:
        return
    active_T = tl.max(ids_TK, axis=1) >= 0
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for e in range(first, last + 1):
        if tl.max((ids_TK == e).to(tl.int32)) > 0:
            acc_TC = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            for start in range(0, I, BLOCK_I):
                i_I = start + tl.arange(0, BLOCK_I)
                x_TI = tl.load(
                    x_ptr + token_T[:, None] * x_stride_t + i_I[None, :] * x_stride_i,
                    mask=active_T[:, None] & (i_I < I)[None, :],
                    other=0.0,
                )
                a_IC = tl.load(
                    a_ptr + e * a_stride_e + c_C[None, :] * a_stride_c + i_I[:, None] * a_stride_i,
                    mask=(c_C < C)[None, :] & (i_I < I)[:, None],
                    other=0.0,
                )
                acc_TC = _dot(x_TI, a_IC, acc_TC)
            scaling_C = tl.load(scaling_ptr + e * (C // R) + c_C // R, mask=c_C < C, other=0.0)
            for k in tl.static_range(K):
                selected_T = _column(ids_TK, k, BLOCK_K) == e
                gate_T = tl.load(gates_ptr + token_T * K + k, mask=selected_T, other=0.0)
                tl.store(
                    h_ptr + (token_T * K + k)[:, None] * C + c_C[None, :],
                    acc_TC * (gate_T[:, None] * scaling_C[None, :]),
                    mask=selected_T[:, None] & (c_C < C)[None, :],
                )


@triton.jit
def _expand_fwd_kernel(
    h_ptr,
    b_ptr,
    ids_ptr,
    order_ptr,
    y_ptr,
    y_stride_t,
    b_stride_e,
    b_stride_o,
    b_stride_r,
    T,
    E,
    R,
    C,
    O,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    token_T, ids_TK = _load_tile(order_ptr, ids_ptr, T, K, BLOCK_T, BLOCK_K)
    first = tl.min(tl.where(ids_TK < 0, E, ids_TK)).to(tl.int64)
    last = tl.max(ids_TK).to(tl.int64)
    if last < 0:
        return
    active_T = tl.max(ids_TK, axis=1) >= 0
    o_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    y_ptr_TO = y_ptr + token_T[:, None] * y_stride_t + o_O[None, :]
    y_mask_TO = active_T[:, None] & (o_O < O)[None, :]
    acc_TO = tl.load(y_ptr_TO, mask=y_mask_TO, other=0.0).to(tl.float32)
    for e in range(first, last + 1):
        if tl.max((ids_TK == e).to(tl.int32)) > 0:
            for start in range(0, R, BLOCK_R):
                r_R = start + tl.arange(0, BLOCK_R)
                h_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
                for k in tl.static_range(K):
                    selected_T = _column(ids_TK, k, BLOCK_K) == e
                    h_TR += tl.load(
                        h_ptr + (token_T * K + k)[:, None] * C + r_R[None, :],
                        mask=selected_T[:, None] & (r_R < R)[None, :],
                        other=0.0,
                    )
                b_RO = tl.load(
                    b_ptr + e * b_stride_e + o_O[None, :] * b_stride_o + r_R[:, None] * b_stride_r,
                    mask=(o_O < O)[None, :] & (r_R < R)[:, None],
                    other=0.0,
                )
                acc_TO = _dot(_round(h_TR, b_RO.dtype), b_RO, acc_TO)
    tl.store(y_ptr_TO, _round(acc_TO, y_ptr.dtype.element_ty), mask=y_mask_TO)


def _block(size: int, at_most: int) -> int:
    return int(max(16, min(at_most, triton.next_power_of_2(size))))  # 16 is the least that tl.dot takes


def shrink(
    x_TI: Tensor, a_ECI: Tensor, scaling_EG: Tensor, gates_TK: Tensor, ids_TK: Tensor, order_T: Tensor
) -> Tensor:
    """Each token's hidden ranks under each of its adapters, gated and scaled.

    Semantics:
        h[t, k, g * R + r] = gates[t, k] * scaling[e, g] * (a[e, g * R + r] . x[t]),  e = ids[t, k]

    Returns [T, K, C] float32; where the id is -1 it is left unwritten.
    """
    (T, I), (E, C, _), K = x_TI.shape, a_ECI.shape, ids_TK.shape[1]
    h_TKC = torch.empty(T, K, C, dtype=torch.float32, device=x_TI.device)
    block_t, block_c = _block(T // E, 64), _block(C, 64)
    _shrink_fwd_kernel[triton.cdiv(T, block_t), triton.cdiv(C, block_c)](
        x_TI,
        a_ECI,
        scaling_EG.float().contiguous(),
        gates_TK.float().contiguous(),
        ids_TK,
        order_T,
        h_TKC,
        *x_TI.stride(),
        *a_ECI.stride(),
        T,
        E,
        C // scaling_EG.shape[1],
        C,
        I,
        K=K,
        BLOCK_K=triton.next_power_of_2(K),
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        BLOCK_I=_block(I, 64),
    )
    return h_TKC


def expand_(y_TO: Tensor, h_TKR: Tensor, b_EOR: Tensor, ids_TK: Tensor, order_T: Tensor) -> None:
    """Add each token's adapters to y in place, all k of them in one float32 accumulator.

    Semantics:
        y[t] += sum_k b[e] @ h[t, k],  e = ids[t, k]

    Rows without an active id are neither read nor written. y and h may be column slices.
    """
    (T, O), E, R, K = y_TO.shape, b_EOR.shape[0], b_EOR.shape[2], ids_TK.shape[1]
    block_t, block_o = _block(T // E, 64), _block(O, 128)
    _expand_fwd_kernel[triton.cdiv(T, block_t), triton.cdiv(O, block_o)](
        h_TKR,
        b_EOR,
        ids_TK,
        order_T,
        y_TO,
        y_TO.stride(0),
        *b_EOR.stride(),
        T,
        E,
        R,
        h_TKR.stride(1),
        O,
        K=K,
        BLOCK_K=triton.next_power_of_2(K),
        BLOCK_T=block_t,
        BLOCK_R=_block(R, 64),
        BLOCK_O=block_o,
        num_stages=1,  # the dot's left operand is in registers: see the top of the file
    )
