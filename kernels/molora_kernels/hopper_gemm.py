"""The fused regime's kernel, in Gluon: y = [x | H] [W | B_all]^T as one persistent GEMM, H made on the way.

A program is one warp that loads tiles by the bulk tensor copy engine into a ring of buffers, and two groups of four
warps that multiply them, each half of a tile. It draws work by its number: first items of H, then tiles of y. A tile's
walk over x goes on into H and B once a counter says that the items of its block of tokens are written.

Legend: T tokens, K top-k, E adapters, G sibling linears, R rank, J = E * R, C = G * J, I in-features, O out-features
of all siblings. U is H before mask, gate and scaling: what a backward pass keeps.
"""
# ruff: noqa: E741, RUF005 (I and O are the legend's; Gluon takes neither unpacking nor every ternary)

from typing import NamedTuple

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

from molora_kernels.plan_tables import BLOCK_T as SPAN
from molora_kernels.tiles import Tiles, count_sms

# Gluon gave these other names between Triton 3.6 and 3.9.
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_as_shape = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
_copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

_SPAN = gl.constexpr(SPAN)  # tokens that one entry of the plan's spans covers
BLOCK_I = 64  # 128 bytes: the widest row that the copy engine swizzles
_PIECE = 32  # rows, of a block of tokens that is not full


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
def _place(ring, stage, desc):
    """A place of the ring in the shape of the descriptor's tile: its first rows or, of an operand that stands in the
    other's buffers, another shape of as many elements."""
    tile = ring.index(stage)
    rows: gl.constexpr = desc.block_type.shape[0]
    columns: gl.constexpr = desc.block_type.shape[1]
    if tile.shape[1] != columns:
        tile = _as_shape(tile, tile.dtype, desc.block_type.shape, desc.layout)
    elif tile.shape[0] != rows:
        tile = tile.slice(0, rows)
    return tile


@gluon.jit
def _copy_pair(left_desc, tail_desc, right_desc, left, right, left_buffer, right_buffer, rows, step, ready, empty):
    """Load one step of both operands into the next place of the ring, once it is empty.

    Where fewer rows than a tile are left of the left one, only those are loaded, in pieces: the copy engine takes
    longer to fill rows with zeros than to read them, and what stands in their place is multiplied but never stored.
    """
    STAGES: gl.constexpr = ready.shape[0]
    NUM_PIECES: gl.constexpr = left_desc.block_type.shape[0] // tail_desc.block_type.shape[0]
    PIECE: gl.constexpr = tail_desc.block_type.shape[0]
    stage = step % STAGES
    barrier = ready.index(stage)
    tile = _place(left_buffer, stage, left_desc)
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    if rows > (NUM_PIECES - 1) * PIECE:
        mbarrier.expect(barrier, left_desc.block_type.nbytes + right_desc.block_type.nbytes)
        _copy_in(left_desc, left, barrier, tile)
    else:
        for num_pieces in gl.static_range(1, NUM_PIECES):
            if gl.cdiv(rows, PIECE) == num_pieces:
                mbarrier.expect(barrier, num_pieces * tail_desc.block_type.nbytes + right_desc.block_type.nbytes)
        for piece in gl.static_range(NUM_PIECES - 1):
            if piece * PIECE < rows:
                _copy_in(tail_desc, [left[0] + piece * PIECE, left[1]], barrier, tile.slice(piece * PIECE, PIECE))
    _copy_in(right_desc, right, barrier, _place(right_buffer, stage, right_desc))
    return step + 1


