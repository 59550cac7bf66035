"""What goes over the wire: OpenAI's chat-completion schema, as far as this server speaks it.

Nothing in a request is ignored. A field is either honoured or refused, and a refused one may still be sent at the
value that changes nothing (`top_p: 1`, `n: 1`, `null`), because client libraries do.

This module knows nothing about engines or FastAPI.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from molora.activation import Policy
from molora.generation import FinishReason

Gates = list[tuple[str, float]]
"""The adapters that acted on one token, by name, and their gates; empty where the base model ran alone."""


# Requests


def _json_kind(value: object) -> str:
    return f"<{type(value).__name__}>"


def _one_of(kinds: str) -> Discriminator:
    """Choose a union's member by JSON type, so that a wrong value gets one error and not one for each member."""
    return Discriminator(_json_kind, custom_error_type="json_kind", custom_error_message=f"Input should be {kinds}")


def _check_unicode(text: str) -> str:
    """JSON can escape half of a surrogate pair, which is no text: no tokenizer and no answer can carry it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "Input should have no lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]


class _RequestPart(BaseModel):
    """A request object: unknown fields are errors, nothing is coerced, and null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Fields that are not supported, with the values (besides null) that change nothing and so are accepted."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if not cls._is_neutral(name, value)}

    @classmethod
    def _is_neutral(cls, name: str, value: object) -> bool:
        if value is None:
            return name in cls.model_fields or name in cls.neutral
        # JSON's true is not 1, though Python's is.
        return any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in cls.neutral.get(name, ())
        )


class TextPart(_RequestPart):
    type: Literal["text"]
    text: Text


class Message(_RequestPart):
    neutral = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "name": (),
        "refusal": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("<str>")] | Annotated[list[TextPart], Tag("<list>")],
        _one_of("a string or a list of text parts"),
    ]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_RequestPart):
    neutral = {"include_obfuscation": (False,)}

    include_usage: bool = False


Route = Annotated[
    Annotated[Text, Tag("<str>")] | Annotated[dict[Text, Annotated[float, Field(allow_inf_nan=False)]], Tag("<dict>")],
    _one_of("a name, or an object of adapter names and weights"),
]
Activation = Annotated[
    Annotated[Policy, Tag("<str>")] | Annotated[int, Field(ge=0), Tag("<int>")],
    _one_of("a policy's name or a token index"),
]


class RouteOptions(_RequestPart):
    """The extension field `molora` of a request: overrides the route that `model` names, and the activation."""

    route: Route | None = None
    activation: Activation | None = None


class ChatRequest(_RequestPart):
    """The body of `POST /v1/chat/completions`.

    Two defaults differ from OpenAI's: `temperature` is 0 (greedy, so that answers repeat), and an answer ends after
    `molora.model.DEFAULT_MAX_NEW_TOKENS` tokens, or where the model's context is full, unless `max_completion_tokens`
    (or its older name `max_tokens`) says otherwise.
    """

    neutral = {
        "audio": (),
        "frequency_penalty": (0,),
        "function_call": ("none",),
        "functions": ([],),
        "logit_bias": ({},),
        "logprobs": (False,),
        "metadata": ({},),
        "modalities": (["text"],),
        "n": (1,),
        "parallel_tool_calls": (True,),
        "prediction": (),
        "presence_penalty": (0,),
        "prompt_cache_key": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "stop": ([],),
        "store": (False,),
        "tool_choice": ("none",),
        "tools": ([],),
        "top_logprobs": (0,),
        "top_p": (1,),
        "user": (),
        "verbosity": (),
        "web_search_options": (),
    }

    model: Text
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    molora: RouteOptions = RouteOptions()

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("conflict", "stream_options is only allowed when stream is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("conflict", "max_tokens and max_completion_tokens disagree; send one of them")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


# Responses


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: Literal[0] = 0
    message: Answer
    logprobs: None = None
    finish_reason: FinishReason


class Report(BaseModel):
    """The extension field `molora` of an answer: a route for each generated token, and where the work went."""

    routes: list[Gates]
    num_reused_tokens: int
    num_computed_tokens: int
    num_recomputed_tokens: int
    num_reencoded_tokens: int


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    molora: Report


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class ChunkChoice(BaseModel):
    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChunkReport(BaseModel):
    """The extension field `molora` of a chunk: the route of its token."""

    route: Gates


class ChatCompletionChunk(BaseModel):
    """One event of a stream. Each generated token is one chunk, even where its bytes complete no character."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    molora: ChunkReport | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["molora"] = "molora"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Error(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: Error
