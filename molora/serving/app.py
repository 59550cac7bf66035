"""The HTTP side: OpenAI's paths and its server-sent events.

This module knows nothing about how tokens are made; it asks the engine for a stream of them.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from molora.generation import Generation
from molora.serving.errors import SERVER_ERROR, UnknownModelError, add_error_handlers
from molora.serving.protocol import (
    Answer,
    CachedTokens,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    ChunkReport,
    Delta,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    Report,
    Usage,
)
from molora.serving.serial import Bank, SerialEngine, TextModel, TextRequest

T = TypeVar("T")

logger = logging.getLogger(__name__)


def create_app(model: TextModel) -> FastAPI:
    """The server of one bank: its router, its base model and each of its adapters are the models that it offers.

    Raises:
        ValueError: two of them would have the same name.
    """
    routes = routes_by_model(model.bank)
    engine = SerialEngine(model)
    created = int(time.time())
    app = FastAPI(title="MoLoRA", responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})
    add_error_handlers(app)

    @app.get("/health")
    async def health() -> Health:
        return Health()

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=name, created=created) for name in routes])

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> ChatCompletion | Response:
        if body.model not in routes:
            raise UnknownModelError(f"unknown model {body.model!r}; this server has {', '.join(map(repr, routes))}")
        wanted = TextRequest(
            messages=[{"role": message.role, "content": message.text} for message in body.messages],
            route=routes[body.model] if body.molora.route is None else body.molora.route,
            activation=body.molora.activation,
            max_new_tokens=body.max_new_tokens,
            temperature=body.temperature,
            seed=body.seed,
        )
        try:
            if not body.stream:
                return await while_connected(request, complete(engine, wanted, body))
            events = stream(engine, wanted, body)
            # The first event comes once the model has accepted the request: until then an error has its own status.
            first = await while_connected(request, anext(events))
        except ClientDisconnect:
            return Response(status_code=499)  # nginx's code for it; nobody is left to read it
        return EventStream(first, events)

    return app


def routes_by_model(bank: Bank) -> dict[str, str]:
    """The models on offer and the route that each one stands for."""
    offers = [(bank.name, "auto")] if bank.has_router else []
    offers += [("base", "base"), *((adapter.name, adapter.name) for adapter in bank.adapters)]
    routes = dict(offers)
    if len(routes) < len(offers):
        names = ", ".join(name for name, _ in offers)
        raise ValueError(f"two models would have one name: {names}; rename the bank or the adapter")
    return routes


async def complete(engine: SerialEngine, wanted: TextRequest, body: ChatRequest) -> ChatCompletion:
    """The whole answer at once."""
    async with engine.generate(wanted) as tokens:
        generated = [token async for token in tokens]
        result = tokens.result
    answer = Answer(content="".join(token.text for token in generated))
    return ChatCompletion(
        id=completion_id(),
        created=int(time.time()),
        model=body.model,
        choices=[Choice(message=answer, finish_reason=result.finish_reason)],
        usage=usage(result),
        molora=Report(
            routes=[list(token.route) for token in generated],
            num_reused_tokens=result.num_reused_tokens,
            num_computed_tokens=result.num_computed_tokens,
            num_recomputed_tokens=result.num_recomputed_tokens,
            num_reencoded_tokens=result.num_reencoded_tokens,
        ),
    )


async def stream(engine: SerialEngine, wanted: TextRequest, body: ChatRequest) -> AsyncGenerator[str]:
    """The answer as server-sent events; once the first is out, an error is an event too, and the last one."""
    head = ChatCompletionChunk(id=completion_id(), created=int(time.time()), model=body.model, choices=[])

    def chunk(**fields: Any) -> str:
        return event(head.model_copy(update=fields))

    async with engine.generate(wanted) as tokens:
        yield chunk(choices=[ChunkChoice(delta=Delta(role="assistant", content=""))])
        try:
            async for token in tokens:
                yield chunk(
                    choices=[ChunkChoice(delta=Delta(content=token.text))],
                    molora=ChunkReport(route=list(token.route)),
                )
            result = tokens.result
        except Exception:
            logger.exception("generation failed in the middle of a stream")
            yield event(ErrorBody(error=SERVER_ERROR))
            return
    yield chunk(choices=[ChunkChoice(delta=Delta(), finish_reason=result.finish_reason)])
    if body.include_usage:
        yield chunk(usage=usage(result))
    yield "data: [DONE]\n\n"


def completion_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def usage(result: Generation) -> Usage:
    return Usage(
        prompt_tokens=result.num_prompt_tokens,
        completion_tokens=result.num_generated_tokens,
        total_tokens=result.num_prompt_tokens + result.num_generated_tokens,
        prompt_tokens_details=CachedTokens(cached_tokens=result.num_reused_tokens),
    )


def event(data: BaseModel) -> str:
    return f"data: {data.model_dump_json()}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events that have begun; closed for certain when the response ends, however it ends."""

    def __init__(self, first: str, rest: AsyncGenerator[str]) -> None:
        super().__init__(self._events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._rest = rest

    async def _events(self, first: str) -> AsyncGenerator[str]:
        yield first
        async for following in self._rest:
            yield following

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._rest.aclose()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Do the work, and give it up when the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
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
