from typing import Any

import pytest

from molora.activation import Prompt, check_activation, last_occurrence, render, resolve
from molora.text_limit import TextLimit
from molora.tiny import byte_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hé, you!"}
ANSWER = {"role": "assistant", "content": "Hm."}
AGAIN = {"role": "user", "content": "And now?"}

CHATML_HEADER = "<|im_start|>"
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER_TEXT = "<|im_start|>user\nHé, you!<|im_end|>\n"
ANSWER_TEXT = "<|im_start|>assistant\nHm.<|im_end|>\n"
AGAIN_TEXT = "<|im_start|>user\nAnd now?<|im_end|>\n"
SYSTEM_TEXT = "<|im_start|>system\nBe brief.<|im_end|>\n"
RESPONSE = "<|im_start|>assistant\n"

# A last answer is rendered with a (here empty) thought, an earlier one without: Qwen3.
THINKING = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}\
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Roles alternate, there is no system role, contents are trimmed: Gemma.
STRICT = """\
{{ 'BOS' }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{{ '<' + m.role + '>' + m.content | trim + '</>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"""
# The system message is put inside the first user message: Llama 2, Mistral.
FOLDED = """\
{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}\
{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}\
{% if m.role == 'user' %}{{ '[INST]' + (system if loop.first else '') + m.content + '[/INST]' }}\
{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def with_template(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def split(tokenizer: Any, prompt: Prompt, policy: str) -> tuple[str, str]:
    start = prompt.starts[policy]
    return tokenizer.decode(prompt.token_ids[:start]), tokenizer.decode(prompt.token_ids[start:])


@pytest.mark.parametrize(
    ("messages", "policy", "before", "after"),
    [
        ([USER], "turn", DEFAULT_SYSTEM, USER_TEXT + RESPONSE),
        ([USER], "response", DEFAULT_SYSTEM + USER_TEXT, RESPONSE),
        ([USER], "system", "", DEFAULT_SYSTEM + USER_TEXT + RESPONSE),
        ([SYSTEM, USER], "turn", SYSTEM_TEXT, USER_TEXT + RESPONSE),
        ([SYSTEM, USER], "response", SYSTEM_TEXT + USER_TEXT, RESPONSE),
        ([SYSTEM, USER], "system", SYSTEM_TEXT, USER_TEXT + RESPONSE),
        ([USER, ANSWER, AGAIN], "turn", DEFAULT_SYSTEM + USER_TEXT + ANSWER_TEXT, AGAIN_TEXT + RESPONSE),
        ([USER, ANSWER, USER], "turn", DEFAULT_SYSTEM + USER_TEXT + ANSWER_TEXT, USER_TEXT + RESPONSE),
        ([SYSTEM, USER, ANSWER, AGAIN], "turn", SYSTEM_TEXT + USER_TEXT + ANSWER_TEXT, AGAIN_TEXT + RESPONSE),
        ([SYSTEM, USER, ANSWER, AGAIN], "system", SYSTEM_TEXT, USER_TEXT + ANSWER_TEXT + AGAIN_TEXT + RESPONSE),
        ([SYSTEM, USER, ANSWER], "turn", SYSTEM_TEXT, USER_TEXT + ANSWER_TEXT + RESPONSE),
        ([USER, AGAIN], "turn", DEFAULT_SYSTEM + USER_TEXT, AGAIN_TEXT + RESPONSE),
    ],
)
def test_the_policies_on_chatml(tokenizer, messages, policy, before, after):
    prompt = render(tokenizer, messages)
    assert split(tokenizer, prompt, policy) == (before, after)
    assert resolve(prompt, policy) == len(tokenizer(before).input_ids)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(prompt.token_ids) == whole


def test_a_template_that_renders_a_last_answer_differently():
    tokenizer = with_template(THINKING)
    prompt = render(tokenizer, [SYSTEM, USER, ANSWER, AGAIN])
    assert split(tokenizer, prompt, "turn") == (SYSTEM_TEXT + USER_TEXT + ANSWER_TEXT, AGAIN_TEXT + RESPONSE)
    assert split(tokenizer, prompt, "response")[1] == RESPONSE
    assert split(tokenizer, prompt, "system")[0] == SYSTEM_TEXT
    assert split(tokenizer, render(tokenizer, [USER]), "turn") == ("", USER_TEXT + RESPONSE)


def test_a_template_that_refuses():
    tokenizer = with_template(STRICT)
    prompt = render(tokenizer, [USER, ANSWER, AGAIN])
    assert split(tokenizer, prompt, "turn") == ("BOS<user>Hé, you!</><assistant>Hm.</>", "<user>And now?</><model>")
    assert split(tokenizer, prompt, "response")[1] == "<model>"
    assert split(tokenizer, render(tokenizer, [USER]), "turn")[0] == "BOS"
    with pytest.raises(ValueError, match="the chat template refuses these messages: System role not supported"):
        render(tokenizer, [SYSTEM, USER])
    with pytest.raises(ValueError, match="the chat template refuses these messages: Conversation roles must alternate"):
        render(tokenizer, [USER, AGAIN])


def test_a_template_that_hides_the_system_message():
    tokenizer = with_template(FOLDED)
    prompt = render(tokenizer, [SYSTEM, USER])
    assert set(prompt.starts) == {"response"}
    for policy in ("system", "turn"):
        with pytest.raises(ValueError, match=rf"activation '{policy}' needs .*a chat template that shows where"):
            resolve(prompt, policy)
    prompt = render(tokenizer, [SYSTEM, USER, ANSWER, AGAIN])
    assert split(tokenizer, prompt, "turn")[1] == "[INST]And now?[/INST]"


@pytest.mark.parametrize("given", ["Some plain text", [70, 71, 72], (70, 71, 72)])
def test_text_and_ids(tokenizer, given):
    prompt = render(tokenizer, given)
    assert prompt.token_ids == (tuple(tokenizer(given).input_ids) if isinstance(given, str) else (70, 71, 72))
    assert resolve(prompt, "system") == 0
    assert resolve(prompt, 2) == 2
    assert resolve(prompt, 99) == 99
    assert resolve(prompt, "invocation", invocation_tokens=prompt.token_ids[1:]) == 1
    for policy in ("turn", "response"):
        with pytest.raises(ValueError, match=rf"activation '{policy}' needs chat messages.* or pass a token index"):
            resolve(prompt, policy)


def test_messages_without_a_user(tokenizer):
    prompt = render(tokenizer, [SYSTEM])
    with pytest.raises(ValueError, match="one of role 'user' among them for 'turn'"):
        resolve(prompt, "turn")


def test_the_last_occurrence(tokenizer):
    assert last_occurrence([1, 2, 3, 1, 2, 4], [1, 2]) == 3
    assert last_occurrence([5, 5, 5], [5, 5]) == 1
    assert last_occurrence([1, 2], [1, 2]) == 0
    for wanted in ([2, 1], [3], [1, 2, 3]):
        with pytest.raises(ValueError, match=r"invocation tokens \[.*\] of adapter 'x' do not occur in the prompt"):
            last_occurrence([1, 2], wanted, of="adapter 'x'")
    prompt = render(tokenizer, [USER, ANSWER, USER])
    wanted = tokenizer("you").input_ids
    text = DEFAULT_SYSTEM + USER_TEXT + ANSWER_TEXT + "<|im_start|>user\nHé, "
    assert resolve(prompt, "invocation", invocation_tokens=wanted) == len(tokenizer(text).input_ids)
    for none in (None, []):
        with pytest.raises(ValueError, match="the router has no alora_invocation_tokens; pass an explicit token index"):
            resolve(prompt, "invocation", invocation_tokens=none, of="the router")


def test_a_developers_message_is_a_systems(tokenizer):
    asked = [{**SYSTEM, "role": "developer"}, USER, ANSWER, AGAIN]
    assert render(tokenizer, asked) == render(tokenizer, [SYSTEM, USER, ANSWER, AGAIN])


def test_text_parts_are_joined(tokenizer):
    parts = [{"type": "text", "text": "Hé, "}, {"type": "text", "text": "you!"}]
    assert render(tokenizer, [{"role": "user", "content": parts}]) == render(tokenizer, [USER])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the message list is empty"),
        ((), "the message list is empty"),
        ("", "the prompt is empty"),
        (["hello"], "message 0 is 'hello'; expected {'role': ..., 'content': ...}"),
        ([USER, {"content": "hi"}], "message 1 is {'content': 'hi'}; expected"),
        ([{"role": "user"}], r"message 0 \(user\) has content None; expected text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0: only text parts"),
        ("a\ud83d", "the prompt holds half of a surrogate pair"),
        ([USER, {"role": "assistant", "content": "\ud83d"}], "message 1 holds half of a surrogate pair"),
        ([{"role": "\ud83d", "content": ""}], "message 0 holds half of a surrogate pair"),
        ([True, None], "token ids holds something else: None"),
        ([True, float("inf")], "token ids holds something else: inf"),
        ([True, 1.5], "token ids holds something else: 1.5"),
        ([1, 1.5], "token ids holds something else: 1.5"),
    ],
)
def test_prompts_that_are_wrong(tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        render(tokenizer, given)


def test_a_tokenizer_without_a_template():
    with pytest.raises(ValueError, match="has no chat template; pass plain text or token ids"):
        render(with_template(None), [USER])


@pytest.mark.parametrize("value", ["never", "", -1, True, 1.5, None, ["turn"]])
def test_values_that_are_no_activation(value):
    with pytest.raises(
        ValueError, match=r"activation .* is unknown; expected one of invocation, response, turn, system"
    ):
        check_activation(value)


@pytest.mark.parametrize("content", ["\ue000", "a\ue000\ue001b", "".join(map(chr, range(0xE000, 0xF900)))])
def test_a_message_may_hold_any_character(content):
    prompt = render(byte_tokenizer(), [{"role": "user", "content": content}])
    assert prompt.starts["turn"] < prompt.starts["response"]


class Untouched:
    """A tokenizer that renders, and must not be asked for tokens."""

    def __init__(self, template: str) -> None:
        self._tokenizer = byte_tokenizer()
        self._tokenizer.chat_template = template

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        pytest.fail("it was tokenized")


@pytest.mark.parametrize("prompt", ["x" * 101, [{"role": "user", "content": "x" * 101}]])
def test_a_text_that_is_too_long_is_not_tokenized(prompt: Any) -> None:
    with pytest.raises(ValueError, match="at most 100"):
        render(Untouched(STRICT), prompt, limit=TextLimit(100))


def test_it_is_the_rendered_text_that_counts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = STRICT
    message = {"role": "user", "content": "x" + " " * 1000}
    assert render(tokenizer, [message], limit=TextLimit(100)) == render(tokenizer, [message | {"content": "x"}])


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("whole", "words"), [("{{ raise_exception('Not today') }}", "Not today"), ("{{ 'x' * 101 }}", "at most 100")]
)
def test_what_is_refused_as_a_whole_is_not_rendered_in_parts(whole: str, words: str) -> None:
    template = f"{{% if add_generation_prompt %}}{whole}{{% else %}}{ENDLESS}{{% endif %}}"
    with pytest.raises(ValueError, match=words):
        render(Untouched(template), [USER], limit=TextLimit(100))


def test_a_place_is_in_the_first_token_that_ends_behind_it() -> None:
    class Trimmed(Untouched):
        """Its offsets leave out spaces, so that a token of nothing else ends where it likes."""

        def __call__(self, text: str, **_: Any) -> Any:
            header = text.index("<model>")
            places = [(0, 3), (3, header), (0, 0), (header, header + 4), (0, 0), (header + 4, len(text))]
            return {"input_ids": [1, 2, 3, 4, 5, 6], "offset_mapping": places}

    assert render(Trimmed(STRICT), [USER]).starts == {"system": 0, "turn": 1, "response": 3}
