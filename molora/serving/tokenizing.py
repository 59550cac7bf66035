"""`/tokenize` and `/detokenize`, with vLLM's bodies."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from molora.chat_template import apply_chat_template
from molora.serving.errors import InvalidRequestError
from molora.serving.fields import Message, Neutral, RequestPart, Text, TokenId, conflict
from molora.serving.service import TheService

if TYPE_CHECKING:
    from molora.model import MoLoRA

router = APIRouter(tags=["tokens"])


class TokenizeRequest(RequestPart):
    """Either a text or a conversation.

    `add_special_tokens` is true by default for a text, and false for a conversation, whose template has its own.
    """

    neutral: ClassVar[Neutral] = {
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "mm_processor_kwargs": ({},),
        "tools": ([],),
    }

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("conflict", "expected either prompt or messages")
        if self.messages is None and self.add_generation_prompt is not None:
            raise conflict("add_generation_prompt", "add_generation_prompt is only allowed with messages")
        return self


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestPart):
    model: Text | None = None
    tokens: list[TokenId]


class Detokenized(BaseModel):
    prompt: str


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: TheService) -> Tokens:
    m = service.engine.m
    if body.model is not None:
        service.model(body.model)
    ids = await asyncio.to_thread(to_ids, m, body)
    strings = list(m.tokenizer.convert_ids_to_tokens(ids)) if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=m.max_context, tokens=ids, token_strs=strings)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: TheService) -> Detokenized:
    if body.model is not None:
        service.model(body.model)
    return Detokenized(prompt=await asyncio.to_thread(to_text, service.engine.m, body.tokens))


def to_ids(m: MoLoRA, body: TokenizeRequest) -> list[int]:
    """
    Raises:
        InvalidRequestError: the text is too long, or the chat template refuses the messages.
    """
    try:
        if body.messages is None:
            text, add_special = body.prompt or "", body.add_special_tokens is not False
        else:
            messages, add_prompt = [message.plain for message in body.messages], body.add_generation_prompt
            add_special = body.add_special_tokens is True
            if add_prompt is not False and not add_special:
                return list(m.render(messages).token_ids)  # as a request to answer them is read
            text = apply_chat_template(m.tokenizer, messages, add_generation_prompt=add_prompt is not False)
        if m.text_limit is not None:
            m.text_limit.check(text)
    except ValueError as error:
        raise InvalidRequestError(str(error), param="prompt" if body.messages is None else "messages") from error
    return list(m.tokenizer(text, add_special_tokens=add_special)["input_ids"])


def to_text(m: MoLoRA, ids: list[int]) -> str:
    """
    Raises:
        InvalidRequestError: an id is not one of the tokenizer's.
    """
    num_ids = len(m.tokenizer)
    if any(token_id >= num_ids for token_id in ids):
        raise InvalidRequestError(f"tokens: expected token ids from 0 to {num_ids - 1}", param="tokens")
    return str(m.tokenizer.decode(ids))
