"""Chat over HTTP, without a socket: answers, streams and errors, as a client library sees them."""

import json

import pytest

from molora.generation import Grammar, Sampling
from molora.serving.request import Request

MESSAGES = [{"role": "user", "content": "hello there"}]
BODY = {"model": "demo", "messages": MESSAGES}
ROUTE = [["maths", 0.75], ["code", 0.25]]
CANDIDATES = [["maths", 0.75], ["base", 0.125]]
URL = "/v1/chat/completions"


@pytest.fixture
def chat(app, call):
    def chat(app=app, **fields):
        content = json.dumps(BODY | fields)  # httpx sends no NaN
        return call(app, "POST", URL, content=content, headers={"content-type": "application/json"})

    return chat


@pytest.fixture
def num_prompt_tokens(engine):
    return len(engine.m.render(MESSAGES).token_ids)


def test_completion(chat, num_prompt_tokens):
    response = chat()
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
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": 6,
            "total_tokens": num_prompt_tokens + 6,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
        "prompt_logprobs": None,
        "molora": {
            "num_generated_tokens": [6],
            "num_reused_tokens": 3,
            "num_computed_tokens": 4,
            "num_recomputed_tokens": 0,
            "num_reencoded_tokens": 1,
            "num_replayed_tokens": 2,
            "queue_s": 0.25,
            "first_token_s": 0.5,
            "total_s": 1.0,
        },
    }


def test_stream(chat, events):
    chunks = events(chat(stream=True, max_tokens=4))
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Per"},
        {"content": "-token"},
        {"content": " rout"},
        {"content": ""},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
    assert not any("molora" in chunk for chunk in chunks)
    assert all(chunk["usage"] is None for chunk in chunks)


def test_stream_with_usage(chat, events):
    *_, last, usage = events(chat(stream=True, stream_options={"include_usage": True}))
    whole = chat().json()
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert usage["molora"] == whole["molora"]


def test_several_choices(chat, events, num_prompt_tokens):
    body = chat(n=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["message"]["content"] == "Per-token routing ✓" for choice in body["choices"])
    assert body["usage"]["prompt_tokens"] == num_prompt_tokens
    assert body["usage"]["completion_tokens"] == 12
    assert body["molora"]["num_generated_tokens"] == [6, 6]

    choices = [chunk["choices"][0] for chunk in events(chat(n=2, stream=True, max_tokens=2))]
    assert [choice["index"] for choice in choices] == [0, 0, 1, 1, 0, 1]
    assert [choice["delta"].get("role") for choice in choices] == ["assistant", None, "assistant", None, None, None]
    assert [choice["finish_reason"] for choice in choices[-2:]] == ["length", "length"]


def entry(text, logprob, **more):
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), **more}


def test_logprobs(chat, engine, events):
    texts = [engine.m.tokenizer.decode([token_id]) for token_id in (50, 51, 60, 61)]
    top = [entry(texts[2], -0.25), entry(texts[3], -1.0)]
    content = chat(logprobs=True, top_logprobs=2, max_tokens=2).json()["choices"][0]["logprobs"]["content"]
    assert content == [entry(text, -0.5, top_logprobs=top) for text in texts[:2]]
    assert engine.requests[-1].sampling.logprobs == 2

    chunks = events(chat(logprobs=True, max_tokens=2, stream=True))
    assert [chunk["choices"][0]["logprobs"] for chunk in chunks] == [
        None,
        *({"content": [entry(text, -0.5, top_logprobs=[])], "refusal": None} for text in texts[:2]),
    ]


def test_routes_that_are_asked_for(chat, events):
    body = chat(return_routes=True, n=2, max_tokens=3).json()
    assert body["molora"]["routes"] == [ROUTE] * 6
    assert body["choices"][0]["logprobs"] is None
    *chunks, usage = events(chat(return_routes=True, stream=True, stream_options={"include_usage": True}))
    assert [chunk.get("molora") for chunk in chunks] == [None, *[{"route": ROUTE}] * 6]
    assert "routes" not in usage["molora"]


def test_routes_in_the_logprobs(chat, events):
    route = {"adapters": ROUTE, "candidates": CANDIDATES}
    (choice,) = chat(logprobs=True, return_routes=True).json()["choices"]
    assert [entry["route"] for entry in choice["logprobs"]["content"]] == [route] * 6
    *_, chunk = events(chat(logprobs=True, return_routes=True, stream=True))
    assert chunk["choices"][0]["logprobs"]["content"][0]["route"] == route


def test_prompt_logprobs(chat, engine, num_prompt_tokens):
    body = chat(prompt_logprobs=1).json()
    assert engine.requests[-1].sampling.prompt_logprobs == 1
    first, second, *rest = body["prompt_logprobs"]
    token_id = engine.m.render(MESSAGES).token_ids[1]
    assert first is None
    assert second == {
        str(token_id): {"logprob": -0.5, "rank": 1, "decoded_token": engine.m.tokenizer.decode([token_id])}
    }
    assert len(rest) == num_prompt_tokens - 2


