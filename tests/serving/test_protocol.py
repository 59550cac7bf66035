"""What a chat request may say: every field is honoured or refused, and none is ignored."""

import pytest
from pydantic import ValidationError

from molora.serving.protocol import ChatRequest

BODY = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


def test_defaults_are_greedy_and_bounded():
    request = ChatRequest.model_validate(BODY)
    assert (request.temperature, request.seed, request.stream) == (0.0, None, False)
    assert request.max_new_tokens is None
    assert not request.include_usage
    assert (request.molora.route, request.molora.activation) == (None, None)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_token_limit(name):
    assert ChatRequest.model_validate(BODY | {name: 7}).max_new_tokens == 7


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    request = ChatRequest.model_validate(BODY | {"messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].text == "one two"


@pytest.mark.parametrize("name", sorted(ChatRequest.neutral))
def test_unsupported_fields_are_accepted_at_neutral_values_only(name):
    for value in (None, *ChatRequest.neutral[name]):
        assert ChatRequest.model_validate(BODY | {name: value}) == ChatRequest.model_validate(BODY)
    for value in (0.5, "something", [1], {"a": 1}):
        with pytest.raises(ValidationError, match=name):
            ChatRequest.model_validate(BODY | {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("n", True), ("n", 2), ("presence_penalty", False), ("store", 0), ("logprobs", True)]
)
def test_true_is_not_one_and_false_is_not_zero(name, value):
    with pytest.raises(ValidationError, match=name):
        ChatRequest.model_validate(BODY | {name: value})


def test_null_means_absent_for_supported_fields():
    names = set(ChatRequest.model_fields) - {"model", "messages"}
    assert ChatRequest.model_validate(BODY | dict.fromkeys(names)) == ChatRequest.model_validate(BODY)


def test_an_answer_can_be_sent_back_as_a_message():
    answer = {"role": "assistant", "content": "hello", "refusal": None, "annotations": [], "tool_calls": None}
    assert ChatRequest.model_validate(BODY | {"messages": [answer]}).messages[0].text == "hello"
