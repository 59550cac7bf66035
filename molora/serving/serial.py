"""One request at a time: what stands between the app and the model until the batching engine does.

Every touch of the model happens on one worker thread, so the event loop never blocks and a generation that was given
up is closed before the next one starts. This module knows nothing about HTTP.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from molora.activation import Activation
from molora.generation import Generation, Token


class Adapter(Protocol):
    @property
    def name(self) -> str: ...


class Bank(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def adapters(self) -> Sequence[Adapter]: ...
    @property
    def has_router(self) -> bool: ...


class TokenIterator(Protocol):
    def __iter__(self) -> Iterator[Token]: ...
    def __next__(self) -> Token: ...
    def close(self) -> None: ...
    @property
    def result(self) -> Generation:
        """Known once the iterator is exhausted."""


class TextModel(Protocol):
    """What the server needs of a model."""

    @property
    def bank(self) -> Bank: ...

    def stream(
        self,
        messages: list[dict[str, str]],
        /,
        *,
        route: str | dict[str, float],
        activation: Activation | None,
        max_new_tokens: int | None,
        temperature: float,
        seed: int | None,
    ) -> TokenIterator:
        """Generate, token by token.

        Raises:
            ValueError: the request cannot be served; raised by this call, not while iterating.
        """


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    messages: list[dict[str, str]]
    route: str | dict[str, float]
    activation: Activation | None
    max_new_tokens: int | None
    temperature: float
    seed: int | None


class InvalidRequestError(ValueError):
    """The model refuses the request; the message is for the one who sent it."""


class AsyncTokenStream:
    """The tokens of a running generation. `result` is known once they are exhausted."""

    def __init__(self, tokens: TokenIterator, thread: ThreadPoolExecutor) -> None:
        self._tokens = tokens
        self._thread = thread

    @property
    def result(self) -> Generation:
        return self._tokens.result

    def __aiter__(self) -> "AsyncTokenStream":
        return self

    async def __anext__(self) -> Token:
        token = await asyncio.wrap_future(self._thread.submit(self._next))
        if token is None:
            raise StopAsyncIteration
        return token

    def _next(self) -> Token | None:
        # A future cannot carry StopIteration.
        return next(self._tokens, None)


class SerialEngine:
    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generation")

    @asynccontextmanager
    async def generate(self, request: TextRequest) -> AsyncIterator[AsyncTokenStream]:
        """Wait for a turn (first come, first served), then generate; leaving the block stops the generation.

        Raises:
            InvalidRequestError: on entry, when the model refuses the request.
        """
        async with self._turn:
            starting = self._thread.submit(self._start, request)
            try:
                yield AsyncTokenStream(await asyncio.wrap_future(starting), self._thread)
            finally:
                # Not awaited: the thread closes it after the token in progress and before anything that is sent next.
                self._thread.submit(_close, starting)

    def _start(self, request: TextRequest) -> TokenIterator:
        try:
            return self._model.stream(
                request.messages,
                route=request.route,
                activation=request.activation,
                max_new_tokens=request.max_new_tokens,
                temperature=request.temperature,
                seed=request.seed,
            )
        except ValueError as error:
            raise InvalidRequestError(str(error)) from error


def _close(started: Future[TokenIterator]) -> None:
    if not started.cancelled() and started.exception() is None:
        started.result().close()