def test_a_developers_message_is_read_as_a_systems(chat, engine):
    said = {"content": "be brief"}
    counts = [
        chat(messages=[{"role": role, **said}, *MESSAGES]).json()["usage"]["prompt_tokens"]
        for role in ("system", "developer")
    ]
    prompts = [engine.m.render(request.prompt) for request in engine.requests]
    assert counts == [len(prompts[0].token_ids)] * 2
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_every_field_reaches_the_engine(chat, engine, stream):
    messages = [{"role": "system", "content": "be brief"}, *MESSAGES, {"role": "assistant", "content": "ok"}]
    chat(
        messages=messages,
        stream=stream,
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=7,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"12": -100, "7": 1.5},
        stop="END",
        stop_token_ids=[3, 4],
        ignore_eos=True,
        n=2,
        logprobs=True,
        top_logprobs=3,
        response_format={"type": "json_object"},
        route={"maths": 0.5, "code": 1},
        activation=12,
        cache_salt="mine",
    )
    assert engine.requests == [
        Request(
            prompt=messages,
            route={"maths": 0.5, "code": 1},
            activation=12,
            salt="mine",
            sampling=Sampling(
                max_new_tokens=9,
                temperature=0.5,
                top_p=0.9,
                top_k=5,
                min_p=0.1,
                seed=7,
                repetition_penalty=1.1,
                presence_penalty=-1,
                frequency_penalty=2,
                logit_bias={12: -100, 7: 1.5},
                stop=["END"],
                stop_token_ids=[3, 4],
                ignore_eos=True,
                n=2,
                logprobs=3,
                grammar=Grammar("json_object"),
            ),
        )
    ]


@pytest.mark.parametrize(
    ("name", "route"), [("demo", "auto"), ("org/base", "base"), ("demo:maths", "maths"), ("demo:code", "code")]
)
def test_the_model_names_the_route(chat, engine, name, route):
    assert chat(model=name).json()["model"] == name
    assert engine.requests == [Request(prompt=MESSAGES, route=route, sampling=Sampling(stop=[], stop_token_ids=[]))]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["gpt-5", "base", "maths", "auto"])
def test_an_unknown_model_is_not_found(chat, assert_refused, stream, name):
    response = chat(model=name, stream=stream)
    assert_refused(response, "model", words="'demo', 'org/base', 'demo:maths', 'demo:code'", status=404)
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
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 2**80}, "top_k"),
        ({"x" * 999: 1}, "x" * 200),
        ({"min_p": float("inf")}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
        ({"logit_bias": {"9" * 5000: 1}}, f"logit_bias.{'9' * 189}"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_all": True}}, "stream_options.include_all"),
        ({"route": 3}, "route"),
        ({"route": {"maths": "much"}}, "route.maths"),
        ({"route": {"maths": float("inf")}}, "route.maths"),
        ({"activation": "always"}, "activation"),
        ({"activation": -1}, "activation"),
        ({"activation": 2**63}, "activation"),
        ({"activation": True}, "activation"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"molora": {"route": "x"}}, "molora"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 17}, "n"),
        ({"stop": 3}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": "\ud800"}}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 70000}}, "structured_outputs"),
        ({"user": 3}, "user"),
        ({"user": "x" * 513}, "user"),
        ({"metadata": "x"}, "metadata"),
        ({"metadata": {"x": 1}}, "metadata.x"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
    ],
)
def test_a_refusal_names_the_field(chat, engine, assert_refused, fields, param):
    assert_refused(chat(**fields), param, words=param)
    assert engine.requests == []


def test_labels_of_the_caller_change_nothing(chat, engine):
    labels = {"user": "me", "safety_identifier": "x" * 512, "prompt_cache_key": "k", "metadata": {"a": "b"}}
    plain = {"store": False, "service_tier": "auto", "parallel_tool_calls": False}
    assert chat(**labels, **plain).status_code == chat().status_code == 200
    assert engine.requests[0] == engine.requests[1]


def test_a_field_whose_name_is_no_text(chat, assert_refused):
    assert_refused(chat(**{"\ud800": 1}), None, words="unicode")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_fields_that_contradict_each_other(chat, assert_refused, fields, param):
    assert_refused(chat(**fields), param, words=param)


def test_an_answer_without_content_is_told_what_is_expected(chat, assert_refused):
    response = chat(messages=[*MESSAGES, {"role": "assistant", "content": None}])
    assert_refused(response, "messages.1.content", words="should be a string or a list of text parts")


SCHEMA = {"type": "object", "properties": {"größe": {"type": "number"}}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            Grammar("json_schema", json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"regex": "[0-9]+"}}, Grammar("regex", "[0-9]+")),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": "{}", "regex": None}}, Grammar("json_schema", "{}")),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
    ],
)
def test_what_an_answer_must_match(chat, engine, fields, grammar):
    assert chat(**fields).status_code == 200
    assert engine.requests[-1].sampling.grammar == grammar


def test_what_the_engine_refuses_is_the_users_error(chat, engine, assert_refused):
    for stream in (False, True):
        response = chat(messages=[{"role": "user", "content": "x" * 1001}], stream=stream)
        assert_refused(response, "messages", words="the model reads at most 1000 tokens")
    assert chat().status_code == 200
    assert engine.running == []


def test_a_prompt_beyond_the_servers_own_limit(chat, make_app, engine, assert_refused):
    response = chat(make_app(limits={"max_prompt_tokens": 10}))
    assert_refused(response, "messages", words="at most 10 tokens")
    assert engine.running == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_engine_says_when_to_come_back(chat, engine, stream):
    engine.max_running = 0
    response = chat(stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_an_adapter_whose_files_are_gone(chat, engine):
    def gone():
        raise FileNotFoundError("adapters/maths does not exist")

    engine.while_submitting = gone
    response = chat(model="demo:maths")
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")


def test_an_engine_that_has_stopped(chat, engine):
    engine.stopped = True
    response = chat()
    assert response.status_code == 503
    assert response.json()["error"] == {
        "message": "the server is stopping; ask another one, or again in a while",
        "type": "server_error",
        "param": None,
        "code": None,
    }
