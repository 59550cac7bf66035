"""One step of the engine on the device: all tokens of several sequences, packed in one row, in one forward.

It knows the model, the pool of keys and values and the routes; what to run, and who owns a block, it is told.

Legend: N tokens of the step, S sequences, D rows that draw, K adapters a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from molora_kernels import base_linear, sizes_to_compile
from numpy.typing import NDArray
from torch import Tensor

from molora.generation import Sampling, TokenLogprob, TokenRoute
from molora.injection import RoutedDecoder, text_config
from molora.routing import RouteRequest
from molora.serving.attention import Pages, Pool, PoolShape, PoolShapes, attending
from molora.serving.block_manager import Copy
from molora.serving.captured import BUCKETS, CapturedSteps, following
from molora.serving.compiled import CompiledLayers, compile_layers
from molora.serving.packing import Packed, PackedRoutes, Row, Span, pack
from molora.serving.report import Report, read_report, write_report
from molora.serving.sampling import Draw, draw, logprobs_of, read_logprobs
from molora.siblings import merge_siblings, with_others
from molora.slots import BASE, Hold, ResolvedRoute, read_route

Candidates = tuple[tuple[str, float], ...]
MAX_CAPTURED_ADAPTERS = 2  # a token; a step with a wider blend is not captured
MAX_WARM_DRAWS = 64  # tokens of a step that is captured for every way to draw before it is needed
LOGPROB_ROWS = 256  # of the vocabulary's width in float32 at a time


@dataclass(frozen=True)
class Drawn:
    """A drawn token, its log-probability if it was asked for, and the router's likeliest columns there."""

    token_id: int
    logprob: TokenLogprob | None = None
    candidates: tuple[tuple[str, float], ...] = ()


class StepOutput(NamedTuple):
    """What a step leaves.

    Attributes:
        routes: of each row's tokens, by digest.
        drawn: for each row that draws, in order.
        prompt_logprobs: of each row's `next_ids`.
    """

    routes: list[list[TokenRoute]]
    drawn: list[Drawn]
    prompt_logprobs: list[list[TokenLogprob]]


class Flight:
    """A step that was launched.

    Attributes:
        is_landed: what it leaves is here. Else the next step can be launched before that is read: what this one draws
            is known to the device, and no draw of this one changes how the next one is drawn.
    """

    def __init__(self, out: StepOutput | None, read: Callable[[], StepOutput] | None = None) -> None:
        self._out, self._read = out, read

    @property
    def is_landed(self) -> bool:
        return self._out is not None

    def land(self) -> StepOutput:
        """Waits for it."""
        if self._out is None:
            assert self._read is not None
            self._out, self._read = self._read(), None
        return self._out


