"""The Triton kernels behind `paged_attention.py`, which says how the work is cut.

Scores and their exponentials are in base 2. What is kept beside a weighted mean of values is the logarithm of the sum
of its weights, so that means over different keys can be joined.

From 64 rows on, weights are multiplied out of registers in a pipelined loop, which ptxas before 13.3 can miscompile
(triton issue 9433). What Triton 3.6 and 3.9 make of the shapes chosen today overwrites none of those registers early;
`benchmarks/attention.py` checks results before it times them, and so must whoever changes the shapes. With fewer rows
scores as [L, R] would fill Hopper's wide products, and on an H100 gave wrong results in some shapes, and no speed.

Legend: N tokens, S sequences, P blocks of the pool, B tokens a block, H heads of the pool, G query heads that share
one, D head size, V head size of the values, L keys that a program takes at a time, R rows of a tile: G for each of its
tokens.
"""

import triton
import triton.language as tl
from molora_kernels.arithmetic import dot, let_next_start, round_to, wait_for_previous

# They vary: no kernel for each.
_CAPACITIES = ["N", "S", "max_splits", "max_decode_splits", "keys_per_split", "keys_per_decode_split"]
LOWEST = tl.constexpr(-1e30)  # stands for minus infinity where one may be subtracted from another
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _write_fwd_kernel(
    k_ptr,
    v_ptr,
    k_pool_ptr,
    v_pool_ptr,
    places_ptr,
    k_stride_n,
    k_stride_h,
    k_stride_d,
    v_stride_n,
    v_stride_h,
    v_stride_v,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        wait_for_previous()
        let_next_start()
    n = tl.program_id(0).to(tl.int64)
    place = tl.load(places_ptr + n).to(tl.int64)
    if place >= 0:
        h_H, d_D, v_V = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_V)[None, :]
        mask_HD, mask_HV = (h_H < H) & (d_D < D), (h_H < H) & (v_V < V)
        k_HD = tl.load(k_ptr + n * k_stride_n + h_H * k_stride_h + d_D * k_stride_d, mask=mask_HD)
        v_HV = tl.load(v_ptr + n * v_stride_n + h_H * v_stride_h + v_V * v_stride_v, mask=mask_HV)
        tl.store(k_pool_ptr + place * (H * D) + h_H * D + d_D, k_HD, mask=mask_HD)
        tl.store(v_pool_ptr + place * (H * V) + h_H * V + v_V, v_HV, mask=mask_HV)


@triton.jit
def _load_span(cu_queries_ptr, num_keys_ptr, s, N, S):
    """First token, number of queries and of keys. Sequence S is the tokens that are nobody's: it has no keys."""
    first = tl.load(cu_queries_ptr + s, mask=s <= S, other=N)
    end = tl.load(cu_queries_ptr + s + 1, mask=s < S, other=N)
    return first, end - first, tl.load(num_keys_ptr + s, mask=s < S, other=0)


@triton.jit
def _count_splits(
    num_queries,
    num_keys,
    max_splits,
    max_decode_splits,
    keys_per_split,
    keys_per_decode_split,
    WINDOW: tl.constexpr,
):
    """Into how many parts a sequence's keys are cut; it depends on no other sequence."""
    if WINDOW is not None:
        num_keys = tl.minimum(num_keys, WINDOW + num_queries)
    is_alone = num_queries == 1
    most = tl.where(is_alone, max_decode_splits, max_splits)
    least = tl.where(is_alone, keys_per_decode_split, keys_per_split)
    return tl.maximum(1, tl.minimum(most, tl.cdiv(num_keys, least)))


@triton.jit
def _find_split(tiles_S, splits_S, place):
    """The split that a place falls into and the place in it, where all sequences' first splits come first, then all
    second ones."""
    split, end = 0, tl.max(splits_S)
    while end - split > 1:
        middle = (split + end) // 2
        is_behind = tl.sum(tiles_S * tl.minimum(splits_S, middle)) <= place
        split, end = tl.where(is_behind, middle, split), tl.where(is_behind, end, middle)
    return split, place - tl.sum(tiles_S * tl.minimum(splits_S, split))


