"""An id for each request, and a line of the log at its end: what it cost and how it ended, and nothing of what it said.

This module knows nothing about engines or FastAPI.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from molora.generation import Generation
    from molora.serving.protocol import Usage
    from molora.serving.tracing import Tracer

HEADER = b"x-request-id"
UNKNOWN_PATH = "unknown"  # a path that is none of ours may hold anything
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

logger = logging.getLogger("molora.requests")


@dataclass
class Served:
    """What is known of a request; it is filled in while it is answered.

    Attributes:
        begun_ns: since 1970.
        path: the route's template.
        status: of the answer; None if the client left before one.
        usage: of a generation that came to its end.
        ends: how each of its answers ended.
        times: of each answer: when its last token came (ns since 1970), and its `queue_s`, `first_token_s`, `total_s`.
        span: of a server that makes traces.
    """

    id: str
    method: str
    path: str = UNKNOWN_PATH
    begun_ns: int = field(default_factory=time.time_ns)
    begun_s: float = field(default_factory=time.perf_counter)
    duration_ms: float = 0.0
    status: int | None = None
    usage: Usage | None = None
    ends: tuple[str, ...] = ()
    times: tuple[tuple[int, float, float, float], ...] = ()
    span: Span | None = None

    def finished(self, usage: Usage, results: Sequence[Generation]) -> None:
        self.usage = usage
        self.ends = tuple(result.finish_reason for result in results)
        now_ns = time.time_ns()
        self.times = tuple((now_ns, each.queue_s, each.first_token_s, each.total_s) for each in results)

    def unfinished(self, end: str) -> None:
        self.ends = (end,)

    def fields(self) -> dict[str, Any]:
        """For a line of the log."""
        fields: dict[str, Any] = {
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "duration_ms": round(self.duration_ms, 3),
        }
        if self.usage is not None:
            fields |= {
                "prompt_tokens": self.usage.prompt_tokens,
                "cached_tokens": self.usage.prompt_tokens_details.cached_tokens,
                "completion_tokens": self.usage.completion_tokens,
            }
        if self.ends:
            fields["finish_reasons"] = list(self.ends)
        if self.times:
            fields["queue_ms"] = round(1e3 * max(queue_s for _, queue_s, _, _ in self.times), 3)
            fields["first_token_ms"] = round(1e3 * max(first_s for _, _, first_s, _ in self.times), 3)
        return fields


served: ContextVar[Served | None] = ContextVar("served", default=None)
"""The request that is answered here; it stays when it is, for what a server logs of it afterwards."""


class LogRequests:
    """Takes a request's id from `X-Request-Id`, or makes one, answers with it, and logs the request at its end.

    The application finds the id, and the place of its own spans in the trace, in the request's headers.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str], tracer: Tracer | None = None) -> None:
        """
        Args:
            paths: the templates of the application's routes.
        """
        self._app = app
        self._paths = paths
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Served(id_of(scope), scope["method"])
        served.set(request)
        own = {HEADER: request.id.encode()}
        if self._tracer is not None:
            request.span = self._tracer.begin(request, scope["headers"])
            own |= self._tracer.headers(request.span)
        scope = {**scope, "headers": [*(each for each in scope["headers"] if each[0] not in own), *own.items()]}

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
                self._name_path(request, scope)
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, request.id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, with_id)
        except Exception:
            request.status = request.status or 500  # which the application's outermost layer answers
            raise
        finally:
            request.duration_ms = 1e3 * (time.perf_counter() - request.begun_s)
            self._name_path(request, scope)
            logger.info("%s %s %s", request.method, request.path, request.status, extra={"request": request.fields()})
            if self._tracer is not None:
                self._tracer.end(request)

    def _name_path(self, request: Served, scope: Scope) -> None:
        """Unless the application has done so."""
        if request.path != UNKNOWN_PATH:
            return
        path: str = scope["path"]
        template = str(getattr(scope.get("route"), "path", ""))  # known once it was routed
        folder = "/" + path[1:].partition("/")[0]  # of files
        request.path = next((each for each in (path, template, folder) if each in self._paths), UNKNOWN_PATH)


def id_of(scope: Scope) -> str:
    """The client's, if it is one that a log and a header can carry."""
    sent = [value for name, value in scope["headers"] if name == HEADER]
    return sent[0].decode() if len(sent) == 1 and _ID.fullmatch(sent[0]) else uuid.uuid4().hex