@gluon.jit
def _at(outer, inner, TRANSPOSED: gl.constexpr):
    """Where a tile of a right operand begins: its rows are the outer dimension, or else the summed one."""
    place = (outer, inner)
    if TRANSPOSED:
        place = (inner, outer)
    return place


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
    TRANSPOSED: gl.constexpr,
):
    """The warp that loads: for each item of H the tokens and A, for each tile of y the tokens and W, then H and B."""
    x_desc, tokens_desc, tail_desc, w_desc, a_desc, h_desc, b_desc = descriptors
    _, spans_ptr, counters_ptr, _ = tables
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
                    place = _at(chunk * BLOCK_J, i, TRANSPOSED)
                    left = [token, i]
                    rows = T - token
                    if H_TOKENS > BLOCK_T:  # the larger buffers hold the tokens
                        step = _copy_pair(
                            tokens_desc, tail_desc, a_desc, left, place, w_ring, x_ring, rows, step, ready, empty
                        )
                    else:
                        step = _copy_pair(
                            x_desc, tail_desc, a_desc, left, place, x_ring, w_ring, rows, step, ready, empty
                        )
        else:
            m, n = _tile_of(work - num_items, num_m, num_n, GROUP)
            rows = T - m * BLOCK_T
            for i in range(0, I, BLOCK_I):
                place = _at(n * BLOCK_O, i, TRANSPOSED)
                left = [m * BLOCK_T, i]
                step = _copy_pair(x_desc, tail_desc, w_desc, left, place, x_ring, w_ring, rows, step, ready, empty)
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
                    place = _at(n * BLOCK_O, j, TRANSPOSED)
                    if BY_ADAPTER:
                        place = (j // R * O + n * BLOCK_O, j % R)
                    left = [m * BLOCK_T, sibling * J + j]
                    rows = BLOCK_T  # H has rows for whole blocks, or is kept and short: its last tiles pay for that
                    step = _copy_pair(h_desc, h_desc, b_desc, left, place, x_ring, w_ring, rows, step, ready, empty)


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
    TRANSPOSED: gl.constexpr,
    layout: gl.constexpr,
):
    """64 rows from ROW on, times N columns from COLUMN on, over the next num_steps steps of the ring."""
    STAGES: gl.constexpr = ready.shape[0]
    acc = gl.zeros([64, N], gl.float32, layout)
    for k in range(0, num_steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        right = right_ring.index(stage)
        if not TRANSPOSED:
            right = right.slice(COLUMN, N).permute([1, 0])
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
    TRANSPOSED: gl.constexpr,
    layout: gl.constexpr,
):
    """128 rows from ROW on, as two accumulators of 64; the operands are in each other's buffers."""
    STAGES: gl.constexpr = ready.shape[0]
    upper = gl.zeros([64, N], gl.float32, layout)
    lower = gl.zeros([64, N], gl.float32, layout)
    for k in range(0, num_steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        left = left_ring.index(stage)
        right = right_ring.index(stage)
        if TRANSPOSED:
            left_shape: gl.constexpr = [left.shape[1], left.shape[0]]
            right_shape: gl.constexpr = [right.shape[1], right.shape[0]]
            left = _as_shape(left, left.dtype, left_shape, gl.NVMMASharedLayout.get_default_for(left_shape, left.dtype))
            right = _as_shape(
                right, right.dtype, right_shape, gl.NVMMASharedLayout.get_default_for(right_shape, right.dtype)
            )
        else:
            right = right.slice(0, N).permute([1, 0])
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
    desc,
    u_desc,
    acc,
    row,
    column,
    buffer,
    scaling_ptr,
    gates_ptr,
    ids_ptr,
    sizes,
    K: gl.constexpr,
    KEEP_U: gl.constexpr,
    layout: gl.constexpr,
):
    """Write [64, N] of H: what each token selected, gated and scaled; and, to keep them, the products themselves."""
    T, _, _, G, E, R = sizes
    if KEEP_U:
        _store(u_desc, acc, row, column, buffer)
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
    u_desc,
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
    KEEP_U: gl.constexpr,
    TRANSPOSED: gl.constexpr,
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
    H_COLUMN: gl.constexpr = 0 if BY_ROWS else HALF * H_N
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    h_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, H_N, 16])
    buffer = buffers.index(HALF)
    h_buffer = buffer
    if buffer.shape[1] != H_N:
        h_buffer = _as_shape(buffer, buffer.dtype, h_desc.block_type.shape, h_desc.layout)
    num_m, num_n, num_chunks = gl.cdiv(T, BLOCK_T), gl.cdiv(O, BLOCK_O), gl.cdiv(G * J, BLOCK_J)
    num_items = 0 if SORTED else gl.cdiv(T, H_TOKENS) * num_chunks  # of sorted tokens, H is there
    num_steps = gl.cdiv(I, BLOCK_I)
    step = 0
    for work in range(gl.program_id(0), num_items + num_m * num_n, gl.num_programs(0)):
        if work < num_items:
            token = work // num_chunks * H_TOKENS
            chunk = work % num_chunks
            if _is_needed(spans_ptr, token, T, chunk, G, R, J, H_TOKENS, BLOCK_J, BLOCK_I):
                column = chunk * BLOCK_J + H_COLUMN
                if H_TOKENS > BLOCK_T:
                    row = token + HALF * 128
                    upper, lower, step = _multiply_twice(
                        step, num_steps, w_ring, x_ring, ready, empty, HALF * 128, H_N, TRANSPOSED, h_layout
                    )
                    _store_h(
                        h_desc,
                        u_desc,
                        upper,
                        row,
                        column,
                        h_buffer,
                        scaling_ptr,
                        gates_ptr,
                        ids_ptr,
                        sizes,
                        K,
                        KEEP_U,
                        h_layout,
                    )
                    _store_h(
                        h_desc,
                        u_desc,
                        lower,
                        row + 64,
                        column,
                        h_buffer,
                        scaling_ptr,
                        gates_ptr,
                        ids_ptr,
                        sizes,
                        K,
                        KEEP_U,
                        h_layout,
                    )
                else:
                    acc, step = _multiply(
                        step, num_steps, x_ring, w_ring, ready, empty, ROW, H_COLUMN, H_N, TRANSPOSED, h_layout
                    )
                    _store_h(
                        h_desc,
                        u_desc,
                        acc,
                        token + ROW,
                        column,
                        h_buffer,
                        scaling_ptr,
                        gates_ptr,
                        ids_ptr,
                        sizes,
                        K,
                        KEEP_U,
                        h_layout,
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
            all_steps = num_steps + max(end - first, 0)
            acc, step = _multiply(step, all_steps, x_ring, w_ring, ready, empty, ROW, COLUMN, N, TRANSPOSED, layout)
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
    tail_desc,
    w_desc,
    a_desc,
    h_desc,
    h_store_desc,
    u_desc,
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
    R: gl.constexpr,  # the columns of one adapter are then known to be equal in groups: fewer divisions, no spills
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
    KEEP_U: gl.constexpr,
    BY_ADAPTER: gl.constexpr,  # B's rows stand adapter by adapter, else those of one o side by side
    TRANSPOSED: gl.constexpr,  # the right operands' rows are the dimension summed over, as a backward pass has them
    REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    _instruct("griddepcontrol.launch_dependents")
    dtype: gl.constexpr = x_desc.dtype
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_I], x_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    buffers = gl.allocate_shared_memory(dtype, [2] + y_desc.block_type.shape, y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    sizes = (T, O, I, G, E, R)
    descriptors = (x_desc, tokens_desc, tail_desc, w_desc, a_desc, h_desc, b_desc)
    tables = (ids_ptr, spans_ptr, counters_ptr, order_ptr)
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    y_desc,
                    h_store_desc,
                    u_desc,
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
                    KEEP_U,
                    TRANSPOSED,
                ),
            ),
            (
                _compute,
                (
                    y_desc,
                    h_store_desc,
                    u_desc,
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
                    KEEP_U,
                    TRANSPOSED,
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
                    TRANSPOSED,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


class Operands(NamedTuple):
    """Of y = [x | h] [w | b]^T + bias and h = x a^T; with `transposed`, w, a and b are their own transposes."""

    x_TI: Tensor
    w: Tensor  # [O, I]
    bias_O: Tensor | None
    a: Tensor  # [G * J, I]
    h_TC: Tensor  # [T or more, G * J], written here unless the tokens are sorted
    u_TC: Tensor | None  # likewise, x a^T as it is: neither masked by route nor gated; only where a tile reads h
    b: Tensor  # [O, J]; adapter by adapter [E * O, R]
    y_TO: Tensor  # written here


class Routing(NamedTuple):
    scaling_EG: Tensor
    gates_TK: Tensor
    ids_TK: Tensor
    spans: Tensor
    counters: Tensor  # one for each block of tokens, zero before
    order_T: Tensor


def launch(
    tiles: Tiles,
    operands: Operands,
    routing: Routing,
    sizes: tuple[int, int, int],
    bounds: tuple[int, ...],
    *,
    sort: bool = False,
    by_adapter: bool = False,
    transposed: bool = False,
) -> None:
    x_TI, w, bias, a, h_TC, u_TC, b, y_TO = operands
    scaling, gates, ids, spans, counters, order = routing
    (T, I), O, (G, E, R) = x_TI.shape, y_TO.shape[1], sizes
    work = tiles.count_items(T, 0 if sort else G * E * R) + tiles.count_tiles(T, O)
    halves = 1 if tiles.block_t == 128 else 2  # of a tile's columns, if its rows are not halved
    buffer_columns = min(128, tiles.block_o // halves)

    def right(matrix: Tensor, outer: int) -> TensorDescriptor:
        return _describe(matrix, *((BLOCK_I, outer) if transposed else (outer, BLOCK_I)))

    _fused_fwd_kernel[min(count_sms(x_TI.device), work),](
        _describe(x_TI, tiles.block_t, BLOCK_I),
        _describe(x_TI, tiles.h_tokens, BLOCK_I),
        _describe(x_TI, _PIECE, BLOCK_I),
        right(w, tiles.block_o),
        right(a, tiles.block_j),
        _describe(h_TC, tiles.block_t, BLOCK_I),
        _describe(h_TC, 64, tiles.block_j // halves),
        _describe(h_TC if u_TC is None else u_TC, 64, tiles.block_j // halves),
        right(b, tiles.block_o),
        _describe(y_TO, 64, buffer_columns),
        y_TO,
        bias,
        scaling,
        gates,
        ids,
        spans,
        counters,
        order,
        T,
        O,
        I,
        G,
        E,
        R,
        BOUNDS=bounds,
        BLOCK_T=tiles.block_t,
        BLOCK_O=tiles.block_o,
        BLOCK_I=BLOCK_I,
        BLOCK_J=tiles.block_j,
        H_TOKENS=tiles.h_tokens,
        STAGES=tiles.num_stages,
        GROUP=16,
        K=ids.shape[1],
        SORTED=sort,
        KEEP_U=u_TC is not None,
        BY_ADAPTER=by_adapter,
        TRANSPOSED=transposed,
        # maxnreg times 12 warps is the program's share; the loading warps keep 24 and these eight get the rest
        REGISTERS=(tiles.num_registers * 12 - 24 * 4) // 8 // 8 * 8,
        num_warps=4,
        maxnreg=tiles.num_registers,
        launch_pdl=True,
    )


def _describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)  # as for any 16-bit dtype
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)
