"""Few tokens: one pass over the base weight, with the adapters added in its accumulator.

Two launches. `shrink` writes each present adapter's hidden ranks for all tokens, zero where a token did not select it;
a present adapter is a *group*, so nothing depends on how many adapters the bank holds. `linear` streams the base
weight, then goes on along the groups' columns as if they were more input: y = [x | h] [W | B]^T. On Hopper the second
launch starts while the first still runs (programmatic dependent launch) and waits for h only once the base weight has
passed, so the shrink costs next to nothing. The first waits for everything before it and only then lets the second
start, so weights written by an earlier kernel are safe to read.

At 1 to 64 tokens this is bound by the bytes of W, hence no split of the sum: every element is written once, nothing is
atomic, and the order of each sum is fixed.

`base` is the second launch alone, for a forward without adapters. There one token is multiplied without tensor cores,
which would pad it to a tile of 16: two rows of W a program, and many programs an SM.

Legend: T tokens, K top-k, E adapters, G sibling linears, R rank, I in-features, O out-features of all siblings,
J = groups * R padded to a power of two: the columns of h.
"""
# ruff: noqa: E741, SIM108 (I and O are the legend's; a ternary of two shapes is not Triton)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels.arithmetic import (
    INTERPRETED,
    count_row_tiles,
    dot,
    find_rows,
    let_next_start,
    overlapping,
    power_of_two,
    round_to,
    wait_for_previous,
)

MAX_TOKENS = 64
_SMEM_WITHOUT_OPT_IN = 48 * 1024


