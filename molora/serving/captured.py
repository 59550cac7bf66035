"""Steps as CUDA graphs: static buffers and one graph for each size and kind of step, captured when it is first needed.

A graph runs what `runner.py` runs, of one size, on buffers that stay where they are; a smaller step is padded to it.
Padding tokens belong to no sequence: they are active for nobody, and their keys and values go to nobody's block.
Without a GPU the same buffers and the same padded step are run as they are, which is how it is tested.

Legend: N tokens, S sequences, D rows that draw, K adapters a token, M blocks a sequence, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora.injection import RoutedDecoder
from molora.routing import NO_ADAPTER, RouteRequest
from molora.serving.attention import Pages, Pool, attending
from molora.serving.compiled import CompiledLayers
from molora.serving.packing import Packed
from molora.serving.report import Layout, Report, read_report, write_report
from molora.serving.sampling import COLUMNS, Draw, Parts, choose, parts_of, table_of

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # tokens of a captured step
NEVER = (1 << 31) - 1  # the activation start of padding
logger = logging.getLogger(__name__)

_capturing = Lock()  # torch captures on one stream of the process
NUM_WARMUPS = 2  # forwards before a capture: libraries and Triton choose their kernels in them


class Kind(NamedTuple):
    """Which parts a step has: graphs differ by it.

    Attributes:
        is_routed: the router, the plan and the adapters run.
        acts_early: adapters act below the router layer as well.
        parts: of choosing the next tokens.
    """

    is_routed: bool
    acts_early: bool
    parts: Parts


@dataclass(frozen=True)
class Capacity:
    """What buffers have room for."""

    num_tokens: int
    num_sequences: int
    num_blocks: int
    num_adapters: int
    num_ids: int


class Buffers:
    """A step's inputs at fixed addresses, filled on the host and sent in one copy.

    The host has two of each, used in turn: a step is filled while the one before it may not have been sent yet.
    """

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        n, s, m, k = capacity.num_tokens, capacity.num_sequences, capacity.num_blocks, capacity.num_adapters
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "ids_N": ((n,), np.int64),
            "follows_N": ((n,), np.int64),
            "positions_N": ((n,), np.int64),
            "places_N": ((n,), np.int64),
            "start_N": ((n,), np.int64),
            "version_N": ((n,), np.int64),
            "kept_S": ((s,), np.int64),
            "slots_NK": ((n, k), np.int32),
            "gates_NK": ((n, k), np.float32),
            "cu_queries_S1": ((s + 1,), np.int32),
            "num_keys_S": ((s,), np.int32),
            "tables_SM": ((s, m), np.int32),
            "table_S5": ((s, COLUMNS), np.float64),
            "auto_N": ((n,), np.bool_),
            "prepared_N": ((n,), np.bool_),
        }
        # Apart from the rest, since few steps need them and they are large.
        self.masks_SW = torch.full((s, -(-capacity.num_ids // 32)), -1, dtype=torch.int32, device=device)
        spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (shape, dtype) in shapes.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            spans[name] = end, end + size
            end += -(-size // 16) * 16
        staged = [torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)]
        self._turns = cycle(
            (
                each,
                {
                    name: each[slice(*spans[name])].numpy().view(dtype).reshape(shape)
                    for name, (shape, dtype) in shapes.items()
                },
            )
            for each in staged
        )
        self._sent = torch.zeros(end, dtype=torch.uint8, device=device)
        self.device: Mapping[str, Tensor] = {
            name: self._sent[slice(*spans[name])].view(torch.from_numpy(np.zeros(0, dtype)).dtype).view(shape)
            for name, (shape, dtype) in shapes.items()
        }

    def fill(self, packed: Packed, draws: Sequence[Draw], parts: Parts, nobodys: int) -> None:
        """Write a step and what pads it, and send it."""
        staged, host = next(self._turns)
        n = len(packed.ids_N)
        for name, values, padding in (
            ("ids_N", packed.ids_N, 0),
            ("follows_N", packed.follows_N, -1),
            ("positions_N", packed.positions_N, 0),
            ("places_N", packed.places_N, nobodys),
        ):
            host[name][:n], host[name][n:] = values, padding
        write_tables(packed, host["tables_SM"], host["cu_queries_S1"], host["num_keys_S"])
        num_kept = len(packed.kept)
        host["kept_S"][:num_kept], host["kept_S"][num_kept:] = packed.kept, 0
        host["start_N"][:] = NEVER
        routes = packed.routes
        if routes is not None:
            k = routes.slots_NK.shape[1]
            host["start_N"][:n] = np.minimum(routes.start_N, NEVER)
            host["version_N"][:n], host["version_N"][n:] = routes.version_N, 0
            host["auto_N"][:n], host["auto_N"][n:] = routes.auto_N, False
            host["prepared_N"][:n], host["prepared_N"][n:] = routes.prepared_N, False
            host["slots_NK"][:] = NO_ADAPTER
            host["slots_NK"][:n, :k], host["gates_NK"][:n, :k] = routes.slots_NK, routes.gates_NK
        if parts.draws:  # else nobody looks
            host["table_S5"][: len(draws)], host["table_S5"][len(draws) :] = table_of(draws), 0
        self._sent.copy_(staged, non_blocking=True)
        if parts.masks:
            self.masks_SW.fill_(-1)
            for s, each in enumerate(draws):
                if each.bitmask is not None:
                    self.masks_SW[s].copy_(each.bitmask)

    def request(self) -> RouteRequest:
        """What the routes of every step in these buffers are asked for."""
        on = self.device
        return RouteRequest(
            on["start_N"][None],
            on["auto_N"][None],
            on["slots_NK"][None],
            on["gates_NK"][None],
            version=on["version_N"][None],
            prepared=on["prepared_N"][None],
        )


class CapturedSteps:
    """The graphs of a runner, by size and kind.

    Attributes:
        last_S: int64, what the last step drew, for a step that is sent before the host knows it.
    """

    def __init__(
        self,
        decoder: RoutedDecoder,
        pools: dict[int, Pool],
        layers: CompiledLayers,
        *,
        nobodys: int,
        max_sequences: int,
        max_blocks: int,
        num_adapters: int,
        num_ids: int,
    ) -> None:
        """
        Args:
            nobodys: the place of what is not to be kept.
            max_blocks: of a sequence.
            num_adapters: that a token may have in a captured step; one with more is run as it is.
            num_ids: of the vocabulary, as wide as logits are.
        """
        self._decoder = decoder
        self._pools = pools
        self._layers = layers
        self._nobodys = nobodys
        self._max_sequences = max_sequences
        self._max_blocks = max_blocks
        self._num_adapters = num_adapters
        self._num_ids = num_ids
        self._buffers: dict[int, Buffers] = {}
        self._steps: dict[tuple[int, Kind], _Step] = {}
        # One step's outputs are read, or sent to the host, before the next one runs: all graphs may use one memory.
        self._memory = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None
        self.last_S = torch.zeros(max_sequences, dtype=torch.long, device=decoder.device)

    def fits(self, packed: Packed) -> bool:
        """Whether a step is small enough, and asks for nothing that a graph does not hold."""
        return (
            len(packed.ids_N) <= BUCKETS[-1]
            and len(packed.spans) <= self._max_sequences
            and packed.tables_SM.shape[1] <= self._max_blocks
            and len(packed.kept) == max(1, len(packed.drawn))
            and (packed.routes is None or packed.routes.slots_NK.shape[1] <= self._num_adapters)
        )

    def tables(self, packed: Packed) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """The blocks [S, M], first queries [S + 1] and keys [S] of a step that is not captured, padded to what buffers
        hold: then what is compiled for one serves all.
        """
        num_sequences, num_blocks = packed.tables_SM.shape
        s, m = max(num_sequences, self._max_sequences), max(num_blocks, self._max_blocks)
        tables = np.zeros((s, m), np.int32), np.zeros(s + 1, np.int32), np.zeros(s, np.int32)
        write_tables(packed, *tables)
        return tables

    def launch(self, packed: Packed, draws: Sequence[Draw]) -> tuple[Tensor, Outcome]:
        """Run a step; the logits [D, V] of the rows that draw, which the next step overwrites, and what will be known.

        At most one outcome may be unread when the next step is launched.
        """
        bucket = next(size for size in BUCKETS if size >= len(packed.ids_N))
        buffers = self._buffers.get(bucket)
        if buffers is None:
            capacity = Capacity(
                bucket, min(bucket, self._max_sequences), self._max_blocks, self._num_adapters, self._num_ids
            )
            buffers = self._buffers[bucket] = Buffers(capacity, self._decoder.device)
        asked, parts = packed.routes, parts_of(draws)
        buffers.fill(packed, draws, parts, self._nobodys)
        kind = Kind(asked is not None, asked is not None and asked.acts_early, parts)
        step = self._steps.get((bucket, kind))
        if step is None:
            last_S = self.last_S.clone()  # capturing runs the step a few times, and this once it is to read them yet
            step = self._steps[bucket, kind] = _Step(
                lambda: self._layers.run(lambda: self._forward(buffers, kind)), self._decoder.device, self._memory
            )
            self.last_S.copy_(last_S)
        out = step.run()
        num_drawn = len(packed.drawn)
        return out.logits_SV[:num_drawn], step.fetch(out, num_drawn)

    def _forward(self, buffers: Buffers, kind: Kind) -> _Output:
        on, decoder = buffers.device, self._decoder
        pages = Pages(
            self._pools,
            on["places_N"],
            on["tables_SM"],
            (),
            cu_queries_S1=on["cu_queries_S1"],
            num_keys_S=on["num_keys_S"],
        )
        request = buffers.request() if kind.is_routed else None
        ids_N = following(on["ids_N"], on["follows_N"], self.last_S)
        with decoder.requested(request, early=kind.acts_early), attending(decoder.model.config):
            out = decoder.model(
                input_ids=ids_N[None],
                position_ids=on["positions_N"][None],
                use_cache=False,
                logits_to_keep=on["kept_S"],
                pages=pages,
            )
            record = decoder.routes.record
            layout, host = None, []
            if record is not None:
                report, layout = write_report(record, on["kept_S"], decoder.temperature)
                host = [report]
        logits_SV = out.logits[0]
        masks_SW = buffers.masks_SW if kind.parts.masks else None
        ids_S = choose(logits_SV, on["table_S5"], masks_SW, kind.parts)
        self.last_S[: len(ids_S)] = ids_S
        return _Output(logits_SV, torch.cat([ids_S.int(), *host]), len(ids_S), layout)


def write_tables(
    packed: Packed, tables_SM: NDArray[np.int32], cu_queries_S1: NDArray[np.int32], num_keys_S: NDArray[np.int32]
) -> None:
    """Where the queries and keys of each sequence are, and sequences without any behind them."""
    s, num_blocks = packed.tables_SM.shape
    tables_SM[:s, :num_blocks] = packed.tables_SM
    cu_queries_S1[1 : s + 1], cu_queries_S1[s + 1 :] = [span.end for span in packed.spans], len(packed.ids_N)
    num_keys_S[:s], num_keys_S[s:] = [span.num_keys for span in packed.spans], 0


def following(ids_N: Tensor, follows_N: Tensor, last_S: Tensor) -> Tensor:
    """Token ids, those that were not known from what the last step drew."""
    drawn_N = last_S[follows_N.clamp(min=0)].clamp(min=0)  # there may be `NOTHING`: that answer ends, whatever it says
    return torch.where(follows_N >= 0, drawn_N, ids_N)


class Outcome:
    """The next tokens and the routes of a step, on their way to the host."""

    def __init__(self, out: _Output, sent: torch.cuda.Event | None, host: Tensor, num_drawn: int) -> None:
        """sent: has happened when `host` holds what the output's does; None if it does."""
        self._out, self._sent, self._host, self._num_drawn = out, sent, host, num_drawn

    def read(self) -> tuple[list[int], Report | None]:
        """Waits for them."""
        if self._sent is not None:
            self._sent.synchronize()
        host, layout = self._host.numpy(), self._out.layout
        report = None if layout is None else read_report(host[self._out.num_ids :], layout)
        return host[: self._num_drawn].tolist(), report


