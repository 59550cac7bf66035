"""An HTTP request on its way from an ingress to a replica, and the answer of the replica's app on its way back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from starlette.types import ASGIApp, Message

from molora.serving.cluster.prefixes import NO_ADAPTERS, NO_PREFIX, Prefix
from molora.serving.request_log import UNKNOWN_PATH, served

VERSION_HEADER = b"x-molora-adapters-version"  # that the replica had when the request came
REPLICA_HEADER = b"x-molora-replica"

logger = logging.getLogger(__name__)

Header = tuple[bytes, bytes]


@dataclass(frozen=True)
class HttpCall:
    """A whole request.

    Attributes:
        path: unescaped.
        raw_path, query: as they came.
        prefix, adapters: of its prompt, and that it names; for the router.
        adapters_version: the newest that the ingress has seen; a replica that has an older one catches up first.
    """

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: tuple[Header, ...]
    body: bytes
    prefix: Prefix = NO_PREFIX
    adapters: frozenset[str] = NO_ADAPTERS
    adapters_version: int = 0


@dataclass(frozen=True)
class HttpHead:
    """What an answer begins with; the parts of its body follow.

    Attributes:
        path: the template of the route that answers.
    """

    status: int
    headers: tuple[Header, ...]
    path: str = UNKNOWN_PATH

    def with_headers(self, *headers: Header) -> HttpHead:
        return replace(self, headers=(*self.headers, *headers))


async def answer(app: ASGIApp, call: HttpCall) -> AsyncGenerator[HttpHead | bytes]:
    """Ask an app in this process. When the generator is closed, the app learns that the client has left.

    Raises:
        Exception: what the app raises before its answer begins.
    """
    incoming: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]
    outgoing: asyncio.Queue[HttpHead | bytes | None] = asyncio.Queue()
    left = asyncio.Event()
    has_begun = False

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal has_begun
        if left.is_set():
            raise OSError("the client has left")
        if message["type"] == "http.response.start":
            has_begun = True
            request = served.get()
            path = UNKNOWN_PATH if request is None else request.path
            outgoing.put_nowait(HttpHead(message["status"], tuple(message["headers"]), path))
        else:
            outgoing.put_nowait(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.raw_path,
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
    }

    async def run() -> None:
        try:
            await app(scope, receive, send)
        except Exception:
            if not has_begun or left.is_set():
                raise
            logger.exception("a request failed")  # its client has been told
        finally:
            outgoing.put_nowait(None)

    running = asyncio.ensure_future(run())
    has_ended = False
    try:
        while not has_ended:
            parts = [await outgoing.get()]
            while not outgoing.empty():  # one part for what has come meanwhile
                parts.append(outgoing.get_nowait())
            has_ended = parts[-1] is None
            body = b""
            for part in parts:
                if isinstance(part, HttpHead):
                    yield part
                elif part is not None:
                    body += part
            if body:
                yield body
        await running
    finally:
        left.set()
        await asyncio.gather(running, return_exceptions=True)
