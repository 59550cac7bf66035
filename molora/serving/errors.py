"""Every error in OpenAI's body: `{"error": {"message", "type", "param", "code"}}`."""

import math
from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from molora.serving.protocol import Error, ErrorBody
from molora.serving.request import EngineClosedError, EngineError, EngineFullError
from molora.serving.request_log import served

SERVER_ERROR = Error(message="the server failed on this request; its log says why", type="server_error")

STOPPING = Error(message="the server is stopping; ask another one, or again in a while", type="server_error")


class InvalidRequestError(ValueError):
    """The request is refused; the message is for the one who sent it."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class UnavailableError(RuntimeError):
    """The engine cannot take a request now; another server may."""


def add_error_handlers(app: FastAPI) -> None:
    from molora.slots import NoFreeSlotError  # it imports torch, which whoever only passes errors on does without

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        message, param = explain(error)
        return refusal(400, message, param=param)

    @app.exception_handler(InvalidRequestError)
    async def invalid_request(request: Request, error: InvalidRequestError) -> Response:
        return refusal(error.status, str(error), param=error.param, code=error.code)

    @app.exception_handler(EngineFullError)
    async def full(request: Request, error: EngineFullError) -> Response:
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        body = Error(message=str(error), type="rate_limit_error", code="rate_limit_exceeded")
        return error_response(429, body, headers=wait)

    @app.exception_handler(NoFreeSlotError)
    async def no_free_slot(request: Request, error: NoFreeSlotError) -> Response:
        return refusal(409, str(error), code="no_free_slot")

    @app.exception_handler(EngineClosedError)
    async def stopping(request: Request, error: EngineClosedError) -> Response:
        return error_response(503, STOPPING)

    @app.exception_handler(UnavailableError)
    async def unavailable(request: Request, error: UnavailableError) -> Response:
        return error_response(503, Error(message=str(error), type="server_error"))

    @app.exception_handler(EngineError)
    async def engine_error(request: Request, error: EngineError) -> Response:
        return error_response(500, describe(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = refusal(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def server_error(request: Request, error: Exception) -> Response:
        known = served.get()  # this answer is made outside of what would add it
        headers = {} if known is None else {"X-Request-Id": known.id}
        return error_response(500, SERVER_ERROR, headers=headers)  # Starlette then raises it again, for the log


def describe(error: Exception) -> Error:
    """What a client is told of a failure: the engine's own words, and of anything else only that it happened."""
    if isinstance(error, EngineClosedError):
        return STOPPING
    return Error(message=str(error), type="server_error") if isinstance(error, EngineError) else SERVER_ERROR


def explain(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, by its first error, and the path of the field in question."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']}", None
    if first["type"] in ("missing", "model_attributes_type") and first["loc"] == ("body",):
        return "the body should be a JSON object, sent as Content-Type: application/json", None
    # A location starts with "body"; its parts in angle brackets only say which member of a union it was.
    param = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith("<"))
    message = "not supported; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
    return (f"{param}: {message}", param) if param else (message, first.get("ctx", {}).get("field"))


def refusal(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Response:
    return error_response(status, Error(message=message, type="invalid_request_error", param=param, code=code))


def error_response(status: int, error: Error, *, headers: Mapping[str, str] | None = None) -> Response:
    body = ErrorBody(error=sendable(error)).model_dump_json()
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def sendable(error: Error) -> Error:
    """An error may quote what was sent, at any length, and half of a surrogate pair, which UTF-8 does not carry."""
    fields = {"message": error.message[:2000], "param": None if error.param is None else error.param[:200]}
    update = {name: text and text.encode("utf-8", "backslashreplace").decode() for name, text in fields.items()}
    return error.model_copy(update=update)
