"""The app over HTTP, without a socket: answers, streams and errors, as a client library sees them."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from molora.serving.app import create_app

MESSAGES = [{"role": "user", "content": "hello there"}]
BODY = {"model": "demo", "messages": MESSAGES}
ROUTE = [["maths", 0.75], ["base", 0.25]]


def call(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://molora") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def chat(app: FastAPI, **fields: Any) -> httpx.Response:
    return call(app, "POST", "/v1/chat/completions", json=BODY | fields)


def assert_refused(response: httpx.Response, param: str | None, *, words: str, status: int = 400) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]


def events(response: httpx.Response) -> list[str]:
    assert response.text.endswith("\n\n")
    lines = response.text.split("\n\n")[:-1]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_health(app):
    response = call(app, "GET", "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_models_are_the_router_the_base_and_each_adapter(app):
    body = call(app, "GET", "/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["demo", "base", "maths", "code"]
    assert all(card["object"] == "model" and card["owned_by"] == "molora" for card in body["data"])


def test_a_bank_without_a_router_offers_no_routed_model(model):
    model.bank = type(model.bank)(has_router=False)
    app = create_app(model)
    assert [card["id"] for card in call(app, "GET", "/v1/models").json()["data"]] == ["base", "maths", "code"]
    assert_refused(chat(app), "model", words="'base', 'maths', 'code'", status=404)


def test_two_models_of_one_name_are_an_error(model):
    model.bank = type(model.bank)(name="maths")
    with pytest.raises(ValueError, match="one name"):
        create_app(model)


def test_completion(app):
    response = chat(app)
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Per-token routing ✓"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 6,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
        "molora": {
            "routes": [ROUTE] * 6,
            "num_reused_tokens": 3,
            "num_computed_tokens": 4,
            "num_recomputed_tokens": 0,
            "num_reencoded_tokens": 1,
        },
    }


def test_stream(app):
    response = chat(app, stream=True, max_tokens=4)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(response)
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Per"},
        {"content": "-token"},
        {"content": " rout"},
        {"content": ""},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]
    assert [chunk["molora"] for chunk in chunks] == [None, *[{"route": ROUTE}] * 4, None]
    assert all(chunk["usage"] is None for chunk in chunks)


def test_stream_with_usage(app):
    response = chat(app, stream=True, stream_options={"include_usage": True})
    *_, last, usage, done = events(response)
    assert json.loads(last)["choices"][0]["finish_reason"] == "stop"
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"] == chat(app).json()["usage"]
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_every_field_reaches_the_model(app, model, stream):
    messages = [{"role": "system", "content": "be brief"}, *MESSAGES, {"role": "assistant", "content": "ok"}]
    options = {"max_completion_tokens": 9, "temperature": 0.5, "seed": 7, "stream": stream}
    chat(app, messages=messages, molora={"route": {"maths": 0.5, "code": 1}, "activation": 12}, **options)
    assert model.calls == [
        {
            "messages": messages,
            "route": {"maths": 0.5, "code": 1},
            "activation": 12,
            "max_new_tokens": 9,
            "temperature": 0.5,
            "seed": 7,
        }
    ]


@pytest.mark.parametrize(("name", "route"), [("demo", "auto"), ("base", "base"), ("maths", "maths"), ("code", "code")])
def test_the_model_names_the_route(app, model, name, route):
    assert chat(app, model=name).json()["model"] == name
    assert model.calls == [
        {
            "messages": MESSAGES,
            "route": route,
            "activation": None,
            "max_new_tokens": None,
            "temperature": 0.0,
            "seed": None,
        }
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(app, stream):
    response = chat(app, model="gpt-5", stream=stream)
    assert_refused(response, "model", words="'demo', 'base', 'maths', 'code'", status=404)
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": "\ud800"}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_all": True}}, "stream_options.include_all"),
        ({"molora": {"route": 3}}, "molora.route"),
        ({"molora": {"route": {"maths": "much"}}}, "molora.route.maths"),
        ({"molora": {"route": {"maths": float("inf")}}}, "molora.route.maths"),
        ({"molora": {"activation": "always"}}, "molora.activation"),
        ({"molora": {"activation": -1}}, "molora.activation"),
        ({"molora": {"activation": True}}, "molora.activation"),
        ({"molora": {"router": "x"}}, "molora.router"),
        ({"top_p": 0.9}, "top_p"),
        ({"n": 2}, "n"),
        ({"stop": ["\n"]}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"user": "me"}, "user"),
        ({"top_k": None}, "top_k"),
    ],
)
def test_a_refusal_names_the_field(app, model, fields, param):
    content = json.dumps(BODY | fields)  # httpx sends no NaN
    headers = {"content-type": "application/json"}
    response = call(app, "POST", "/v1/chat/completions", content=content, headers=headers)
    assert_refused(response, param, words=f"{param}: ")
    assert model.calls == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "disagree"),
    ],
)
def test_fields_that_contradict_each_other(app, fields, words):
    assert_refused(chat(app, **fields), None, words=words)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a":' * 100_000])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_a_body_that_is_no_json_object(app, content, content_type):
    headers = {"content-type": content_type}
    response = call(app, "POST", "/v1/chat/completions", content=content, headers=headers)
    assert_refused(response, None, words="body")


def test_unknown_paths_and_methods(app):
    assert_refused(call(app, "POST", "/v1/completions", json={}), None, words="/v1/completions", status=404)
    response = call(app, "GET", "/v1/chat/completions")
    assert_refused(response, None, words="Method Not Allowed", status=405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_refuses_is_the_users_error(app, stream):
    response = chat(app, messages=[{"role": "user", "content": "x" * 1001}], stream=stream)
    assert_refused(response, None, words="the context holds 1000")
    assert chat(app).status_code == 200


def fail_at_two(position: int) -> None:
    if position == 2:
        raise ValueError("a secret of the server")


def test_an_error_while_generating(app, model):
    model.before_token = fail_at_two
    response = chat(app)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert model.closed.wait(timeout=5)


def test_an_error_in_mid_stream_is_the_last_event(app, model, caplog):
    model.before_token = fail_at_two
    response = chat(app, stream=True)
    assert response.status_code == 200
    *chunks, last = [json.loads(event) for event in events(response)]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["", "Per", "-token"]
    assert last["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "a secret of the server" in caplog.text
    assert model.closed.wait(timeout=5)

    model.before_token = lambda position: None
    assert chat(app).status_code == 200


def test_the_schema_documents_errors_as_they_are(app):
    responses = call(app, "GET", "/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "422" not in responses
    assert responses["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")
