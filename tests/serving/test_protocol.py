"""What a request may say: every field is honoured or refused, and none is ignored."""

import pytest
from pydantic import ValidationError

from molora.serving.chat import ChatRequest
from molora.serving.completions import CompletionRequest
from molora.serving.models import LoadRequest
from molora.serving.tokenizing import TokenizeRequest

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "demo", "prompt": "hi"}
BODIES = [(ChatRequest, CHAT), (CompletionRequest, TEXT), (TokenizeRequest, {"prompt": "hi"})]
BODIES += [(LoadRequest, {"lora_name": "x", "lora_path": "y"})]
each_kind = pytest.mark.parametrize(("kind", "body"), BODIES, ids=lambda value: getattr(value, "__name__", ""))


@pytest.mark.parametrize(("kind", "body"), BODIES[:2])
def test_defaults_are_greedy_and_bounded(kind, body):
    request = kind.model_validate(body)
    assert (request.temperature, request.top_p, request.n, request.seed) == (0.0, 1.0, 1, None)
    assert (request.stream, request.include_usage, request.grammar) == (False, False, None)
    assert (request.route, request.activation, request.cache_salt) == (None, None, "")
    assert request.max_tokens is None


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_token_limit(name):
    assert ChatRequest.model_validate(CHAT | {name: 7}).max_new_tokens == 7


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    request = ChatRequest.model_validate(CHAT | {"messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].plain == {"role": "user", "content": "one two"}


@pytest.mark.parametrize(
    ("kind", "body", "name"), [(kind, body, name) for kind, body in BODIES for name in sorted(kind.neutral)]
)
def test_unsupported_fields_are_accepted_at_neutral_values_only(kind, body, name):
    for value in (None, *kind.neutral[name]):
        assert kind.model_validate(body | {name: value}) == kind.model_validate(body)
    for value in (0.5, "something", [1], {"a": 1}):
        with pytest.raises(ValidationError, match=name):
            kind.model_validate(body | {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("best_of", True), ("n", True), ("min_tokens", False), ("store", 0), ("logprobs", 1)]
)
def test_true_is_not_one_and_false_is_not_zero(name, value):
    with pytest.raises(ValidationError, match=name):
        ChatRequest.model_validate(CHAT | {name: value})


@each_kind
def test_null_means_absent_for_supported_fields(kind, body):
    names = set(kind.model_fields) - set(body)
    assert kind.model_validate(body | dict.fromkeys(names)) == kind.model_validate(body)


@each_kind
def test_unknown_fields_are_refused(kind, body):
    with pytest.raises(ValidationError, match="unheard_of"):
        kind.model_validate(body | {"unheard_of": None})


def test_an_answer_can_be_sent_back_as_a_message():
    answer = {"role": "assistant", "content": "hello", "refusal": None, "annotations": [], "tool_calls": None}
    assert ChatRequest.model_validate(CHAT | {"messages": [answer]}).messages[0].plain["content"] == "hello"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_every_kind_of_prompt(prompt, prompts):
    assert CompletionRequest.model_validate(TEXT | {"prompt": prompt}).prompts == prompts


def test_one_stop_string_is_a_list_of_one():
    assert ChatRequest.model_validate(CHAT | {"stop": "x"}).stop_strings == ["x"]
    assert ChatRequest.model_validate(CHAT | {"stop": ["x", "y"]}).stop_strings == ["x", "y"]
