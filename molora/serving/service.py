"""What the endpoints share: the engine, what its routes are called, and how a request is handed to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from fastapi import Depends
from fastapi import Request as HttpRequest

from molora.activation import Activation
from molora.generation import Sampling
from molora.serving.config import Limits, ServeConfig
from molora.serving.errors import InvalidRequestError, UnavailableError
from molora.serving.metrics import Metrics
from molora.serving.protocol import GenerationRequest
from molora.serving.request import Request, RequestError
from molora.serving.running import Running
from molora.serving.token_text import TokenTexts

if TYPE_CHECKING:
    from molora.serving.engine import Engine
    from molora.serving.stream import Stream
    from molora.slots import AdapterInfo

NUM_THREADS = 4  # that tokenize and check; the engine's own work is elsewhere


@dataclass(frozen=True)
class Model:
    """A name that requests may give as `model`: the base, the router or an adapter, and its route."""

    name: str
    route: str
    root: str
    parent: str | None
    adapter: AdapterInfo | None = None


class AdapterLoader(Protocol):
    """What loads and unloads adapters: the engine, or something that stands for several; see `Engine`."""

    def load_adapter(
        self, name: str, path: str | Path, *, activation: Activation | None = None, replace: bool = False
    ) -> AdapterInfo: ...

    def unload_adapter(self, name: str) -> None: ...


class Service:
    """Attributes: engine, loader, limits, metrics, and when it was created, in seconds since 1970."""

    def __init__(self, engine: Engine, config: ServeConfig, loader: AdapterLoader) -> None:
        """
        Raises:
            ValueError: the base and the router would have one name.
        """
        self.engine = engine
        self.loader = loader
        self.limits: Limits = config.limits
        self.adapter_folders = config.adapter_folders
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="submit")
        if self.base_name == engine.m.bank.name:
            raise ValueError(f"the base and the router would both be called {self.base_name!r}; rename the bank.")

    @property
    def base_name(self) -> str:
        return self.engine.m.bank.config.base.name

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.engine.m.tokenizer)

    def name_of(self, adapter: str) -> str:
        """What requests call an adapter."""
        return f"{self.engine.m.bank.name}:{adapter}"

    def models(self) -> dict[str, Model]:
        """By name: the router, if there is one, the base, and each adapter that can be named now."""
        bank, base = self.engine.m.bank, self.base_name
        models = [Model(bank.name, "auto", bank.name, base)] if bank.has_router else []
        models.append(Model(base, "base", base, None))
        models += [
            Model(self.name_of(info.name), info.name, str(info.path), base, info) for info in self.engine.adapters()
        ]
        return {model.name: model for model in models}

    def model(self, name: str) -> Model:
        """
        Raises:
            InvalidRequestError: there is no such model (404).
        """
        models = self.models()
        if name not in models:
            known = ", ".join(map(repr, models))
            raise InvalidRequestError(
                f"unknown model {name!r}; this server has {known}", param="model", status=404, code="model_not_found"
            )
        return models[name]

    def sampling(
        self,
        body: GenerationRequest,
        *,
        max_new_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> Sampling:
        """
        Raises:
            InvalidRequestError: a value is beyond this server's limits.
        """
        limits, grammar = self.limits, body.grammar
        _at_most("n", body.n, limits.max_n)
        _at_most("stop", len(body.stop_strings), limits.max_stop_strings, "strings")
        for text in body.stop_strings:
            _at_most("stop", len(text), limits.max_stop_chars, "characters each")
            if not text:
                raise InvalidRequestError("stop: an empty string would end every answer at once", param="stop")
        _at_most(body.name_of("logprobs"), logprobs, limits.max_logprobs)
        _at_most("prompt_logprobs", prompt_logprobs, limits.max_logprobs)
        if grammar is not None:
            _at_most(body.name_of("grammar"), len(grammar.text.encode()), limits.max_grammar_bytes, "bytes")
        fields: dict[str, Any] = dict(
            max_new_tokens=max_new_tokens,
            temperature=body.temperature,
            top_k=max(body.top_k, 0),
            top_p=body.top_p,
            min_p=body.min_p,
            seed=body.seed,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias={int(token_id): bias for token_id, bias in body.logit_bias.items()},
            stop=body.stop_strings,
            stop_token_ids=body.stop_token_ids,
            ignore_eos=body.ignore_eos,
            n=body.n,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
        )
        try:
            return Sampling(**fields)
        except ValueError as error:  # its first word is the field's name
            name = str(error).partition(" ")[0]
            raise InvalidRequestError(str(error), param=body.name_of(name) if name in fields else None) from None

    async def submit(self, body: GenerationRequest, requests: Sequence[Request]) -> Running:
        """Hand all of them to the engine, or none.

        Raises:
            InvalidRequestError: one of them cannot be served.
            EngineFullError: too many wait.
            EngineClosedError: the engine has stopped.
            UnavailableError: an adapter's files are gone.
        """
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(await self._submit(body, request))
                num_tokens, limit = streams[-1].num_prompt_tokens, self.limits.max_prompt_tokens
                _at_most(body.name_of("prompt"), num_tokens, limit, "tokens")
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return Running(streams, self.metrics)

    async def _submit(self, body: GenerationRequest, request: Request) -> Stream:
        submitted = self._threads.submit(self.engine.submit, request)
        try:
            return await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_close)  # whoever asked has left, and the thread may be half through
            raise
        except OSError as error:
            raise UnavailableError(str(error)) from error
        except RequestError as error:
            raise InvalidRequestError(str(error), param=body.name_of(error.field)) from error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


async def _of_app(request: HttpRequest) -> Service:  # not in a thread of its own
    return request.app.state.service  # type: ignore[no-any-return]


TheService = Annotated[Service, Depends(_of_app)]
"""For endpoints, which are functions of their modules: FastAPI keeps them for good, and would keep what they hold."""


def _at_most(field: str, value: int | None, limit: int | None, unit: str = "") -> None:
    if value is not None and limit is not None and value > limit:
        what = f"{limit} {unit}".rstrip()
        raise InvalidRequestError(f"{field}: {value} is too much; this server takes at most {what}", param=field)


def _close(submitted: Future[Stream]) -> None:
    with suppress(Exception):
        if not submitted.cancelled():
            submitted.result().close()
