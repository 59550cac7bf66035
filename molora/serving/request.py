"""What is asked of the engine, and the ways in which it says no. It imports no torch and knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from molora.activation import Activation, Messages
from molora.generation import Sampling


class RequestError(ValueError):
    """A request cannot be served; `field` is that of `Request` or of `Sampling` which would have to change."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@contextmanager
def checking(field: str) -> Iterator[None]:
    """A ValueError inside is about this field."""
    try:
        yield
    except ValueError as error:
        raise RequestError(field, str(error)) from error


class EngineFullError(RuntimeError):
    """Too many requests wait already; `retry_after_s` says when to try again."""

    def __init__(self, num_waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{num_waiting} requests wait already; try again in {retry_after_s:g} s.")
        self.retry_after_s = retry_after_s


class EngineError(RuntimeError):
    """The engine failed on a request; the request itself may be in order."""


class EngineClosedError(EngineError):
    """The engine has stopped."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: chat messages, plain text, or token ids.
        route: who acts on the active tokens: "auto" (the router), "base", an adapter's name, or {name: weight}.
        activation: where adapters may begin to act: a policy or an absolute token index; None takes the policy that
            the route was trained with.
        salt: nothing is shared in the cache between requests of different salts.
    """

    prompt: Messages | str | Sequence[int]
    route: str | Mapping[str, float] = "auto"
    activation: Activation | None = None
    sampling: Sampling = field(default_factory=Sampling)
    salt: str = ""
