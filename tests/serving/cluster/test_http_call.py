"""A request through an app in this process, and the health of the engine behind it."""

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace

import pytest

from molora.serving.cluster.health import STALL_S, Health
from molora.serving.cluster.http_call import HttpCall, HttpHead, answer
from molora.serving.cluster.merged_metrics import merge
from molora.serving.engine import EngineStats
from molora.serving.request_log import LogRequests

URL = "/v1/chat/completions"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "hello there"}]}


def call_of(path: str, body: object = None, method: str = "POST") -> HttpCall:
    data = b"" if body is None else json.dumps(body).encode()
    return HttpCall(method, path, path.encode(), b"", ((b"content-type", b"application/json"),), data)


async def collect(app, call):
    async with aclosing(answer(app, call)) as parts:
        return [part async for part in parts]


def test_an_answer_is_a_head_and_its_body(app, call):
    head, body = asyncio.run(collect(app, call_of("/v1/models", method="GET")))
    direct = call(app, "GET", "/v1/models")
    assert isinstance(head, HttpHead)
    headers, expected = dict(head.headers), dict(direct.headers.raw)
    assert headers.pop(b"x-request-id") != expected.pop(b"x-request-id")
    assert (head.status, headers) == (200, expected)
    assert body == direct.content
    assert [part.status for part in asyncio.run(collect(app, call_of("/v1/models", method="HEAD")))] == [200]
    assert asyncio.run(collect(app, call_of("/nothing", {})))[0].status == 404


def test_a_stream_comes_as_it_is_made(app, engine, gate):
    async def run():
        engine.before_token = held = gate(3)
        async with aclosing(answer(app, call_of(URL, BODY | {"stream": True}))) as parts:
            assert (await anext(parts)).status == 200
            text = b""
            while text.count(b'"content"') < 4:  # the role and three tokens
                text += await anext(parts)
            held.opened.set()
            rest = [part async for part in parts]
        assert rest[-1].endswith(b"data: [DONE]\n\n")

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_closing_it_cancels_the_request(app, engine, gate, stream):
    async def run():
        engine.before_token = held = gate(3)
        parts = answer(app, call_of(URL, BODY | {"stream": stream}))
        reading = asyncio.create_task(anext(parts))
        await asyncio.wait_for(held.reached.wait(), 5)
        if stream:
            await reading
        else:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await parts.aclose()
        assert engine.log == ["submit", "cancel"]

    asyncio.run(run())


def test_what_an_app_raises():
    async def fails(scope, receive, send):
        raise RuntimeError("at once")

    async def fails_late(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"sorry"})
        raise RuntimeError("for the log")

    with pytest.raises(RuntimeError, match="at once"):
        asyncio.run(collect(fails, call_of("/")))
    assert asyncio.run(collect(fails_late, call_of("/"))) == [HttpHead(500, ()), b"sorry"]


def test_what_fails_late_is_logged_with_the_request_s_id(lines):
    async def fails_late(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("for the log")

    call = replace(call_of("/"), headers=((b"x-request-id", b"mine"),))
    asyncio.run(collect(LogRequests(fails_late, ()), call))
    request, failure = map(json.loads, lines)
    assert "for the log" in failure["exception"]
    assert (request["request_id"], failure["request_id"]) == ("mine", "mine")


def test_metrics_of_two_replicas_on_one_page(app, call):
    text = call(app, "GET", "/metrics").text
    merged = merge({"one": text, "two": text}).decode()
    samples = [line for line in merged.splitlines() if line.startswith("molora:prompt_tokens_total")]
    assert samples == [
        f'molora:prompt_tokens_total{{model_name="demo",replica="{name}"}} 20.0' for name in ("one", "two")
    ]
    assert merged.count("# TYPE molora:prompt_tokens_total counter") == 1
    assert merged.count('le="0.1"') == 2 * text.count('le="0.1"')
    assert merge({}) == b""


class FakeEngine:
    is_ready = True
    now = EngineStats()

    def stats(self):
        return self.now


def test_health():
    engine, now = FakeEngine(), 0.0
    health = Health(engine, lambda: now)
    health.check()
    now = 10 * STALL_S  # nothing runs, so nothing stands still
    health.check()
    engine.now = EngineStats(num_running=2, num_steps=5)
    health.check()
    now += STALL_S + 1
    engine.now = EngineStats(num_running=2, num_steps=6)
    health.check()
    now += STALL_S + 1
    with pytest.raises(RuntimeError, match="2 requests run, and no step ended for 120 s"):
        health.check()
    engine.is_ready = False
    with pytest.raises(RuntimeError, match="stopped"):
        health.check()
