"""The engine: many conversations at once over one paged cache.

A request is checked where it is submitted, and then belongs to the engine's own thread, which plans a step
(`scheduler.py`), runs it (`runner.py`), draws the next tokens (`sampling.py`) and hands them to the streams. It knows
nothing of HTTP.
"""

from __future__ import annotations

import gc
import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from molora.activation import Activation, Prompt
from molora.digest import json_digest
from molora.display import one_line
from molora.generation import Generation, TokenRoute
from molora.injection import text_config
from molora.serving.answer import Answer
from molora.serving.block_manager import NEVER, BlockManager, BlockTable, Source
from molora.serving.grammar import GrammarCompiler
from molora.serving.packing import Row
from molora.serving.request import (
    EngineClosedError,
    EngineError,
    EngineFullError,
    Request,
    RequestError,
    checking,
)
from molora.serving.runner import Drawn, Flight, Runner, StepOutput
from molora.serving.sampling import NOTHING
from molora.serving.scheduler import Scheduler, Work
from molora.serving.scheduler import Sequence as Tokens
from molora.serving.stream import Stream, agather, gather
from molora.serving.text import decode_of
from molora.slots import BASE, AdapterInfo, Hold, NoFreeSlotError, ResolvedRoute

if TYPE_CHECKING:
    from molora.model import MoLoRA

__all__ = [
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "EngineFullError",
    "EngineStats",
    "NoFreeSlotError",
    "Request",
    "RequestError",
]

logger = logging.getLogger(__name__)

