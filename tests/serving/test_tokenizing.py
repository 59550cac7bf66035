"""Texts and conversations to ids and back."""

import pytest

from molora import chat_template

MESSAGES = [{"role": "user", "content": "hé"}]


@pytest.fixture
def tokenize(app, call):
    return lambda **body: call(app, "POST", "/tokenize", json=body)


@pytest.fixture
def detokenize(app, call):
    return lambda **body: call(app, "POST", "/detokenize", json=body)


def test_a_text_and_back(tokenize, detokenize, engine):
    ids = engine.m.tokenizer("hé ✓")["input_ids"]
    assert tokenize(model="demo", prompt="hé ✓").json() == {
        "count": len(ids),
        "max_model_len": 1000,
        "tokens": ids,
        "token_strs": None,
    }
    assert tokenize(prompt="a b", return_token_strs=True).json()["token_strs"] == ["a", "Ġ", "b"]
    assert tokenize(prompt="").json()["tokens"] == []
    assert detokenize(tokens=ids, model="demo:maths").json() == {"prompt": "hé ✓"}
    assert detokenize(tokens=[]).json() == {"prompt": ""}
    assert detokenize(tokens=[1]).json() == {"prompt": "<|im_start|>"}


def test_a_conversation_is_what_a_request_would_be(tokenize, detokenize, engine):
    ids = tokenize(messages=MESSAGES).json()["tokens"]
    assert ids == list(engine.m.render(MESSAGES).token_ids)
    assert detokenize(tokens=ids).json()["prompt"].endswith("<|im_start|>assistant\n")
    shorter = tokenize(messages=MESSAGES, add_generation_prompt=False).json()["tokens"]
    assert ids[: len(shorter)] == shorter
    assert detokenize(tokens=shorter).json()["prompt"].endswith("hé<|im_end|>\n")
    assert tokenize(messages=MESSAGES, add_special_tokens=True).json()["tokens"] == ids  # this tokenizer adds none


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"prompt": "a", "messages": MESSAGES}, None),
        ({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        ({"prompt": 3}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": MESSAGES, "chat_template": "{{ x }}"}, "chat_template"),
        ({"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ({"messages": MESSAGES, "tools": [{}]}, "tools"),
    ],
)
def test_refusals(tokenize, assert_refused, body, param):
    assert_refused(tokenize(**body), param, words="" if param is None else param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x" * 13_001}, "prompt"),
        ({"messages": [{"role": "user", "content": "x" * 13_001}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 13_001}], "add_special_tokens": True}, "messages"),
    ],
)
def test_a_text_that_is_far_too_long(tokenize, assert_refused, body, param):
    assert_refused(tokenize(**body), param, words="at most 13000")


def test_unknown_models(tokenize, detokenize, assert_refused):
    assert_refused(tokenize(model="x", prompt="a"), "model", words="unknown model", status=404)
    assert_refused(detokenize(model="x", tokens=[5]), "model", words="unknown model", status=404)


@pytest.mark.parametrize("tokens", [[-1], [259], [2**31], [2**70], [True], ["a"], [1.5], "a", None])
def test_ids_outside_the_vocabulary(detokenize, assert_refused, tokens):
    response = detokenize(tokens=tokens)
    assert response.status_code == 400
    assert "tokens" in response.json()["error"]["message"]


def test_a_tokenizer_without_a_chat_template(tokenize, engine, assert_refused):
    engine.m.tokenizer.chat_template = None
    for add_prompt in (True, False):
        response = tokenize(messages=MESSAGES, add_generation_prompt=add_prompt)
        assert_refused(response, "messages", words="no chat template")


def test_a_chat_template_that_does_not_end(app, call, tokenize, engine, assert_refused, monkeypatch, caplog):
    """The client's messages are refused, the operator is told, and others are served."""
    monkeypatch.setattr(chat_template, "TIME_LIMIT_S", 0.5)
    chat_template._renderer.end()  # one that knows the limit takes its place
    tokenizer = engine.m.tokenizer
    usual = tokenizer.chat_template
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    chat = {"model": "demo", "messages": MESSAGES}
    for path, body in (("/v1/chat/completions", chat), ("/tokenize", {"messages": MESSAGES})):
        assert_refused(call(app, "POST", path, json=body), "messages", words="does not end within 0.5 s")
    assert [record.levelname for record in caplog.records if record.name == "molora.chat_template"] == ["WARNING"] * 2
    tokenizer.chat_template = usual
    assert call(app, "POST", "/v1/chat/completions", json=chat).status_code == 200
    assert engine.running == []
    chat_template._renderer.end()