class Runner:
    """
    Attributes:
        num_blocks: of the pool; the pool itself has one more, for what is not to be kept.
    """

    def __init__(
        self,
        decoder: RoutedDecoder,
        *,
        block_size: int,
        num_bytes: int,
        max_step_tokens: int,
        max_sequences: int,
        captures: bool,
    ) -> None:
        """
        Args:
            num_bytes: for the pool of keys and values.
            max_step_tokens, max_sequences: of a step.
            captures: siblings are merged, layers compiled, and small steps run as graphs on static buffers: on a GPU.

        Raises:
            ValueError: they hold no block.
        """
        self._decoder = decoder
        self._config = decoder.model.config
        _check_can_be_packed(decoder.model)
        self.block_size = block_size
        self._captures = captures
        self._max_step_tokens = max_step_tokens
        shapes = self._ask_for_shapes()
        self.num_bytes_per_token = sum(
            shape.num_heads * (shape.key_size + shape.value_size) * shape.dtype.itemsize for shape in shapes.values()
        )
        self.num_blocks = num_bytes // (self.num_bytes_per_token * block_size) - 1
        if self.num_blocks < 1:
            raise ValueError(
                f"{num_bytes} bytes hold no block of {block_size} tokens, of {self.num_bytes_per_token} bytes each; "
                "give the cache more memory."
            )
        self._nobodys = self.num_blocks * block_size
        self._pools = {layer: self._pool(shape) for layer, shape in shapes.items()}
        self._captured: CapturedSteps | None = None
        self._layers = CompiledLayers({}, {}, "")
        if captures:
            linears = with_others(decoder.model, decoder.linears)
            for linear in linears.values():
                linear.base_linear = base_linear
            merge_siblings(linears, self._ask_for_shapes)
            backend = "inductor" if decoder.device.type == "cuda" else "aot_eager"  # the latter shows that it can be
            pool_of = {module: self._pools[layer] for layer, module in shapes.modules.items()}
            self._layers = CompiledLayers(compile_layers(decoder.model, backend), pool_of, type(decoder.model).__name__)
            self._captured = CapturedSteps(
                decoder,
                self._pools,
                self._layers,
                nobodys=self._nobodys,
                max_sequences=max_sequences,
                max_blocks=min(self.num_blocks, -(-text_config(decoder.model).max_position_embeddings // block_size)),
                num_adapters=max(MAX_CAPTURED_ADAPTERS, decoder.top_k),
                num_ids=int(text_config(decoder.model).vocab_size),
            )

    @property
    def _device(self) -> AbstractContextManager[None]:
        """Kernels are launched and graphs captured on the current device."""
        device = self._decoder.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy the first tokens of blocks into others."""
        with self._device:
            for source, target, num_tokens in ((c.source, c.target, c.num_tokens) for c in copies):
                for pool in self._pools.values():
                    pool.keys[target, :num_tokens] = pool.keys[source, :num_tokens]
                    pool.values[target, :num_tokens] = pool.values[source, :num_tokens]

    def warm_up(self, hold: Hold | None, route: ResolvedRoute) -> None:
        """Compile and capture what most steps need: of every size, base and routed, and every way to draw for few.

        Steps that are too large to be captured have kernels by their size, and other ones for multiples of 16. Nothing
        is written to the cache. On a CPU there is nothing to do.

        Args:
            hold, route: of steps that are routed; base steps alone if `hold` is None.
        """
        if self._captured is None:
            return
        whole = min(self._max_step_tokens, self.num_blocks * self.block_size)
        captured = [size for size in BUCKETS if size <= whole]
        linears = [linear.computed_at_once for linear in self._decoder.linears.values()]
        larger = sizes_to_compile(range(BUCKETS[-1] + 1, whole, 64), linears, self._decoder.device)
        for size in [whole, *larger, *reversed(captured)]:
            ways = [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)]
            for sampling in ways if size <= MAX_WARM_DRAWS else ways[:1]:
                for of in [None, *([hold] if hold is not None else [])]:
                    row = Row(
                        token_ids=[0] * size,
                        first=0,
                        blocks=range(-(-size // self.block_size)),
                        draws=True,
                        writes=False,
                        activation_start=0,
                        route=BASE if of is None else route,
                        hold=of,
                    )
                    self.launch([row], [Draw(sampling, (), (), 0.0)]).land()

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row], draws: Sequence[Draw]) -> Flight:
        """Run the rows' tokens, or begin to: what is launched next finds their keys and values in the pool.

        Args:
            draws: for each row that draws, in order.
        """
        with self._device:
            packed = pack(rows, self.block_size, self._nobodys)
            if self._captured is None or not self._captured.fits(packed):
                return Flight(self._run(rows, packed, draws))
            logits, outcome = self._captured.launch(packed, draws)
            if all(each.is_free for each in draws):
                return Flight(None, lambda: _output(rows, packed, *outcome.read()))
            ids, report = outcome.read()
            if any(each.is_adjusted for each in draws):  # that was not part of the graph
                ids, logprobs = draw(logits, draws)
            else:
                logprobs = logprobs_of(logits, torch.tensor(ids, device=logits.device), draws)
            return Flight(_output(rows, packed, ids, report, logprobs))

    def _run(self, rows: Sequence[Row], packed: Packed, draws: Sequence[Draw]) -> StepOutput:
        logits, report = self._forward(packed)
        prompt_logprobs = _prompt_logprobs(rows, logits)
        if len(packed.drawn) < len(packed.kept):
            logits = logits[packed.drawn]
        ids, logprobs = draw(logits, draws)
        return _output(rows, packed, ids, report, logprobs, prompt_logprobs)

    def _forward(self, packed: Packed) -> tuple[Tensor, Report | None]:
        """The logits of the kept tokens, and the routes."""
        decoder, device = self._decoder, self._decoder.device

        def put(array: NDArray[Any], dtype: type = np.int64) -> Tensor:
            return torch.from_numpy(array.astype(dtype, copy=False)).to(device)

        places_N = put(packed.places_N)
        if self._captured is None:
            pages = Pages(self._pools, places_N, put(packed.tables_SM, np.int32), packed.spans)
        else:
            tables_SM, cu_queries_S1, num_keys_S = map(put, self._captured.tables(packed), [np.int32] * 3)
            pages = Pages(self._pools, places_N, tables_SM, packed.spans, cu_queries_S1, num_keys_S)
        request, early = None, False
        if packed.routes is not None:
            request, early = _route_request(packed.routes, device), packed.routes.acts_early
        ids_N = put(packed.ids_N)
        if self._captured is not None and (packed.follows_N >= 0).any():
            ids_N = following(ids_N, put(packed.follows_N), self._captured.last_S)
        inputs = {"input_ids": ids_N[None], "position_ids": put(packed.positions_N)[None]}
        kept = torch.tensor(packed.kept, device=device)
        with decoder.requested(request, early=early), attending(self._config):
            out = self._layers.run(lambda: decoder.model(**inputs, use_cache=False, logits_to_keep=kept, pages=pages))
            record = decoder.routes.record
            if record is None:
                return out.logits[0], None
            drawing = torch.tensor([packed.kept[index] for index in packed.drawn], dtype=torch.long, device=device)
            report, layout = write_report(record, drawing, decoder.temperature)
        return out.logits[0], read_report(report.cpu().numpy(), layout)

    def _ask_for_shapes(self) -> PoolShapes:
        """What each layer keeps of a token, found by a forward of one token whose attention does nothing else."""
        shapes = PoolShapes()
        device = self._decoder.device
        with torch.inference_mode(), self._decoder.requested(None), attending(self._config):
            self._decoder.model(
                input_ids=torch.zeros(1, 1, dtype=torch.long, device=device),
                position_ids=torch.zeros(1, 1, dtype=torch.long, device=device),
                use_cache=False,
                logits_to_keep=1,
                pages=shapes,
            )
        num_calls = [shapes.num_calls[layer] for layer in range(text_config(self._decoder.model).num_hidden_layers)]
        if any(count != 1 for count in num_calls):
            raise ValueError(
                f"{type(self._decoder.model).__name__} does not call transformers' attention interface once in each of "
                "its layers, so its cache cannot be paged."
            )
        return shapes

    def _pool(self, shape: PoolShape) -> Pool:
        num_blocks, device = self.num_blocks + 1, self._decoder.device

        def zeros(size: int) -> Tensor:
            if self._captures:  # for Triton's attention
                return torch.zeros(num_blocks, self.block_size, shape.num_heads, size, dtype=shape.dtype, device=device)
            # For torch's own: with a head's keys side by side it is twice as fast.
            pool = torch.zeros(shape.num_heads, num_blocks, self.block_size, size, dtype=shape.dtype)
            return pool.permute(1, 2, 0, 3)

        return Pool(zeros(shape.key_size), zeros(shape.value_size))


def _check_can_be_packed(model: Any) -> None:
    """
    Raises:
        ValueError: a token's result depends on more of the packed row than its own sequence, or on later tokens.
    """
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    missing = ""
    if kinds & {"longrope", "dynamic"}:
        missing = "its positions' frequencies change with the longest sequence of a batch (longrope, dynamic)"
    elif getattr(config, "attention_chunk_size", None):
        missing = "its attention is chunked"
    elif getattr(config, "use_bidirectional_attention", False):
        missing = "its attention looks ahead"
    if missing:
        raise ValueError(f"{type(model).__name__} cannot be served with other sequences in one row: {missing}.")


def _output(
    rows: Sequence[Row],
    packed: Packed,
    ids: Sequence[int],
    report: Report | None,
    logprobs: Sequence[TokenLogprob | None] | None = None,
    prompt_logprobs: list[list[TokenLogprob]] | None = None,
) -> StepOutput:
    routes, candidates = _name_routes(rows, packed.spans, report)
    drawn = list(map(Drawn, ids, logprobs or [None] * len(ids), candidates))
    return StepOutput(routes, drawn, prompt_logprobs or [[] for _ in rows])


def _name_routes(
    rows: Sequence[Row], spans: Sequence[Span], report: Report | None
) -> tuple[list[list[TokenRoute]], list[Candidates]]:
    """Each row's routes, by digest; and for each row that draws the router's likeliest columns, by name."""
    num_drawing = sum(row.draws for row in rows)
    if report is None:
        return [[()] * len(row.token_ids) for row in rows], [()] * num_drawing
    slots_NK, gates_NK = report.slots_NK.tolist(), report.gates_NK.tolist()
    routes = []
    for row, (first, end, _) in zip(rows, spans, strict=True):
        digests = {} if row.hold is None else row.hold.digests
        routes.append([read_route(slots_NK[t], gates_NK[t], digests) for t in range(first, end)])
    drawing = [row for row in rows if row.draws]
    candidates: list[Candidates] = [
        tuple((_column_name(row, column), prob) for column, prob in zip(columns, probs, strict=True))
        if row.route.auto and row.is_active
        else ()
        for row, columns, probs in zip(drawing, report.columns_DC.tolist(), report.probs_DC.tolist(), strict=False)
    ]
    return routes, candidates


def _column_name(row: Row, column: int) -> str:
    hold = row.hold
    assert hold is not None
    return hold.names[hold.digests[hold.version.column_slots[column - 1]]] if column else "base"


def _prompt_logprobs(rows: Sequence[Row], logits: Tensor) -> list[list[TokenLogprob]]:
    out: list[list[TokenLogprob]] = []
    at = 0
    for row in rows:
        found: list[TokenLogprob] = []
        for first in range(0, len(row.next_ids), LOGPROB_ROWS):
            ids = row.next_ids[first : first + LOGPROB_ROWS]
            logprobs = logits[at + first : at + first + len(ids)].float().log_softmax(-1)
            found += read_logprobs(logprobs, torch.tensor(ids, device=logits.device), row.num_top)
        out.append(found)
        at += len(row.next_ids) + row.draws
    return out


def _route_request(routes: PackedRoutes, device: torch.device) -> RouteRequest:
    def packed(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)[None]

    slots, gates = None, None
    if not routes.auto_N.all():
        slots, gates = packed(routes.slots_NK.astype(np.int32)), packed(routes.gates_NK)
    return RouteRequest(
        packed(routes.start_N),
        packed(routes.auto_N) if routes.asks_router else None,
        slots,
        gates,
        version=packed(routes.version_N),
        prepared=packed(routes.prepared_N),
    )