@triton.jit
def _count_readers(
    tables_ptr,
    cu_queries_ptr,
    num_keys_ptr,
    tables_stride_s,
    s,
    split,
    N,
    S,
    max_splits,
    max_decode_splits,
    keys_per_split,
    keys_per_decode_split,
    B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    MATES: tl.constexpr,
):
    """How many sequences with one query, from s on, read the very same blocks in a split: their rows fit into one tile.
    0 if the one before s does, which then reads them for s as well.

    Tiles are of MATES sequences side by side, from a multiple of MATES on. Each sees all keys of such a split, so a
    row's sum is the one that it would be alone.
    """
    SOME: tl.constexpr = 32  # blocks at a time
    group = s // MATES * MATES
    s_G = group + tl.arange(0, MATES)
    _, num_queries_G, num_keys_G = _load_span(cu_queries_ptr, num_keys_ptr, s_G, N, S)
    splits_G = _count_splits(
        num_queries_G, num_keys_G, max_splits, max_decode_splits, keys_per_split, keys_per_decode_split, None
    )
    length_G = _length_of_splits(num_keys_G, splits_G, BLOCK_L)
    length = tl.max(tl.where(s_G == s, length_G, 0))
    begin, end = split * length, (split + 1) * length
    agrees_G = (num_queries_G == 1) & (splits_G > 1) & (length_G == length) & (end <= num_keys_G)
    reads = tl.max(tl.where(s_G == s, agrees_G, 0)) > 0
    for first in range(begin // B, tl.where(reads, tl.cdiv(end, B), 0), SOME):
        p_P = first + tl.arange(0, SOME)
        is_read_P = p_P < tl.cdiv(end, B)
        own_P = tl.load(tables_ptr + s.to(tl.int64) * tables_stride_s + p_P, mask=is_read_P, other=0)
        table_ptr_GP = tables_ptr + s_G[:, None].to(tl.int64) * tables_stride_s + p_P[None, :]
        p_GP = tl.load(table_ptr_GP, mask=agrees_G[:, None] & is_read_P[None, :], other=0)
        agrees_G = agrees_G & (tl.sum((p_GP != own_P[None, :]).to(tl.int32), 1) == 0)
    end_of_run = tl.min(tl.where((s_G > s) & (agrees_G == 0), s_G, group + MATES))
    is_read_before = reads & (tl.max(tl.where(s_G == s - 1, agrees_G, 0)) > 0)
    return tl.where(is_read_before, 0, tl.where(reads, end_of_run - s, 1))


@triton.jit
def _length_of_splits(num_keys, splits, BLOCK_L: tl.constexpr):
    return tl.cdiv(tl.cdiv(num_keys, splits), BLOCK_L) * BLOCK_L


@triton.jit
def _attend(
    q_RD,
    position_R,
    k_ptr,
    v_ptr,
    table_ptr,
    top_R,
    sum_R,
    first_key,
    begin,
    full_end,
    end,
    inner_scale,
    scale,
    B: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The weighted mean of values [R, V] over the keys of begin to end, and the logarithm of each row's sum of weights.

    Each row begins with a sum of weights, relative to its largest score. No key before first_key is read.
    """
    # What every row sees goes first, in a loop of its own without masks.
    NUM_PASSES: tl.constexpr = 1 if WINDOW is not None else 2
    WHOLE: tl.constexpr = B % BLOCK_L == 0  # the keys of a step stand in one block
    l_L, d_D, v_V = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    acc_RV = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for masked in tl.static_range(2 - NUM_PASSES, 2):
        if NUM_PASSES == 1:
            start, stop = begin, end
        elif masked:
            start, stop = full_end, end
        else:
            start, stop = begin, full_end
        if WHOLE:
            p_L = tl.load(table_ptr + start // B, mask=start < stop, other=0)
        else:
            key_L = start + l_L
            p_L = tl.load(table_ptr + key_L.to(tl.uint32) // B, mask=(key_L >= first_key) & (key_L < stop), other=0)
        for here in tl.range(start, stop, BLOCK_L):
            key_L = here + l_L
            row_L = p_L.to(tl.int64) * B + (here % B + l_L if WHOLE else key_L.to(tl.uint32) % B)
            k_ptr_LD = k_ptr + row_L[:, None] * (H * D) + d_D[None, :]
            v_ptr_LV = v_ptr + row_L[:, None] * (H * V) + v_V[None, :]
            if masked:
                exists_L = (key_L >= first_key) & (key_L < stop)
                k_LD = tl.load(k_ptr_LD, mask=exists_L[:, None] & (d_D < D)[None, :], other=0.0)
                v_LV = tl.load(v_ptr_LV, mask=exists_L[:, None] & (v_V < V)[None, :], other=0.0)
            else:
                k_LD = tl.load(k_ptr_LD, mask=(d_D < D)[None, :], other=0.0)
                v_LV = tl.load(v_ptr_LV, mask=(v_V < V)[None, :], other=0.0)
            if masked:  # a weight of 0 does not stop what overflowed
                v_LV = tl.where(tl.abs(v_LV.to(tl.float32)) < float("inf"), v_LV, tl.zeros_like(v_LV))
            # The next keys' blocks, now: then those keys can be asked for at once.
            if WHOLE:
                p_L = tl.load(table_ptr + (here + BLOCK_L) // B, mask=here + BLOCK_L < stop, other=0)
            else:
                next_L = key_L + BLOCK_L
                p_L = tl.load(table_ptr + next_L.to(tl.uint32) // B, mask=next_L < stop, other=0)

            scores_RL = dot(q_RD, k_LD.T, tl.zeros((BLOCK_R, BLOCK_L), tl.float32))
            if SOFTCAP:
                scores_RL = 1 - 2 / (tl.exp2(tl.minimum(scores_RL * inner_scale, 100.0)) + 1)  # tanh
            if masked:
                back_RL = position_R[:, None] - key_L[None, :]
                sees_RL = back_RL >= 0
                if WINDOW is not None:
                    sees_RL &= back_RL < WINDOW
                scores_RL = tl.where(sees_RL, scores_RL, -float("inf"))
            new_top_R = tl.maximum(top_R, tl.max(scores_RL, 1) * scale)
            weights_RL = tl.exp2(scores_RL * scale - new_top_R[:, None])
            shrink_R = tl.exp2(top_R - new_top_R)
            top_R = new_top_R
            sum_R = sum_R * shrink_R + tl.sum(weights_RL, 1)
            acc_RV = dot(round_to(weights_RL, v_LV.dtype), v_LV, acc_RV * shrink_R[:, None])
    sum_R = tl.where(sum_R == 0, 1.0, sum_R)  # no keys: the mean is zero, its weight that of the lowest score
    return acc_RV / sum_R[:, None], top_R + tl.log2(sum_R)


@triton.jit
def _attend_tile(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    sinks_ptr,
    out_ptr,
    parts_ptr,
    logs_ptr,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    inner_scale,
    scale,
    h,
    first,
    num_tokens,
    num_queries,
    num_keys,
    tile,
    split,
    splits,
    part,
    parts_of_token,
    B: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """num_tokens: that the tile's sequence, or those that share it, have from `first` on."""
    TILE_N: tl.constexpr = BLOCK_R // G
    r_R, d_D, v_V = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    query_R = tile * TILE_N + r_R // G
    exists_R = (query_R < num_tokens) & (r_R < TILE_N * G)
    token_R = (first + query_R).to(tl.int64)
    head_R = h * G + r_R % G
    mask_RD = exists_R[:, None] & (d_D < D)[None, :]
    offset_R = token_R * q_stride_n + head_R * q_stride_h
    q_RD = tl.load(q_ptr + offset_R[:, None] + d_D[None, :] * q_stride_d, mask=mask_RD, other=0.0)

    position = num_keys - num_queries + tile * TILE_N  # of the first row; the last one's key is the last of all
    end = tl.minimum(num_keys, position + TILE_N)
    first_key = 0
    if WINDOW is not None:
        first_key = tl.maximum(0, position - WINDOW + 1)
    begin = first_key // BLOCK_L * BLOCK_L
    length = _length_of_splits(end - begin, splits, BLOCK_L)
    begin += split * length
    end = tl.minimum(end, begin + length)
    full_end = begin + tl.maximum(0, tl.minimum(end, position + 1) - begin) // BLOCK_L * BLOCK_L

    # A sink is a first key of no value.
    if sinks_ptr is not None:
        sink_R = tl.load(sinks_ptr + head_R).to(tl.float32) * LOG2_E
        top_R, sum_R = (
            tl.where(split == 0, sink_R, LOWEST),
            tl.where(split == 0, tl.full((BLOCK_R,), 1.0, tl.float32), 0.0),
        )
    else:
        top_R, sum_R = tl.full((BLOCK_R,), LOWEST, tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    mean_RV, log_R = _attend(
        q_RD,
        num_keys - num_queries + query_R,
        k_ptr + h * D,
        v_ptr + h * V,
        table_ptr,
        top_R,
        sum_R,
        first_key,
        begin,
        full_end,
        end,
        inner_scale,
        scale,
        B,
        H,
        D,
        V,
        BLOCK_D,
        BLOCK_V,
        BLOCK_R,
        BLOCK_L,
        WINDOW,
        SOFTCAP,
    )
    mask_RV = exists_R[:, None] & (v_V < V)[None, :]
    if splits == 1:
        out_ptr_RV = out_ptr + (token_R * (H * G) + head_R)[:, None] * V + v_V[None, :]
        tl.store(out_ptr_RV, round_to(mean_RV, out_ptr.dtype.element_ty), mask=mask_RV)
    else:
        part_R = (part + query_R * parts_of_token + split).to(tl.int64) * (H * G) + head_R
        tl.store(parts_ptr + part_R[:, None] * V + v_V[None, :], mean_RV, mask=mask_RV)
        tl.store(logs_ptr + part_R, log_R, mask=exists_R)


@triton.jit(do_not_specialize=_CAPACITIES)
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    cu_queries_ptr,
    num_keys_ptr,
    sinks_ptr,
    out_ptr,
    parts_ptr,
    logs_ptr,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    tables_stride_s,
    inner_scale,
    scale,
    N,
    S,
    max_splits,
    max_decode_splits,
    keys_per_split,
    keys_per_decode_split,
    B: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DECODE_R: tl.constexpr,  # rows of the tile of a sequence's only query
    MATES: tl.constexpr,  # sequences of which such a tile has room for the queries
    BLOCK_L: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """An item of work is a tile of a sequence's queries, a head of the pool and a split of the keys.

    All sequences' first splits come first, then all second ones: sequences that begin with the same blocks read them at
    about the same time, and all but one of them from the L2 cache. Where they decode side by side, some of them are one
    tile and read them once.
    """
    if OVERLAP:
        wait_for_previous()
        let_next_start()
    TILE_N: tl.constexpr = BLOCK_R // G
    _, num_queries_S, num_keys_S = _load_span(cu_queries_ptr, num_keys_ptr, tl.arange(0, BLOCK_S), N, S)
    splits_S = _count_splits(
        num_queries_S, num_keys_S, max_splits, max_decode_splits, keys_per_split, keys_per_decode_split, WINDOW
    )
    tiles_S = tl.cdiv(num_queries_S, TILE_N)
    for item in range(tl.program_id(0), tl.sum(tiles_S * splits_S) * H, tl.num_programs(0)):
        h, place = item % H, item // H
        split, place = _find_split(tiles_S, splits_S, place)
        end_S = tl.cumsum(tl.where(splits_S > split, tiles_S, 0), 0)
        s = tl.sum((end_S <= place).to(tl.int32))
        place -= tl.max(tl.where(end_S <= place, end_S, 0))
        first, num_queries, num_keys = _load_span(cu_queries_ptr, num_keys_ptr, s, N, S)
        splits = _count_splits(
            num_queries, num_keys, max_splits, max_decode_splits, keys_per_split, keys_per_decode_split, WINDOW
        )
        tile = tl.cdiv(num_queries, TILE_N) - 1 - place  # the one with most keys comes first
        table_ptr = tables_ptr + s.to(tl.int64) * tables_stride_s
        num_tokens = num_queries
        if WINDOW is None and MATES > 1:  # noqa: SIM102 (known when it is compiled, unlike the rest)
            if (num_queries == 1) & (splits > 1) & (S > 1):
                num_tokens = _count_readers(
                    tables_ptr,
                    cu_queries_ptr,
                    num_keys_ptr,
                    tables_stride_s,
                    s,
                    split,
                    N,
                    S,
                    max_splits,
                    max_decode_splits,
                    keys_per_split,
                    keys_per_decode_split,
                    B,
                    BLOCK_L,
                    MATES,
                )
        for alone in tl.static_range(2):
            if (num_tokens > 0) & ((num_queries == 1) == (alone == 1)):
                _attend_tile(
                    q_ptr,
                    k_ptr,
                    v_ptr,
                    table_ptr,
                    sinks_ptr,
                    out_ptr,
                    parts_ptr,
                    logs_ptr,
                    q_stride_n,
                    q_stride_h,
                    q_stride_d,
                    inner_scale,
                    scale,
                    h,
                    first,
                    num_tokens,
                    num_queries,
                    num_keys,
                    tile,
                    split,
                    splits,
                    s * max_decode_splits if alone else S * max_decode_splits + first * max_splits,
                    max_decode_splits if alone else max_splits,
                    B,
                    H,
                    G,
                    D,
                    V,
                    BLOCK_D,
                    BLOCK_V,
                    DECODE_R if alone else BLOCK_R,
                    BLOCK_L,
                    WINDOW,
                    SOFTCAP,
                )


@triton.jit(do_not_specialize=_CAPACITIES)
def _join_fwd_kernel(
    parts_ptr,
    logs_ptr,
    cu_queries_ptr,
    num_keys_ptr,
    out_ptr,
    N,
    S,
    max_splits,
    max_decode_splits,
    keys_per_split,
    keys_per_decode_split,
    HEADS: tl.constexpr,  # of queries
    V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,  # parts that are summed at a time
    WINDOW: tl.constexpr,
    ROW_IS_TOKEN: tl.constexpr,  # else a sequence: then only those of one query are split
    OVERLAP: tl.constexpr,
):
    """One token and head: the mean of its parts, weighted. Tokens of sequences that are not split are done already."""
    if OVERLAP:
        wait_for_previous()
        let_next_start()
    row, head = tl.program_id(0), tl.program_id(1)
    if ROW_IS_TOKEN:
        end_S = tl.load(cu_queries_ptr + 1 + tl.arange(0, BLOCK_S), mask=tl.arange(0, BLOCK_S) < S, other=N)
        s = tl.sum((end_S <= row).to(tl.int32))
    else:
        s = row
    first, num_queries, num_keys = _load_span(cu_queries_ptr, num_keys_ptr, s, N, S)
    splits = _count_splits(
        num_queries, num_keys, max_splits, max_decode_splits, keys_per_split, keys_per_decode_split, WINDOW
    )
    if splits > 1:
        if num_queries == 1:
            token, part = first, s * max_decode_splits
        else:
            token, part = row, S * max_decode_splits + row * max_splits
        p_P, v_V = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
        part_P = (part + p_P).to(tl.int64) * HEADS + head
        top = LOWEST
        for start in range(0, splits, BLOCK_P):
            log_P = tl.load(logs_ptr + part_P + start * HEADS, mask=start + p_P < splits, other=LOWEST)
            top = tl.maximum(top, tl.max(log_P))
        total = 0.0
        acc_V = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, splits, BLOCK_P):
            exists_P = start + p_P < splits
            log_P = tl.load(logs_ptr + part_P + start * HEADS, mask=exists_P, other=-float("inf"))
            weight_P = tl.exp2(log_P - top)
            total += tl.sum(weight_P)
            mask_PV = exists_P[:, None] & (v_V < V)[None, :]
            part_ptr_PV = parts_ptr + (part_P + start * HEADS)[:, None] * V + v_V[None, :]
            part_PV = tl.load(part_ptr_PV, mask=mask_PV, other=0.0)
            acc_V += tl.sum(part_PV * weight_P[:, None], 0)
        out_V = round_to(acc_V / total, out_ptr.dtype.element_ty)
        tl.store(out_ptr + (token.to(tl.int64) * HEADS + head) * V + v_V, out_V, mask=v_V < V)
