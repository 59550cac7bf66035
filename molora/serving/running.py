"""The generations of one HTTP request: their tokens as they come, their results, and their end in any case.

This module knows nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from molora.generation import Generation, Token
from molora.serving.metrics import ABORT, Metrics
from molora.serving.protocol import CachedTokens, Report, Usage
from molora.serving.request_log import served

if TYPE_CHECKING:
    from molora.serving.stream import Stream


class Running:
    """One stream for each prompt. Used as `async with`: leaving it cancels whatever still runs."""

    def __init__(self, streams: Sequence[Stream], metrics: Metrics) -> None:
        self.streams = streams
        self._metrics = metrics
        self._finished = False
        self._request = served.get()

    async def __aenter__(self) -> Running:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self._finished:
            self._finished = True
            failed = isinstance(exc[1], Exception)
            self._metrics.unfinished(len(self.streams), failed=failed)
            if self._request is not None:
                self._request.unfinished("error" if failed else ABORT)
        for stream in self.streams:
            stream.close()

    async def tokens(self) -> AsyncGenerator[tuple[int, Token]]:
        """Each token with the index of its prompt, in the order in which they come.

        Raises:
            EngineError: a generation failed.
        """
        last_at: dict[tuple[int, int], float] = {}
        async with aclosing(self._merged() if len(self.streams) > 1 else self._single()) as tokens:
            async for index, token in tokens:
                now, before = time.monotonic(), last_at.get((index, token.choice))
                if before is not None:
                    self._metrics.between_tokens(now - before)
                last_at[index, token.choice] = now
                yield index, token
        self._finished = True
        for result in self.results:
            self._metrics.finished(result)
        if self._request is not None:
            self._request.finished(self.usage, self.results)

    async def all_tokens(self) -> list[list[Token]]:
        """The tokens of each choice, once all have ended: those of the first prompt, then of the next."""
        num_choices = 0
        by_choice: dict[tuple[int, int], list[Token]] = {}
        async with aclosing(self.tokens()) as tokens:
            async for index, token in tokens:
                by_choice.setdefault((index, token.choice), []).append(token)
        for index, stream in enumerate(self.streams):
            num_choices += len(stream.results)
            for choice in range(len(stream.results)):
                by_choice.setdefault((index, choice), [])
        assert len(by_choice) == num_choices
        return [by_choice[key] for key in sorted(by_choice)]

    @property
    def results(self) -> list[Generation]:
        """Of each choice, in the order of `all_tokens`; known once all have ended."""
        return [result for stream in self.streams for result in stream.results]

    @property
    def usage(self) -> Usage:
        """A prompt counts once, however many answers it has."""
        prompt_tokens = sum(stream.num_prompt_tokens for stream in self.streams)
        completion_tokens = sum(result.num_generated_tokens for result in self.results)
        cached_tokens = sum(stream.results[0].num_reused_tokens for stream in self.streams)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=CachedTokens(cached_tokens=cached_tokens),
        )

    def report(self, *, with_routes: bool = False) -> Report:
        results = self.results
        return Report(
            routes=[route for result in results for route in result.generated_routes] if with_routes else None,
            num_generated_tokens=[result.num_generated_tokens for result in results],
            num_reused_tokens=sum(result.num_reused_tokens for result in results),
            num_computed_tokens=sum(result.num_computed_tokens for result in results),
            num_recomputed_tokens=sum(result.num_recomputed_tokens for result in results),
            num_reencoded_tokens=sum(result.num_reencoded_tokens for result in results),
            num_replayed_tokens=sum(result.num_replayed_tokens for result in results),
            queue_s=max(result.queue_s for result in results),
            first_token_s=max(result.first_token_s for result in results),
            total_s=max(result.total_s for result in results),
        )

    @property
    def last_chunk(self) -> dict[str, Any]:
        """What `include_usage` adds to a stream: no choices, and what the whole request took."""
        return {"choices": [], "usage": self.usage.model_dump(), "molora": self.report().model_dump()}

    async def _single(self) -> AsyncGenerator[tuple[int, Token]]:
        async for token in self.streams[0]:
            yield 0, token

    async def _merged(self) -> AsyncGenerator[tuple[int, Token]]:
        async def following(stream: Stream) -> Token | None:
            return await anext(aiter(stream), None)

        pending = {asyncio.ensure_future(following(stream)): index for index, stream in enumerate(self.streams)}
        try:
            while pending:
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index = pending.pop(task)
                    if (token := task.result()) is not None:
                        pending[asyncio.ensure_future(following(self.streams[index]))] = index
                        yield index, token
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
