"""Clients that leave: whatever they waited for is cancelled at once, streamed or not, queued, submitted or begun.

These drive the app through ASGI by hand, because a test client shows neither partial answers nor a client that leaves.
"""

import asyncio
import threading

import pytest

TIMEOUT_S = 10
URLS = {
    "/v1/chat/completions": {"model": "demo", "messages": [{"role": "user", "content": "hello"}]},
    "/v1/completions": {"model": "demo", "prompt": ["one", "two"]},
}
each_api = pytest.mark.parametrize("path", URLS)
streamed_or_not = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture
def ask(app, connect):
    def ask(path, *, stream, **options):
        return connect(app, path, URLS[path] | {"stream": stream}, **options)

    return ask


@each_api
def test_tokens_are_sent_as_they_are_made(ask, engine, gate, until, path):
    async def scenario():
        engine.before_token = held = gate(2)
        client = ask(path, stream=True)
        await held.reached.wait()
        await until(lambda: '"-token"' in client.text)
        assert '" rout"' not in client.text
        held.opened.set()
        await client.finish()
        assert client.text.endswith("data: [DONE]\n\n")

    asyncio.run(scenario())
    assert "cancel" not in engine.log


@each_api
@streamed_or_not
def test_requests_run_side_by_side(ask, engine, gate, until, path, stream):
    async def scenario():
        engine.before_token = held = gate(1)
        clients = [ask(path, stream=stream) for _ in range(3)]
        await until(lambda: len(engine.running) == 3 * (1 + (path == "/v1/completions")))
        held.opened.set()
        for client in clients:
            await client.finish()
            assert "ing" in client.text

    asyncio.run(scenario())
    assert engine.running == []


@each_api
@streamed_or_not
@pytest.mark.parametrize("position", [0, 2], ids=["queued", "begun"])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])  # servers of the newer one may tell by `send` alone
def test_a_client_that_leaves_cancels_its_request(ask, engine, gate, until, path, stream, position, spec_version):
    async def scenario():
        engine.before_token = held = gate(position)
        client = ask(path, stream=stream, spec_version=spec_version)
        await held.reached.wait()
        client.left.set()
        await until(lambda: not engine.running)  # though the engine is still held
        await client.finish()
        assert '" rout"' not in client.text

    asyncio.run(scenario())
    assert engine.log[-1] == "cancel"


@each_api
@streamed_or_not
def test_a_client_that_leaves_while_its_prompt_is_read(ask, engine, until, path, stream):
    reached, opened = threading.Event(), threading.Event()

    def hold():
        reached.set()
        assert opened.wait(TIMEOUT_S)

    async def scenario():
        engine.while_submitting = hold
        client = ask(path, stream=stream)
        await until(reached.is_set)
        client.left.set()
        await client.finish()
        assert engine.log == []
        opened.set()
        await until(lambda: "cancel" in engine.log)

    asyncio.run(scenario())
    assert engine.running == []
    assert engine.log == ["submit", "cancel"]  # of two prompts, the second was never submitted


def test_a_client_that_leaves_before_its_body_is_complete(app, engine):
    async def scenario():
        messages = iter([{"type": "http.request", "body": b'{"model"', "more_body": True}, {"type": "http.disconnect"}])

        async def receive():
            return next(messages)

        async def send(message):
            raise OSError("the client has left")

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        await app(scope, receive, send)

    asyncio.run(scenario())
    assert engine.log == []
