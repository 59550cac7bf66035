"""What an operator sees: probes, the version, the schema, errors that no request can cause, and hostile bodies."""

import asyncio
import gc
import json
import weakref

import pytest

import molora
from molora.serving.app import create_app
from molora.serving.config import ServeConfig
from molora.serving.request import EngineError

URL = "/v1/chat/completions"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "hello there"}]}
COMPLETION = {"model": "demo", "prompt": ["hello", "there"], "activation": 0}


def test_health_and_version(app, call):
    assert call(app, "GET", "/health").json() == {"status": "ok"}
    assert call(app, "GET", "/version").json() == {"version": molora.__version__}


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/v1/models", "/static/app.js"])
def test_head_is_get_without_a_body(app, call, path):
    head, get = call(app, "HEAD", path), call(app, "GET", path)
    assert (head.status_code, head.content) == (200, b"")
    del head.headers["x-request-id"], get.headers["x-request-id"]  # each has its own
    assert head.headers == get.headers
    assert get.content


def test_head_of_what_is_only_posted(app, call, engine):
    assert call(app, "HEAD", URL).status_code == 405
    assert engine.log == []


def test_readiness(app, call, engine):
    assert call(app, "GET", "/ready").status_code == 200
    engine.is_ready = False
    response = call(app, "GET", "/ready")
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
    assert call(app, "GET", "/health").status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'"\xed\xa0\x80"', b"9" * 5000, b'{"a":' * 100_000])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
@pytest.mark.parametrize("path", [URL, "/v1/completions", "/tokenize", "/v1/load_lora_adapter"])
def test_a_body_that_is_no_json_object(app, call, assert_refused, path, content, content_type):
    response = call(app, "POST", path, content=content, headers={"content-type": content_type})
    assert_refused(response, None, words="body")


@pytest.mark.parametrize("depth", [60, 100, 500, 900, 5000])
@pytest.mark.parametrize(
    ("field", "is_free"),
    [
        ('"structured_outputs": {"json": SCHEMA}', True),
        ('"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}', True),
        ('"metadata": SCHEMA', False),
        ('"route": SCHEMA', False),
        ('"messages": SCHEMA', False),
        ('"logit_bias": SCHEMA', False),
        ('"x": SCHEMA', False),
    ],
)
def test_json_that_is_nested_deeply(app, call, depth, field, is_free):
    schema = '{"a":' * depth + "1" + "}" * depth
    content = f"{json.dumps(BODY)[:-1]}, {field.replace('SCHEMA', schema)}}}"
    response = call(app, "POST", URL, content=content, headers={"content-type": "application/json"})
    assert response.status_code == (200 if is_free and depth == 60 else 400), response.text


def test_unknown_paths_and_methods(app, call, assert_refused):
    assert_refused(call(app, "POST", "/v1/embeddings", json={}), None, words="/v1/embeddings", status=404)
    assert_refused(call(app, "GET", "/v1/models/x/%ff%00"), "model", words="unknown model", status=404)
    response = call(app, "GET", URL)
    assert_refused(response, None, words="Method Not Allowed", status=405)
    assert response.headers["allow"] == "POST"


async def fail_at_two(position):
    await asyncio.sleep(0)
    if position == 2:
        raise RuntimeError("a secret of the server")


async def run_out_of_memory(position):
    if position == 2:
        raise EngineError("the step failed: out of memory")


@pytest.mark.parametrize(("path", "body"), [(URL, BODY), ("/v1/completions", COMPLETION)])
def test_an_error_while_generating(app, call, engine, path, body):
    engine.before_token = fail_at_two
    response = call(app, "POST", path, json=body)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert engine.running == []

    engine.before_token = run_out_of_memory
    response = call(app, "POST", path, json=body)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the step failed: out of memory"
    assert engine.running == []


@pytest.mark.parametrize(("path", "body"), [(URL, BODY), ("/v1/completions", COMPLETION)])
def test_an_error_in_mid_stream_is_the_last_event(app, call, engine, events, caplog, path, body):
    engine.before_token = fail_at_two
    response = call(app, "POST", path, json=body | {"stream": True})
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    assert "secret" not in response.text
    *chunks, last = events(response)
    assert all(chunk["choices"] for chunk in chunks)
    assert last["error"]["type"] == "server_error"
    assert "a secret of the server" in caplog.text
    assert engine.running == []


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_a_status(app, call, engine, stream):
    async def fail(position):
        raise EngineError("the step failed: out of memory")

    engine.before_token = fail
    response = call(app, "POST", URL, json=BODY | {"stream": stream})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the step failed: out of memory"


def test_nothing_holds_on_to_an_app_that_has_answered(call, engine_class):
    engine = engine_class()
    app = create_app(engine, ServeConfig(bank="demo"))
    for path in ("/ready", "/v1/models", "/metrics", "/", "/docs"):
        assert call(app, "GET", path).status_code == 200
    for path, body in ((URL, BODY), ("/v1/completions", COMPLETION), ("/tokenize", {"prompt": "x"})):
        assert call(app, "POST", path, json=body).status_code == 200
    left = weakref.ref(engine)
    del app, engine
    gc.collect()
    assert left() is None


def test_the_schema_documents_errors_as_they_are(app, call):
    schema = call(app, "GET", "/openapi.json").json()
    responses = schema["paths"][URL]["post"]["responses"]
    assert "422" not in responses
    assert responses["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"route", "activation", "cache_salt", "return_routes", "structured_outputs"} <= set(fields)
    assert call(app, "GET", "/redoc").status_code == 404
