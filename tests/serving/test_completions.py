"""Plain completions over HTTP: every kind of prompt, echoes and scores as evaluation harnesses read them."""

import json
from dataclasses import replace

import pytest

from molora.generation import Sampling
from molora.serving.request import Request

BODY = {"model": "org/base", "prompt": "hé there"}
ROUTE = [["maths", 0.75], ["code", 0.25]]
NO_STOP = {"stop": [], "stop_token_ids": []}


@pytest.fixture
def complete(app, call):
    def complete(app=app, **fields):
        return call(app, "POST", "/v1/completions", json=BODY | fields)

    return complete


@pytest.fixture
def ids(engine):
    return engine.m.tokenizer("hé there")["input_ids"]


@pytest.fixture
def text_of(engine):
    return lambda token_id: engine.m.tokenizer.decode([token_id])


def test_completion(complete, ids):
    body = complete(max_tokens=3).json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert "routes" not in body.pop("molora")
    assert body == {
        "object": "text_completion",
        "model": "org/base",
        "choices": [
            {
                "index": 0,
                "text": "Per-token rout",
                "logprobs": None,
                "finish_reason": "length",
                "prompt_logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(ids),
            "completion_tokens": 3,
            "total_tokens": len(ids) + 3,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", ["one"]),
        (["one"], ["one"]),
        (["one", "two"], ["one", "two"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_kind_of_prompt(complete, engine, prompt, prompts, stream):
    assert complete(prompt=prompt, stream=stream).status_code == 200
    assert engine.requests == [
        Request(prompt=each, route="base", sampling=Sampling(**NO_STOP)) for each in prompts
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        (3, "prompt"),
        ({}, "prompt"),
        ([], "prompt"),
        ([[]], "prompt.0"),
        ([None], "prompt"),
        (["a", 3], "prompt.1"),
        ([3, "a"], "prompt.1"),
        ([True], "prompt"),
        ([1.5], "prompt"),
        ([-1], "prompt.0"),
        ([2**31], "prompt.0"),
        ([[1], ["a"]], "prompt.1.0"),
        (["a"] * 65, "prompt"),
    ],
)
def test_prompts_of_no_kind(complete, assert_refused, prompt, param):
    assert_refused(complete(prompt=prompt), param, words="prompt")


def test_an_empty_text_is_the_engines_to_refuse(complete, assert_refused):
    assert_refused(complete(prompt=""), "prompt", words="the prompt is empty")


def test_choices_of_several_prompts(complete, events):
    body = complete(prompt=["one", "four!"], n=2, max_tokens=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 3 + 5
    assert body["usage"]["completion_tokens"] == 8
    assert body["molora"]["num_generated_tokens"] == [2, 2, 2, 2]

    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = events(complete(prompt=["one", "four!"], n=2, max_tokens=2, **options))
    for index in range(4):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [choice["text"] for choice in choices] == ["Per", "-token"]
        assert [choice["finish_reason"] for choice in choices] == [None, "length"]
    assert not any("molora" in chunk for chunk in chunks)
    assert usage["usage"] == body["usage"]


def test_one_prompt_that_is_refused_stops_the_others(complete, engine, assert_refused):
    assert_refused(complete(prompt=["one", "x" * 1001]), "prompt", words="the model reads")
    assert engine.log == ["submit", "cancel"]
    engine.max_running = 1
    assert complete(prompt=["one", "two"]).status_code == 429
    assert engine.running == []


def test_logprobs(complete, text_of):
    (choice,) = complete(logprobs=1, max_tokens=2).json()["choices"]
    texts = [text_of(50), text_of(51)]
    assert choice["logprobs"] == {
        "tokens": texts,
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{text_of(60): -0.25, text: -0.5} for text in texts],
        "text_offset": [0, 1],
    }
    (choice,) = complete(logprobs=0, max_tokens=1, return_routes=True).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{texts[0]: -0.5}]
    assert choice["logprobs"]["routes"] == [{"adapters": ROUTE, "candidates": [["maths", 0.75], ["base", 0.125]]}]


def test_routes_that_are_asked_for(complete, events):
    assert complete(max_tokens=3, return_routes=True).json()["molora"]["routes"] == [ROUTE] * 3
    chunks = events(complete(max_tokens=3, return_routes=True, stream=True))
    assert [chunk["molora"] for chunk in chunks] == [{"route": ROUTE}] * 3


def test_streamed_logprobs(complete, events, text_of):
    chunks = events(complete(logprobs=0, max_tokens=3, stream=True, return_routes=True))
    scores = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [score["tokens"] for score in scores] == [[text_of(50)], [text_of(51)], [text_of(52)]]
    assert [score["text_offset"] for score in scores] == [[0], [1], [2]]
    assert all(score["routes"][0]["adapters"] == ROUTE for score in scores)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_scored_prompt(complete, engine, ids, text_of, max_tokens):
    body = complete(prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens).json()
    (choice,) = body["choices"]
    scores = choice["logprobs"]
    assert engine.requests[0].sampling.prompt_logprobs == 1
    assert choice["text"] == "hé there" + "Per" * max_tokens
    assert choice["finish_reason"] == "length"
    assert scores["tokens"][:3] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert scores["token_logprobs"] == [None, *[-0.5] * (len(ids) - 1 + max_tokens)]
    assert scores["top_logprobs"][0] is None
    assert scores["top_logprobs"][1] == {"bytes:\\xc3": -0.5}
    assert scores["text_offset"] == [0, 1, 1, 2, 3, 4, 5, 6, 7, 8][: len(ids) + max_tokens]
    assert {len(values) for values in scores.values()} == {len(ids) + max_tokens}
    assert body["usage"]["completion_tokens"] == max_tokens
    assert body["usage"]["total_tokens"] == len(ids) + max_tokens


def test_a_special_token_that_the_text_does_not_have_takes_no_room(complete):
    (choice,) = complete(prompt=[1, 50, 51], echo=True, logprobs=0, max_tokens=0).json()["choices"]
    assert choice["text"].startswith("<|im_start|>")
    assert choice["logprobs"]["text_offset"] == [0, 12, 13]


def test_echo_of_each_choice(complete, events):
    body = complete(echo=True, n=2, max_tokens=1, logprobs=0, prompt_logprobs=2).json()
    for choice in body["choices"]:
        assert choice["text"] == "hé therePer"
        assert len(choice["logprobs"]["tokens"]) == 10
        assert len(choice["prompt_logprobs"]) == 9
        assert len(choice["prompt_logprobs"][5]) == 2
    choices = [chunk["choices"][0] for chunk in events(complete(echo=True, n=2, max_tokens=1, stream=True))]
    assert [(choice["index"], choice["text"]) for choice in choices] == [
        (0, "hé there"), (0, "Per"), (1, "hé there"), (1, "Per")
    ]  # fmt: skip


def test_an_echo_and_nothing_else_in_a_stream(complete, events):
    (chunk,) = events(complete(echo=True, max_tokens=0, stream=True))
    assert chunk["choices"] == [{"index": 0, "text": "hé there", "logprobs": None, "finish_reason": "length"}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
    ],
)
def test_fields_that_contradict_each_other(complete, assert_refused, fields, param):
    assert_refused(complete(**fields), param, words=param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"messages": []}, "messages"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_a_refusal_names_the_field(complete, assert_refused, fields, param):
    assert_refused(complete(**fields), param, words=f"{param}: ")


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({"model": "org/base"}, None),
        ({"model": "demo"}, 0),
        ({"model": "demo:maths"}, 0),
        ({"model": "demo:invoked"}, None),
        ({"model": "demo:maths", "activation": 3}, 3),
        ({"route": {"maths": 1, "code": 1}}, 0),
        ({"route": {"maths": 1, "invoked": 1}}, None),
        ({"route": {}}, None),
        ({"route": "nobody"}, None),
    ],
)
def test_adapters_act_from_the_first_token_where_their_policy_needs_messages(complete, engine, fields, activation):
    engine.infos["invoked"] = replace(engine.infos["maths"], name="invoked", activation="invocation")
    complete(**fields)
    assert engine.requests[0].activation == activation


def test_every_chunk_is_valid_json_of_one_line(complete, engine):
    engine.words = ("a\nb", "\u2028", "\U0001f600", '"\\')
    response = complete(stream=True)
    lines = [line for line in response.text.split("\n") if line]
    assert [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]] == list(engine.words)
