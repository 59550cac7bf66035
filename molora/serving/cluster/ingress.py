"""The ingress: takes HTTP requests, finds out what they begin with, and passes each to the replica that is picked.

Ray's HTTP proxy asks the router of the first deployment before anyone has read a request's body. So that the router can
see a prompt, the first deployment is this one, which holds no model, and the replicas stand behind it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molora.serving.cluster.http_call import VERSION_HEADER, HttpCall, HttpHead
from molora.serving.cluster.merged_metrics import merge
from molora.serving.cluster.prefixes import NO_ADAPTERS, NO_PREFIX, Prefix, adapters_of, prefix_of
from molora.serving.cluster.telemetry import start_telemetry
from molora.serving.config import ServeConfig
from molora.serving.errors import SERVER_ERROR, STOPPING, error_response
from molora.serving.protocol import Error
from molora.serving.request_log import HEADER as ID_HEADER
from molora.serving.request_log import LogRequests, served
from molora.serving.security import OPEN_PATHS, LimitBody, RequireKey, SafeHeaders
from molora.serving.sse import to_event, while_connected

if TYPE_CHECKING:
    from molora.serving.tracing import Tracer

GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
KNOWN_PATHS = GENERATING | OPEN_PATHS | {"/metrics"}  # others are known to the replicas
METRICS_S = 5.0  # for the slowest replica
NO_METRICS = Error(
    message=f"a replica has not told its metrics within {METRICS_S:g} s; ask again in a while", type="server_error"
)
RETRY = {"Retry-After": "1"}
LOST = Error(
    message="the replica that worked on this request was lost, and its answer with it; send the request again",
    type="server_error",
    code="replica_lost",
)
FULL = Error(
    message="too many requests wait already; try again in 1 s.", type="rate_limit_error", code="rate_limit_exceeded"
)

logger = logging.getLogger(__name__)


@serve.ingress()
class Ingress:
    def __init__(self, config: ServeConfig, replicas: DeploymentHandle[Any]) -> None:
        self._config = config
        self._replicas = replicas
        self._tracer = start_telemetry(config, ingress=serve.get_replica_context().replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_ingress(self._replicas, self._config, self._tracer)


def create_ingress(replicas: DeploymentHandle[Any], config: ServeConfig, tracer: Tracer | None = None) -> ASGIApp:
    """The app before all replicas; what it does not do itself, the app of each replica does (`app.py`).

    A tracer is closed when the app ends.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if tracer is not None:
            tracer.close()

    async def metrics(request: Request) -> Response:
        return await merged_metrics(replicas)

    limits = config.limits
    return Starlette(
        routes=[Route("/metrics", metrics), Mount("/", Forward(replicas))],
        middleware=[
            Middleware(LeaveId),
            Middleware(LogRequests, paths=KNOWN_PATHS, tracer=tracer),
            Middleware(SafeHeaders),
            Middleware(RequireKey, keys=config.api_keys),
            Middleware(LimitBody, max_body_bytes=limits.max_body_bytes, max_body_s=limits.max_body_s),
        ],
        lifespan=lifespan,
    )


