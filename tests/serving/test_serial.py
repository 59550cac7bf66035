"""Turns: one generation at a time, off the event loop, and stopped when its client leaves.

These drive the app through ASGI by hand, because a test client shows neither partial answers nor a client that leaves.
"""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

TIMEOUT_S = 10


class Client:
    """One request: `sent` grows as the app answers, and setting `left` hangs up."""

    def __init__(self, app: FastAPI, content: str, *, stream: bool, spec_version: str = "2.3") -> None:
        body = {"model": "base", "messages": [{"role": "user", "content": content}], "stream": stream}
        self._incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
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


class Gate:
    """Holds the worker thread before a token, until opened."""

    def __init__(self, position: int) -> None:
        self._position = position
        self._reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, position: int) -> None:
        if position == self._position and not self._opened.is_set():
            self._reached.set()
            assert self._opened.wait(TIMEOUT_S)

    async def reached(self) -> None:
        await until(self._reached.is_set)

    def open(self) -> None:
        self._opened.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Let everything that can happen without the worker thread happen."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_request_waits_for_the_first(app, model, stream):
    async def scenario() -> None:
        model.before_token = gate = Gate(1)
        first = Client(app, "first", stream=stream)
        await gate.reached()
        others = [Client(app, name, stream=stream) for name in ("second", "third")]
        await settle()
        assert model.log == ["start first"]
        assert not any(other.sent for other in others)
        gate.open()
        for client in (first, *others):
            await client.finish()
            assert "routing" in client.text or '"content":"ing"' in client.text

    asyncio.run(scenario())
    assert model.closed.wait(TIMEOUT_S)
    assert model.log[:5] == ["start first", "close", "start second", "close", "start third"]


def test_tokens_are_sent_as_they_are_made_and_the_server_stays_awake(app, model):
    async def scenario() -> None:
        model.before_token = gate = Gate(2)
        client = Client(app, "hello", stream=True)
        await gate.reached()
        await until(lambda: '"content":"-token"' in client.text)
        assert '"content":" rout"' not in client.text
        gate.open()
        await client.finish()
        assert client.text.endswith("data: [DONE]\n\n")

    asyncio.run(scenario())


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])  # the older one is told by receive, the newer by send
def test_a_client_that_leaves_a_stream_stops_it(app, model, spec_version):
    async def scenario() -> None:
        model.before_token = gate = Gate(2)
        client = Client(app, "hello", stream=True, spec_version=spec_version)
        await gate.reached()
        client.left.set()
        await settle()
        gate.open()
        await asyncio.gather(client.task, return_exceptions=True)
        await until(model.closed.is_set)
        assert '"content":" rout"' not in client.text

    asyncio.run(scenario())
    assert model.log == ["start hello", "close"]


def test_a_client_that_leaves_an_answer_stops_it(app, model):
    async def scenario() -> None:
        made = []
        gate = Gate(2)
        model.before_token = lambda position: (gate(position), made.append(position))
        client = Client(app, "hello", stream=False)
        await gate.reached()
        client.left.set()
        following = Client(app, "again", stream=False)
        await settle()
        gate.open()
        await asyncio.gather(client.task, return_exceptions=True)
        await following.finish()
        assert "Per-token routing" in following.text
        assert made[:4] == [0, 1, 2, 0]

    asyncio.run(scenario())
    assert model.log[:3] == ["start hello", "close", "start again"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_never_generated_for(app, model, stream):
    async def scenario() -> None:
        model.before_token = gate = Gate(1)
        first = Client(app, "first", stream=True)
        await gate.reached()
        impatient, patient = Client(app, "impatient", stream=stream), Client(app, "patient", stream=stream)
        await settle()
        impatient.left.set()
        await asyncio.gather(impatient.task, return_exceptions=True)
        gate.open()
        await first.finish()
        await patient.finish()

    asyncio.run(scenario())
    assert model.log[:3] == ["start first", "close", "start patient"]


def test_a_client_that_leaves_while_the_model_starts(app, model, monkeypatch):
    async def scenario() -> None:
        gate, start = Gate(0), model.stream

        def slow_start(*messages: Any, **options: Any) -> Any:
            gate(0)
            return start(*messages, **options)

        monkeypatch.setattr(model, "stream", slow_start)
        client = Client(app, "hello", stream=True)
        await gate.reached()
        client.left.set()
        await asyncio.gather(client.task, return_exceptions=True)
        gate.open()
        await until(model.closed.is_set)

    asyncio.run(scenario())
    assert model.log == ["start hello", "close"]
