"""The tokens of a request on their way from the engine's thread to a thread or an event loop that waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from molora.generation import Generation, Token
from molora.serving.request import EngineFullError, Request

if TYPE_CHECKING:
    from molora.serving.answer import Answer


class Stream(Iterator[Token], AsyncIterator[Token]):
    """The tokens of a request's answers as they come, those of its n answers interleaved.

    Iterate it from a thread or from an event loop, and leave it with `close`, or by `with`: then the rest is not
    computed.

    Attributes:
        prompt_ids: the prompt as the model reads it.
        answers: the engine's side of it.
    """

    def __init__(
        self, prompt_ids: Sequence[int], cancel: Callable[[Stream], None], check: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            cancel: tells the engine that nobody waits any more.
            check: raises where a thread would wait in vain.
        """
        self.prompt_ids = prompt_ids
        self._check = check
        self.answers: Sequence[Answer] = ()
        self._cancel = cancel
        self._release: Callable[[], None] | None = None
        self._changed = threading.Condition()
        self._tokens: deque[Token] = deque()
        self._is_over = False
        self._error: Exception | None = None
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def is_over(self) -> bool:
        """No more tokens will come."""
        return self._is_over

    @property
    def _is_finished(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    @property
    def results(self) -> list[Generation]:
        """The finished answers.

        Raises:
            RuntimeError: the stream has not come to its end.
        """
        if self._tokens or not self._is_finished:
            raise RuntimeError("the stream has no result before its last token; iterate it to the end first.")
        return [answer.result for answer in self.answers]

    @property
    def result(self) -> Generation:
        """The finished answer of a request for one.

        Raises:
            RuntimeError: the stream has not come to its end.
        """
        return self.results[0]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        self._check()
        with self._changed:
            while True:
                if self._tokens:
                    return self._tokens.popleft()
                if self._error is not None:
                    raise self._error
                if self._is_over:
                    raise StopIteration
                self._changed.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        while True:
            with self._changed:
                if self._tokens:
                    return self._tokens.popleft()
                if self._error is not None:
                    raise self._error
                if self._is_over:
                    raise StopAsyncIteration
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self._waiter = loop, future
            await future

    def close(self) -> None:
        """Stop generating, within one step; what was computed so far stays in the cache."""
        with self._changed:
            self._tokens.clear()
            if self._is_over:
                return
            self._over()
        self._cancel(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The engine's side.

    def holds(self, release: Callable[[], None]) -> None:
        """release: called once, when nothing of the request runs any more."""
        self._release = release

    def put(self, token: Token) -> None:
        with self._changed:
            if self._is_over:
                return
            self._tokens.append(token)
            if self._is_finished:
                self.release()
                self._over()
            else:
                self._wake()

    def fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._over()

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()

    def _over(self) -> None:
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            loop, future = waiter
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake_up, future)


def _wake_up(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _close(submitted: asyncio.Future[Stream]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().close()


def _exhaust(stream: Stream) -> None:
    for _ in stream:
        pass


def _running(streams: Sequence[Stream]) -> Stream | None:
    """One of them that is not over; None where an engine that is full is full of others' requests."""
    return next((stream for stream in streams if not stream.is_over), None)


def gather(submit: Callable[[Request], Stream], requests: Sequence[Request]) -> list[Generation]:
    """Submit requests, wait for all, and cancel the rest if one fails. More than may wait are submitted one by one."""
    streams: list[Stream] = []
    try:
        for request in requests:
            while len(streams) < len(requests):
                try:
                    streams.append(submit(request))
                    break
                except EngineFullError:
                    if (running := _running(streams)) is None:
                        raise
                    _exhaust(running)
        for stream in streams:
            _exhaust(stream)
        return [result for stream in streams for result in stream.results]
    finally:
        for stream in streams:
            stream.close()


async def agather(submit: Callable[[Request], Stream], requests: Sequence[Request]) -> list[Generation]:
    """`gather`, for an event loop: prompts are tokenized on other threads."""
    streams: list[Stream] = []
    try:
        for request in requests:
            while len(streams) < len(requests):
                submitted = asyncio.ensure_future(asyncio.to_thread(submit, request))
                try:
                    streams.append(await asyncio.shield(submitted))
                    break
                except EngineFullError:
                    if (running := _running(streams)) is None:
                        raise
                    async for _ in running:
                        pass
                except asyncio.CancelledError:  # a thread cannot be stopped: what it submits is closed then
                    submitted.add_done_callback(_close)
                    raise
        for stream in streams:
            async for _ in stream:
                pass
        return [result for stream in streams for result in stream.results]
    finally:
        for stream in streams:
            stream.close()