class LeaveId:
    """The id that Ray's proxy has passed on is left to it, since it adds it to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        by_proxy = [(name, value) for name, value in scope.get("headers", ()) if name == ID_HEADER]

        async def without_it(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [each for each in message["headers"] if each not in by_proxy]}
            await send(message)

        await self._app(scope, receive, without_it)


async def merged_metrics(replicas: DeploymentHandle[Any]) -> Response:
    """Of all replicas but those that were lost; 503 while one hangs, since a page without it would mislead."""
    try:
        found = await replicas.broadcast("metrics").results_async(timeout_s=METRICS_S, return_exceptions=True)
    except TimeoutError:
        return error_response(503, NO_METRICS, headers=RETRY)
    return Response(merge(dict(each for each in found if isinstance(each, tuple))), media_type=CONTENT_TYPE_LATEST)


class Forward:
    """Every request, whole, to one replica, and its answer back as it comes.

    A replica that is lost costs the client an error that says so: with status 503, or as the last event of a stream.
    """

    def __init__(self, replicas: DeploymentHandle[Any]) -> None:
        self._answer = replicas.options(stream=True).answer
        self._adapters_version = 0  # the newest that an answer has told of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        with suppress(ClientDisconnect, OSError):  # either way of learning that the client has left
            parts = self._parts(await self._call(scope, receive))
            try:
                await while_connected(receive, _relay(parts, scope, receive, send))
            finally:
                await parts.aclose()

    async def _call(self, scope: Scope, receive: Receive) -> HttpCall:
        body = await Request(scope, receive).body()
        prefix, adapters = NO_PREFIX, NO_ADAPTERS
        if scope["path"] in GENERATING:
            prefix, adapters = await asyncio.to_thread(_read, body)
        return HttpCall(
            method=scope["method"],
            path=scope["path"],
            raw_path=scope["raw_path"],
            query=scope["query_string"],
            headers=tuple(scope["headers"]),
            body=body,
            prefix=prefix,
            adapters=adapters,
            adapters_version=self._adapters_version,
        )

    async def _parts(self, call: HttpCall) -> AsyncGenerator[HttpHead | bytes]:
        """
        Raises:
            _FailedError: there is no more to come, though there should be.
        """
        response: Any = self._answer.remote(call)
        try:
            async for part in response:
                if isinstance(part, HttpHead):
                    self._note(part)
                yield part
        except Exception as error:
            failed = _FailedError(error)
            if not isinstance(error, BackPressureError):  # which is no failure
                logger.warning("no answer of a replica (%s): %s", type(error).__name__, failed.error.message)
            raise failed from error
        finally:
            with suppress(Exception):  # one that no replica has got raises again why
                response.cancel()

    def _note(self, head: HttpHead) -> None:
        version = int(dict(head.headers).get(VERSION_HEADER, b"0"))
        self._adapters_version = max(self._adapters_version, version)


class _FailedError(Exception):
    """Attributes: status and error, which the client is told."""

    def __init__(self, cause: Exception) -> None:
        self.status, self.error = 500, SERVER_ERROR
        if isinstance(cause, BackPressureError):
            self.status, self.error = 429, FULL
        elif isinstance(cause, (DeploymentUnavailableError, TaskCancelledError)):
            self.status, self.error = 503, STOPPING
        elif isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
            self.status, self.error = 503, LOST

    @property
    def response(self) -> Response:
        return error_response(self.status, self.error, headers=None if self.status == 500 else RETRY)


async def _relay(parts: AsyncGenerator[HttpHead | bytes], scope: Scope, receive: Receive, send: Send) -> None:
    try:
        head = await anext(parts)
        first = await anext(parts, b"")  # until it is there, an error has a status of its own
    except _FailedError as failed:
        await failed.response(scope, receive, send)
        return
    assert isinstance(head, HttpHead)
    if (request := served.get()) is not None:
        request.path = head.path
    headers = [header for header in head.headers if header[0] != ID_HEADER]  # LogRequests adds it
    await send({"type": "http.response.start", "status": head.status, "headers": headers})
    await send({"type": "http.response.body", "body": first, "more_body": True})
    last = b""
    try:
        async for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    except _FailedError as failed:
        if not dict(head.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
            raise  # the connection ends before the answer does
        last = to_event({"error": failed.error.model_dump()}).encode()
    await send({"type": "http.response.body", "body": last, "more_body": False})


def _read(body: bytes) -> tuple[Prefix, frozenset[str]]:
    try:
        read = json.loads(body)
        return prefix_of(read), adapters_of(read)
    except (ValueError, RecursionError):  # the replica says what is wrong with it
        return NO_PREFIX, NO_ADAPTERS
