"""Many tokens, few columns of adapters, on Hopper: one persistent GEMM whose inner dimension goes on into the adapters.

    y = [x | H] [W | B_all]^T,    H = (x A_all^T) masked by route, times gate and scaling,    J = E * R columns

The adapters' share stays in the accumulator: y is written once and never read. H is computed by the same launch, in
items of its own that stand first in the list of work, so that they fill the part of the last round of tiles that would
be idle; a tile reads H only after its whole pass over x, by when H has long been there. A counter for each block of
tokens says so. Columns that no token of a block selected are skipped on both sides, so a block without adapters pays
nothing and a block of one adapter pays for one.

A program is one warp that loads tiles by the bulk tensor copy engine and two groups of four warps that multiply them,
each half of a tile. Every element is written once and the order of each sum is fixed: results are deterministic.

It waits for H that other programs compute, so the first programs must be running: true of a GPU that starts programs in
order, unless two such kernels compete from streams of different priority.

Legend: T tokens, K top-k, P = T * K, E adapters, G sibling linears, R rank, J = E * R, C = G * J, I in-features, O
out-features of all siblings.
"""
# ruff: noqa: E741 (I and O are the legend's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels.arithmetic import INTERPRETED, let_next_start, power_of_two, wait_for_previous
from molora_kernels.hopper_gemm import BLOCK_I, Operands, Routing, launch
from molora_kernels.sorting import sort_and_shrink, spread_
from molora_kernels.tiles import choose_backward_tiles, choose_tiles


@triton.jit
def _prepare_kernel(
    b_ptr,
    b_all_ptr,
    counters_ptr,
    num_counters,
    b_stride_e,
    b_stride_o,
    b_stride_r,
    b_all_stride_o,
    O,
    R,
    J,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Zero the counters and, where B is not stored by rows of O, lay it out so."""
    wait_for_previous()  # only then let the GEMM start: whatever earlier kernels wrote is there for it to read
    let_next_start()
    program = tl.program_id(0)
    if program == 0:
        for start in range(0, num_counters, 256):
            i = start + tl.arange(0, 256)
            tl.store(counters_ptr + i, tl.zeros((256,), tl.int32), mask=i < num_counters)
    if COPY:
        o_O = (program * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
        for start in range(0, J, BLOCK_J):
            j_J = start + tl.arange(0, BLOCK_J)
            offset_J = (j_J // R).to(tl.int64) * b_stride_e + (j_J % R) * b_stride_r
            if ALIGNED:
                offset_J = tl.max_contiguous(tl.multiple_of(offset_J, 8), 8)
            mask = (o_O < O)[:, None] & (j_J < J)[None, :]
            b_OJ = tl.load(b_ptr + o_O[:, None] * b_stride_o + offset_J[None, :], mask=mask, other=0.0)
            tl.store(b_all_ptr + o_O[:, None] * b_all_stride_o + j_J[None, :], b_OJ, mask=mask)


@triton.jit
def _gates_bwd_kernel(
    u_ptr,
    v_ptr,
    scaling_ptr,
    ids_ptr,
    dgates_ptr,
    u_stride_t,
    v_stride_t,
    P,
    R,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Each pair of a token and a slot: u . v over the ranks of its adapter, scaled."""
    p_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    id_P = tl.load(ids_ptr + p_P, mask=p_P < P, other=-1)
    row_P = (p_P // K).to(tl.int64)
    sum_P = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, R, BLOCK_R):
        r_R = start + tl.arange(0, BLOCK_R)
        mask = (id_P >= 0)[:, None] & (r_R < R)[None, :]
        column_PR = id_P[:, None] * R + r_R[None, :]
        u_PR = tl.load(u_ptr + row_P[:, None] * u_stride_t + column_PR, mask=mask, other=0.0).to(tl.float32)
        v_PR = tl.load(v_ptr + row_P[:, None] * v_stride_t + column_PR, mask=mask, other=0.0).to(tl.float32)
        sum_P += tl.sum(u_PR * v_PR, axis=1)
    scaling_P = tl.load(scaling_ptr + id_P, mask=id_P >= 0, other=0.0)
    tl.store(dgates_ptr + p_P, sum_P * scaling_P, mask=p_P < P)


def runs_on(device: torch.device) -> bool:
    """True on Hopper: wgmma and its shared-memory layouts are that generation's own. The interpreter has no Gluon."""
    return (
        not INTERPRETED.value
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] == 9
    )


