"""An engine that writes words, one for a token, and remembers what was asked of it; and clients that can leave."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from molora.activation import Activation, Prompt, render
from molora.generation import Generation, Token, TokenLogprob
from molora.serving.app import create_app
from molora.serving.config import Limits, ServeConfig
from molora.serving.engine import EngineStats
from molora.serving.logs import JsonFormatter
from molora.serving.request import EngineClosedError, EngineFullError, Request, RequestError, checking
from molora.serving.tracing import Tracer
from molora.slots import AdapterInfo, NoFreeSlotError
from molora.text_limit import TextLimit
from molora.tiny import byte_tokenizer

TIMEOUT_S = 10
WORDS = ("Per", "-token", " rout", "", "ing", " ✓")
ROUTE = (("maths", 0.75), ("code", 0.25))
CANDIDATES = (("maths", 0.75), ("base", 0.125))


@dataclass(frozen=True)
class FakeBase:
    name: str = "org/base"


@dataclass(frozen=True)
class FakeConfig:
    base: FakeBase = FakeBase()
    activation: Activation = "turn"


@dataclass(frozen=True)
class FakeBank:
    name: str = "demo"
    has_router: bool = True
    config: FakeConfig = FakeConfig()


class FakeModel:
    max_context = 1000
    text_limit = TextLimit(13_000)

    def __init__(self) -> None:
        self.bank = FakeBank()
        self.tokenizer: Any = byte_tokenizer()

    def render(self, prompt: Any) -> Prompt:
        return render(self.tokenizer, prompt, limit=self.text_limit)


def adapter_info(name: str, path: Path = Path("adapters"), *, activation: Activation = "turn") -> AdapterInfo:
    return AdapterInfo(name, f"digest of {name}", False, activation, None, False, path / name)


async def at_once(position: int) -> None:
    await asyncio.sleep(0)


class FakeStream:
    def __init__(self, engine: "FakeEngine", request: Request, prompt_ids: Sequence[int]) -> None:
        self.engine = engine
        self.request = request
        self.prompt_ids = tuple(prompt_ids)
        self.num_prompt_tokens = len(prompt_ids)
        self.is_over = False
        self._tokens = self._make()
        self._num_made = 0

    @property
    def num_tokens(self) -> int:
        limit = self.request.sampling.max_new_tokens
        return len(self.engine.words) if limit is None else min(limit, len(self.engine.words))

    @property
    def results(self) -> list[Generation]:
        if self._num_made < self.num_tokens:
            raise RuntimeError("the stream has no result before its last token")
        return [self._result(choice) for choice in range(self.request.sampling.n)]

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> Token:
        return await anext(self._tokens)

    def close(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.engine.log.append("cancel" if self._num_made < self.num_tokens else "end")
            self.engine.running.remove(self)

    async def _make(self) -> Any:
        for position in range(self.num_tokens):
            await self.engine.before_token(position)
            if self.is_over:
                return
            self._num_made += 1
            for choice in range(self.request.sampling.n):
                yield self._token(position, choice)

    def _token(self, position: int, choice: int) -> Token:
        is_last = position == self.num_tokens - 1
        reason = ("stop" if self.num_tokens == len(self.engine.words) else "length") if is_last else None
        logprobs = self.request.sampling.logprobs
        logprob = None if logprobs is None else TokenLogprob(50 + position, -0.5, ((60, -0.25), (61, -1.0))[:logprobs])
        word = self.engine.words[position]
        return Token(50 + position, word, ROUTE, choice, CANDIDATES, logprob, reason)

    def _result(self, choice: int) -> Generation:
        num_new, asked = self.num_tokens, self.request.sampling.prompt_logprobs
        scores = [TokenLogprob(token_id, -0.5, ((token_id, -0.5), (61, -1.0))[:asked]) for token_id in self.prompt_ids]
        return Generation(
            text="".join(self.engine.words[:num_new]),
            token_ids=[*self.prompt_ids, *range(50, 50 + num_new)],
            routes=[()] * (self.num_prompt_tokens - 1) + [ROUTE] * num_new + [()],
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=num_new,
            activation_start=0,
            num_reused_tokens=3,
            num_computed_tokens=4,
            num_recomputed_tokens=0,
            num_reencoded_tokens=1,
            finish_reason="stop" if num_new == len(self.engine.words) else "length",
            num_replayed_tokens=2,
            choice=choice,
            prompt_logprobs=[None, *scores[1:]] if asked is not None and choice == 0 else None,
            queue_s=0.25,
            first_token_s=0.5,
            total_s=1.0,
        )


class FakeEngine:
    """`before_token` is awaited before each token, with its position: to fail there, or to wait."""

    def __init__(self) -> None:
        self.m = FakeModel()
        self.words: tuple[str, ...] = WORDS
        self.before_token: Callable[[int], Awaitable[object]] = at_once
        self.while_submitting: Callable[[], object] = lambda: None
        self.requests: list[Request] = []
        self.running: list[FakeStream] = []
        self.log: list[str] = []
        self.max_running = 100
        self.is_ready = True
        self.captures = True
        self.stopped = False
        self.infos = {name: adapter_info(name) for name in ("maths", "code")}
        self.num_free_slots = 1

    def warm_up(self) -> None:
        self.log.append("warm up")

    def submit(self, request: Request) -> FakeStream:
        with pytest.raises(RuntimeError):  # it tokenizes, which must not block an event loop
            asyncio.get_running_loop()
        self.while_submitting()
        if self.stopped:
            raise EngineClosedError("the engine was closed.")
        if len(self.running) >= self.max_running:
            raise EngineFullError(self.max_running, retry_after_s=1.5)
        with checking("prompt"):
            prompt_ids = list(self.m.render(request.prompt).token_ids)
        if len(prompt_ids) >= self.m.max_context:
            raise RequestError(
                "prompt", f"the prompt has {len(prompt_ids)} tokens, but the model reads at most 1000 tokens"
            )
        self.requests.append(request)
        self.running.append(stream := FakeStream(self, request, prompt_ids))
        self.log.append("submit")
        return stream

    def adapters(self) -> list[AdapterInfo]:
        return list(self.infos.values())

    def load_adapter(self, name: str, path: Path, *, activation: Any = None, replace: bool = False) -> AdapterInfo:
        if name not in self.infos and not self.num_free_slots:
            raise NoFreeSlotError("all 2 adapter slots are in use")
        if name in self.infos and not replace:
            raise ValueError("there is one already")
        self.infos[name] = adapter_info(name, path.parent, activation=activation or 0)
        return self.infos[name]

    def unload_adapter(self, name: str) -> None:
        if name == "maths":
            raise ValueError("adapter 'maths' has a column of the router")
        del self.infos[name]

    def close(self) -> None:
        self.stopped = True
        self.log.append("close")

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running), num_blocks=8, num_free_blocks=6, num_prompt_tokens=20, num_cached_tokens=7,
            num_adapter_tokens={"base": 5, "maths": 9},
        )  # fmt: skip


@dataclass
class Gate:
    """Holds a stream before a token, until opened."""

    position: int
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, position: int) -> None:
        if position == self.position:
            self.reached.set()
            await asyncio.wait_for(self.opened.wait(), TIMEOUT_S)


class Client:
    """One request, driven through ASGI by hand: `sent` grows as the app answers, and setting `left` hangs up."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any], *, spec_version: str = "2.3") -> None:
        self._incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._incoming:
            return self._incoming.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self.left.is_set():
            raise OSError("the client has left")
        self.sent.append(message)

    async def finish(self) -> None:
        await asyncio.wait_for(self.task, TIMEOUT_S)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


