"""A model that writes words, one for a token, and remembers what was asked of it."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI

from molora.generation import Generation, Token
from molora.serving.app import create_app

WORDS = ("Per", "-token", " rout", "", "ing", " ✓")


@dataclass(frozen=True)
class FakeAdapter:
    name: str


@dataclass(frozen=True)
class FakeBank:
    name: str = "demo"
    adapters: tuple[FakeAdapter, ...] = (FakeAdapter("maths"), FakeAdapter("code"))
    has_router: bool = True


class FakeIterator:
    def __init__(self, model: "FakeModel", num_prompt_tokens: int, max_new_tokens: int) -> None:
        self._model = model
        self._num_prompt_tokens = num_prompt_tokens
        self._max_new_tokens = max_new_tokens
        self._num_generated_tokens = 0
        self.result: Any = None

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        assert threading.current_thread() is not threading.main_thread(), "generation blocks the event loop"
        position = self._num_generated_tokens
        if position == min(len(self._model.words), self._max_new_tokens):
            self.result = self._generation()
            raise StopIteration
        self._model.before_token(position)
        self._num_generated_tokens += 1
        return Token(position, self._model.words[position], [("maths", 0.75), ("base", 0.25)])

    def _generation(self) -> Generation:
        num_generated_tokens = self._num_generated_tokens
        return Generation(
            text="".join(self._model.words[:num_generated_tokens]),
            token_ids=list(range(self._num_prompt_tokens + num_generated_tokens)),
            routes=[],
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=num_generated_tokens,
            activation_start=None,
            num_reused_tokens=3,
            num_computed_tokens=4,
            num_recomputed_tokens=0,
            num_reencoded_tokens=1,
            finish_reason="length" if num_generated_tokens == self._max_new_tokens else "stop",
        )

    def close(self) -> None:
        self._model.log.append("close")
        self._model.closed.set()


@dataclass
class FakeModel:
    """`before_token` is called on the worker thread with each token's position: to fail there, or to wait."""

    bank: FakeBank = FakeBank()
    words: tuple[str, ...] = WORDS
    before_token: Callable[[int], object] = lambda position: None
    calls: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def stream(self, messages: list[dict[str, str]], /, *, max_new_tokens: int | None, **options: Any) -> FakeIterator:
        text = " ".join(message["content"] for message in messages)
        if len(text) > 1000:
            raise ValueError("the prompt has 1001 tokens and the context holds 1000")
        self.log.append(f"start {text}")
        self.calls.append({"messages": messages, "max_new_tokens": max_new_tokens, **options})
        return FakeIterator(self, len(text.split()), max_new_tokens or len(self.words) + 1)


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def app(model: FakeModel) -> FastAPI:
    return create_app(model)