def suits(x_TI: Tensor, w_OI: Tensor, a_GERI: Tensor, widths: tuple[int, ...]) -> bool:
    """Whether the copy engine can address the operands: 16-bit, contiguous rows of whole 16 bytes; and Hopper."""
    return (
        runs_on(x_TI.device)
        and x_TI.dtype in (torch.float16, torch.bfloat16)
        and choose_tiles(1, widths, 1, x_TI.device) is not None
        and sum(widths) % 8 == 0
        and a_GERI.is_contiguous()
        and all(_is_addressable(matrix) for matrix in (x_TI, w_OI, a_GERI.flatten(0, 2)))
    )


def _is_addressable(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0


def fused(
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
    spans: Tensor,
    widths: tuple[int, ...],
    *,
    sort: bool = False,
    keep_h: bool = False,
    keep_u: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`routed_linears` where `suits` holds, and its hidden ranks.

    As the tokens come, its price grows with the adapters that meet in a block of tokens, up to E * R columns. With
    `sort` it works on a copy of x in the plan's order, in which few meet, and scatters the rows of y: for many columns,
    and one adapter a token.

    Returns y [T, O]; H, with `keep_h` whole as [T, E * R], else written only where tiles read it; and with `keep_u`
    x A_all^T [T, E * R], written at least where H is not zero.
    """
    T, O, (G, E, R, _), K = x_TI.shape[0], w_OI.shape[0], a_GERI.shape, ids_TK.shape[1]
    J = E * R
    tiles = choose_tiles(T, widths, 0 if sort else G * J, x_TI.device)  # of sorted tokens, H is there before
    assert tiles is not None  # suits() held
    counters = torch.empty(triton.cdiv(T, tiles.block_t), dtype=torch.int32, device=x_TI.device)
    h_TC = _zeros(T, G * J, x_TI) if keep_h else _empty_matrix(_whole_blocks(T), G * J, x_TI)
    u_TC = _empty_matrix(T, G * J, x_TI) if keep_u else None
    y_TO = torch.empty(T, O, dtype=x_TI.dtype, device=x_TI.device)
    if sort:
        assert K == 1
        x_TI, spans, partials = sort_and_shrink(x_TI, a_GERI, ids_TK, order_T, offsets)
    by_adapter = b_EOR.is_contiguous() and R % BLOCK_I == 0 and _is_addressable(b_EOR.flatten(0, 1))
    b_rows, copies = (b_EOR.flatten(0, 1), False) if by_adapter else _lay_by_rows(b_EOR)
    if copies or not sort:
        _prepare(b_EOR, b_rows, counters, copies)
    if sort:
        spread_(h_TC, partials, scaling_EG, gates_TK, ids_TK, order_T, spans)
    bounds = tuple(sum(widths[:g]) for g in range(1, len(widths)))
    operands = Operands(x_TI, w_OI, bias_O, a_GERI.flatten(0, 2), h_TC, u_TC, b_rows, y_TO)
    routing = Routing(scaling_EG, gates_TK, ids_TK, spans, counters, order_T)
    launch(tiles, operands, routing, (G, E, R), bounds, sort=sort, by_adapter=by_adapter)
    return y_TO, h_TC, u_TC


def fused_backward(
    dy_TO: Tensor,
    w_OI: Tensor,
    a_ERI: Tensor,
    b_EOR: Tensor,
    scaling_E1: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    order_T: Tensor,
    spans: Tensor,
    u_TJ: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients to x [T, I], to x A_all^T [T, E * R] and, given U, the gates: the forward's product the other way.

    dx = [dy | G] [W ; A_all],    G = V masked by route, times gate and scaling,    V = dy B_all
    dgates[t, k] = scaling[e] * sum_r U[t, e, r] * V[t, e, r],    e = ids[t, k],    U = x A_all^T
    """
    (T, _), (E, R, I) = dy_TO.shape, a_ERI.shape
    tiles = choose_backward_tiles(T, I, E * R, dy_TO.device)
    counters = torch.empty(triton.cdiv(T, tiles.block_t), dtype=torch.int32, device=dy_TO.device)
    g_TJ = _zeros(T, E * R, dy_TO)
    v_TJ = None if u_TJ is None else _empty_matrix(T, E * R, dy_TO)
    dx_TI = torch.empty(T, I, dtype=dy_TO.dtype, device=dy_TO.device)
    b_OJ, copies = _lay_by_rows(b_EOR)
    _prepare(b_EOR, b_OJ, counters, copies)
    operands = Operands(dy_TO, w_OI, None, b_OJ, g_TJ, v_TJ, a_ERI.flatten(0, 1), dx_TI)
    routing = Routing(scaling_E1, gates_TK, ids_TK, spans, counters, order_T)
    launch(tiles, operands, routing, (1, E, R), (), transposed=True)
    dgates_TK = None
    if u_TJ is not None and v_TJ is not None:
        dgates_TK = _gates_bwd(u_TJ, v_TJ, scaling_E1, ids_TK, R)
    return dx_TI, g_TJ, dgates_TK


def _gates_bwd(u_TJ: Tensor, v_TJ: Tensor, scaling_E1: Tensor, ids_TK: Tensor, R: int) -> Tensor:
    """Semantics: dgates[t, k] = scaling[e] * (u[t, e] . v[t, e]), e = ids[t, k]; 0 where the id is -1."""
    T, K = ids_TK.shape
    dgates_TK = torch.empty(T, K, dtype=torch.float32, device=ids_TK.device)
    _gates_bwd_kernel[triton.cdiv(T * K, 32),](
        u_TJ,
        v_TJ,
        scaling_E1,
        ids_TK,
        dgates_TK,
        u_TJ.stride(0),
        v_TJ.stride(0),
        T * K,
        R,
        K=K,
        BLOCK_P=32,
        BLOCK_R=power_of_two(R, at_most=64),
    )
    return dgates_TK


def _lay_by_rows(b_EOR: Tensor) -> tuple[Tensor, bool]:
    """B as [O, E * R], and whether it has yet to be copied there: a bank that stores it so needs no copy."""
    (E, O, R), b_OER = b_EOR.shape, b_EOR.transpose(0, 1)
    if b_OER.is_contiguous() and _is_addressable(b_OER.flatten(1)):
        return b_OER.flatten(1), False
    return _empty_matrix(O, E * R, b_EOR), True


def _prepare(b_EOR: Tensor, b_OJ: Tensor, counters: Tensor, copies: bool) -> None:
    E, O, R = b_EOR.shape
    _prepare_kernel[triton.cdiv(O, 32) if copies else 1,](
        b_EOR,
        b_OJ,
        counters,
        len(counters),
        *b_EOR.stride(),
        b_OJ.stride(0),
        O,
        R,
        E * R,
        COPY=copies,
        ALIGNED=R % 8 == 0 and b_EOR.stride(2) == 1 and b_EOR.stride(0) % 8 == 0,
        BLOCK_O=32,
        BLOCK_J=128,
        launch_pdl=True,
    )


def _empty_matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    """Unwritten, its rows padded to whole 16 bytes."""
    return torch.empty(rows, triton.cdiv(columns, 8) * 8, dtype=like.dtype, device=like.device)[:, :columns]


def _zeros(rows: int, columns: int, like: Tensor) -> Tensor:
    """Likewise for what is summed over all tokens: zero where no tile reads and so none writes."""
    return _empty_matrix(rows, columns, like).zero_()


def _whole_blocks(num_tokens: int) -> int:
    """Rows enough for tiles that are not full: `hopper_gemm._copy_pair` says why."""
    return int(triton.cdiv(num_tokens, 128) * 128)
