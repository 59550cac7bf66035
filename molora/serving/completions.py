"""`POST /v1/completions`: plain text or token ids, continued; with `echo` and `logprobs` also scored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from molora.activation import Activation, activation_of_text
from molora.generation import FinishReason, Token, TokenLogprob
from molora.serving import request as engine
from molora.serving.errors import InvalidRequestError
from molora.serving.fields import Neutral, Text, TokenId, conflict
from molora.serving.logprobs import TextLogprobs, TokenReport, prompt_entries, text_logprobs, token_report
from molora.serving.protocol import GenerationRequest, PromptLogprobs, Report, Usage
from molora.serving.running import Running
from molora.serving.service import Service, TheService
from molora.serving.sse import DONE, respond, to_event
from molora.serving.token_text import Offsets

router = APIRouter(tags=["generation"])


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return f"<{type(value).__name__}>"
    return f"<list of {type(value[0]).__name__}>" if value else "<list of str>"


TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompt = Annotated[
    Annotated[Text, Tag("<str>")]
    | Annotated[Annotated[list[Text], Field(min_length=1)], Tag("<list of str>")]
    | Annotated[TokenIds, Tag("<list of int>")]
    | Annotated[list[TokenIds], Tag("<list of list>")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_kind",
        custom_error_message="Input should be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]


class CompletionRequest(GenerationRequest):
    __doc__ = f"""{GenerationRequest.__doc__}
    There are no messages here: where the route's own policy needs some ("turn", "response"), its adapters act from the
    first token on, unless `activation` says otherwise.
    """

    neutral: ClassVar[Neutral] = {**GenerationRequest.neutral, "add_special_tokens": (True,), "suffix": ()}

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, description="0 only with echo")
    echo: bool = Field(False, description="begin the answer with the prompt, and its log-probabilities if asked for")
    logprobs: int | None = Field(None, ge=0, description="this many likely tokens beside each token's own")

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise conflict("max_tokens", "max_tokens is 0 and echo is false, so there is nothing to answer")
        if self.stream and self.echo and self.logprobs is not None:
            raise conflict("stream", "echo with logprobs is not streamed; leave stream out")
        return self

    def name_of(self, field: str) -> str:
        return "max_tokens" if field == "max_new_tokens" else super().name_of(field)

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else [*self.prompt]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | None = None


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    molora: Report


@router.post("/v1/completions", response_model=TextCompletion)
async def completions(body: CompletionRequest, request: Request, service: TheService) -> Response:
    """Continue text or token ids. With `echo`, `logprobs` and `max_tokens` 0 or 1 it scores the prompt."""
    wanted = to_engine(service, body)
    return await respond(
        request,
        whole=lambda: complete(service, body, wanted),
        events=lambda: stream(service, body, wanted),
        stream=body.stream,
    )


def to_engine(service: Service, body: CompletionRequest) -> list[engine.Request]:
    """
    Raises:
        InvalidRequestError: there is no such model, or a value is beyond the server's limits.
    """
    model, limit = service.model(body.model), service.limits.max_prompts
    if len(body.prompts) > limit:
        raise InvalidRequestError(f"prompt: {len(body.prompts)} are too many; send {limit} at a time", param="prompt")
    sampling = service.sampling(
        body,
        max_new_tokens=1 if body.max_tokens == 0 else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=max(
            (num for num in (body.prompt_logprobs, body.logprobs if body.echo else None) if num is not None),
            default=None,
        ),
    )
    route = model.route if body.route is None else body.route
    activation = _activation(service, route) if body.activation is None else body.activation
    return [
        engine.Request(prompt=prompt, route=route, activation=activation, sampling=sampling, salt=body.cache_salt)
        for prompt in body.prompts
    ]


def _activation(service: Service, route: str | dict[str, float]) -> Activation | None:
    policies = {info.name: info.activation for info in service.engine.adapters()}
    return activation_of_text(route, router=service.engine.m.bank.config.activation, adapters=policies)


async def complete(service: Service, body: CompletionRequest, wanted: list[engine.Request]) -> TextCompletion:
    async with await service.submit(body, wanted) as running:
        tokens = iter(await running.all_tokens())
        choices: list[TextChoice] = []
        for prompt, stream in zip(body.prompts, running.streams, strict=True):
            scores = stream.results[0].prompt_logprobs  # the prompt was read once
            for result in stream.results:
                generated = [] if body.max_tokens == 0 else next(tokens)
                echo = _echo(service, prompt, stream.prompt_ids) if body.echo else ""
                choices.append(
                    TextChoice(
                        index=len(choices),
                        text=echo + "".join(token.text for token in generated),
                        logprobs=_logprobs(service, body, echo, stream.prompt_ids, scores, generated),
                        finish_reason="length" if body.max_tokens == 0 else result.finish_reason,
                        prompt_logprobs=None
                        if body.prompt_logprobs is None
                        else prompt_entries(scores, service.texts, num_top=body.prompt_logprobs),
                    )
                )
        return TextCompletion(
            id=completion_id(),
            created=int(time.time()),
            model=body.model,
            choices=choices,
            usage=_usage(body, running),
            molora=running.report(with_routes=body.return_routes),
        )


async def stream(service: Service, body: CompletionRequest, wanted: list[engine.Request]) -> AsyncGenerator[str]:
    """A chunk for each token; with `echo`, the first of a choice follows one with the prompt."""
    head = {"id": completion_id(), "object": "text_completion", "created": int(time.time()), "model": body.model}

    def chunk(index: int, text: str, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None} | more
        return head | {"choices": [choice], "usage": None}

    offsets: dict[int, Offsets] = {}
    async with await service.submit(body, wanted) as running:
        async with aclosing(running.tokens()) as tokens:
            async for prompt, token in tokens:
                index = prompt * body.n + token.choice
                if index not in offsets:
                    ids = running.streams[prompt].prompt_ids
                    echo = _echo(service, body.prompts[prompt], ids) if body.echo else ""
                    offsets[index] = Offsets(len(echo))
                    if body.echo:
                        done = "length" if body.max_tokens == 0 else None
                        yield to_event(chunk(index, echo, finish_reason=done))
                if body.max_tokens == 0:
                    continue
                scores = _scores(service, body, [], [], [token], offsets[index])
                yield to_event(
                    chunk(
                        index,
                        token.text,
                        logprobs=None if scores is None else scores.model_dump(),
                        finish_reason=token.finish_reason,
                    )
                    | ({"molora": {"route": token.route}} if body.return_routes else {})
                )
        if body.include_usage:
            yield to_event(head | running.last_chunk | {"usage": _usage(body, running).model_dump()})
    yield DONE


def _echo(service: Service, prompt: str | list[int], ids: Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else str(service.engine.m.tokenizer.decode(ids))


def _usage(body: CompletionRequest, running: Running) -> Usage:
    """A prompt that is only scored takes one token that nobody asked for."""
    usage = running.usage
    if body.max_tokens != 0:
        return usage
    return usage.model_copy(update={"completion_tokens": 0, "total_tokens": usage.prompt_tokens})


def _logprobs(
    service: Service,
    body: CompletionRequest,
    echo: str,
    prompt_ids: Sequence[int],
    prompt_scores: Sequence[TokenLogprob | None] | None,
    generated: Sequence[Token],
) -> TextLogprobs | None:
    """Of one choice, its echoed prompt included."""
    ids = prompt_ids if body.echo else []
    entries = (prompt_scores or []) if body.echo else []
    return _scores(service, body, ids, entries, generated, Offsets(), echo=echo)


def _scores(
    service: Service,
    body: CompletionRequest,
    prompt_ids: Sequence[int],
    prompt_scores: Sequence[TokenLogprob | None],
    generated: Sequence[Token],
    offsets: Offsets,
    *,
    echo: str = "",
) -> TextLogprobs | None:
    if body.logprobs is None:
        return None
    texts = service.texts
    widths = [texts.to_bytes(token_id) for token_id in prompt_ids]
    # A tokenizer may begin a text with a special token that the text does not have.
    if widths and texts.is_special(prompt_ids[0]) and not echo.startswith(texts.to_text(prompt_ids[0])):
        widths[0] = b""
    widths += [b"" if texts.is_special(token.id) else texts.to_bytes(token.id) for token in generated]
    routes: list[TokenReport | None] | None = None
    if body.return_routes:
        routes = [*[None] * len(prompt_ids), *(token_report(token) for token in generated)]
    return text_logprobs(
        [*prompt_scores, *(token.logprob for token in generated)],
        [*prompt_ids, *(token.id for token in generated)],
        widths,
        texts,
        offsets,
        num_top=body.logprobs,
        routes=routes,
    )


def completion_id() -> str:
    return f"cmpl-{uuid.uuid4().hex}"