IDLE_S = 10.0  # after which the thread ends; the next request starts one again
CPU_CACHE_BYTES = 1 << 30
GPU_CACHE_SHARE = 0.9  # of the memory that is free once the model is loaded


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """
    Attributes:
        kv_cache_bytes: memory for keys and values; None is `CPU_CACHE_BYTES` on a CPU, most of what is free on a GPU.
        block_size: tokens of a block: what is shared and evicted at once; None is 64 on a CPU, 128 on a GPU.
        max_step_tokens: tokens that a step computes at most; a longer prompt is read in several steps. None is 512 on a
            CPU, 2048 on a GPU.
        max_sequences: that run at once.
        max_waiting: requests that wait; one more is refused.
    """

    kv_cache_bytes: int | None = None
    block_size: int | None = None
    max_step_tokens: int | None = None
    max_sequences: int = 64
    max_waiting: int = 256

    def __post_init__(self) -> None:
        for name in ("kv_cache_bytes", "block_size", "max_step_tokens", "max_sequences", "max_waiting"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a whole number of 1 or more.")
        if self.max_step_tokens is not None and self.max_sequences > self.max_step_tokens:
            raise ValueError(
                f"max_sequences is {self.max_sequences}, over max_step_tokens, {self.max_step_tokens}: a step must "
                "have room for a token of each sequence."
            )


@dataclass(frozen=True)
class EngineStats:
    """A moment's counts. Those of tokens are totals since the start.

    Attributes:
        num_cached_tokens: prompt tokens whose keys and values were found.
        num_computed_tokens: rows that entered layer 0, but for those that were computed ahead and thrown away.
        num_recomputed_tokens: base tokens that were computed while they could be found: 0.
        num_reencoded_tokens: tokens that were found as active ones only, and computed once as base.
        num_replayed_tokens: tokens computed again after preemption.
        num_adapter_tokens: how many tokens each adapter acted on, by name; "base" for those on which none did.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    num_evicted_blocks: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_reencoded_tokens: int = 0
    num_replayed_tokens: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0
    num_adapter_tokens: dict[str, int] = field(default_factory=dict)


class Engine:
    """Continues many prompts at once; see `Request` for what may be asked.

    Attributes:
        m: the loaded model.
        config: what the engine was made with.
        captures: steps run compiled and as CUDA graphs: on a GPU.
    """

    def __init__(self, m: MoLoRA, config: EngineConfig | None = None) -> None:
        """
        Raises:
            ValueError: the cache's memory holds no block.
        """
        self.m = m
        self.config = config = EngineConfig() if config is None else config
        self.captures = on_gpu = m.decoder.device.type == "cuda"
        self._block_size = config.block_size or (128 if on_gpu else 64)
        self._max_step_tokens = config.max_step_tokens or max(2048 if on_gpu else 512, config.max_sequences)
        with m.lock:
            self._runner = Runner(
                m.decoder,
                block_size=self._block_size,
                num_bytes=_cache_bytes(m, config),
                max_step_tokens=self._max_step_tokens,
                max_sequences=config.max_sequences,
                captures=on_gpu,
            )
        self._domain = _domain(m)
        self._decode = decode_of(m.tokenizer)
        self._counts: Counter[str] = Counter()
        self._blocks, self._scheduler = self._new_cache()
        self._adapter_counts: Counter[str] = Counter()
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = self._has_frozen = False
        self._answers: dict[Tokens, Answer] = {}
        self._launched: _Launched | None = None  # the step in flight
        self._num_submitted = 0  # that the thread has not seen yet

    @property
    def is_ready(self) -> bool:
        return not self._closed

    @property
    def capacity(self) -> int:
        """The most tokens of one sequence, prompt and answer together."""
        return min(self.m.max_context, self._runner.num_blocks * self._block_size)

    def warm_up(self) -> None:
        """What would hold up requests later: on a GPU, compile and capture what most steps need, which takes a minute.

        What the process holds by then is kept from Python's garbage collector (`gc.freeze`) until the engine is closed:
        to look through a model's and a compiler's objects stops all threads, for up to half a second.
        """
        if self.captures:
            self._capture_steps()
        gc.collect()
        gc.freeze()
        self._has_frozen = True

    def _capture_steps(self) -> None:
        slots, hold, route = self.m.slots, None, BASE
        names = ["auto"] if self.m.bank.has_router else list(slots.current.adapters)[:1]
        if names:
            route = self.m.resolve_route(names[0])
            hold = slots.acquire(route)

        def warm() -> None:
            self._land()  # what it draws is where the next step would look for it
            with self.m.lock, torch.inference_mode():
                self._runner.warm_up(hold, route)

        try:
            self._call(warm)
        finally:
            if hold is not None:
                slots.release(hold)

    def submit(self, request: Request) -> Stream:
        """Check a request and queue it; its tokens come through the stream.

        Raises:
            RequestError: the request cannot be served, whenever it comes.
            EngineFullError: too many wait.
            NoFreeSlotError: the adapter that it names has no slot, and all slots are in use.
            EngineClosedError: the engine was closed.
        """
        self.m.check_not_routing()
        with self._wake:
            if self._closed:
                raise EngineClosedError("the engine was closed and takes no more requests.")
            num_waiting = self._scheduler.num_waiting + self._num_submitted
            if num_waiting >= self.config.max_waiting:
                raise EngineFullError(num_waiting, retry_after_s=1.0)
            self._num_submitted += 1
        try:
            stream = self._stream(request)
        except BaseException:
            with self._wake:
                self._num_submitted -= 1
            raise
        self._send(lambda: self._begin(stream))
        return stream

    def generate(self, requests: Request | Sequence[Request]) -> list[Generation]:
        """Answer requests side by side; returns when all have ended: in their order, and each one's n answers in order.

        Raises:
            what `submit` raises; EngineError if a step failed.
        """
        return gather(self.submit, [requests] if isinstance(requests, Request) else requests)

    async def agenerate(self, requests: Request | Sequence[Request]) -> list[Generation]:
        """`generate`, for an event loop."""
        return await agather(self.submit, [requests] if isinstance(requests, Request) else requests)

    def adapters(self) -> list[AdapterInfo]:
        """Those that requests which begin now may name."""
        return list(self.m.slots.current.adapters.values())

    def load_adapter(
        self,
        name: str,
        path: str | Path,
        *,
        activation: Activation | None = None,
        replace: bool = False,
        digest: str | None = None,
    ) -> AdapterInfo:
        """Let requests name the adapter of a PEFT folder; see `AdapterSlots.load`. Requests that run do not notice."""
        return self.m.slots.load(name, path, activation=activation, replaces=replace, digest=digest)

    def unload_adapter(self, name: str) -> None:
        """Requests that begin from now on cannot name it; see `AdapterSlots.unload`."""
        self.m.slots.unload(name)

    def clear_cache(self) -> None:
        """Forget what was computed.

        Raises:
            RuntimeError: requests are running or waiting.
        """

        def clear() -> None:
            if self._answers:
                raise RuntimeError("requests run; wait for them, or cancel them, before the cache is cleared.")
            self._forget()

        self._call(clear)

    def stats(self) -> EngineStats:
        scheduler, blocks = self._scheduler, self._blocks
        counts = dict(self._counts)
        counts["num_preemptions"] = counts.get("num_preemptions", 0) + scheduler.num_preempted
        counts["num_evicted_blocks"] = counts.get("num_evicted_blocks", 0) + blocks.num_evicted
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._num_submitted,
            num_blocks=self._runner.num_blocks,
            num_free_blocks=blocks.num_free,
            num_adapter_tokens=dict(self._adapter_counts),
            **counts,
        )

    def close(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that run go on for `drain_s` seconds at most, and end the rest."""
        self._closed = True
        deadline = time.monotonic() + drain_s
        while time.monotonic() < deadline and (self._answers or self._inbox or self._num_submitted):
            time.sleep(0.01)
        closed = EngineClosedError("the engine was closed.")
        thread = self._call(lambda: self._fail(list(self._answers.values()), closed))
        thread.join()  # it would keep the model's memory for a while
        if self._has_frozen:
            gc.unfreeze()

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.m.tokenizer, self.m.vocab_size, end_ids=self.m.eos_ids)

    def _stream(self, request: Request) -> Stream:
        """Check a request, and take hold of what it needs."""
        m, sampling = self.m, request.sampling
        with checking("prompt"):
            prompt = m.render(request.prompt)
            m.check_token_ids("the prompt", prompt.packed)
            m.check_lengths(prompt, None, self.capacity)
        with checking("max_new_tokens"):
            max_new_tokens = m.check_lengths(prompt, sampling.max_new_tokens, self.capacity)
        with checking("logit_bias"):
            m.check_token_ids("logit_bias", list(sampling.logit_bias))
        with checking("stop_token_ids"):
            m.check_token_ids("stop_token_ids", list(sampling.stop_token_ids))
        with checking("route"):
            route = m.resolve_route(request.route)
        version = m.slots.current
        with checking("activation"):
            start = m.resolve_activation(route, request.activation, prompt, version)
        try:
            salt = request.salt.encode()
        except UnicodeEncodeError as error:
            raise RequestError("salt", f"salt is no text: {error}.") from None
        stream = Stream(prompt.token_ids, self._cancel, m.check_not_routing)
        with checking("route"):
            hold = None if route.is_base else m.slots.acquire(route)
        if hold is not None:
            stream.holds(lambda: m.slots.release(hold))
        try:
            if hold is not None and hold.version is not version:  # an adapter was replaced meanwhile, and its policy
                with checking("activation"):
                    start = m.resolve_activation(route, request.activation, prompt, hold.version)
            stream.answers = self._new_answers(request, stream, prompt, route, start, hold, salt, max_new_tokens)
        except BaseException:
            stream.release()
            raise
        return stream

    def _new_answers(
        self,
        request: Request,
        stream: Stream,
        prompt: Prompt,
        route: ResolvedRoute,
        start: int,
        hold: Hold | None,
        salt: bytes,
        max_new_tokens: int,
    ) -> list[Answer]:
        sampling, m = request.sampling, self.m
        with checking("grammar"):
            grammar = None if sampling.grammar is None else self._grammars.compile(sampling.grammar)
        source = Source(salt=salt)
        if hold is not None and start < NEVER:
            source = Source(start, hold.version.route_digest(route).encode(), salt)
        keys = self._blocks.keys(prompt.packed, source)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return [
            Answer(
                stream=stream,
                index=index,
                tokens=Tokens(
                    prompt.packed[:],
                    source,
                    stream.num_prompt_tokens + max_new_tokens,
                    reads_cache=sampling.prompt_logprobs is None or index > 0,
                    keys=keys,
                ),
                route=route,
                hold=hold,
                activation_start=start,
                sampling=sampling,
                seed=seed,
                eos_ids=frozenset() if sampling.ignore_eos else m.eos_ids,
                matcher=None if grammar is None else grammar.matcher(),
                decode=self._decode,
            )
            for index in range(sampling.n)
        ]

    # What follows runs on the engine's thread, but for _call, _send and _cancel.

    def _call(self, action: Callable[[], None]) -> threading.Thread:
        """Do something on the engine's thread, between steps, and wait for it; that thread."""
        self.m.check_not_routing()
        done: Future[None] = Future()

        def act() -> None:
            try:
                action()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        thread = self._send(act)
        done.result()
        return thread

    def _send(self, action: Callable[[], None]) -> threading.Thread:
        with self._wake:
            self._inbox.append(action)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="molora-engine", daemon=True)
                self._thread.start()
            self._wake.notify()
            return self._thread

    def _cancel(self, stream: Stream) -> None:
        self._send(lambda: self._end(stream))

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._inbox and not self._answers and self._launched is None:
                    if self._closed or (not self._wake.wait(IDLE_S) and not self._inbox):
                        self._thread = None
                        return
                actions = list(self._inbox)
                self._inbox.clear()
            for action in (*actions, self._step):
                try:
                    action()
                except Exception as error:  # a fault of the engine itself: nobody may wait for ever, and it goes on
                    logger.exception("the engine failed beside the model")
                    self._fail(list(self._answers.values()), EngineError(f"the engine failed: {one_line(error)}"))
                    self._land()  # for nobody: the next step may use its buffers
                    self._forget()

    def _begin(self, stream: Stream) -> None:
        with self._wake:
            self._num_submitted -= 1
        if self._closed:
            stream.release()
            stream.fail(EngineClosedError("the engine was closed."))
        elif not stream.is_over:
            self._counts["num_prompt_tokens"] += stream.num_prompt_tokens
            self._add(stream.answers[0])

    def _add(self, answer: Answer) -> None:
        self._answers[answer.tokens] = answer
        self._scheduler.add(answer.tokens)

    def _end(self, stream: Stream) -> None:
        for answer in stream.answers:
            self._drop(answer)
        stream.release()

    def _drop(self, answer: Answer) -> None:
        if self._answers.pop(answer.tokens, None) is not None:
            self._scheduler.remove(answer.tokens)
            self._counts["num_recomputed_tokens"] += answer.tokens.num_recomputed

    def _fail(self, answers: Sequence[Answer], error: Exception) -> None:
        for stream in {id(answer.stream): answer.stream for answer in answers}.values():
            self._end(stream)
            stream.fail(error)

    def _step(self) -> None:
        """Launch the next step, and see to what the last one left, in this order where that can be."""
        last = self._launched
        if last is not None and not self._scheduler.can_run_ahead:
            self._land()
            last = None
        step = self._launch(is_alone=last is None) if self._answers else None
        if last is not None:
            self._land()
        self._launched = step
        if step is not None and step.flight.is_landed:
            self._land()

    def _launch(self, *, is_alone: bool) -> _Launched | None:
        """
        Args:
            is_alone: no step is in flight, so that somebody can run.

        Returns:
            None if nobody can run now, or the launch failed.
        """
        works = self._scheduler.plan()
        if not works:
            if is_alone:
                raise RuntimeError("sequences wait, and none of them can ever run")
            return None
        answers = [self._answers[work.sequence] for work in works]
        try:
            with self.m.lock:
                if copies := [copy for work in works for copy in work.copies]:
                    self._runner.copy(copies)
                rows = [self._row(work, answer) for work, answer in zip(works, answers, strict=True)]
                drawing = [answer for work, answer in zip(works, answers, strict=True) if work.draws]
                draws = [answer.draw(answer.tokens.num_pending - 1) for answer in drawing]
                flight = self._runner.launch(rows, draws)
        except Exception as error:  # whatever a model may raise, out of memory included
            self._land()  # whoever ends with that step did not need this one
            self._fail_step(answers, error)
            return None
        for place, answer in enumerate(drawing):
            answer.place = place
        return _Launched(works, answers, flight)

    def _land(self) -> None:
        """See to what the step in flight left, if there is one; for answers that ended meanwhile that is nothing."""
        step, self._launched = self._launched, None
        if step is None:
            return
        try:
            out = step.flight.land()
        except Exception as error:
            self._fail_step(step.answers, error)
            return
        self._counts["num_steps"] += 1
        drawn = iter(out.drawn)
        for index, (work, answer) in enumerate(zip(step.works, step.answers, strict=True)):
            token = next(drawn) if work.draws else None
            if answer.tokens not in self._answers:
                continue
            self._note(work, answer, out, index)
            self._scheduler.done(work)
            if token is not None:
                try:
                    self._push(answer, token)
                except Exception as error:  # of its text or its grammar: its own matter
                    logger.exception("an answer could not go on")
                    self._fail([answer], EngineError(f"the answer could not go on: {one_line(error)}"))

    def _fail_step(self, answers: Sequence[Answer], error: Exception) -> None:
        """Only this step's requests end."""
        self._counts["num_failed_steps"] += 1
        failure = EngineError(f"the step failed: {one_line(error)}")
        failure.__cause__ = error
        self._fail([answer for answer in answers if answer.tokens in self._answers], failure)

    def _row(self, work: Work, answer: Answer) -> Row:
        table, tokens = _table(work), answer.tokens
        end = work.first + work.num_tokens
        answer.begun()
        # Of each prompt token once, also where a prompt is read again after it had to make way.
        first_next = max(0, len(answer.prompt_logprobs) - work.first)
        last_next = min(end + 1, answer.num_prompt_tokens)
        next_ids = [] if tokens.reads_cache else tokens.token_ids[work.first + 1 + first_next : last_next]
        token_ids, follows = tokens.token_ids[work.first : end], -1
        if end > len(tokens.token_ids):  # the last one is being drawn
            token_ids.append(0)
            follows = answer.place
        return Row(
            token_ids=token_ids,
            first=work.first,
            blocks=table.blocks[: -(-end // self._block_size)],
            draws=work.draws,
            writes=work.writes,
            activation_start=answer.activation_start,
            route=answer.route,
            hold=answer.hold,
            follows=follows,
            known=answer.routes[work.first : end],
            next_ids=next_ids,
            first_next=first_next,
            num_top=answer.sampling.prompt_logprobs or 0,
        )

    def _note(self, work: Work, answer: Answer, out: StepOutput, index: int) -> None:
        """Keep the routes of what was computed, each token's once."""
        tokens = answer.tokens
        num_known = max(0, min(len(tokens.notes) - work.first, work.num_tokens))
        fresh: list[TokenRoute] = out.routes[index][num_known:]
        tokens.notes += fresh
        for route in fresh:
            if route and answer.hold is not None:
                for digest, _ in route:
                    self._adapter_counts[answer.hold.names[digest]] += 1
            else:
                self._adapter_counts["base"] += 1
        answer.prompt_logprobs += out.prompt_logprobs[index]
        answer.num_computed += work.num_tokens
        self._counts["num_computed_tokens"] += work.num_tokens
        if work.writes:
            tokens.num_replayed += num_known
            self._counts["num_replayed_tokens"] += num_known

    def _push(self, answer: Answer, drawn: Drawn) -> None:
        if drawn.token_id == NOTHING:
            raise OverflowError("the model's numbers overflowed; are the route's weights too large?")
        is_first = not answer.num_generated
        if is_first and answer.index == 0:  # of the prompt, which is one for all answers
            self._counts["num_cached_tokens"] += answer.num_reused
            self._counts["num_reencoded_tokens"] += answer.tokens.num_reencoded
        token = answer.push(drawn)
        self._counts["num_generated_tokens"] += 1
        if token.finish_reason is not None:
            self._drop(answer)
            answer.finish(token.finish_reason)
        answer.stream.put(token)
        if is_first and answer.index == 0:
            for other in answer.stream.answers[1:]:  # they find the prompt that was read for the first one
                self._add(other)

    def _forget(self) -> None:
        self._counts["num_preemptions"] += self._scheduler.num_preempted
        self._counts["num_evicted_blocks"] += self._blocks.num_evicted
        self._blocks, self._scheduler = self._new_cache()

    def _new_cache(self) -> tuple[BlockManager, Scheduler]:
        blocks = BlockManager(self._runner.num_blocks, self._block_size, self._domain)
        max_sequences = self.config.max_sequences
        return blocks, Scheduler(blocks, max_step_tokens=self._max_step_tokens, max_sequences=max_sequences)


@dataclass(frozen=True)
class _Launched:
    """A step and whose parts it has."""

    works: list[Work]
    answers: list[Answer]
    flight: Flight


def _table(work: Work) -> BlockTable:
    assert work.sequence.table is not None
    return work.sequence.table


def _domain(m: MoLoRA) -> bytes:
    """What all keys of the cache depend on, beside tokens and routes."""
    dtype = str(m.model.dtype)
    config = text_config(m.model).to_json_string(use_diff=False)
    return json_digest([m.base_digest, dtype, config, "activated"]).encode()


def _cache_bytes(m: MoLoRA, config: EngineConfig) -> int:
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if m.decoder.device.type != "cuda":
        return CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(m.decoder.device)
    return int(free * GPU_CACHE_SHARE)
