"""Attention over a paged cache in Triton: a packed batch of sequences, some with one new token, some with thousands.

`write_kv` puts a step's keys and values into the pool; `paged_attention` lets each sequence's queries attend to its own
blocks. Grids depend on capacities alone, everything else is read on the device: both can be captured in a CUDA graph,
and neither ever waits for the device.

An item of work is a tile of one sequence's queries, one head of the pool and one part of the keys. Programs take items
in turn; where a sequence's keys are split, a second launch joins the parts. Nothing is atomic and the order of each sum
is fixed. A token's result depends on its sequence's queries and keys and on the `LaunchShape`, on no neighbour: a
decoded token's only on its own keys and the shape, and the shape only on capacities.

What bounds it: up to 32 rows (tokens times query heads that share a head of the pool) the bytes of keys and values, so
many programs with 32 KB or more under way each, and keys split until all of them are busy; from 128 rows on the
products, so wide tiles, few loads, and no split.

Legend: N tokens, S sequences, M blocks a sequence, P blocks of the pool, B tokens a block, H heads, D head size, V head
size of the values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from molora_kernels.arithmetic import overlapping, power_of_two
from torch import Tensor

from molora.serving import paged_attention_kernels as kernels

if TYPE_CHECKING:
    from molora.serving.attention import Pages, Pool

_LOG2_E = math.log2(math.e)
_JOINED_AT_A_TIME = 16
_MAX_PARTS_BYTES = 1 << 27
_RESERVED_BYTES = 1024  # of shared memory, for each program


class BatchTables(NamedTuple):
    """Where the queries and keys of each sequence are; int32, on the device.

    Attributes:
        block_tables_SM: the blocks of each sequence; those past its last key may be anything.
        cu_queries_S1: where each sequence's queries begin among the packed tokens, and after the last where they end.
            Tokens from there on are padding. A sequence may have no queries.
        num_keys_S: keys of each sequence, this step's included: its last query sees as many.
    """

    block_tables_SM: Tensor
    cu_queries_S1: Tensor
    num_keys_S: Tensor


@dataclass(frozen=True)
class LaunchShape:
    """How the work is cut.

    Attributes:
        rows: of a tile: its tokens times the query heads that share a head of the pool.
        decode_rows: those of a sequence's only query.
        keys: that a program takes at a time.
        splits: into how many parts the keys of a sequence with several queries are cut at most.
        decode_splits: the same for a sequence with one query.
        keys_per_split: a sequence's keys are cut into no more parts than leave each as many.
        keys_per_decode_split: the same for a sequence with one query.
        num_programs: of the grid.
        num_warps, num_stages: of each program.
    """

    rows: int
    decode_rows: int
    keys: int
    splits: int
    decode_splits: int
    keys_per_split: int
    keys_per_decode_split: int
    num_programs: int
    num_warps: int
    num_stages: int


class Device(NamedTuple):
    """What a launch is cut for."""

    num_sms: int
    sm_bytes: int  # shared memory
    program_bytes: int  # the most that one program gets of it


def choose_shape(
    num_tokens: int,
    num_sequences: int,
    num_heads: int,
    group: int,
    head_sizes: tuple[int, int],
    item_bytes: int,
    max_keys: int,
    device: Device,
) -> LaunchShape:
    """From capacities alone, by bytes under way and programs that fit.

    An H200 needs some 26 KB under way on each SM (4.25 TB/s at 0.8 us). With Llama's heads a step of 64 keys is 32 KB
    and two programs an SM have two steps under way each, so up to 64 rows all that matters is that each of the 264 has
    keys to read: `splits` is what that takes if the tokens are those of one sequence, which makes the fewest tiles;
    `decode_splits` if there is but one sequence. An item has a beginning and an end in which nothing is read: where
    there are enough for all programs, parts are long (64 sequences of 1056 keys took 124 us on an H100 in three parts
    each, 111 in one). Wide tiles come where there are enough of them for each SM: 128 rows by 64 keys are 1024 cycles
    of products on 32 KB.

    Args:
        num_heads, group: heads of the pool, and query heads that share each.
        head_sizes: of keys and of values.
        max_keys: that a sequence can have.
    """
    decode_rows = power_of_two(group)
    if item_bytes > 2:
        most_rows = 32  # float32 is multiplied without tensor cores: larger tiles would not fit into registers
    elif num_tokens * group < 2048:
        most_rows = 64
    else:
        most_rows = 128
    rows = max(decode_rows, power_of_two(num_tokens * group, at_most=most_rows))
    keys = 64 if item_bytes <= 2 else 32
    programs_per_sm = 2 if rows < 128 else 1

    def count_stages() -> int:
        row_bytes = item_bytes * sum(power_of_two(size) for size in head_sizes)
        tile_bytes = item_bytes * rows * (power_of_two(head_sizes[0]) + (keys if rows < 64 else 0))
        budget = min(device.program_bytes, device.sm_bytes // programs_per_sm - _RESERVED_BYTES)
        return (budget - tile_bytes) // (keys * row_bytes)

    while count_stages() < 2 and programs_per_sm > 1:
        programs_per_sm -= 1
    while count_stages() < 2 and keys > 16:
        keys //= 2

    resident = device.num_sms * programs_per_sm
    keys_per_split, keys_per_decode_split = min(max(8 * num_tokens, 128), 512), min(128 * num_tokens, 2048)
    parts_bytes = num_sequences * num_heads * group * head_sizes[1] * 4
    most_splits, most_decode_splits = (
        min(128, triton.cdiv(max_keys, least)) for least in (keys_per_split, keys_per_decode_split)
    )
    decode_splits = min(most_decode_splits, 2 * device.num_sms // num_heads, _MAX_PARTS_BYTES // parts_bytes)
    tile_tokens = rows // group
    num_tiles = triton.cdiv(num_tokens, tile_tokens)
    # Parts are written and read again: where no tile's keys are read twice, one program an SM asks for enough of them.
    splits = min(most_splits, (resident if num_tiles > 1 else device.num_sms) // (num_heads * num_tiles))
    splits, decode_splits = max(1, splits), max(1, decode_splits)
    tiles = num_heads * (num_tokens // tile_tokens + num_sequences + 1)
    # Many items are better handed out by the hardware, as programs end; but one without an item takes time, too.
    num_programs = min(4 * resident, tiles * max(splits, decode_splits)) if splits > 1 else max(resident, tiles)
    return LaunchShape(
        rows=rows,
        decode_rows=decode_rows,
        keys=keys,
        splits=splits,
        decode_splits=decode_splits,
        keys_per_split=keys_per_split,
        keys_per_decode_split=keys_per_decode_split,
        num_programs=num_programs,
        num_warps=8 if rows >= 128 or rows * head_sizes[1] > 64 * 128 else 4,  # so that sums fit into registers
        num_stages=max(1, min(3, count_stages())),
    )


def write_kv(key_NHD: Tensor, value_NHV: Tensor, k_pool_PBHD: Tensor, v_pool_PBHV: Tensor, places_N: Tensor) -> None:
    """Put each token's key and value at its place in the pool, block * B + offset; nowhere if that is negative.

    Args:
        k_pool_PBHD, v_pool_PBHV: contiguous, and of one dtype with key and value.
        places_N: int32 or int64. Which of two tokens with the same place is kept is not defined.
    """
    N, H, D = key_NHD.shape
    V = value_NHV.shape[2]
    assert k_pool_PBHD.is_contiguous()
    assert v_pool_PBHV.is_contiguous()
    if N:
        kernels._write_fwd_kernel[(N,)](
            key_NHD,
            value_NHV,
            k_pool_PBHD,
            v_pool_PBHV,
            places_N,
            *key_NHD.stride(),
            *value_NHV.stride(),
            H=H,
            D=D,
            V=V,
            BLOCK_H=triton.next_power_of_2(H),
            BLOCK_D=triton.next_power_of_2(D),
            BLOCK_V=triton.next_power_of_2(V),
            **overlapping(key_NHD.device),
        )


def paged_attention(
    q_NHD: Tensor,
    k_pool_PBHD: Tensor,
    v_pool_PBHV: Tensor,
    tables: BatchTables,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    out: Tensor | None = None,
    shape: LaunchShape | None = None,
) -> Tensor:
    """Each query's attention to the keys of its own sequence, up to its own position.

    Semantics:
        p = num_keys[s] - n + i                                     of the i-th of n queries of sequence s
        x[j] = scale * q . k[j]                                     or softcap * tanh(that / softcap)
        out = sum_j exp(x[j]) v[j] / (exp(sinks[h]) + sum_j exp(x[j])),  p - window < j <= p

    A query that sees no key gets zeros, and so does padding. Sums are in float32.

    Args:
        q_NHD: float16, bfloat16 or float32, of any strides; H is a multiple of the pool's heads.
        k_pool_PBHD, v_pool_PBHV: contiguous, of q's dtype. What is not some sequence's key is never used.
        window: the number of latest keys that are seen; all if None.
        sinks_H: a score for each head that takes its share of the softmax and adds nothing.
        out: [N, H, V], contiguous, to write to.
        shape: to use instead of `choose_shape`'s.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit together.
    """
    (N, num_heads, D), (_, B, H, _), V = q_NHD.shape, k_pool_PBHD.shape, v_pool_PBHV.shape[3]
    S = len(tables.num_keys_S)
    _check(q_NHD, k_pool_PBHD, v_pool_PBHV, tables, window, softcap, sinks_H)
    if out is None:
        out = torch.empty(N, num_heads, V, dtype=q_NHD.dtype, device=q_NHD.device)
    elif out.shape != (N, num_heads, V) or out.dtype != q_NHD.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {(N, num_heads, V)} of {q_NHD.dtype}, not {out.shape} of {out.dtype}."
        )
    if N == 0:
        return out
    if shape is None:
        max_keys, item_bytes = tables.block_tables_SM.shape[1] * B, q_NHD.element_size()
        shape = choose_shape(N, S, H, num_heads // H, (D, V), item_bytes, max_keys, describe(q_NHD.device))
    is_split = shape.splits > 1 or shape.decode_splits > 1
    parts = logs = out  # not used
    if is_split:
        num_parts = S * shape.decode_splits + (N * shape.splits if shape.splits > 1 else 0)
        parts = torch.empty(num_parts, num_heads, V, dtype=torch.float32, device=q_NHD.device)
        logs = torch.empty(num_parts, num_heads, dtype=torch.float32, device=q_NHD.device)
    kernels._attention_fwd_kernel[(shape.num_programs,)](
        q_NHD,
        k_pool_PBHD,
        v_pool_PBHV,
        *tables,
        sinks_H,
        out,
        parts,
        logs,
        *q_NHD.stride(),
        tables.block_tables_SM.stride(0),
        2 * _LOG2_E * scale / softcap if softcap else 0.0,
        _LOG2_E * (softcap or scale),
        N,
        S,
        shape.splits,
        shape.decode_splits,
        shape.keys_per_split,
        shape.keys_per_decode_split,
        B=B,
        H=H,
        G=num_heads // H,
        D=D,
        V=V,
        BLOCK_S=triton.next_power_of_2(S + 1),
        BLOCK_D=power_of_two(D),
        BLOCK_V=power_of_two(V),
        BLOCK_R=shape.rows,
        DECODE_R=shape.decode_rows,
        MATES=triton.next_power_of_2(shape.decode_rows // (num_heads // H) + 1) // 2,
        BLOCK_L=shape.keys,
        WINDOW=window,
        SOFTCAP=softcap is not None,
        **overlapping(q_NHD.device),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    if is_split:
        kernels._join_fwd_kernel[N if shape.splits > 1 else S, num_heads](
            parts,
            logs,
            tables.cu_queries_S1,
            tables.num_keys_S,
            out,
            N,
            S,
            shape.splits,
            shape.decode_splits,
            shape.keys_per_split,
            shape.keys_per_decode_split,
            HEADS=num_heads,
            V=V,
            BLOCK_S=triton.next_power_of_2(S + 1),
            BLOCK_V=power_of_two(V),
            BLOCK_P=_JOINED_AT_A_TIME,
            WINDOW=window,
            ROW_IS_TOKEN=shape.splits > 1,
            **overlapping(q_NHD.device),
        )
    return out


def attend(
    pages: Pages,
    pool: Pool,
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HNV: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """A layer's part of `attention.attend` on a GPU; [1, N, H, V]."""
    assert pages.cu_queries_S1 is not None
    assert pages.num_keys_S is not None
    tables = pages.tables_SM, pages.cu_queries_S1, pages.num_keys_S
    out: Tensor = _attend(
        query_1HND, key_1HND, value_1HNV, *pool, pages.places_N, *tables, scale, window, softcap, sinks_H
    )
    return out


