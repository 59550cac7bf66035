"""A request's id, its line of the log and its spans: what they say, and that they keep secrets."""

import asyncio
import json
import logging
import logging.config
from contextlib import contextmanager

import pytest

from molora.serving import cli
from molora.serving.config import ServeConfig
from molora.serving.logs import json_logging

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "words-that-were-asked"}]}
URL = "/v1/chat/completions"
KEY = {"authorization": "Bearer first-key"}
SECRETS = ("words-that-were-asked", "first-key", "wrong-key", "salt-of-a-tenant", "somebody", "a-secret-field")


@pytest.fixture
def traced(make_app, tracer):
    return make_app(api_keys=("first-key",), tracer=tracer)


def requests_of(lines):
    return [line for line in map(json.loads, lines) if line["logger"] == "molora.requests"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_says_what_a_request_cost(app, call, lines, stream):
    response = call(app, "POST", URL, json=CHAT | {"stream": stream, "n": 2}, headers={"x-request-id": "mine-1"})
    assert (response.status_code, response.headers["x-request-id"]) == (200, "mine-1")
    (line,) = requests_of(lines)
    assert line.pop("duration_ms") > 0
    assert line.pop("time").endswith("+00:00")
    prompt_tokens = line.pop("prompt_tokens")
    assert prompt_tokens > 20
    assert line == {
        "level": "info",
        "logger": "molora.requests",
        "message": f"POST {URL} 200",
        "request_id": "mine-1",
        "method": "POST",
        "path": URL,
        "status": 200,
        "cached_tokens": 3,
        "completion_tokens": 12,
        "finish_reasons": ["stop", "stop"],
        "queue_ms": 250.0,
        "first_token_ms": 500.0,
    }


@pytest.mark.parametrize("sent", [None, "", "a b", "é", "x" * 129, 'a"b', "a\tb", ["one", "two"]])
def test_an_id_is_made_where_none_that_fits_was_sent(app, call, lines, sent):
    values = [] if sent is None else sent if isinstance(sent, list) else [sent]
    response = call(app, "GET", "/health", headers=[("x-request-id", value.encode()) for value in values])
    request_id = response.headers["x-request-id"]
    assert len(request_id) == 32
    assert int(request_id, 16) >= 0
    assert [line["request_id"] for line in requests_of(lines)] == [request_id]
    assert call(app, "GET", "/health").headers["x-request-id"] != request_id


@pytest.mark.parametrize(
    ("method", "path", "status", "template"),
    [
        ("GET", "/v1/models/a-secret-field", 404, "/v1/models/{model_id:path}"),
        ("HEAD", "/v1/models", 200, "/v1/models"),
        ("GET", URL, 405, URL),
        ("GET", "/a-secret-field", 404, "unknown"),
        ("GET", "/static/a-secret-field", 404, "/static"),
        ("GET", "/", 200, "/"),
    ],
)
def test_a_path_is_logged_by_its_template(app, call, lines, method, path, status, template):
    assert call(app, method, path).status_code == status
    (line,) = requests_of(lines)
    assert (line["path"], line["status"], line["method"]) == (template, status, method)


async def fail(position):
    if position == 2:
        raise RuntimeError("the engine failed")


def test_what_fails_is_logged_with_the_requests_id(app, call, engine, lines):
    engine.before_token = fail
    response = call(app, "POST", URL, json=CHAT, headers={"x-request-id": "a"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "a")
    assert call(app, "POST", URL, json=CHAT | {"stream": True}, headers={"x-request-id": "b"}).status_code == 200
    first, second = requests_of(lines)
    assert (first["status"], first["finish_reasons"], first["request_id"]) == (500, ["error"], "a")
    assert (second["status"], second["finish_reasons"], second["request_id"]) == (200, ["error"], "b")
    (failure,) = [line for line in map(json.loads, lines) if "exception" in line]
    assert (failure["request_id"], failure["level"]) == ("b", "error")
    assert "RuntimeError: the engine failed" in failure["exception"]
    assert all("\n" not in line for line in lines)


def test_a_client_that_leaves(app, engine, gate, connect, lines):
    async def leave():
        engine.before_token = held = gate(2)
        client = connect(app, URL, CHAT | {"stream": True})
        await held.reached.wait()
        client.left.set()
        await client.finish()

    asyncio.run(leave())
    (line,) = requests_of(lines)
    assert (line["status"], line["finish_reasons"]) == (200, ["abort"])


def ask_in_all_ways(app, call, engine):
    chat = CHAT | {"cache_salt": "salt-of-a-tenant", "user": "somebody"}
    usual, statuses = engine.before_token, []
    for changes, headers, before in (
        ({}, KEY, usual),
        ({"stream": True}, KEY, usual),
        ({}, {"authorization": "Bearer wrong-key"}, usual),
        ({"temperature": "a-secret-field"}, KEY, usual),
        ({"model": "a-secret-field"}, KEY, usual),
        ({"a-secret-field": 1}, KEY, usual),
        ({}, KEY, fail),
        ({}, KEY | {"x-request-id": "words-that-were-asked, first-key"}, usual),
        ({}, KEY | {"traceparent": "first-key"}, usual),
    ):
        engine.before_token = before
        statuses.append(call(app, "POST", URL, json=chat | changes, headers=headers).status_code)
    statuses.append(call(app, "GET", f"{URL}/a-secret-field?a-secret-field=1", headers=KEY).status_code)
    assert statuses == [200, 200, 401, 400, 404, 400, 500, 200, 200, 404]


def test_secrets_are_in_no_line_and_no_span(traced, call, engine, lines, spans):
    ask_in_all_ways(traced, call, engine)
    assert len(requests_of(lines)) == 10
    told = "\n".join([*lines, *(span.to_json() for span in spans.get_finished_spans())])
    assert "molora.request_id" in told
    assert [secret for secret in SECRETS if secret in told] == []


def test_the_spans_of_a_request(traced, call, spans):
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    call(traced, "POST", URL, json=CHAT, headers=KEY | {"traceparent": parent, "x-request-id": "mine-1"})
    *parts, whole = spans.get_finished_spans()
    assert whole.name == f"POST {URL}"
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    attributes = dict(whole.attributes)
    assert attributes.pop("gen_ai.usage.input_tokens") > 20
    assert attributes == {
        "http.request.method": "POST",
        "http.route": URL,
        "http.response.status_code": 200,
        "molora.request_id": "mine-1",
        "molora.cached_tokens": 3,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert [part.name for part in parts] == ["queued", "prefill", "decode"]
    assert all(part.parent.span_id == whole.context.span_id for part in parts)
    assert [(part.end_time - part.start_time) / 1e9 for part in parts] == pytest.approx([0.25, 0.25, 0.5])
    assert parts[0].end_time == parts[1].start_time
    assert parts[1].end_time == parts[2].start_time


def test_a_failure_is_an_error_in_the_trace(traced, call, engine, spans):
    engine.before_token = fail
    call(traced, "POST", URL, json=CHAT, headers=KEY)
    (span,) = spans.get_finished_spans()
    assert (span.status.status_code.name, span.attributes["http.response.status_code"]) == ("ERROR", 500)
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)


@contextmanager
def configured(**process):
    """JSON logging as the server has it; afterwards, what was there before."""
    loggers = [logging.getLogger(name) for name in ("", "molora", "uvicorn")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    logging.config.dictConfig(json_logging(process))
    yield
    for logger, (logger.handlers, level, logger.propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)


def test_json_on_standard_error(capsys, app, call):
    with configured():
        call(app, "GET", "/health", headers={"x-request-id": "mine-1"})
        logging.getLogger("another").warning("of another\nlibrary")
        logging.getLogger("uvicorn.error").info("too much")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["path"], first["request_id"]) == ("/health", "mine-1")
    assert (second["message"], second["level"]) == ("of another\nlibrary", "warning")


def test_a_line_says_whose_it_is(capsys):
    with configured(replica="one"):
        logging.getLogger("molora.x").warning("of a replica")
    assert json.loads(capsys.readouterr().err)["replica"] == "one"


def test_plain_logs_hold_no_line_of_a_request(app, call, capfd):
    call(app, "GET", "/health")
    assert capfd.readouterr().err == ""


def test_the_settings(capsys, monkeypatch):
    assert ServeConfig(bank="b").log_format == "plain"
    with pytest.raises(ValueError, match="log_format is 'xml'; expected plain or json"):
        ServeConfig(bank="b", log_format="xml")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert cli.main(["--bank", "b", "--port", "0", "--otlp-endpoint", "http://localhost:1/v1/traces"]) == 2
    assert "pip install 'molora[otel]'" in capsys.readouterr().err