@pytest.fixture(scope="session")
def engine_class() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_app(engine: FakeEngine) -> Callable[..., FastAPI]:
    """An app of the fake engine with settings of its own; `limits` is a mapping."""

    def make(*, limits: dict[str, Any] | None = None, tracer: Tracer | None = None, **settings: Any) -> FastAPI:
        config = ServeConfig(bank="demo", limits=Limits(**(limits or {})), **settings)
        return create_app(engine, config, tracer=tracer)

    return make


@pytest.fixture
def app(make_app: Callable[..., FastAPI]) -> FastAPI:
    return make_app()


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged from here on, as lines of JSON."""
    found = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(self.format(record))

    handler, root, ours = Handler(), logging.getLogger(), logging.getLogger("molora")
    handler.setFormatter(JsonFormatter())
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    yield found
    ours.setLevel(logging.NOTSET)
    root.removeHandler(handler)


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


@pytest.fixture
def tracer(spans: InMemorySpanExporter) -> Tracer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Tracer(provider)


@pytest.fixture(scope="session")
def gate() -> type[Gate]:
    return Gate


@pytest.fixture(scope="session")
def connect() -> type[Client]:
    return Client


@pytest.fixture(scope="session")
def until() -> Callable[..., Awaitable[None]]:
    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                await asyncio.sleep(0.001)

    return until


@pytest.fixture(scope="session")
def call() -> Callable[..., httpx.Response]:
    """One request through ASGI, in an event loop of its own."""

    def call(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://molora") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    return call


@pytest.fixture(scope="session")
def assert_refused() -> Callable[..., None]:
    def check(response: httpx.Response, param: str | None, *, words: str, status: int = 400) -> None:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        error = response.json()["error"]
        assert set(response.json()) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert words in error["message"]

    return check


@pytest.fixture(scope="session")
def events() -> Callable[[httpx.Response], list[Any]]:
    """The data of a stream's events; the last one, [DONE], is checked and left out."""

    def read(response: httpx.Response) -> Sequence[Any]:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.text.endswith("\n\n")
        lines = response.text.split("\n\n")[:-1]
        assert all(line.startswith("data: ") for line in lines)
        *data, last = [line.removeprefix("data: ") for line in lines]
        if last != "[DONE]":
            data.append(last)
        return [json.loads(each) for each in data]

    return read


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """A file of settings."""

    def write(text: str) -> Path:
        (tmp_path / "serve.yaml").write_text(text)
        return tmp_path / "serve.yaml"

    return write
