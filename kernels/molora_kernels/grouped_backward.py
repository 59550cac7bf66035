"""The gradients of any shape and any bank: (token, adapter) pairs grouped by adapter, nothing wider than a rank kept.

    u[p] = A[e] x[t]                   gated_u[p] = gate[p] scaling[e] u[p]
    v[p] = B[e]^T dy[t]                gated_v[p] = gate[p] scaling[e] v[p]

    dgate[p] = scaling[e] <u[p], v[p]>                    dA[e] = sum_p gated_v[p] x[t]^T
    dx[t]    = dy[t] W + sum_p A[e]^T gated_v[p]          dB[e] = sum_p dy[t] gated_u[p]^T

A pair p = t * K + k is token t under its k-th adapter e. Sorted by adapter, a tile of pairs meets one adapter, and dA
and dB are sums over an adapter's run of pairs: one program walks the run in order for its block of the result, so that
nothing is atomic and results are bitwise the same from run to run. Pairs without an adapter are in no run: what scratch
holds for them is never written and never read.

u and v are gated and rounded in a launch of their own, so that every dot reads both its operands from memory: the top
of `grouped.py` says why.

Legend: T tokens, K top-k, P = T * K pairs, E adapters, G sibling linears, R rank, C = G * R, I in-features, O
out-features of all siblings, S parts of a sum.
"""
# ruff: noqa: E741 (I and O are the legend's)

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels.arithmetic import dot, power_of_two, round_to
from molora_kernels.grouped import block_of_tokens, expand_, find_tile, max_tiles
from molora_kernels.plan_tables import build_tables


class Wanted(NamedTuple):
    """Which gradients to compute."""

    x: bool
    lora_a: bool
    lora_b: bool
    gates: bool


class _Pairs(NamedTuple):
    """Pairs by adapter, as a plan of P tokens with one adapter each has them."""

    order: Tensor
    offsets: Tensor
    top_k: int