# One step for compilers. It does not say that it writes to the pool: nothing else in a graph reads that, and a compiler
# which knew might copy it.
@torch.library.custom_op("molora::attend", mutates_args=())
def _attend(
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HNV: Tensor,
    k_pool_PBHD: Tensor,
    v_pool_PBHV: Tensor,
    places_N: Tensor,
    block_tables_SM: Tensor,
    cu_queries_S1: Tensor,
    num_keys_S: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    key_NHD, value_NHV = key_1HND[0].transpose(0, 1), value_1HNV[0].transpose(0, 1)
    write_kv(key_NHD, value_NHV, k_pool_PBHD, v_pool_PBHV, places_N)
    out_NHV = paged_attention(
        query_1HND[0].transpose(0, 1),
        k_pool_PBHD,
        v_pool_PBHV,
        BatchTables(block_tables_SM, cu_queries_S1, num_keys_S),
        scale=scale,
        window=window,
        softcap=softcap,
        sinks_H=sinks_H,
    )
    return out_NHV[None]


@_attend.register_fake
def _(query_1HND: Tensor, key_1HND: Tensor, value_1HNV: Tensor, *others: object) -> Tensor:
    return value_1HNV.new_empty(1, query_1HND.shape[2], query_1HND.shape[1], value_1HNV.shape[3])


def _check(
    q_NHD: Tensor,
    k_pool_PBHD: Tensor,
    v_pool_PBHV: Tensor,
    tables: BatchTables,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> None:
    q, k, v, S = q_NHD.shape, k_pool_PBHD.shape, v_pool_PBHV.shape, len(tables.num_keys_S)
    if q[1] % k[2] or q[2] != k[3] or k[:3] != v[:3]:
        raise ValueError(f"q {tuple(q)}, k_pool {tuple(k)} and v_pool {tuple(v)} do not fit together.")
    if not q_NHD.dtype == k_pool_PBHD.dtype == v_pool_PBHV.dtype:
        raise ValueError(f"q is {q_NHD.dtype}, the pool {k_pool_PBHD.dtype} and {v_pool_PBHV.dtype}: it must be one.")
    if not (k_pool_PBHD.is_contiguous() and v_pool_PBHV.is_contiguous()):
        raise ValueError("the pool must be contiguous.")
    if any(table.dtype != torch.int32 or table.stride(-1) != 1 for table in tables):
        raise ValueError("tables must be int32, their last dimension contiguous.")
    if len(tables.cu_queries_S1) != S + 1 or len(tables.block_tables_SM) != S:
        raise ValueError(f"{S} sequences need {S} block tables and {S + 1} entries of cu_queries.")
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"window and softcap must be positive or None, not {window} and {softcap}.")
    if sinks_H is not None and (sinks_H.shape != q[1:2] or sinks_H.stride(0) != 1):
        raise ValueError(f"sinks must be one contiguous score for each of {q[1]} heads, not {tuple(sinks_H.shape)}.")


@cache
def describe(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(2, 228 * 1024, 227 * 1024)  # of the interpreter: as on Hopper, but few programs
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        getattr(properties, "shared_memory_per_block_optin", 48 * 1024),
    )