class _Output(NamedTuple):
    """What a captured step leaves, at fixed addresses.

    Attributes:
        host: what the host reads, in one piece: the next tokens [num_ids], and the report.
    """

    logits_SV: Tensor
    host: Tensor
    num_ids: int
    layout: Layout | None


class _Step:
    """One size and kind, captured when it is made. Without a GPU it is simply run again."""

    def __init__(self, forward: Callable[[], _Output], device: torch.device, memory: Any) -> None:
        self._forward = forward
        self._fetched: Iterator[Tensor] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            try:
                self._capture(device, memory)
            except RuntimeError:  # the model waits for the device somewhere, or memory is short: it still runs
                logger.exception("a step could not be captured, and is run as it is")
                self._graph = None

    def _capture(self, device: torch.device, memory: Any) -> None:
        forward = self._forward
        with _capturing:
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(NUM_WARMUPS):
                    forward()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device: one that loads an adapter, for instance.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                self._output = forward()
        self._graph = graph

    def fetch(self, out: _Output, num_drawn: int) -> Outcome:
        if not out.host.is_cuda:
            return Outcome(out, None, out.host, num_drawn)
        if self._fetched is None:
            self._fetched = cycle([torch.empty_like(out.host, device="cpu", pin_memory=True) for _ in range(2)])
        host = next(self._fetched)
        host.copy_(out.host, non_blocking=True)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record()
        return Outcome(out, sent, host, num_drawn)

    def run(self) -> _Output:
        if self._graph is None:
            return self._forward()
        self._graph.replay()
        return self._output
