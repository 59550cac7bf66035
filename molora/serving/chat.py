"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, model_validator

from molora.generation import FinishReason, Token
from molora.serving import request as engine
from molora.serving.fields import Message, Neutral, conflict
from molora.serving.logprobs import ChatLogprobs, chat_entry, prompt_entries
from molora.serving.protocol import GenerationRequest, PromptLogprobs, Report, Usage
from molora.serving.service import Service, TheService
from molora.serving.sse import DONE, respond, to_event

router = APIRouter(tags=["generation"])


class ChatRequest(GenerationRequest):
    __doc__ = GenerationRequest.__doc__

    neutral: ClassVar[Neutral] = {
        **GenerationRequest.neutral,
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),
        "audio": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": (),
        "tool_choice": ("none",),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise conflict("max_completion_tokens", "max_tokens and max_completion_tokens disagree; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def name_of(self, field: str) -> str:
        max_tokens = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        names = {"prompt": "messages", "max_new_tokens": max_tokens, "logprobs": "top_logprobs"}
        return names.get(field) or super().name_of(field)


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    molora: Report


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat_completions(body: ChatRequest, request: Request, service: TheService) -> Response:
    """Answer a conversation. `model` says who answers: the base, the bank's router, or `<bank>:<adapter>`."""
    wanted = to_engine(service, body)
    return await respond(
        request,
        whole=lambda: complete(service, body, wanted),
        events=lambda: stream(service, body, wanted),
        stream=body.stream,
    )


def to_engine(service: Service, body: ChatRequest) -> engine.Request:
    """
    Raises:
        InvalidRequestError: there is no such model, or a value is beyond the server's limits.
    """
    model = service.model(body.model)
    sampling = service.sampling(
        body,
        max_new_tokens=body.max_new_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    return engine.Request(
        prompt=[message.plain for message in body.messages],
        route=model.route if body.route is None else body.route,
        activation=body.activation,
        sampling=sampling,
        salt=body.cache_salt,
    )


async def complete(service: Service, body: ChatRequest, wanted: engine.Request) -> ChatCompletion:
    async with await service.submit(body, [wanted]) as running:
        tokens = await running.all_tokens()
        return ChatCompletion(
            id=completion_id(),
            created=int(time.time()),
            model=body.model,
            choices=[
                ChatChoice(
                    index=result.choice,
                    message=Answer(content="".join(token.text for token in generated)),
                    logprobs=logprobs(service, body, generated),
                    finish_reason=result.finish_reason,
                )
                for result, generated in zip(running.results, tokens, strict=True)
            ],
            usage=running.usage,
            prompt_logprobs=prompt_entries(
                running.results[0].prompt_logprobs, service.texts, num_top=body.prompt_logprobs or 0
            ),
            molora=running.report(with_routes=body.return_routes),
        )


async def stream(service: Service, body: ChatRequest, wanted: engine.Request) -> AsyncGenerator[str]:
    """A chunk for each token, even one that completes no character; the first of a choice follows one with its role."""
    head = {
        "id": completion_id(),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": body.model,
    }

    def chunk(index: int, delta: dict[str, str], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more
        return head | {"choices": [choice], "usage": None}

    begun: set[int] = set()
    async with await service.submit(body, [wanted]) as running:
        async with aclosing(running.tokens()) as tokens:
            async for _, token in tokens:
                if token.choice not in begun:
                    begun.add(token.choice)
                    yield to_event(chunk(token.choice, {"role": "assistant", "content": ""}))
                entries = logprobs(service, body, [token])
                yield to_event(
                    chunk(
                        token.choice,
                        {"content": token.text},
                        logprobs=None if entries is None else entries.model_dump(),
                        finish_reason=token.finish_reason,
                    )
                    | ({"molora": {"route": token.route}} if body.return_routes else {})
                )
        if body.include_usage:
            yield to_event(head | running.last_chunk)
    yield DONE


def logprobs(service: Service, body: ChatRequest, tokens: Sequence[Token]) -> ChatLogprobs | None:
    if not body.logprobs:
        return None
    return ChatLogprobs(content=[chat_entry(token, service.texts, with_route=body.return_routes) for token in tokens])


def completion_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
