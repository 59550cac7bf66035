"""What every request passes before any endpoint sees it: an API key, bounds on its body, and headers on its answer."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from hashlib import sha256

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molora.serving.errors import error_response, refusal
from molora.serving.protocol import Error

# None holds anything of the model, a bank or a conversation: probes, and the pages' own files.
OPEN_PATHS = frozenset({"/", "/docs", "/health", "/ready"})
OPEN_FOLDER = "/static/"


class RequireKey:
    """`Authorization: Bearer <key>` with one of the keys, compared in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and self._digests and not self._may_pass(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            response = refusal(
                401, "send one of this server's API keys as 'Authorization: Bearer <key>'", code="invalid_api_key"
            )
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return True
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (sent[0] if len(sent) == 1 else b"").partition(b" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all, whichever fits
        return scheme.lower() == b"bearer" and any(matches)


class LimitBody:
    """Reads a request's body before the application does: no more of it than is allowed, and no longer."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_body_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_body_s = max_body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        try:
            if declared.isdigit() and (len(declared) > 18 or int(declared) > self._max_body_bytes):
                raise _TooLargeError
            async with asyncio.timeout(self._max_body_s):
                body = await self._read(receive)
        except _TooLargeError:
            reason = f"the body is larger than the {self._max_body_bytes} bytes that this server reads"
            await refusal(413, reason)(scope, receive, send)
        except TimeoutError:
            reason = f"the body did not arrive within the {self._max_body_s} s that this server waits for it"
            await refusal(408, reason)(scope, receive, send)
        except ClientDisconnect:
            pass
        else:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> list[Message]:
        body: list[Message] = []
        num_bytes = 0
        while not body or body[-1].get("more_body", False):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body.append(message)
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise _TooLargeError
        return body


class _TooLargeError(Exception):
    pass


class AnswerCancelled:
    """A request that the server gives up when it stops is told so, unless its answer has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if has_begun or scope["type"] != "http":
                raise
            stopping = Error(message="the server stops and takes no more requests", type="server_error")
            await error_response(503, stopping)(scope, receive, send)


class SafeHeaders:
    """No answer is taken for another type than it says, nor shown inside another site's page."""

    HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                known = {name.lower() for name, _ in headers}
                message = {**message, "headers": headers + [each for each in self.HEADERS if each[0] not in known]}
            await send(message)

        await self._app(scope, receive, with_headers)


class AnswerHead:
    """HEAD is answered as GET is, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, without_body)
        else:
            await self._app(scope, receive, send)


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key's, so that the comparison says nothing of that either."""
    return sha256(key).digest()


def _replay(messages: list[Message], receive: Receive) -> Receive:
    remaining = iter(messages)

    async def following() -> Message:
        return next(remaining, None) or await receive()

    return following