@triton.jit
def _shrink_pairs_bwd_kernel(
    x_ptr,
    a_ptr,
    order_ptr,
    offsets_ptr,
    u_ptr,
    x_stride_t,
    x_stride_i,
    a_stride_e,
    a_stride_r,
    a_stride_i,
    u_stride_s,
    u_stride_p,
    E,
    R,
    I,
    per_part,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    adapter, place, end = find_tile(tl.program_id(0), offsets_ptr, E, BLOCK_P, BLOCK_E)
    if place >= end:
        return
    part = tl.program_id(1)
    place_P = place + tl.arange(0, BLOCK_P)
    pair_P = tl.load(order_ptr + place_P, mask=place_P < end, other=0).to(tl.int64)
    r_R = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_ptr_P = x_ptr + pair_P // K * x_stride_t
    a_ptr_R = a_ptr + adapter.to(tl.int64) * a_stride_e + r_R.to(tl.int64) * a_stride_r
    acc_PR = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for start in range(part * per_part, tl.minimum(part * per_part + per_part, I), BLOCK_I):
        i_I = (start + tl.arange(0, BLOCK_I)).to(tl.int64)
        x_PI = tl.load(
            x_ptr_P[:, None] + i_I[None, :] * x_stride_i, mask=(place_P < end)[:, None] & (i_I < I)[None, :], other=0.0
        )
        a_IR = tl.load(
            a_ptr_R[None, :] + i_I[:, None] * a_stride_i, mask=(r_R < R)[None, :] & (i_I < I)[:, None], other=0.0
        )
        acc_PR = dot(x_PI, a_IR, acc_PR)
    u_ptr_PR = u_ptr + part.to(tl.int64) * u_stride_s + pair_P[:, None] * u_stride_p + r_R[None, :]
    tl.store(u_ptr_PR, acc_PR, mask=(place_P < end)[:, None] & (r_R < R)[None, :])


@triton.jit
def _add_parts(u_ptr, offset_PC, mask_PC, S, stride_s):
    sum_PC = tl.load(u_ptr + offset_PC, mask=mask_PC, other=0.0)
    for _ in range(1, S):
        u_ptr += stride_s
        sum_PC += tl.load(u_ptr + offset_PC, mask=mask_PC, other=0.0)
    return sum_PC


@triton.jit
def _gate_pairs_bwd_kernel(
    u_ptr,
    v_ptr,
    scaling_ptr,
    gates_ptr,
    ids_ptr,
    gated_u_ptr,
    gated_v_ptr,
    dgates_ptr,
    u_parts,
    v_parts,
    stride_s,
    P,
    R,
    C,
    GATED_U: tl.constexpr,
    GATED_V: tl.constexpr,
    DGATES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    id_P = tl.load(ids_ptr + p_P, mask=p_P < P, other=-1)
    gate_P = tl.load(gates_ptr + p_P, mask=id_P >= 0, other=0.0)
    dgate_P = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, C, BLOCK_C):
        c_C = start + tl.arange(0, BLOCK_C)
        mask_PC = (id_P >= 0)[:, None] & (c_C < C)[None, :]
        offset_PC = p_P[:, None].to(tl.int64) * C + c_C[None, :]
        scaling_PC = tl.load(scaling_ptr + id_P[:, None] * (C // R) + (c_C // R)[None, :], mask=mask_PC, other=0.0)
        factor_PC = gate_P[:, None] * scaling_PC
        if GATED_U or DGATES:
            u_PC = _add_parts(u_ptr, offset_PC, mask_PC, u_parts, stride_s)
        if GATED_V or DGATES:
            v_PC = _add_parts(v_ptr, offset_PC, mask_PC, v_parts, stride_s)
        if GATED_U:
            tl.store(gated_u_ptr + offset_PC, round_to(u_PC * factor_PC, gated_u_ptr.dtype.element_ty), mask_PC)
        if GATED_V:
            tl.store(gated_v_ptr + offset_PC, round_to(v_PC * factor_PC, gated_v_ptr.dtype.element_ty), mask_PC)
        if DGATES:
            dgate_P += tl.sum(u_PC * v_PC * scaling_PC, axis=1)
    if DGATES:
        tl.store(dgates_ptr + p_P, dgate_P, mask=p_P < P)


@triton.jit
def _add_up_pairs_bwd_kernel(
    x_ptr,
    h_ptr,
    order_ptr,
    offsets_ptr,
    sum_ptr,
    x_stride_t,
    x_stride_i,
    h_stride_p,
    sum_stride_e,
    sum_stride_i,
    sum_stride_r,
    R,
    I,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    e = tl.program_id(2)
    first, end = tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)
    i_I = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    r_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc_IR = tl.zeros((BLOCK_I, BLOCK_R), tl.float32)
    for start in range(first, end, BLOCK_P):
        place_P = start + tl.arange(0, BLOCK_P)
        pair_P = tl.load(order_ptr + place_P, mask=place_P < end, other=0).to(tl.int64)
        x_IP = tl.load(
            x_ptr + (pair_P // K)[None, :] * x_stride_t + i_I[:, None] * x_stride_i,
            mask=(i_I < I)[:, None] & (place_P < end)[None, :],
            other=0.0,
        )
        h_PR = tl.load(
            h_ptr + pair_P[:, None] * h_stride_p + r_R[None, :],
            mask=(place_P < end)[:, None] & (r_R < R)[None, :],
            other=0.0,
        )
        acc_IR = dot(x_IP, h_PR, acc_IR)
    sum_ptr_IR = sum_ptr + e.to(tl.int64) * sum_stride_e + i_I[:, None] * sum_stride_i
    sum_ptr_IR += r_R[None, :].to(tl.int64) * sum_stride_r
    tl.store(sum_ptr_IR, round_to(acc_IR, sum_ptr.dtype.element_ty), mask=(i_I < I)[:, None] & (r_R < R)[None, :])


def grouped_backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    w_OI: Tensor,
    a_GERI: Tensor,
    b_EOR: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    order_T: Tensor,
    offsets: Tensor,
    widths: tuple[int, ...],
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients to x, lora_a, lora_b and gates, for any number of tokens, E, R, dtype and strides.

    dx, dA and dB come in x's dtype and dgates in float32; those not wanted come as a tensor [0].
    """
    (T, I), K, (G, E, R, _) = x_TI.shape, ids_TK.shape[1], a_GERI.shape
    P, C = T * K, G * R
    pairs = _Pairs(order_T, offsets, K)
    if K > 1:
        _, order_P, offsets_of_pairs, *_ = build_tables(ids_TK.view(P, 1), E)
        pairs = _Pairs(order_P, offsets_of_pairs, K)
    a_ECI = a_GERI.transpose(0, 1).flatten(1, 2)  # a view of one linear's A, a copy of siblings'
    siblings = [  # their rows of O and columns of C
        (slice(end - width, end), slice(g * R, g * R + R))
        for g, (width, end) in enumerate(zip(widths, accumulate(widths), strict=True))
    ]

    u_SPC, v_SPC, dx_TI, da_GERI, db_EOR = (x_TI.new_empty(0) for _ in range(5))
    if wanted.lora_b or wanted.gates:
        u_SPC = torch.empty(_count_parts(P, E, C, I), P, C, dtype=torch.float32, device=x_TI.device)
        _shrink_pairs(u_SPC, x_TI, a_ECI, pairs)
    if wanted.x or wanted.lora_a or wanted.gates:
        v_SPC = torch.empty(_count_parts(P, E, R, max(widths)), P, C, dtype=torch.float32, device=x_TI.device)
        for rows, columns in siblings:
            _shrink_pairs(v_SPC[..., columns], dy_TO[:, rows], b_EOR[:, rows].transpose(1, 2), pairs)
    gated_u_PC, gated_v_PC, dgates_TK = _gate_pairs(u_SPC, v_SPC, scaling_EG, gates_TK, ids_TK, R, x_TI.dtype, wanted)

    if wanted.x:
        dx_TI = dy_TO @ w_OI
        expand_(dx_TI, gated_v_PC.view(T, K, C), a_ECI.transpose(1, 2), ids_TK, order_T, offsets, (I,))
    if wanted.lora_a:
        da_ECI = torch.empty(E, C, I, dtype=x_TI.dtype, device=x_TI.device)
        _add_up_pairs(da_ECI.transpose(1, 2), x_TI, gated_v_PC, pairs)
        da_GERI = da_ECI.unflatten(1, (G, R)).transpose(0, 1)
    if wanted.lora_b:
        db_EOR = torch.empty_like(b_EOR)
        for rows, columns in siblings:
            _add_up_pairs(db_EOR[:, rows], dy_TO[:, rows], gated_u_PC[:, columns], pairs)
    return dx_TI, da_GERI, db_EOR, dgates_TK


def _count_parts(P: int, E: int, R: int, I: int) -> int:
    """Into how many parts `_shrink_pairs` cuts its sums over I: for two programs on each SM of a large GPU."""
    num_tiles = triton.cdiv(P, block_of_tokens(P, E, at_most=64)) * triton.cdiv(R, 64)
    return int(max(1, min(264 // max(1, num_tiles), I // 512)))


def _shrink_pairs(u_SPR: Tensor, x_TI: Tensor, a_ERI: Tensor, pairs: _Pairs) -> None:
    """Each pair's hidden ranks, neither gated nor scaled, as parts of a sum.

    Semantics:
        sum_s u[s, p] = a[e] @ x[p // K] for the pairs p of adapter e; those without an adapter are left unwritten
    """
    (S, P, R), (E, _, I) = u_SPR.shape, a_ERI.shape
    block_p, block_r = block_of_tokens(P, E, at_most=64), power_of_two(R, at_most=64)
    block_i = power_of_two(I, at_most=128 // x_TI.element_size())
    _shrink_pairs_bwd_kernel[max_tiles(P, E, block_p), S, triton.cdiv(R, block_r)](
        x_TI,
        a_ERI,
        pairs.order,
        pairs.offsets,
        u_SPR,
        *x_TI.stride(),
        *a_ERI.stride(),
        *u_SPR.stride()[:2],
        E,
        R,
        I,
        triton.cdiv(triton.cdiv(I, S), block_i) * block_i,
        K=pairs.top_k,
        BLOCK_E=power_of_two(E, at_most=128),
        BLOCK_P=block_p,
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        num_stages=4,
    )


def _gate_pairs(
    u_SPC: Tensor,
    v_SPC: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    R: int,
    dtype: torch.dtype,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor]:
    """u and v times gate and scaling, rounded to dtype, and dgates; each as far as a wanted gradient needs it.

    dgates is 0 where the id is -1; the gated rows of such pairs are left unwritten.
    """
    (T, K), C, device = ids_TK.shape, scaling_EG.shape[1] * R, ids_TK.device
    needs_u, needs_v = wanted.lora_b, wanted.x or wanted.lora_a
    gated_u_PC = torch.empty(T * K if needs_u else 0, C, dtype=dtype, device=device)
    gated_v_PC = torch.empty(T * K if needs_v else 0, C, dtype=dtype, device=device)
    dgates_TK = torch.empty((T, K) if wanted.gates else 0, dtype=torch.float32, device=device)
    _gate_pairs_bwd_kernel[triton.cdiv(T * K, 32),](
        u_SPC,
        v_SPC,
        scaling_EG,
        gates_TK,
        ids_TK,
        gated_u_PC,
        gated_v_PC,
        dgates_TK,
        u_SPC.shape[0],
        v_SPC.shape[0],
        T * K * C,
        T * K,
        R,
        C,
        GATED_U=needs_u,
        GATED_V=needs_v,
        DGATES=wanted.gates,
        BLOCK_P=32,
        BLOCK_C=power_of_two(C, at_most=64),
    )
    return gated_u_PC, gated_v_PC, dgates_TK


def _add_up_pairs(sum_EIR: Tensor, x_TI: Tensor, h_PR: Tensor, pairs: _Pairs) -> None:
    """Semantics: sum[e] = sum of x[p // K] h[p]^T over the pairs p of adapter e, in their order; 0 where e has none."""
    E, I, R = sum_EIR.shape
    block_i, block_r = power_of_two(I, at_most=64), power_of_two(R, at_most=64)
    _add_up_pairs_bwd_kernel[triton.cdiv(I, block_i), triton.cdiv(R, block_r), E](
        x_TI,
        h_PR,
        pairs.order,
        pairs.offsets,
        sum_EIR,
        *x_TI.stride(),
        h_PR.stride(0),
        *sum_EIR.stride(),
        R,
        I,
        K=pairs.top_k,
        BLOCK_P=power_of_two(len(h_PR) // E, at_most=128 // x_TI.element_size()),
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        num_stages=6,  # three buffers: a load of rows waits for a load of order
    )
