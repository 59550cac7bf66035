"""API keys, the bound on bodies, and the headers of every answer."""

import asyncio
import json
import time

import pytest
from starlette.testclient import TestClient

from molora.serving.app import create_app
from molora.serving.config import ServeConfig
from molora.serving.engine import Engine, EngineConfig

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
URL = "/v1/chat/completions"


@pytest.fixture
def locked(make_app):
    return make_app(api_keys=("first-key", "second-key"))


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def paths(app, call):
    described = call(app, "GET", "/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, methods in described.items() for method in methods]


def test_every_route_but_the_probes_wants_a_key(app, locked, call):
    described = [*paths(app, call), ("GET", "/openapi.json"), ("GET", "/redoc"), ("GET", "/nowhere"), ("PUT", URL)]
    assert len(described) >= 16
    for method, path in described:
        status = call(locked, method, path.replace("{model_id}", "demo")).status_code
        assert (status == 401) == (path not in ("/health", "/ready")), (method, path, status)


def test_the_page_is_open_and_holds_no_data(locked, call):
    for path in ("/", "/docs"):
        assert call(locked, "GET", path).status_code in (200, 404)
    assert call(locked, "GET", "/static/nothing").status_code == 404
    for path in ("/static/../v1/models", "/static", "//v1/models", "/v1/models/", "/STATIC/../metrics"):
        assert call(locked, "GET", path).status_code in (401, 404), path


@pytest.mark.parametrize("key", ["first-key", "second-key", "  second-key "])
def test_each_key_fits(locked, call, key):
    assert call(locked, "POST", URL, json=CHAT, headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "header", [b"", b"Bearer", b"Bearer ", b"Bearer first", b"Bearer first-key2", b"Basic first-key", b"first-key",
               b"Bearer \xff\xfe", b"Bearer first-key second-key", b"Bearer first-key,second-key"],
)  # fmt: skip
def test_no_other_does(locked, call, engine, assert_refused, header):
    response = call(locked, "POST", URL, json=CHAT, headers={"authorization": header})
    assert_refused(response, None, words="Authorization: Bearer", status=401)
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert engine.log == []


def test_two_headers_are_none(locked, call):
    headers = [("authorization", "Bearer first-key"), ("authorization", "Bearer first-key")]
    assert call(locked, "GET", "/v1/models", headers=headers).status_code == 401


def body_of(num_bytes):
    return (
        json.dumps(CHAT | {"cache_salt": ""}).replace('"cache_salt": ""', f'"cache_salt": "{"x" * num_bytes}"').encode()
    )


def test_a_body_of_the_largest_size(make_app, call, assert_refused):
    app = make_app(limits={"max_body_bytes": 200})
    headers = {"content-type": "application/json"}
    fits = body_of(200 - len(body_of(0)))
    assert call(app, "POST", URL, content=fits, headers=headers).status_code == 200
    response = call(app, "POST", URL, content=fits + b" ", headers=headers)
    assert_refused(response, None, words="200 bytes", status=413)
    headers["content-length"] = "9" * 5000
    assert call(app, "POST", URL, content=b"{}", headers=headers).status_code == 413


def test_a_body_in_chunks_is_read_no_further_than_it_may(make_app, call):
    app, sent = make_app(limits={"max_body_bytes": 1000}), []

    async def endless():
        while True:
            sent.append(100)
            yield b" " * 100
            await asyncio.sleep(0)

    response = call(app, "POST", URL, content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert sum(sent) <= 1200


def test_a_body_that_is_late(make_app, call, engine, assert_refused):
    async def slow():
        yield body_of(5)[:20]
        await asyncio.sleep(30)

    app, begun = make_app(limits={"max_body_s": 1}), time.monotonic()
    response = call(app, "POST", URL, content=slow(), headers={"content-type": "application/json"})
    assert_refused(response, None, words="within the 1 s", status=408)
    assert time.monotonic() - begun < 10
    assert engine.log == []


def test_an_answer_may_take_longer_than_its_body(make_app, call, engine):
    async def slowly(position):
        await asyncio.sleep(0.6 if position < 2 else 0)

    engine.before_token = slowly
    assert call(make_app(limits={"max_body_s": 1}), "POST", URL, json=CHAT).status_code == 200


def test_chunks_are_put_together(app, call):
    async def pieces():
        for byte in body_of(5):
            yield bytes([byte])

    response = call(app, "POST", URL, content=pieces(), headers={"content-type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nowhere", "/"])
def test_headers_of_every_answer(app, call, path):
    headers = call(app, "GET", path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"


SECRETS = (
    "words-that-were-asked",
    "first-key",
    "a-key-that-is-none",
    "salt-of-a-tenant",
    "somebody",
    "words-in-a-field",
)


async def fail(position):
    if position == 2:
        raise RuntimeError("the engine failed")


def test_prompts_keys_and_salts_are_in_no_log_and_no_metric(locked, call, engine, caplog):
    """Whatever becomes of a request: answered, refused, failed, streamed or not."""
    caplog.set_level(1)
    words, key, wrong_key, salt, user, field = SECRETS
    chat = CHAT | {"messages": [{"role": "user", "content": words}], "cache_salt": salt, "user": user}
    statuses, usual = [], engine.before_token

    def ask(sent=key, **changes):
        statuses.append(call(locked, "POST", URL, json=chat | changes, headers=bearer(sent)).status_code)

    for stream in (False, True):
        ask(stream=stream)
        ask(stream=stream, sent=wrong_key)
        ask(stream=stream, temperature=field)
        ask(stream=stream, model=field)
        ask(stream=stream, messages=words)
        engine.before_token = fail
        ask(stream=stream)
        engine.before_token = usual
    assert statuses == [200, 401, 400, 404, 400, 500, 200, 401, 400, 404, 400, 200]
    assert "the engine failed" in caplog.text
    told = caplog.text + call(locked, "GET", "/metrics", headers=bearer(key)).text
    assert [secret for secret in SECRETS if secret in told] == []


def test_nor_in_what_the_engine_itself_logs(m, caplog, monkeypatch):
    """Of an answer that cannot go on, of a step that fails, and of a fault beside the model."""
    caplog.set_level(1)
    words, key, _, salt, user, field = SECRETS
    engine = Engine(m, EngineConfig(kv_cache_bytes=1 << 24))
    app = create_app(engine, ServeConfig(bank="tiny", api_keys=(key,)))
    endless = "a{30}(" + field + r")?\w?" + r"\w?" * 500  # which shows only as it is followed
    asked = {"model": "tiny:x", "prompt": words, "cache_salt": salt, "user": user, "max_tokens": 60}
    asked["structured_outputs"] = {"regex": endless}

    def fail(*args):
        raise RuntimeError("no such luck")

    faults = [(engine._runner, "launch"), (engine._steps.scheduler, "plan"), (None, "")]
    with TestClient(app, raise_server_exceptions=False) as client:
        for holder, name in faults:
            with monkeypatch.context() as patch:
                if holder is not None:
                    patch.setattr(holder, name, fail)
                for stream in (False, True):
                    sent = asked | {"stream": stream}
                    response = client.post("/v1/completions", json=sent, headers=bearer(key))
                    assert "lexer error" in response.text or "no such luck" in response.text
        told = caplog.text + client.get("/metrics", headers=bearer(key)).text
    engine.close()
    for said in ("no such luck", "lexer error", "an answer could not go on", "the engine failed beside the model"):
        assert said in caplog.text
    assert [secret for secret in SECRETS if secret in told] == []
