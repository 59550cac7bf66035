"""What chat and plain completions have in common on the wire: OpenAI's fields, and vLLM's names for the rest.

This module knows nothing about engines or FastAPI.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from molora.generation import Grammar, TokenRoute
from molora.serving.fields import (
    Activation,
    Label,
    Neutral,
    Number,
    RequestPart,
    Route,
    Text,
    TokenId,
    conflict,
    one_of,
)

MAX_SCHEMA_DEPTH = 64

UNUSED: Any = Field(None, description="a label of the caller's; accepted and not used")
Bias = Annotated[Number, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


def _check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Free-form JSON is walked without recursion: whoever reads it later may recurse."""
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            break
    else:
        raise PydanticCustomError("depth", "Input should be nested less deeply")
    try:
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # a lone surrogate, or NaN or Infinity
        raise PydanticCustomError("schema", "Input should have no lone surrogate and no infinite number") from None
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_check_schema)]


class JsonSchema(RequestPart):
    neutral: ClassVar[Neutral] = {"description": ()}

    name: Text
    json_schema: Schema = Field(alias="schema")
    strict: bool = True


class TextFormat(RequestPart):
    type: Literal["text"]


class JsonObjectFormat(RequestPart):
    type: Literal["json_object"]


class JsonSchemaFormat(RequestPart):
    type: Literal["json_schema"]
    json_schema: JsonSchema


def _format_kind(value: object) -> str:
    return f"<{value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)}>"


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(
        _format_kind,
        custom_error_type="format_kind",
        custom_error_message="Input should be an object whose type is text, json_object or json_schema",
    ),
]


class StructuredOutputs(RequestPart):
    """vLLM's name for what an answer must match; exactly one of these."""

    neutral: ClassVar[Neutral] = {"choice": (), "grammar": (), "structural_tag": (), "disable_any_whitespace": (False,)}

    regex: Text | None = None
    json_schema: (
        Annotated[
            Annotated[Text, Tag("<str>")] | Annotated[Schema, Tag("<dict>")],
            one_of("a JSON schema, as an object or as a string"),
        ]
        | None
    ) = Field(None, alias="json")
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "StructuredOutputs":
        if [self.regex, self.json_schema, self.json_object].count(None) != 2:
            raise PydanticCustomError("conflict", "expected exactly one of regex, json and json_object")
        return self

    @property
    def grammar(self) -> Grammar:
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.json_schema is None:
            return Grammar("json_object")
        text = self.json_schema if isinstance(self.json_schema, str) else json.dumps(self.json_schema)
        return Grammar("json_schema", text)


class StreamOptions(RequestPart):
    neutral: ClassVar[Neutral] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


class GenerationRequest(RequestPart):
    """The fields of both kinds of request.

    Two defaults differ from OpenAI's: `temperature` is 0 (greedy, so that answers repeat), and an answer ends after
    512 tokens, or where the model's context is full, unless `max_tokens` says otherwise.
    """

    neutral: ClassVar[Neutral] = {
        "allowed_token_ids": (),
        "bad_words": ([],),
        "best_of": (1,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "min_tokens": (0,),
        "priority": (0,),
        "prompt_cache_retention": (),
        "service_tier": ("auto", "default"),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "store": (False,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
    }

    model: Text
    temperature: Number = Field(0.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 or -1: all tokens")
    min_p: Number = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    repetition_penalty: Number = Field(1.0, gt=0, le=1000)
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenKey, Bias] = Field(default_factory=dict, max_length=1024)
    stop: Annotated[
        Annotated[Text, Tag("<str>")] | Annotated[list[Text], Tag("<list>")], one_of("a string or a list of strings")
    ] = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=1024)
    ignore_eos: bool = False
    n: int = Field(1, ge=1)
    prompt_logprobs: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    route: Route | None = Field(None, description='"auto", "base", an adapter\'s name, or {name: weight}')
    activation: Activation | None = Field(None, description="where adapters may begin to act")
    cache_salt: Text = Field("", description="nothing is shared in the cache between requests of different salts")
    return_routes: bool = Field(
        False, description="say who wrote each token: in `molora`, and in `logprobs` if asked for"
    )
    user: Label | None = UNUSED
    safety_identifier: Label | None = UNUSED
    prompt_cache_key: Label | None = UNUSED
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = UNUSED

    @model_validator(mode="after")
    def _check_conflicts(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "stream_options is only allowed when stream is true")
        if self.stream and self.prompt_logprobs is not None:
            raise conflict("prompt_logprobs", "prompt_logprobs is not streamed; leave stream out")
        if self.structured_outputs is not None and not isinstance(self.response_format, TextFormat | None):
            raise conflict("structured_outputs", "response_format and structured_outputs both ask; send one of them")
        return self

    def name_of(self, field: str) -> str:
        """The field of this request that says what `field` says of the engine's."""
        grammar = "response_format" if self.structured_outputs is None else "structured_outputs"
        route = "model" if self.route is None else "route"
        return {"grammar": grammar, "route": route, "salt": "cache_salt"}.get(field, field)

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def grammar(self) -> Grammar | None:
        if self.structured_outputs is not None:
            return self.structured_outputs.grammar
        if isinstance(self.response_format, JsonSchemaFormat):
            return Grammar("json_schema", json.dumps(self.response_format.json_schema.json_schema))
        return Grammar("json_object") if isinstance(self.response_format, JsonObjectFormat) else None


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class WithoutRoutes(BaseModel):
    """Routes that were not asked for are absent, and not null."""

    @model_serializer(mode="wrap")
    def _drop(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None or "route" not in name}


class Report(WithoutRoutes):
    """The extension field `molora` of an answer: where the work went and, if `return_routes` asked, who wrote it.

    `routes` has a route for each generated token, choice after choice; `num_generated_tokens` says how many each has.
    The counts are of all prompts and choices together; the times are of the slowest, in seconds from its submission.
    """

    routes: list[TokenRoute] | None = None
    num_generated_tokens: list[int]
    num_reused_tokens: int
    num_computed_tokens: int
    num_recomputed_tokens: int
    num_reencoded_tokens: int
    num_replayed_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float


class PromptLogprob(BaseModel):
    """vLLM's entry of `prompt_logprobs`, by token id; `rank` counts from 1 and is null beyond those asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class Error(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: Error
