"""Attention over pages, each query against a softmax written down in float64. Without a GPU: Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_kernels.backend import triton_runs_on
from torch import Tensor

from molora.serving import attention
from molora.serving import paged_attention_kernels as kernels
from molora.serving.packing import Span
from molora.serving.paged_attention import BatchTables, Device, LaunchShape, choose_shape, paged_attention, write_kv

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.skipif(not triton_runs_on(DEVICE), reason="no Triton")]
if DEVICE.type == "cuda":
    pytestmark.append(pytest.mark.gpu)
H200 = Device(132, 228 * 1024, 227 * 1024)
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL = LaunchShape(
    rows=16,
    decode_rows=16,
    keys=16,
    splits=3,
    decode_splits=4,
    keys_per_split=8,
    keys_per_decode_split=8,
    num_programs=3,
    num_warps=4,
    num_stages=2,
)
WIDE = replace(SMALL, rows=64, splits=1)  # scores are not transposed


@dataclass(frozen=True)
class Batch:
    """A packed batch over a pool that is NaN wherever no key of a sequence is, and the same keys side by side."""

    q_NHD: Tensor
    k_pool_PBHD: Tensor
    v_pool_PBHV: Tensor
    tables: BatchTables
    spans: list[Span]
    keys: list[Tensor]  # of each sequence, [L, H, D]
    values: list[Tensor]

    def attend(self, shape: LaunchShape | None = SMALL, **options: Any) -> Tensor:
        out = torch.full((*self.q_NHD.shape[:2], self.v_pool_PBHV.shape[3]), torch.nan).to(self.q_NHD)
        options = {"scale": self.q_NHD.shape[2] ** -0.5} | options
        pool = self.k_pool_PBHD, self.v_pool_PBHV
        return paged_attention(self.q_NHD, *pool, self.tables, out=out, shape=shape, **options)


def make_batch(
    sequences: Sequence[tuple[int, int]] = ((1, 20), (5, 3), (1, 0), (19, 30)),
    *,
    num_padding: int = 2,
    num_heads: int = 2,
    group: int = 2,
    head_sizes: tuple[int, int] = (16, 16),
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """Sequences are (queries, keys before them). The padding is tokens of no sequence, and as many empty sequences."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(DEVICE, dtype)

    spans, keys, values, places = [], [], [], []
    first = 0
    blocks_of = [-(-(queries + before) // block_size) for queries, before in sequences]
    num_blocks = sum(blocks_of) + 2
    free = torch.randperm(num_blocks, generator=rng).tolist()
    tables_SM = torch.randint(num_blocks, (len(sequences) + num_padding, max(blocks_of) + 2), generator=rng)
    for index, (queries, before) in enumerate(sequences):
        num_keys = queries + before if queries else 0
        spans.append(Span(first, first + queries, num_keys))
        first += queries
        keys.append(draw(num_keys, num_heads, head_sizes[0]))
        values.append(draw(num_keys, num_heads, head_sizes[1]))
        blocks = torch.tensor([free.pop() for _ in range(blocks_of[index])], dtype=torch.int64)
        tables_SM[index, : len(blocks)] = blocks
        key_L = torch.arange(num_keys)
        places.append(blocks[key_L // block_size] * block_size + key_L % block_size)
    k_pool = torch.full((num_blocks, block_size, num_heads, head_sizes[0]), torch.nan).to(DEVICE, dtype)
    v_pool = torch.full((num_blocks, block_size, num_heads, head_sizes[1]), torch.nan).to(DEVICE, dtype)
    write_kv(torch.cat(keys), torch.cat(values), k_pool, v_pool, torch.cat(places).to(DEVICE))
    ends = [span.end for span in spans] + [first] * num_padding
    return Batch(
        q_NHD=draw(num_heads * group, first + num_padding, head_sizes[0]).transpose(0, 1),
        k_pool_PBHD=k_pool,
        v_pool_PBHV=v_pool,
        tables=BatchTables(
            tables_SM.to(DEVICE, torch.int32),
            torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE),
            torch.tensor([span.num_keys for span in spans] + [0] * num_padding, dtype=torch.int32, device=DEVICE),
        ),
        spans=spans,
        keys=keys,
        values=values,
    )


def solve(
    batch: Batch,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The definition, one query at a time, in float64; zeros for padding."""
    q_NHD = batch.q_NHD.double().cpu()
    N, num_heads, D = q_NHD.shape
    out = torch.zeros(N, num_heads, batch.v_pool_PBHV.shape[3], dtype=torch.float64)
    for (first, end, num_keys), k_LHD, v_LHV in zip(batch.spans, batch.keys, batch.values, strict=True):
        for token in range(first, end):
            position = num_keys - end + token
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            group = num_heads // k_LHD.shape[1]
            k_lHD = k_LHD[seen].double().cpu().repeat_interleave(group, 1)
            v_lHV = v_LHV[seen].double().cpu().repeat_interleave(group, 1)
            scores_Hl = torch.einsum("hd,lhd->hl", q_NHD[token], k_lHD) * (scale or D**-0.5)
            if softcap is not None:
                scores_Hl = softcap * torch.tanh(scores_Hl / softcap)
            if sinks_H is not None:
                scores_Hl = torch.cat([scores_Hl, sinks_H.double().cpu()[:, None]], 1)
            weights_Hl = scores_Hl.softmax(1)[:, : len(k_lHD)]
            out[token] = torch.einsum("hl,lhv->hv", weights_Hl, v_lHV)
    return out


def assert_solved(batch: Batch, out: Tensor, **options: Any) -> None:
    expected = solve(batch, **options)
    error = (out.double().cpu() - expected).abs().max().item()
    assert error <= LIMITS[out.dtype] * (1 + expected.abs().max().item()), error  # NaN is no less either


sequences = st.lists(
    st.one_of(
        st.tuples(st.just(1), st.integers(0, 70)),
        st.tuples(st.integers(2, 40), st.sampled_from([0, 1, 15, 16, 50])),
        st.just((0, 0)),
    ),
    min_size=1,
    max_size=4,
).filter(lambda drawn: any(queries for queries, _ in drawn))


@given(
    sequences=sequences,
    num_padding=st.integers(0, 3),
    num_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 7, 8]),
    head_sizes=st.sampled_from([(16, 16), (32, 32), (80, 80), (96, 96), (24, 16), (256, 256)]),
    block_size=st.sampled_from([8, 16, 32, 24]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    window=st.sampled_from([None, 1, 7, 16, 40]),
    softcap=st.sampled_from([None, 5.0]),
    has_sinks=st.booleans(),
    shape=st.sampled_from([SMALL, WIDE, None]),
    keys=st.sampled_from([16, 32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, derandomize=True)
def test_every_query_sees_its_own_keys_only(
    sequences: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    shape: LaunchShape | None,
    keys: int,
    seed: int,
    **sizes: Any,
) -> None:
    batch = make_batch(sequences, seed=seed, **sizes)
    num_heads = batch.q_NHD.shape[1]
    sinks_H = torch.linspace(-2, 4, num_heads, device=DEVICE) if has_sinks else None
    options = {"window": window, "softcap": softcap, "sinks_H": sinks_H}
    out = batch.attend(replace(shape, keys=keys) if shape else None, **options)
    assert_solved(batch, out, **options)


def test_bfloat16_is_summed_in_float32() -> None:
    batch = make_batch(dtype=torch.bfloat16, head_sizes=(64, 64))
    for shape in (SMALL, WIDE):
        assert_solved(batch, batch.attend(shape))


@pytest.mark.parametrize("before", [0, 3, 20, 40])
def test_a_sink_takes_its_share_once(before: int) -> None:
    """However the keys are split, and where a split is left without any."""
    batch = make_batch([(1, before), (2, before)], num_padding=0)
    sinks_H = torch.tensor([-3.0, 0.0, 2.0, 30.0], device=DEVICE)
    assert_solved(batch, batch.attend(replace(SMALL, splits=5, decode_splits=5), sinks_H=sinks_H), sinks_H=sinks_H)


@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["rows16", "rows64"])
def test_keys_that_a_window_has_left_behind_are_not_read(shape: LaunchShape) -> None:
    batch = make_batch([(1, 60), (5, 30)], num_padding=0, block_size=8)
    expected = solve(batch, window=9)
    for index, (first, end, num_keys) in enumerate(batch.spans):
        gone = num_keys - (end - first) - 9 + 1  # before what the first query sees
        for key in range(gone):
            place = batch.tables.block_tables_SM[index, key // 8], key % 8
            batch.k_pool_PBHD[place], batch.v_pool_PBHV[place] = torch.nan, torch.nan
        batch.tables.block_tables_SM[index, : gone // 8] = 1 << 30  # not even looked up
    out = batch.attend(shape, window=9).double().cpu()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_the_same_call_gives_the_same_bits() -> None:
    batch = make_batch(dtype=torch.float16)
    assert torch.equal(batch.attend(), batch.attend())


@pytest.mark.parametrize("shape", [SMALL, WIDE, None], ids=["rows16", "rows64", "chosen"])
def test_neighbours_change_no_bit(shape: LaunchShape | None) -> None:
    """Of a decoded token and of a chunk, in the same shape."""
    batch = make_batch([(1, 50), (6, 20), (4, 9), (1, 3)], num_padding=0)
    before = batch.attend(shape)
    k_pool, v_pool = batch.k_pool_PBHD.clone(), batch.v_pool_PBHV.clone()
    for index in (2, 3):  # others' keys, and how many there are
        used = batch.tables.block_tables_SM[index, : -(-batch.spans[index].num_keys // 8)]
        k_pool[used], v_pool[used] = 9.0, -9.0
    tables = batch.tables._replace(num_keys_S=batch.tables.num_keys_S.clone())
    tables.num_keys_S[3] = 2
    after = replace(batch, k_pool_PBHD=k_pool, v_pool_PBHV=v_pool, tables=tables).attend(shape)
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7:], after[7:])


def shared_batch(lengths: Sequence[int], num_shared: int, **options: Any) -> tuple[Batch, Batch]:
    """Sequences that decode, whose first blocks are those of the first one; and the same with blocks of their own."""
    apart = make_batch([(1, length - 1) for length in lengths], block_size=8, **options)
    tables_SM = apart.tables.block_tables_SM.clone()
    for s, length in enumerate(lengths):
        here = slice(0, min(num_shared, length - 1) // 8)
        for pool in (apart.k_pool_PBHD, apart.v_pool_PBHV):
            pool[tables_SM[s, here].long()] = pool[tables_SM[0, here].long()]
        tables_SM[s, here] = tables_SM[0, here]
    return replace(apart, tables=apart.tables._replace(block_tables_SM=tables_SM)), apart


@pytest.mark.parametrize(
    ("lengths", "num_shared", "options", "sinks"),
    [
        ([60, 61, 62, 63, 64], 48, {}, False),
        ([60, 61, 62, 63, 64], 48, {}, True),
        ([64] * 9, 56, {"num_heads": 1}, False),
        ([64, 64, 40, 80, 64, 17], 40, {"num_heads": 1}, True),  # one of them cuts its keys elsewhere
        ([64] * 5, 64 - 8, {"group": 1}, True),
        ([64] * 5, 64 - 8, {"group": 16, "num_heads": 1}, False),  # no tile has room for two
        ([64] * 6, 64 - 8, {"group": 5, "dtype": torch.bfloat16}, True),
    ],
)
def test_who_reads_the_same_blocks_gets_the_bits_it_would_get_alone(
    lengths: list[int], num_shared: int, options: dict[str, Any], sinks: bool
) -> None:
    shared, apart = shared_batch(lengths, num_shared, **options)
    sinks_H = torch.randn(shared.q_NHD.shape[1], device=DEVICE) if sinks else None
    together, alone = (batch.attend(sinks_H=sinks_H) for batch in (shared, apart))
    if torch.cuda.is_available():
        assert torch.equal(together, alone)
    else:  # the interpreter's products are NumPy's, whose bits depend on a matrix's shape on some processors
        torch.testing.assert_close(together, alone)


@triton.jit
def _count_all(tables_ptr, cu_queries_ptr, num_keys_ptr, out_ptr, tables_stride_s, N, S, SPLITS: tl.constexpr):
    s, split = tl.program_id(0), tl.program_id(1)
    counted = kernels._count_readers(
        tables_ptr, cu_queries_ptr, num_keys_ptr, tables_stride_s, s, split, N, S, 1, SPLITS, 8, 8, 8, 16, 4
    )
    tl.store(out_ptr + s * SPLITS + split, counted)


@pytest.mark.parametrize(
    ("lengths", "num_shared", "expected"),
    [
        ([64] * 5, 48, [[4, 4, 4, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]]),
        ([64] * 3, 40, [[3, 3, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]),  # a split that is shared in part is not
        ([64, 64, 40, 64, 64], 40, [[4, 4, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]),
        ([64, 64, 80, 64], 48, [[2, 2, 2, 1], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),  # in splits of 16, 16, 32, 16
        ([64, 64], 0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_sequences_side_by_side_read_their_shared_blocks_once(
    lengths: list[int], num_shared: int, expected: list[list[int]]
) -> None:
    tables = shared_batch(lengths, num_shared)[0].tables
    counted = torch.zeros(len(lengths), 4, dtype=torch.int32, device=DEVICE)
    _count_all[(len(lengths), 4)](
        *tables,
        counted,
        tables.block_tables_SM.stride(0),
        int(tables.cu_queries_S1[-1]),
        len(tables.num_keys_S),
        SPLITS=4,
    )
    assert counted.tolist() == expected


def test_what_is_not_to_be_kept_is_not_written() -> None:
    key, value = torch.randn(4, 2, 24, device=DEVICE), torch.randn(4, 2, 16, device=DEVICE)
    for dtype in (torch.int32, torch.int64):
        k_pool, v_pool = torch.zeros(3, 8, 2, 24, device=DEVICE), torch.zeros(3, 8, 2, 16, device=DEVICE)
        write_kv(key, value, k_pool, v_pool, torch.tensor([9, -1, 0, 23], dtype=dtype, device=DEVICE))
        for pool, new in ((k_pool, key), (v_pool, value)):
            rows = pool.flatten(0, 1)
            assert torch.equal(rows[[9, 0, 23]], new[[0, 2, 3]])
            assert rows.count_nonzero() == new[[0, 2, 3]].numel()


@pytest.mark.parametrize("window", [None, 7])
def test_the_engine_attends_on_a_gpu_as_it_does_on_a_cpu(window: int | None) -> None:
    """`attention.attend` with the tables on the device, and without."""
    batch = make_batch([(1, 20), (5, 3), (19, 0)], num_padding=0)
    module = torch.nn.Module()
    module.layer_idx = 3
    places_N = torch.cat(
        [
            tables[key_n // 8].long().cpu() * 8 + key_n % 8
            for tables, (first, end, num_keys) in zip(batch.tables.block_tables_SM, batch.spans, strict=True)
            for key_n in [torch.arange(num_keys - (end - first), num_keys)]
        ]
    )
    new = [slice(span.num_keys - (span.end - span.first), None) for span in batch.spans]
    key, value = (
        torch.cat([rows[part] for rows, part in zip(of, new, strict=True)]).transpose(0, 1)[None]
        for of in (batch.keys, batch.values)
    )
    outs = []
    for device, on_device in ((torch.device("cpu"), {}), (DEVICE, batch.tables._asdict())):
        k_pool, v_pool = batch.k_pool_PBHD.to(device, copy=True), batch.v_pool_PBHV.to(device, copy=True)
        k_pool.flatten(0, 1)[places_N], v_pool.flatten(0, 1)[places_N] = torch.nan, torch.nan
        pages = attention.Pages(
            {3: attention.Pool(k_pool, v_pool)},
            places_N.to(device),
            batch.tables.block_tables_SM.to(device),
            batch.spans,
            on_device.get("cu_queries_S1"),
            on_device.get("num_keys_S"),
        )
        tensors = (tensor.to(device) for tensor in (batch.q_NHD.transpose(0, 1)[None], key, value))
        out, _ = attention.attend(module, *tensors, None, sliding_window=window, pages=pages)
        outs.append(out.cpu())
    assert_solved(batch, outs[1][0], window=window)
    torch.testing.assert_close(outs[0], outs[1])


LLAMA = {"num_heads": 8, "group": 4, "head_sizes": (128, 128), "item_bytes": 2, "max_keys": 1 << 17, "device": H200}


@pytest.mark.parametrize(
    ("num_tokens", "num_sequences", "rows", "splits", "decode_splits"),
    [
        (1, 1, 16, 16, 33),
        (8, 8, 32, 16, 33),
        (16, 16, 64, 16, 33),  # 16 decoded tokens, or a conversation's 16 new ones
        (64, 64, 64, 8, 33),
        (256, 256, 64, 2, 32),
        (512, 64, 128, 1, 33),
        (8192, 256, 128, 1, 32),
    ],
)
def test_shapes_fill_the_device(
    num_tokens: int, num_sequences: int, rows: int, splits: int, decode_splits: int
) -> None:
    shape = choose_shape(num_tokens, num_sequences, **LLAMA)
    assert (shape.rows, shape.splits, shape.decode_splits) == (rows, splits, decode_splits)
    assert shape.num_stages >= 2
    assert shape.num_programs >= (264 if rows < 128 else 132)


@given(
    num_tokens=st.integers(1, 9000),
    num_sequences=st.integers(1, 300),
    num_heads=st.sampled_from([1, 2, 8, 32]),
    group=st.sampled_from([1, 3, 4, 8, 71]),
    head_size=st.sampled_from([16, 80, 128, 192, 256]),
    item_bytes=st.sampled_from([2, 4]),
    max_keys=st.integers(1, 1 << 20),
    device=st.sampled_from([H200, Device(108, 164 * 1024, 163 * 1024), Device(128, 100 * 1024, 99 * 1024)]),
)
def test_shapes_fit(group: int, head_size: int, item_bytes: int, device: Device, **capacities: int) -> None:
    shape = choose_shape(
        group=group, head_sizes=(head_size, head_size), item_bytes=item_bytes, device=device, **capacities
    )
    assert shape.rows >= shape.decode_rows >= group
    assert shape.num_stages >= 1
    assert shape.num_programs >= 1
    padded = 1 << (head_size - 1).bit_length()
    num_bytes = item_bytes * padded * (shape.rows + 2 * shape.num_stages * shape.keys)
    assert num_bytes <= device.program_bytes or shape.num_stages == 1
    num_parts = capacities["num_sequences"] * shape.decode_splits * (shape.decode_splits > 1)
    num_parts += capacities["num_tokens"] * shape.splits * (shape.splits > 1)
    assert num_parts * capacities["num_heads"] * group * head_size * 4 <= 1 << 28


def test_what_does_not_fit_together_is_refused() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match="do not fit together"):
        replace(batch, q_NHD=batch.q_NHD[:, :3]).attend()
    with pytest.raises(ValueError, match="it must be one"):
        replace(batch, q_NHD=batch.q_NHD.half()).attend()
    with pytest.raises(ValueError, match="int32"):
        replace(batch, tables=batch.tables._replace(num_keys_S=batch.tables.num_keys_S.long())).attend()
    with pytest.raises(ValueError, match="entries of cu_queries"):
        replace(batch, tables=batch.tables._replace(num_keys_S=batch.tables.num_keys_S[1:])).attend()
    with pytest.raises(ValueError, match="window and softcap must be positive"):
        batch.attend(window=0)
    with pytest.raises(ValueError, match="sinks"):
        batch.attend(sinks_H=torch.zeros(3, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous"):
        replace(batch, k_pool_PBHD=batch.k_pool_PBHD.transpose(1, 2).contiguous().transpose(1, 2)).attend()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_captured_call_follows_its_tables() -> None:
    sequences = [[(1, 50), (6, 20), (4, 9)], [(3, 70), (1, 3), (5, 0)], [(9, 1), (1, 0), (1, 200)]]
    batches = [
        make_batch(drawn, num_padding=12 - sum(n for n, _ in drawn), seed=i) for i, drawn in enumerate(sequences)
    ]
    num_blocks = max(len(batch.k_pool_PBHD) for batch in batches)
    width = max(batch.tables.block_tables_SM.shape[1] for batch in batches)
    q, k_pool, v_pool = batches[0].q_NHD.clone(), *(torch.empty(num_blocks, 8, 2, 16, device=DEVICE) for _ in "kv")
    tables = BatchTables(
        torch.zeros(15, width, dtype=torch.int32, device=DEVICE),
        torch.zeros(16, dtype=torch.int32, device=DEVICE),
        torch.zeros(15, dtype=torch.int32, device=DEVICE),
    )

    def attend() -> Tensor:
        return paged_attention(q, k_pool, v_pool, tables, scale=0.25)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for batch in batches:
        q.copy_(batch.q_NHD)
        k_pool[: len(batch.k_pool_PBHD)], v_pool[: len(batch.v_pool_PBHV)] = batch.k_pool_PBHD, batch.v_pool_PBHV
        block_tables_SM, cu_queries_S1, num_keys_S = batch.tables
        S = len(num_keys_S)
        tables.block_tables_SM[:S, : block_tables_SM.shape[1]] = block_tables_SM
        tables.cu_queries_S1.fill_(int(cu_queries_S1[-1]))[: S + 1] = cu_queries_S1
        tables.num_keys_S.zero_()[:S] = num_keys_S
        graph.replay()
        assert_solved(batch, out)
