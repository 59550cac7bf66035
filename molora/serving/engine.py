"""The engine: many conversations at once over one paged cache.

A request is checked where it is submitted, and then belongs to the engine's own thread, which takes all that run from
step to step (`steps.py`). It knows nothing of HTTP.
"""

from __future__ import annotations

import gc
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from molora.activation import Activation, Prompt
from molora.digest import json_digest
from molora.display import one_line
from molora.generation import Generation
from molora.injection import text_config
from molora.serving.answer import Answer
from molora.serving.block_manager import NEVER, Source
from molora.serving.engine_config import EngineConfig, EngineStats
from molora.serving.grammar import GrammarCompiler
from molora.serving.request import (
    EngineClosedError,
    EngineError,
    EngineFullError,
    Request,
    RequestError,
    checking,
)
from molora.serving.runner import Runner
from molora.serving.scheduler import Sequence as Tokens
from molora.serving.steps import Steps
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
        max_step_tokens = config.max_step_tokens or max(2048 if on_gpu else 512, config.max_sequences)
        with m.lock:
            self._runner = Runner(
                m.decoder,
                block_size=config.block_size or (128 if on_gpu else 64),
                num_bytes=_cache_bytes(m, config),
                max_step_tokens=max_step_tokens,
                max_sequences=config.max_sequences,
                captures=on_gpu,
            )
        self._steps = Steps(
            self._runner,
            m.lock,
            domain=_domain(m),
            max_step_tokens=max_step_tokens,
            max_sequences=config.max_sequences,
        )
        self._decode = decode_of(m.tokenizer)
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = self._has_frozen = False
        self._num_submitted = 0  # that the thread has not seen yet

    @property
    def is_ready(self) -> bool:
        return not self._closed

    @property
    def capacity(self) -> int:
        """The most tokens of one sequence, prompt and answer together."""
        return min(self.m.max_context, self._runner.num_blocks * self._runner.block_size)

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
            self._steps.land()  # what it draws is where the next step would look for it
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
            num_waiting = self._steps.scheduler.num_waiting + self._num_submitted
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
            if self._steps.answers:
                raise RuntimeError("requests run; wait for them, or cancel them, before the cache is cleared.")
            self._steps.forget()

        self._call(clear)

    def stats(self) -> EngineStats:
        scheduler, blocks = self._steps.scheduler, self._steps.blocks
        counts = dict(self._steps.counts)
        counts["num_preemptions"] = counts.get("num_preemptions", 0) + scheduler.num_preempted
        counts["num_evicted_blocks"] = counts.get("num_evicted_blocks", 0) + blocks.num_evicted
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._num_submitted,
            num_blocks=self._runner.num_blocks,
            num_free_blocks=blocks.num_free,
            num_adapter_tokens=dict(self._steps.adapter_counts),
            **counts,
        )

    def close(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that run go on for `drain_s` seconds at most, and end the rest."""
        self._closed = True
        deadline = time.monotonic() + drain_s
        while time.monotonic() < deadline and (self._steps.answers or self._inbox or self._num_submitted):
            time.sleep(0.01)
        closed = EngineClosedError("the engine was closed.")
        thread = self._call(lambda: self._steps.fail_all(closed))
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
        keys = self._steps.blocks.keys(prompt.packed, source)
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
        self._send(lambda: self._steps.end(stream))

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._inbox and self._steps.is_idle:
                    if self._closed or (not self._wake.wait(IDLE_S) and not self._inbox):
                        self._thread = None
                        return
                actions = list(self._inbox)
                self._inbox.clear()
            for action in (*actions, self._steps.step):
                try:
                    action()
                except Exception as error:  # a fault of the engine itself: nobody may wait for ever, and it goes on
                    logger.exception("the engine failed beside the model")
                    self._steps.fail_all(EngineError(f"the engine failed: {one_line(error)}"))
                    self._steps.land()  # for nobody: the next step may use its buffers
                    self._steps.forget()

    def _begin(self, stream: Stream) -> None:
        with self._wake:
            self._num_submitted -= 1
        if self._closed:
            stream.release()
            stream.fail(EngineClosedError("the engine was closed."))
        elif not stream.is_over:
            self._steps.counts["num_prompt_tokens"] += stream.num_prompt_tokens
            self._steps.add(stream.answers[0])


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
