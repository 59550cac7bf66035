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

Legend: T tokens, K top-k, E adapters, G sibling linears, R rank, J = E * R, I in-features, O out-features of all
siblings.
"""
# ruff: noqa: E741 (I and O are the legend's)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from molora_kernels.arithmetic import power_of_two
from molora_kernels.grouped import block_of_tokens, find_tile, max_tiles
from molora_kernels.plan_tables import BLOCK_T as SPAN

# Gluon gave these three other names between Triton 3.6 and 3.9.
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

_SPAN = gl.constexpr(SPAN)  # tokens that one entry of the plan's spans covers
_BLOCK_I = 64  # 128 bytes: the widest row that the copy engine swizzles


@dataclass(frozen=True)
class Tiles:
    """How y is cut: block_t tokens by block_o rows of W, in a pipeline of num_stages blocks of 64 in-features.

    H is cut into items of h_tokens by block_j columns. cost_us is the time of a tile and its epilogue at 4096
    in-features, on an H200 (kernels/results): below 256 rows the bytes from the L2 cache bound it, not arithmetic.
    """

    block_t: int
    block_o: int
    num_stages: int
    num_registers: int
    cost_us: float

    @property
    def block_j(self) -> int:
        return min(self.block_o, 128)

    @property
    def h_tokens(self) -> int:
        return 256 if self.block_o == 256 else self.block_t

    def count_items(self, num_tokens: int, num_columns: int) -> int:
        return triton.cdiv(num_tokens, self.h_tokens) * triton.cdiv(num_columns, self.block_j)

    def count_tiles(self, num_tokens: int, out_features: int) -> int:
        return triton.cdiv(num_tokens, self.block_t) * triton.cdiv(out_features, self.block_o)


_TILES = (
    Tiles(128, 256, 4, 168, 44.0),
    Tiles(128, 128, 5, 168, 22.5),
    Tiles(128, 64, 8, 104, 16.0),
    Tiles(64, 64, 11, 80, 11.5),
)


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
    gdc_wait()  # only then let the GEMM start: whatever earlier kernels wrote is there for it to read
    gdc_launch_dependents()
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
def _sort_kernel(
    x_ptr,
    ids_ptr,
    order_ptr,
    sorted_x_ptr,
    spans_ptr,
    x_stride_t,
    T,
    E,
    I,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Copy x in the plan's order, and note the lowest and the highest id of each span of that order."""
    gdc_launch_dependents()
    span = tl.program_id(0)
    i_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    for start in range(span * SPAN, span * SPAN + SPAN, BLOCK_T):
        place_T = start + tl.arange(0, BLOCK_T)
        token_T = tl.load(order_ptr + place_T, mask=place_T < T, other=0).to(tl.int64)
        mask = (place_T < T)[:, None] & (i_I < I)[None, :]
        x_TI = tl.load(x_ptr + token_T[:, None] * x_stride_t + i_I[None, :], mask=mask, other=0.0)
        tl.store(sorted_x_ptr + place_T[:, None].to(tl.int64) * I + i_I[None, :], x_TI, mask=mask)
    if tl.program_id(1) == 0:
        place_S = span * SPAN + tl.arange(0, SPAN)
        token_S = tl.load(order_ptr + place_S, mask=place_S < T, other=0)
        id_S = tl.load(ids_ptr + token_S, mask=place_S < T, other=-1)
        tl.store(spans_ptr + 2 * span, tl.min(tl.where(id_S < 0, E, id_S)))
        tl.store(spans_ptr + 2 * span + 1, tl.max(id_S))


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptr,
    order_ptr,
    offsets_ptr,
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
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Partial sums of each token's hidden ranks, over a part of I, in the plan's order.

    It reads nothing that the kernel before it writes, so it may run beside it; it only ends after it.
    """
    gdc_launch_dependents()
    split = tl.program_id(1)
    num_blocks = tl.cdiv(R, BLOCK_R)
    sibling = tl.program_id(2) // num_blocks
    r_R = tl.program_id(2) % num_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    adapter, place, end = find_tile(tl.program_id(0), offsets_ptr, E, BLOCK_T, BLOCK_E)
    if place < end:
        place_T = place + tl.arange(0, BLOCK_T)
        token_T = tl.load(order_ptr + place_T, mask=place_T < end, other=0).to(tl.int64)
        a_ptr += sibling.to(tl.int64) * a_stride_g + adapter.to(tl.int64) * a_stride_e
        acc_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for start in range(split * per_split, tl.minimum(split * per_split + per_split, I), BLOCK_I):
            i_I = start + tl.arange(0, BLOCK_I)
            x_TI = tl.load(
                x_ptr + token_T[:, None] * x_stride_t + i_I[None, :],
                mask=(place_T < end)[:, None] & (i_I < I)[None, :],
                other=0.0,
            )
            a_IR = tl.load(
                a_ptr + r_R[None, :] * a_stride_r + i_I[:, None], mask=(r_R < R)[None, :] & (i_I < I)[:, None], other=0.0
            )
            acc_TR = tl.dot(x_TI, a_IR, acc_TR)
        row_T = (split * T + place_T).to(tl.int64) * (G * R) + sibling * R
        tl.store(
            partial_ptr + row_T[:, None] + r_R[None, :], acc_TR, mask=(place_T < end)[:, None] & (r_R < R)[None, :]
        )
    gdc_wait()


@triton.jit
def _spread_kernel(
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
    gdc_wait()
    gdc_launch_dependents()
    span = tl.program_id(0) * BLOCK_T // SPAN
    first = tl.load(spans_ptr + 2 * span) * R // BLOCK_J
    end = tl.cdiv(tl.minimum((tl.load(spans_ptr + 2 * span + 1) + 1) * R, J), BLOCK_J)
    sibling = tl.program_id(1)
    place_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_T = tl.load(order_ptr + place_T, mask=place_T < T, other=0)
    id_T = tl.load(ids_ptr + token_T, mask=place_T < T, other=-1)
    gate_T = tl.load(gates_ptr + token_T, mask=id_T >= 0, other=0.0)
    gate_T *= tl.load(scaling_ptr + id_T * G + sibling, mask=id_T >= 0, other=0.0)
    for block in range(first, end):
        j_J = block * BLOCK_J + tl.arange(0, BLOCK_J)
        mine_TJ = id_T[:, None] == (j_J // R)[None, :]
        sum_TJ = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
        for split in tl.static_range(SPLITS):
            row_T = (split * T + place_T).to(tl.int64) * (G * R) + sibling * R
            sum_TJ += tl.load(partial_ptr + row_T[:, None] + (j_J % R)[None, :], mask=mine_TJ, other=0.0)
        h_TJ = tl.where(mine_TJ, sum_TJ * gate_T[:, None], 0.0)
        tl.store(
            h_ptr + place_T[:, None].to(tl.int64) * h_stride_t + (sibling * J + j_J)[None, :],
            h_TJ.to(h_ptr.dtype.element_ty),
            mask=(place_T < T)[:, None] & (j_J < J)[None, :],
        )


@gluon.jit
def _instruct(asm: gl.constexpr):
    gl.inline_asm_elementwise(asm + "; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _tile_of(tile, num_m, num_n, GROUP: gl.constexpr):
    """Tiles in bands of GROUP blocks of tokens, so that those under way together share x and W in the cache."""
    band = tile // (GROUP * num_n)
    height = min(num_m - band * GROUP, GROUP)
    place = tile % (GROUP * num_n)
    return band * GROUP + place % height, place // height


@gluon.jit
def _steps_of(spans_ptr, token, R, J, BLOCK_I: gl.constexpr):
    """The steps of BLOCK_I columns of H, first and end, that hold the adapters of a block of tokens."""
    lowest = gl.load(spans_ptr + 2 * (token // _SPAN))
    highest = gl.load(spans_ptr + 2 * (token // _SPAN) + 1)
    end = gl.cdiv(min((highest + 1) * R, J), BLOCK_I)
    return lowest * R // BLOCK_I, gl.where(highest < 0, 0, end)


@gluon.jit
def _is_needed(
    spans_ptr, token, T, chunk, G, R, J, H_TOKENS: gl.constexpr, BLOCK_J: gl.constexpr, BLOCK_I: gl.constexpr
):
    """Whether some tile reads this item of H."""
    needed = False
    for offset in gl.static_range(0, H_TOKENS, _SPAN if H_TOKENS > _SPAN else H_TOKENS):
        first, end = _steps_of(spans_ptr, min(token + offset, T - 1), R, J, BLOCK_I)
        for g in range(0, G):
            reads = (g * J + first * BLOCK_I < (chunk + 1) * BLOCK_J) & (g * J + end * BLOCK_I > chunk * BLOCK_J)
            needed = needed | (reads & (end > first))
    return needed


@gluon.jit
def _copy_pair(left_desc, right_desc, left, right, left_buffer, right_buffer, step, ready, empty):
    """Load one step of both operands into the next place of the ring, once it is empty."""
    STAGES: gl.constexpr = ready.shape[0]
    stage = step % STAGES
    barrier = ready.index(stage)
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(barrier, left_desc.block_type.nbytes + right_desc.block_type.nbytes)
    _copy_in(left_desc, left, barrier, left_buffer.index(stage))
    _copy_in(right_desc, right, barrier, right_buffer.index(stage))
    return step + 1


@gluon.jit
def _load(
    descriptors,
    tables,
    x_ring,
    w_ring,
    ready,
    empty,
    sizes,
    BOUNDS: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_O: gl.constexpr,
    BLOCK_I: gl.constexpr,
    BLOCK_J: gl.constexpr,
    H_TOKENS: gl.constexpr,
    GROUP: gl.constexpr,
    SORTED: gl.constexpr,
    BY_ADAPTER: gl.constexpr,
):
    """The warp that loads: for each item of H the tokens and A, for each tile of y the tokens and W, then H and B."""
    x_desc, tokens_desc, w_desc, a_desc, h_desc, b_desc = descriptors
    ids_ptr, spans_ptr, counters_ptr, order_ptr = tables
    T, O, I, G, E, R = sizes
    J = E * R
    num_m, num_n, num_chunks = gl.cdiv(T, BLOCK_T), gl.cdiv(O, BLOCK_O), gl.cdiv(G * J, BLOCK_J)
    num_items = 0 if SORTED else gl.cdiv(T, H_TOKENS) * num_chunks  # of sorted tokens, H is there
    step = 0
    for work in range(gl.program_id(0), num_items + num_m * num_n, gl.num_programs(0)):
        if work < num_items:
            token = work // num_chunks * H_TOKENS
            chunk = work % num_chunks
            if _is_needed(spans_ptr, token, T, chunk, G, R, J, H_TOKENS, BLOCK_J, BLOCK_I):
                for i in range(0, I, BLOCK_I):
                    if H_TOKENS > BLOCK_T:  # the larger buffers hold the tokens
                        step = _copy_pair(
                            tokens_desc, a_desc, [token, i], [chunk * BLOCK_J, i], w_ring, x_ring, step, ready, empty
                        )
                    else:
                        step = _copy_pair(
                            x_desc, a_desc, [token, i], [chunk * BLOCK_J, i], x_ring, w_ring, step, ready, empty
                        )
        else:
            m, n = _tile_of(work - num_items, num_m, num_n, GROUP)
            for i in range(0, I, BLOCK_I):
                step = _copy_pair(
                    x_desc, w_desc, [m * BLOCK_T, i], [n * BLOCK_O, i], x_ring, w_ring, step, ready, empty
                )
            first, end = _steps_of(spans_ptr, m * BLOCK_T, R, J, BLOCK_I)
            if end > first:
                sibling = 0
                for bound in gl.static_range(len(BOUNDS)):
                    sibling += gl.where(n * BLOCK_O >= BOUNDS[bound], 1, 0)
                _instruct("griddepcontrol.wait")  # for the counters to be zeroed and B to be laid out, or for H
                if not SORTED:
                    while gl.atomic_add(counters_ptr + m, 0, sem="acquire", scope="gpu") < 2 * num_chunks:
                        pass
                    _instruct("fence.proxy.async")  # H was seen by this thread: now by the copy engine
                for j in range(first * BLOCK_I, end * BLOCK_I, BLOCK_I):
                    b_row = n * BLOCK_O
                    b_column = j
                    if BY_ADAPTER:
                        b_row += j // R * O
                        b_column = j % R
                    step = _copy_pair(
                        h_desc,
                        b_desc,
                        [m * BLOCK_T, sibling * J + j],
                        [b_row, b_column],
                        x_ring,
                        w_ring,
                        step,
                        ready,
                        empty,
                    )


@gluon.jit
def _release(empty, step, pred):
    """The place used one step ago may be overwritten: its product has been waited for."""
    STAGES: gl.constexpr = empty.shape[0]
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=pred)


@gluon.jit
def _multiply(
    step,
    num_steps,
    left_ring,
    right_ring,
    ready,
    empty,
    ROW: gl.constexpr,
    COLUMN: gl.constexpr,
    N: gl.constexpr,
    layout: gl.constexpr,
):
    """64 rows from ROW on, times N columns from COLUMN on, over the next num_steps steps of the ring."""
    STAGES: gl.constexpr = ready.shape[0]
    acc = gl.zeros([64, N], gl.float32, layout)
    for k in range(0, num_steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        right = right_ring.index(stage).slice(COLUMN, N).permute([1, 0])
        token = warpgroup_mma(left_ring.index(stage).slice(ROW, 64), right, acc, is_async=True, use_acc=k > 0)
        acc = warpgroup_mma_wait(1, [token])
        _release(empty, step, k > 0)
        step += 1
    acc = warpgroup_mma_wait(0, [acc])
    _release(empty, step, True)
    return acc, step


@gluon.jit
def _multiply_twice(
    step,
    num_steps,
    left_ring,
    right_ring,
    ready,
    empty,
    ROW: gl.constexpr,
    N: gl.constexpr,
    layout: gl.constexpr,
):
    """128 rows from ROW on, as two accumulators of 64."""
    STAGES: gl.constexpr = ready.shape[0]
    upper = gl.zeros([64, N], gl.float32, layout)
    lower = gl.zeros([64, N], gl.float32, layout)
    for k in range(0, num_steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        left = left_ring.index(stage)
        right = right_ring.index(stage).slice(0, N).permute([1, 0])
        upper_token = warpgroup_mma(left.slice(ROW, 64), right, upper, is_async=True, use_acc=k > 0)
        lower_token = warpgroup_mma(left.slice(ROW + 64, 64), right, lower, is_async=True, use_acc=k > 0)
        upper, lower = warpgroup_mma_wait(2, [upper_token, lower_token])
        _release(empty, step, k > 0)
        step += 1
    upper, lower = warpgroup_mma_wait(0, [upper, lower])
    _release(empty, step, True)
    return upper, lower, step


@gluon.jit
def _store(desc, value, row, column, buffer):
    """Write a tile through shared memory, by the copy engine and without waiting for it."""
    tma.store_wait(pendings=0)
    buffer.store(value.to(buffer.dtype))
    fence_async_shared()
    _copy_out(desc, [row, column], buffer)


@gluon.jit
def _scatter(y_ptr, order_ptr, value, row, column, T, O, buffer):
    """Write a tile of sorted tokens to their rows of y, through shared memory so that rows are written whole."""
    N: gl.constexpr = value.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [4, 1], [1, 0])
    tma.store_wait(pendings=0)
    buffer.store(value.to(buffer.dtype))
    whole = buffer.load(layout)
    place_T = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    o_N = column + gl.arange(0, N, gl.SliceLayout(0, layout))
    token_T = gl.load(order_ptr + place_T, mask=place_T < T, other=0).to(gl.int64)
    mask = (place_T < T)[:, None] & (o_N < O)[None, :]
    gl.store(y_ptr + token_T[:, None] * O + o_N[None, :], whole, mask=mask)


@gluon.jit
def _store_h(
    desc, acc, row, column, buffer, scaling_ptr, gates_ptr, ids_ptr, sizes, K: gl.constexpr, layout: gl.constexpr
):
    """Keep what each token selected, gated and scaled, and write it: [64, N] of H."""
    T, O, I, G, E, R = sizes
    t_T = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    c_N = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    e_N = (c_N // R) % E
    scaling_N = gl.load(scaling_ptr + e_N * G + c_N // (E * R), mask=c_N < G * E * R, other=0.0)
    gate_TN = gl.zeros(acc.shape, gl.float32, layout)
    selected_TN = gl.zeros(acc.shape, gl.int1, layout)
    for k in gl.static_range(K):
        id_T = gl.load(ids_ptr + t_T * K + k, mask=t_T < T, other=-1)
        gate_T = gl.load(gates_ptr + t_T * K + k, mask=id_T >= 0, other=0.0)
        hit_TN = id_T[:, None] == e_N[None, :]
        gate_TN += gl.where(hit_TN, gate_T[:, None], 0.0)
        selected_TN = selected_TN | hit_TN
    # Not a product with a zero gate: an adapter that overflows must not reach the tokens that did not select it.
    _store(desc, gl.where(selected_TN, acc * gate_TN * scaling_N[None, :], 0.0), row, column, buffer)


@gluon.jit
def _compute(
    y_desc,
    h_desc,
    y_ptr,
    bias_ptr,
    scaling_ptr,
    gates_ptr,
    tables,
    x_ring,
    w_ring,
    buffers,
    ready,
    empty,
    sizes,
    HALF: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_O: gl.constexpr,
    BLOCK_I: gl.constexpr,
    BLOCK_J: gl.constexpr,
    H_TOKENS: gl.constexpr,
    GROUP: gl.constexpr,
    K: gl.constexpr,
    SORTED: gl.constexpr,
):
    """Four of the eight warps that multiply. They halve a tile of 128 tokens by rows, one of 64 by columns."""
    ids_ptr, spans_ptr, counters_ptr, order_ptr = tables
    T, O, I, G, E, R = sizes
    J = E * R
    BY_ROWS: gl.constexpr = BLOCK_T == 128
    ROW: gl.constexpr = HALF * 64 if BY_ROWS else 0
    N: gl.constexpr = BLOCK_O if BY_ROWS else BLOCK_O // 2
    H_N: gl.constexpr = BLOCK_J if BY_ROWS else BLOCK_J // 2
    COLUMN: gl.constexpr = 0 if BY_ROWS else HALF * N
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    h_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, H_N, 16])
    buffer = buffers.index(HALF)
    num_m, num_n, num_chunks = gl.cdiv(T, BLOCK_T), gl.cdiv(O, BLOCK_O), gl.cdiv(G * J, BLOCK_J)
    num_items = 0 if SORTED else gl.cdiv(T, H_TOKENS) * num_chunks  # of sorted tokens, H is there
    num_steps = gl.cdiv(I, BLOCK_I)
    step = 0
    for work in range(gl.program_id(0), num_items + num_m * num_n, gl.num_programs(0)):
        if work < num_items:
            token = work // num_chunks * H_TOKENS
            chunk = work % num_chunks
            if _is_needed(spans_ptr, token, T, chunk, G, R, J, H_TOKENS, BLOCK_J, BLOCK_I):
                column = chunk * BLOCK_J + COLUMN
                if H_TOKENS > BLOCK_T:
                    row = token + HALF * 128
                    upper, lower, step = _multiply_twice(
                        step, num_steps, w_ring, x_ring, ready, empty, HALF * 128, H_N, h_layout
                    )
                    _store_h(
                        h_desc, upper, row, column, buffer, scaling_ptr, gates_ptr, ids_ptr, sizes, K, h_layout
                    )
                    _store_h(
                        h_desc, lower, row + 64, column, buffer, scaling_ptr, gates_ptr, ids_ptr, sizes, K, h_layout
                    )
                else:
                    acc, step = _multiply(
                        step, num_steps, x_ring, w_ring, ready, empty, ROW, COLUMN, H_N, h_layout
                    )
                    _store_h(
                        h_desc, acc, token + ROW, column, buffer, scaling_ptr, gates_ptr, ids_ptr, sizes, K, h_layout
                    )
                _instruct("cp.async.bulk.wait_group 0")  # until the writes are done, not only read from the buffer
                _instruct("fence.proxy.async")
            _instruct("griddepcontrol.wait")  # for the counters to be zeroed
            _barrier()
            if H_TOKENS > BLOCK_T:  # this half wrote a whole block of tokens, the other half the next
                m = token // BLOCK_T + HALF
                if m < num_m:
                    gl.atomic_add(counters_ptr + m, 2, sem="release", scope="gpu")
            else:
                gl.atomic_add(counters_ptr + token // BLOCK_T, 1, sem="release", scope="gpu")
        else:
            m, n = _tile_of(work - num_items, num_m, num_n, GROUP)
            first, end = _steps_of(spans_ptr, m * BLOCK_T, R, J, BLOCK_I)
            acc, step = _multiply(
                step, num_steps + max(end - first, 0), x_ring, w_ring, ready, empty, ROW, COLUMN, N, layout
            )
            row = m * BLOCK_T + ROW
            column = n * BLOCK_O + COLUMN
            if bias_ptr is not None:
                o_N = column + gl.arange(0, N, gl.SliceLayout(0, layout))
                acc += gl.load(bias_ptr + o_N, mask=o_N < O, other=0.0).to(gl.float32)[None, :]
            if N > 128:  # there is room for half of it
                left, right = acc.reshape([64, 2, N // 2]).permute([0, 2, 1]).split()
                if SORTED:
                    _scatter(y_ptr, order_ptr, left, row, column, T, O, buffer)
                    _scatter(y_ptr, order_ptr, right, row, column + N // 2, T, O, buffer)
                else:
                    _store(y_desc, left, row, column, buffer)
                    _store(y_desc, right, row, column + N // 2, buffer)
            elif SORTED:
                _scatter(y_ptr, order_ptr, acc, row, column, T, O, buffer)
            else:
                _store(y_desc, acc, row, column, buffer)
    tma.store_wait(pendings=0)
    _instruct("griddepcontrol.wait")  # whatever follows this kernel also follows the one before it


@gluon.jit
def _fused_fwd_kernel(
    x_desc,
    tokens_desc,
    w_desc,
    a_desc,
    h_desc,
    h_store_desc,
    b_desc,
    y_desc,
    y_ptr,
    bias_ptr,
    scaling_ptr,
    gates_ptr,
    ids_ptr,
    spans_ptr,
    counters_ptr,
    order_ptr,
    T,
    O,
    I,
    G,
    E,
    R,
    BOUNDS: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_O: gl.constexpr,
    BLOCK_I: gl.constexpr,
    BLOCK_J: gl.constexpr,
    H_TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    K: gl.constexpr,
    SORTED: gl.constexpr,
    BY_ADAPTER: gl.constexpr,  # B's rows stand adapter by adapter, else those of one o side by side
    REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    _instruct("griddepcontrol.launch_dependents")
    dtype: gl.constexpr = x_desc.dtype
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_I], x_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_O, BLOCK_I], w_desc.layout)
    buffers = gl.allocate_shared_memory(dtype, [2] + y_desc.block_type.shape, y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    sizes = (T, O, I, G, E, R)
    descriptors = (x_desc, tokens_desc, w_desc, a_desc, h_desc, b_desc)
    tables = (ids_ptr, spans_ptr, counters_ptr, order_ptr)
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    y_desc,
                    h_store_desc,
                    y_ptr,
                    bias_ptr,
                    scaling_ptr,
                    gates_ptr,
                    tables,
                    x_ring,
                    w_ring,
                    buffers,
                    ready,
                    empty,
                    sizes,
                    0,
                    BLOCK_T,
                    BLOCK_O,
                    BLOCK_I,
                    BLOCK_J,
                    H_TOKENS,
                    GROUP,
                    K,
                    SORTED,
                ),
            ),
            (
                _compute,
                (
                    y_desc,
                    h_store_desc,
                    y_ptr,
                    bias_ptr,
                    scaling_ptr,
                    gates_ptr,
                    tables,
                    x_ring,
                    w_ring,
                    buffers,
                    ready,
                    empty,
                    sizes,
                    1,
                    BLOCK_T,
                    BLOCK_O,
                    BLOCK_I,
                    BLOCK_J,
                    H_TOKENS,
                    GROUP,
                    K,
                    SORTED,
                ),
            ),
            (
                _load,
                (
                    descriptors,
                    tables,
                    x_ring,
                    w_ring,
                    ready,
                    empty,
                    sizes,
                    BOUNDS,
                    BLOCK_T,
                    BLOCK_O,
                    BLOCK_I,
                    BLOCK_J,
                    H_TOKENS,
                    GROUP,
                    SORTED,
                    BY_ADAPTER,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def suits(
    x_TI: Tensor, w_OI: Tensor, a_GERI: Tensor, b_EOR: Tensor, widths: tuple[int, ...]
) -> bool:
    """Whether the copy engine can address the operands: 16-bit, contiguous rows of whole 16 bytes; and Hopper."""
    if not x_TI.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(x_TI.device)[0] != 9:
        return False
    return (
        x_TI.dtype in (torch.float16, torch.bfloat16)
        and _choose_tiles(1, widths, 1, x_TI.device) is not None
        and sum(widths) % 8 == 0
        and a_GERI.is_contiguous()
        and all(_is_addressable(matrix) for matrix in (x_TI, w_OI, a_GERI.flatten(0, 2)))
    )


def _is_addressable(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0


def _choose_tiles(num_tokens: int, widths: tuple[int, ...], num_columns: int, device: torch.device) -> Tiles | None:
    """The tiles whose rounds over the GPU take least, of those that no boundary between siblings cuts."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def cost_us(tiles: Tiles) -> float:
        num_items = tiles.count_items(num_tokens, num_columns)
        work = num_items + tiles.count_tiles(num_tokens, sum(widths))
        return triton.cdiv(work, num_sms) * tiles.cost_us

    whole = [tiles for tiles in _TILES if all(width % tiles.block_o == 0 for width in widths[:-1])]
    return min(whole, key=cost_us, default=None)


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
    sort: bool,
) -> Tensor:
    """`routed_linears` where `suits` holds; [T, O].

    As the tokens come, its price grows with the adapters that meet in a block of tokens, up to E * R columns. With
    `sort` it works on a copy of x in the plan's order, in which few meet, and scatters the rows of y: for many columns,
    and one adapter a token.
    """
    (T, I), O, (G, E, R, _), K = x_TI.shape, w_OI.shape[0], a_GERI.shape, ids_TK.shape[1]
    J, dtype, device = E * R, x_TI.dtype, x_TI.device
    num_columns = 0 if sort else G * J  # of H, which sorted tokens have before
    tiles = _choose_tiles(T, widths, num_columns, device)
    assert tiles is not None  # suits() held
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    counters = torch.empty(triton.cdiv(T, tiles.block_t), dtype=torch.int32, device=device)
    h_TC = _empty_matrix(T, G * J, dtype, device)
    y_TO = torch.empty(T, O, dtype=dtype, device=device)
    b_OER, by_adapter, copies = b_EOR.transpose(0, 1), False, False
    if b_OER.is_contiguous() and _is_addressable(b_OER.flatten(1)):
        b_OJ = b_OER.flatten(1)
    elif b_EOR.is_contiguous() and R % _BLOCK_I == 0 and _is_addressable(b_EOR.flatten(0, 1)):
        b_OJ, by_adapter = b_EOR.flatten(0, 1), True
    else:
        b_OJ, copies = _empty_matrix(O, J, dtype, device), True
    if sort:
        assert K == 1
        x_TI, spans, partials = _sort_and_shrink(x_TI, a_GERI, ids_TK, order_T, offsets)
    if copies or not sort:
        _prepare_kernel[triton.cdiv(O, 32) if copies else 1,](
            b_EOR,
            b_OJ,
            counters,
            len(counters),
            *b_EOR.stride(),
            b_OJ.stride(0),
            O,
            R,
            J,
            COPY=copies,
            ALIGNED=R % 8 == 0 and b_EOR.stride(2) == 1 and b_EOR.stride(0) % 8 == 0,
            BLOCK_O=32,
            BLOCK_J=128,
            launch_pdl=True,
        )
    if sort:
        _spread_kernel[triton.cdiv(T, 32), G](
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
            R,
            J,
            SPLITS=len(partials),
            BLOCK_T=32,
            BLOCK_J=_BLOCK_I,
            SPAN=SPAN,
            launch_pdl=True,
        )
    bounds = tuple(sum(widths[:g]) for g in range(1, len(widths)))
    half = [64, min(128, tiles.block_o if tiles.block_t == 128 else tiles.block_o // 2)]
    work = tiles.count_items(T, num_columns) + tiles.count_tiles(T, O)
    _fused_fwd_kernel[min(num_sms, work),](
        _describe(x_TI, tiles.block_t, _BLOCK_I),
        _describe(x_TI, tiles.h_tokens, _BLOCK_I),
        _describe(w_OI, tiles.block_o, _BLOCK_I),
        _describe(a_GERI.flatten(0, 2), tiles.block_j, _BLOCK_I),
        _describe(h_TC, tiles.block_t, _BLOCK_I),
        _describe(h_TC, *half),
        _describe(b_OJ, tiles.block_o, _BLOCK_I),
        _describe(y_TO, *half),
        y_TO,
        bias_O,
        scaling_EG,
        gates_TK,
        ids_TK,
        spans,
        counters,
        order_T,
        T,
        O,
        I,
        G,
        E,
        R,
        BOUNDS=bounds,
        BLOCK_T=tiles.block_t,
        BLOCK_O=tiles.block_o,
        BLOCK_I=_BLOCK_I,
        BLOCK_J=tiles.block_j,
        H_TOKENS=tiles.h_tokens,
        STAGES=tiles.num_stages,
        GROUP=16,
        K=K,
        SORTED=sort,
        BY_ADAPTER=by_adapter,
        # maxnreg times 12 warps is the program's share; the loading warps keep 24 and these eight get the rest
        REGISTERS=(tiles.num_registers * 12 - 24 * 4) // 8 // 8 * 8,
        num_warps=4,
        maxnreg=tiles.num_registers,
        launch_pdl=True,
    )
    return y_TO


def _sort_and_shrink(
    x_TI: Tensor, a_GERI: Tensor, ids_TK: Tensor, order_T: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x in the plan's order [T, I], the spans of that order, and partial sums of the hidden ranks [splits, T, G * R]."""
    (T, I), (G, E, R, _), device = x_TI.shape, a_GERI.shape, x_TI.device
    block_t, block_r = block_of_tokens(T, E, at_most=64), power_of_two(R, at_most=64)
    num_tiles, num_blocks = max_tiles(T, E, block_t), G * triton.cdiv(R, block_r)
    wanted = 264 // (triton.cdiv(T, block_t) * num_blocks)  # two programs an SM
    per_split = triton.cdiv(triton.cdiv(I, power_of_two(wanted, at_least=1, at_most=16)), 128) * 128
    num_splits = triton.cdiv(I, per_split)
    sorted_x = torch.empty(T, I, dtype=x_TI.dtype, device=device)
    partials = torch.empty(num_splits, T, G * R, dtype=torch.float32, device=device)
    spans = torch.empty(triton.cdiv(T, SPAN), 2, dtype=torch.int32, device=device)
    _sort_kernel[len(spans), triton.cdiv(I, 512)](
        x_TI,
        ids_TK,
        order_T,
        sorted_x,
        spans,
        x_TI.stride(0),
        T,
        E,
        I,
        BLOCK_T=16,
        BLOCK_I=512,
        SPAN=SPAN,
    )
    _shrink_kernel[num_tiles, num_splits, num_blocks](
        x_TI,
        a_GERI,
        order_T,
        offsets,
        partials,
        x_TI.stride(0),
        *a_GERI.stride()[:3],
        T,
        E,
        I,
        R,
        G,
        per_split,
        BLOCK_T=block_t,
        BLOCK_I=64 if block_t == 64 else 128,
        BLOCK_R=block_r,
        BLOCK_E=power_of_two(E, at_most=128),
        num_stages=4,
        launch_pdl=True,
    )
    return sorted_x, spans, partials


def _empty_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Unwritten, its rows padded to whole 16 bytes."""
    return torch.empty(rows, triton.cdiv(columns, 8) * 8, dtype=dtype, device=device)[:, :columns]


def _describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)  # as for any 16-bit dtype
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)