@triton.jit
def _shrink_fwd_kernel(
    x_ptr,
    a_ptr,
    scaling_ptr,
    gates_ptr,
    ids_ptr,
    groups_ptr,
    num_groups_ptr,
    h_ptr,
    x_stride_t,
    x_stride_i,
    a_stride_g,
    a_stride_e,
    a_stride_r,
    a_stride_i,
    T,
    I,
    R,
    J,
    G: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,  # a group's columns of h
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    EVEN_I: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        wait_for_previous()
        let_next_start()
    group = tl.program_id(0)
    if group >= tl.load(num_groups_ptr):
        return
    sibling = tl.program_id(1) % G
    e = tl.load(groups_ptr + group).to(tl.int64)
    t_T = tl.arange(0, BLOCK_T)
    r_R = (tl.program_id(1) // G) * BLOCK_R + tl.arange(0, BLOCK_R)
    gate_T = tl.zeros((BLOCK_T,), tl.float32)
    selected_T = tl.zeros((BLOCK_T,), tl.int32)
    for k in tl.static_range(K):
        hit_T = tl.load(ids_ptr + t_T * K + k, mask=t_T < T, other=-1) == e
        gate_T += tl.load(gates_ptr + t_T * K + k, mask=hit_T, other=0.0)
        selected_T = tl.where(hit_T, 1, selected_T)
    scaling = tl.load(scaling_ptr + e * G + sibling)
    a_ptr += sibling.to(tl.int64) * a_stride_g + e * a_stride_e

    acc_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, I, BLOCK_I):
        i_I = start + tl.arange(0, BLOCK_I)
        x_mask, a_mask = (t_T < T)[:, None], (r_R < R)[None, :]
        if not EVEN_I:
            x_mask, a_mask = x_mask & (i_I < I)[None, :], a_mask & (i_I < I)[:, None]
        x_TI = tl.load(
            x_ptr + t_T[:, None].to(tl.int64) * x_stride_t + i_I[None, :] * x_stride_i, mask=x_mask, other=0.0
        )
        a_IR = tl.load(a_ptr + r_R[None, :] * a_stride_r + i_I[:, None] * a_stride_i, mask=a_mask, other=0.0)
        acc_TR = dot(x_TI, a_IR, acc_TR)
    # Not a product with a zero gate: an adapter that overflows must not reach the tokens that did not select it.
    h_TR = tl.where((selected_T > 0)[:, None], acc_TR * (gate_T * scaling)[:, None], 0.0)
    column_R = (sibling * tl.num_programs(0) + group) * BLOCK_J + r_R
    tl.store(h_ptr + t_T[:, None] * J + column_R[None, :], round_to(h_TR, h_ptr.dtype.element_ty))


@triton.jit
def _load_b(
    b_ptr,
    groups_ptr,
    num_columns,
    start,
    o_O,
    end,
    b_stride_e,
    b_stride_o,
    b_stride_r,
    R,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """BLOCK_C columns of the groups' B side by side, from column `start` on: [BLOCK_O, BLOCK_C]."""
    c_C = start + tl.arange(0, BLOCK_C)
    r_C = c_C % BLOCK_J
    exists_C = (c_C < num_columns) & (r_C < R)
    e_C = tl.load(groups_ptr + c_C // BLOCK_J, mask=c_C < num_columns, other=0)
    offset_C = e_C.to(tl.int64) * b_stride_e + r_C * b_stride_r
    if ALIGNED:
        offset_C = tl.max_contiguous(tl.multiple_of(offset_C, 8), 8)
    return tl.load(
        b_ptr + o_O[:, None].to(tl.int64) * b_stride_o + offset_C[None, :],
        mask=(o_O < end)[:, None] & exists_C[None, :],
        other=0.0,
    )


@triton.jit
def _load_h(h_ptr, t_T, first, start, num_columns, J, BLOCK_C: tl.constexpr):
    c_C = start + tl.arange(0, BLOCK_C)
    return tl.load(h_ptr + t_T[:, None] * J + first + c_C[None, :], mask=(c_C < num_columns)[None, :], other=0.0)


@triton.jit
def _accumulate(acc, x_TI, w_OI, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        acc = dot(w_OI, x_TI.T, acc)
    else:
        acc = dot(x_TI, w_OI.T, acc)
    return acc


@triton.jit
def _linear_fwd_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    b_ptr,
    h_ptr,
    groups_ptr,
    num_groups_ptr,
    y_ptr,
    x_stride_t,
    x_stride_i,
    w_stride_o,
    w_stride_i,
    b_stride_e,
    b_stride_o,
    b_stride_r,
    y_stride_t,
    T,
    I,
    R,
    J,
    MAX_GROUPS,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,  # 1 without adapters, or enough for tensor cores
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the accumulator is [O, T]: then 64 rows of W feed Hopper's wide products
    EVEN_I: tl.constexpr,
    EVEN_O: tl.constexpr,
    ALIGNED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Without adapters b_ptr and all that belongs to them is None."""
    sibling, first, end = find_rows(tl.program_id(0), WIDTHS, BLOCK_O)
    t_T = tl.arange(0, BLOCK_T)
    o_O = first + tl.arange(0, BLOCK_O)
    w_ptr_O = w_ptr + o_O.to(tl.int64) * w_stride_o
    if b_ptr is not None:
        if OVERLAP:
            let_next_start()
        num_columns = tl.load(num_groups_ptr) * BLOCK_J
        # The first columns of B wait in registers: of what follows the base weight, only h is not there yet.
        b_OC = _load_b(
            b_ptr,
            groups_ptr,
            num_columns,
            0,
            o_O,
            end,
            b_stride_e,
            b_stride_o,
            b_stride_r,
            R,
            BLOCK_C,
            BLOCK_J,
            ALIGNED,
        )
    elif OVERLAP:
        wait_for_previous()
        let_next_start()

    if BLOCK_T == 1:
        acc_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    else:
        acc = tl.zeros((BLOCK_O, BLOCK_T) if TRANSPOSED else (BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, I, BLOCK_I):
        i_I = start + tl.arange(0, BLOCK_I)
        w_OI_ptr = w_ptr_O[:, None] + i_I[None, :] * w_stride_i
        x_TI_ptr = x_ptr + t_T[:, None].to(tl.int64) * x_stride_t + i_I[None, :] * x_stride_i
        if EVEN_I:
            x_TI = tl.load(x_TI_ptr, mask=(t_T < T)[:, None], other=0.0)
        else:
            x_TI = tl.load(x_TI_ptr, mask=(t_T < T)[:, None] & (i_I < I)[None, :], other=0.0)
        if EVEN_I and EVEN_O:
            w_OI = tl.load(w_OI_ptr, eviction_policy="evict_first")
        else:
            w_OI = tl.load(w_OI_ptr, mask=(o_O < end)[:, None] & (i_I < I)[None, :], other=0.0)
        if BLOCK_T == 1:
            acc_OI += w_OI.to(tl.float32) * x_TI.to(tl.float32)
        else:
            acc = _accumulate(acc, x_TI, w_OI, TRANSPOSED)
    if BLOCK_T == 1:
        acc = tl.sum(acc_OI, 1)

    if b_ptr is not None:
        if OVERLAP:
            wait_for_previous()
        h_ptr += sibling * MAX_GROUPS * BLOCK_J
        acc = _accumulate(acc, _load_h(h_ptr, t_T, 0, 0, num_columns, J, BLOCK_C), b_OC, TRANSPOSED)
        for start in tl.range(BLOCK_C, num_columns, BLOCK_C, num_stages=2):
            h_TC = _load_h(h_ptr, t_T, 0, start, num_columns, J, BLOCK_C)
            b_OC = _load_b(
                b_ptr,
                groups_ptr,
                num_columns,
                start,
                o_O,
                end,
                b_stride_e,
                b_stride_o,
                b_stride_r,
                R,
                BLOCK_C,
                BLOCK_J,
                ALIGNED,
            )
            acc = _accumulate(acc, h_TC, b_OC, TRANSPOSED)

    if bias_ptr is not None:
        bias_O = tl.load(bias_ptr + o_O, mask=o_O < end, other=0.0).to(tl.float32)
        acc += bias_O[:, None] if TRANSPOSED else bias_O
    if BLOCK_T == 1:
        tl.store(y_ptr + o_O, round_to(acc, y_ptr.dtype.element_ty), mask=o_O < end)
    else:
        if TRANSPOSED:
            y_ptr += t_T[None, :].to(tl.int64) * y_stride_t + o_O[:, None]
            mask = (t_T < T)[None, :] & (o_O < end)[:, None]
        else:
            y_ptr += t_T[:, None].to(tl.int64) * y_stride_t + o_O[None, :]
            mask = (t_T < T)[:, None] & (o_O < end)[None, :]
        tl.store(y_ptr, round_to(acc, y_ptr.dtype.element_ty), mask=mask)


class Adapters(NamedTuple):
    """What the second launch reads of adapters; `num_groups` of the groups are there."""

    b_EOR: Tensor
    h_TJ: Tensor
    groups: Tensor
    num_groups: Tensor


def suits(x_TI: Tensor, w_OI: Tensor) -> bool:
    """Whether the tokens are few, and rows are read 16 bytes at a time."""
    return (
        0 < len(x_TI) <= MAX_TOKENS
        and x_TI.element_size() == 2
        and all(of.stride(1) == 1 and of.stride(0) % 8 == 0 for of in (x_TI, w_OI))
    )


def decode(
    x_TI: Tensor,
    w_OI: Tensor,
    bias_O: Tensor | None,
    a_GERI: Tensor,
    b_EOR: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    groups: Tensor,
    num_groups: Tensor,
    widths: tuple[int, ...],
) -> Tensor:
    """`routed_linears` for 1 to MAX_TOKENS tokens; [T, O]. `groups` are the present adapters, `num_groups` how many."""
    (T, I), (G, _, R, _), K = x_TI.shape, a_GERI.shape, ids_TK.shape[1]
    device, max_groups = x_TI.device, groups.shape[0]
    block_t, block_j = power_of_two(T), power_of_two(R)
    block_r = min(block_j, 64)
    num_columns = G * max_groups * block_j
    h_TJ = torch.empty(block_t, num_columns, dtype=x_TI.dtype, device=device)
    shrink_i = power_of_two(I, at_most=256 if block_t * block_r < 4096 else 128)
    _shrink_fwd_kernel[max_groups, G * (block_j // block_r)](
        x_TI,
        a_GERI,
        scaling_EG,
        gates_TK,
        ids_TK,
        groups,
        num_groups,
        h_TJ,
        *x_TI.stride(),
        *a_GERI.stride(),
        T,
        I,
        R,
        num_columns,
        G=G,
        K=K,
        BLOCK_T=block_t,
        BLOCK_J=block_j,
        BLOCK_R=block_r,
        BLOCK_I=shrink_i,
        EVEN_I=I % shrink_i == 0,
        num_warps=4,
        num_stages=4,
        **overlapping(device),
    )
    return _linear(x_TI, w_OI, bias_O, widths, Adapters(b_EOR, h_TJ, groups, num_groups))


def base(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """What `decode` gives without adapters, for 1 to MAX_TOKENS tokens; [T, O]."""
    return _linear(x_TI, w_OI, bias_O, (len(w_OI),))


def _linear(
    x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None, widths: tuple[int, ...], adapters: Adapters | None = None
) -> Tensor:
    (T, I), O = x_TI.shape, w_OI.shape[0]
    b_strides: tuple[int, ...] = (0, 0, 0)
    R, J, max_groups, is_aligned = 0, 0, 0, False
    if adapters is not None:
        b_EOR, h_TJ, groups, _ = adapters
        b_strides, R, J, max_groups = b_EOR.stride(), b_EOR.shape[2], h_TJ.shape[1], len(groups)
        is_aligned = R % 8 == 0 and b_EOR.stride(2) == 1 and b_EOR.stride(0) % 8 == 0
    block_j = power_of_two(R)
    tiles = _choose_tiles(T, block_j, max_groups, O, I, x_TI.device)
    y_TO = torch.empty(T, O, dtype=x_TI.dtype, device=x_TI.device)
    _linear_fwd_kernel[(count_row_tiles(widths, tiles["BLOCK_O"]),)](
        x_TI,
        w_OI,
        bias_O,
        *(adapters or (None, None, None, None)),
        y_TO,
        *x_TI.stride(),
        *w_OI.stride(),
        *b_strides,
        O,
        T,
        I,
        R,
        J,
        max_groups,
        WIDTHS=widths,
        BLOCK_J=block_j,
        EVEN_I=I % tiles["BLOCK_I"] == 0,
        EVEN_O=all(width % tiles["BLOCK_O"] == 0 for width in widths),
        ALIGNED=is_aligned,
        **tiles,
        **overlapping(x_TI.device),
    )
    return y_TO


def _choose_tiles(
    num_tokens: int, block_j: int, max_groups: int, O: int, I: int, device: torch.device
) -> dict[str, Any]:
    """Tiles of the base weight, from sweeps, with adapters on an H200 and without on an H100: enough programs to occupy
    the GPU, and in each of them enough bytes of W under way to keep memory busy."""
    is_alone = num_tokens == 1 and max_groups == 0
    block_t, block_c, num_warps = 1 if is_alone else power_of_two(num_tokens), 128, 4
    if INTERPRETED:
        block_o, block_i, num_stages = 32, power_of_two(I, at_most=64), 1
    elif is_alone:
        block_o, block_i, num_stages, num_warps = 2, power_of_two(I, at_most=2048), 2, 8
    else:
        num_sms, smem = _describe(device)
        if 24 * num_sms > O:  # too narrow for 64 rows each
            block_o, block_i, depth = 32, 128, 5
            if block_j > 16:
                block_c = 256
            elif block_t <= 16:
                block_o, block_i, depth = 16, 128, 6
            elif block_t == 32:
                block_o, block_i, depth = 32, 256, 4
        elif 64 * num_sms > O:  # one program an SM: a deep pipeline
            block_o, block_i, depth = 64, 128, 6
            block_c = 256 if block_j > 16 else 128
        elif max_groups == 0 and block_t >= 32:  # x is read by fewer programs
            block_o, block_i, depth, num_warps = 128, 128, 3, 8
        elif block_t < 64:  # two programs an SM
            block_o, block_i, depth = 64, 128, 4
        else:
            block_o, block_i, depth = 128, 64, 6
        block_i = power_of_two(I, at_most=block_i)
        rest = 2 * (block_o + block_t) * max(block_j, 128)  # the columns of B and h
        num_stages = max(2, min(depth, (smem - rest) // (2 * (block_o + block_t) * block_i)))
    return {
        "BLOCK_T": block_t,
        "BLOCK_O": block_o,
        "BLOCK_I": block_i,
        "BLOCK_C": power_of_two(max_groups * block_j, at_most=block_c),
        "TRANSPOSED": not INTERPRETED and block_o >= 64,
        "num_stages": num_stages,
        "num_warps": num_warps,
    }


def _describe(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", _SMEM_WITHOUT_OPT_IN)
