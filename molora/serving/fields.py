"""What the fields of every request have in common: whatever asks for something is honoured or refused.

A refused field may still be sent at the value that changes nothing (`best_of: 1`, `store: false`, `null`), because
client libraries do; and labels that only the caller uses (`user`, `metadata`) are accepted as they are. Nothing is
coerced. This module knows nothing about engines or FastAPI.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from molora.activation import Policy

Neutral = Mapping[str, tuple[object, ...]]


class RequestPart(BaseModel):
    """A request object: unknown fields are errors, nothing is coerced, and null means absent where that is allowed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    neutral: ClassVar[Neutral] = {}
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
            return name in cls.neutral or (name in cls.model_fields and not cls.model_fields[name].is_required())
        # JSON's true is not 1, though Python's is.
        return any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in cls.neutral.get(name, ())
        )


def conflict(field: str, message: str) -> PydanticCustomError:
    """Fields contradict each other; this one would have to change."""
    return PydanticCustomError("conflict", message, {"field": field})


def one_of(kinds: str) -> Discriminator:
    """Choose a union's member by JSON type, so that a wrong value gets one error and not one for each member.

    Its members are tagged "<str>", "<int>", "<dict>", "<list>", and so on.
    """
    return Discriminator(_json_kind, custom_error_type="json_kind", custom_error_message=f"Input should be {kinds}")


def _json_kind(value: object) -> str:
    return f"<{type(value).__name__}>"


def _check_unicode(text: str) -> str:
    """JSON can escape half of a surrogate pair, which is no text: no tokenizer and no answer can carry it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "Input should have no lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
Label = Annotated[Text, Field(max_length=512)]
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Route = Annotated[
    Annotated[Text, Tag("<str>")] | Annotated[dict[Text, Number], Tag("<dict>")],
    one_of("a name, or an object of adapter names and weights"),
]
Activation = Annotated[
    Annotated[Policy, Tag("<str>")] | Annotated[int, Field(ge=0, lt=2**63), Tag("<int>")],
    one_of("a policy's name or a token index"),
]


class TextPart(RequestPart):
    type: Literal["text"]
    text: Text


class Message(RequestPart):
    neutral: ClassVar[Neutral] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "name": (),
        "refusal": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("<str>")] | Annotated[list[TextPart], Tag("<list>")],
        one_of("a string or a list of text parts"),
    ]

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template reads it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "".join(parts)}
