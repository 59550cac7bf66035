"""Server-sent events, and clients that leave: whatever a client waits for is given up when it goes away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from molora.serving.errors import describe, sendable
from molora.serving.request import EngineClosedError

T = TypeVar("T")

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"


async def respond(
    request: Request,
    *,
    whole: Callable[[], Awaitable[BaseModel]],
    events: Callable[[], AsyncGenerator[str]],
    stream: bool,
) -> Response:
    """The whole answer, or a stream of events. Until the first event is there, an error has a status of its own."""
    try:
        if not stream:
            answer = await while_connected(request.receive, whole())
            return Response(answer.model_dump_json(), media_type="application/json")
        rest = errors_as_events(events())
        return EventStream(await while_connected(request.receive, anext(rest)), rest)
    except ClientDisconnect:
        return NoResponse()


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Do the work, and give it up when the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def errors_as_events(events: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """Once the first event is out, an error is an event too, and the last one."""
    begun = False
    try:
        async with aclosing(events):
            async for event in events:
                begun = True
                yield event
    except Exception as error:
        if not begun:
            raise
        if not isinstance(error, EngineClosedError):
            logger.exception("generation failed in the middle of a stream")
        yield to_event({"error": sendable(describe(error)).model_dump()})


def to_event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class NoResponse(Response):
    """The client has left, so that nothing is sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass


class EventStream(Response):
    """Events that have begun; closed for certain when the response ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, first: str, rest: AsyncGenerator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except (ClientDisconnect, OSError):
            pass  # either way of learning that the client has left
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first.encode(), "more_body": True})
        async for event in self._rest:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
