"""Every error in OpenAI's body: `{"error": {"message", "type", "param", "code"}}`."""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from molora.serving.protocol import Error, ErrorBody
from molora.serving.serial import InvalidRequestError

SERVER_ERROR = Error(message="the server failed on this request; its log says why", type="server_error")


class UnknownModelError(ValueError):
    """The request names a model that this server does not have."""


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        message, param = explain(error)
        return refusal(400, message, param=param)

    @app.exception_handler(InvalidRequestError)
    async def invalid_request(request: Request, error: InvalidRequestError) -> Response:
        return refusal(400, str(error))

    @app.exception_handler(UnknownModelError)
    async def unknown_model(request: Request, error: UnknownModelError) -> Response:
        return refusal(404, str(error), param="model", code="model_not_found")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = refusal(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def server_error(request: Request, error: Exception) -> Response:
        return error_response(500, SERVER_ERROR)  # Starlette then raises it again, for the log


def explain(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, by its first error, and the path of the field in question."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']}", None
    if first["type"] in ("missing", "model_attributes_type") and first["loc"] == ("body",):
        return "the body should be a JSON object, sent as Content-Type: application/json", None
    # A location starts with "body"; its parts in angle brackets only say which member of a union it was.
    param = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith("<")) or None
    message = "not supported; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
    return (f"{param}: {message}" if param else message), param


def refusal(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Response:
    return error_response(status, Error(message=message, type="invalid_request_error", param=param, code=code))


def error_response(status: int, error: Error) -> Response:
    return Response(ErrorBody(error=error).model_dump_json(), status_code=status, media_type="application/json")
