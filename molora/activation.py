"""Activation policies: where in a rendered prompt adapters may begin to act.

A policy is resolved once, on the rendered prompt, to an absolute token index. Generated tokens never move it, and
nothing is counted from the end. This module knows tokenizers and chat templates, but no model and no router.
"""

from __future__ import annotations

import operator
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, SupportsIndex, get_args

from molora.chat_template import Conversation, apply_chat_template, apply_chat_templates
from molora.text_limit import TextLimit

Policy = Literal["invocation", "response", "turn", "system"]
Activation = Policy | int
"""A policy's name, or an absolute token index."""
Messages = Sequence[Mapping[str, Any]]
"""The messages of a conversation, each with a `role` and a `content`."""

POLICIES: tuple[str, ...] = get_args(Policy)
NEED_MESSAGES = frozenset({"turn", "response"})


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        token_ids: the whole prompt, generation prompt included.
        starts: for each policy that the prompt's messages define, its absolute token index.
    """

    token_ids: tuple[int, ...]
    starts: Mapping[str, int]

    @cached_property
    def packed(self) -> array[int]:
        """The ids as 32-bit integers, since a long prompt's are checked, hashed and copied much faster so.

        Raises:
            struct.error: one is no integer, or does not fit.
        """
        return array("i", struct.Struct(f"{len(self.token_ids)}i").pack(*self.token_ids))  # twice as fast as array's


def check_activation(value: object) -> Activation:
    """Return `value` if it is a policy's name or a token index.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str) and value in POLICIES:
        return value  # type: ignore[return-value]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return value
    raise ValueError(f"activation {value!r} is unknown; expected one of {', '.join(POLICIES)}, or a token index.")


def render(
    tokenizer: Any, messages_or_text: Messages | str | Sequence[int], *, limit: TextLimit | None = None
) -> Prompt:
    """Render chat messages, plain text or token ids to a prompt with its activation points.

    Args:
        limit: of the rendered text; a longer one is refused before it is tokenized.

    Raises:
        ValueError: nothing to render, a malformed message, a text that is too long, a tokenizer without a chat
            template, or one that refuses the messages or does not end on them.
    """
    if isinstance(messages_or_text, str):
        if not messages_or_text:
            raise ValueError("the prompt is empty; pass some text or a list of messages.")
        check_unicode(messages_or_text, "the prompt")
        if limit is not None:
            limit.check(messages_or_text)
        return Prompt(tuple(tokenizer(messages_or_text)["input_ids"]), {"system": 0})
    if not isinstance(messages_or_text, Iterable) or isinstance(messages_or_text, Mapping):
        raise ValueError(
            f"the prompt is {messages_or_text!r}; expected messages such as [{{'role': 'user', 'content': ...}}], text "
            "or token ids."
        )
    items = tuple(messages_or_text)
    if not items:
        raise ValueError("the message list is empty; pass at least one {'role': ..., 'content': ...}.")
    if isinstance(items[0], int):
        try:
            ids = items if type(items[0]) is int else tuple(map(operator.index, items))  # type: ignore[arg-type]
            prompt = Prompt(ids, {"system": 0})  # type: ignore[arg-type]
            _ = prompt.packed
        except (struct.error, TypeError):
            for item in items:
                if not isinstance(item, SupportsIndex):
                    raise ValueError(f"a prompt of token ids holds something else: {item!r:.100}.") from None
            raise ValueError("the prompt has token ids of more than 32 bits; no vocabulary is so large.") from None
        return prompt
    messages = [check_message(item, index) for index, item in enumerate(items)]
    return _render_messages(tokenizer, messages, limit)


def resolve(
    prompt: Prompt, activation: Activation, *, invocation_tokens: Sequence[int] | None = None, of: str = "this route"
) -> int:
    """The absolute index of the first active token; the prompt's length or more means never active in the prompt.

    Args:
        invocation_tokens: the adapter's `alora_invocation_tokens`; needed by the policy "invocation".
        of: what is being activated, for error messages.

    Raises:
        ValueError: the policy does not apply to this prompt, or the invocation sequence does not occur in it.
    """
    activation = check_activation(activation)
    if isinstance(activation, int):
        return activation
    if activation == "invocation":
        if not invocation_tokens:
            raise ValueError(
                f"activation 'invocation': {of} has no alora_invocation_tokens; pass an explicit token index."
            )
        return last_occurrence(prompt.token_ids, invocation_tokens, of=of)
    if activation not in prompt.starts:
        raise ValueError(
            f"activation {activation!r} needs chat messages such as [{{'role': 'user', 'content': ...}}], one of role "
            "'user' among them for 'turn', and a chat template that shows where they begin; or pass a token index as "
            "activation (0 activates everything)."
        )
    return prompt.starts[activation]


def activation_of_text(
    route: str | Mapping[str, float], *, router: Activation, adapters: Mapping[str, Activation]
) -> Activation | None:
    """What is asked for text whose reader says nothing of activation: how servers and harnesses read a plain prompt.

    Args:
        router, adapters: the policies that the router and each adapter were trained with.

    Returns:
        0 where every policy of the route needs messages, which a text has none of; None leaves it to the route.
    """
    if route == "auto":
        asked: list[Activation | None] = [router]
    else:
        asked = [adapters.get(name) for name in ([route] if isinstance(route, str) else route)]
    return 0 if asked and all(policy in NEED_MESSAGES for policy in asked) else None


def last_occurrence(token_ids: Sequence[int], sequence: Sequence[int], *, of: str = "this adapter") -> int:
    """Index of the first token of the last occurrence of `sequence` (PEFT's aLoRA rule).

    Raises:
        ValueError: the sequence does not occur. It is never silently base.
    """
    tokens, wanted = list(token_ids), list(sequence)
    for start in range(len(tokens) - len(wanted), -1, -1):
        if tokens[start : start + len(wanted)] == wanted:
            return start
    raise ValueError(
        f"the invocation tokens {wanted} of {of} do not occur in the prompt; add the invocation text to the prompt "
        "(it must tokenize to exactly these ids) or pass an explicit activation index."
    )


def check_message(message: Any, index: int) -> dict[str, str]:
    """A message's role and text; "developer" is what OpenAI's clients call "system" now.

    Raises:
        ValueError: it has no role or no text, no Unicode text, or says more than a chat template is given here.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {index} is {message!r}; expected {{'role': ..., 'content': ...}}.")
    unknown = sorted(str(key) for key in set(message) - {"role", "content"} if message[key] not in (None, []))
    if unknown:
        raise ValueError(f"message {index} ({message['role']}) has {unknown}; only role and content are supported.")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        if not all(
            isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            raise ValueError(f"message {index}: only text parts {{'type': 'text', 'text': ...}} are supported.")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"message {index} ({message['role']}) has content {content!r}; expected text.")
    check_unicode(message["role"] + content, f"message {index}")
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": content}


def check_unicode(text: str, what: str) -> None:
    """
    Raises:
        ValueError: it holds half of a surrogate pair; the message begins with `what`.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair, which no tokenizer reads; remove it.") from None


def _render_messages(tokenizer: Any, messages: list[dict[str, str]], limit: TextLimit | None) -> Prompt:
    full = apply_chat_template(tokenizer, messages, add_generation_prompt=True)
    if limit is not None:
        limit.check(full)
    parts = _parts_of(messages)
    rendered = zip(parts, apply_chat_templates(tokenizer, [*parts.values()]), strict=True)
    texts = {part: text for part, text in rendered if isinstance(text, str)}
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    ends = [*accumulate((end for _, end in encoded["offset_mapping"]), max)]
    starts = {}
    for policy, find in (("system", _system_end), ("turn", _turn_start), ("response", _response_start)):
        try:
            char = find(texts, messages, full)
        except KeyError:  # the template refuses a part of the conversation by itself, so it hides the place
            continue
        if char is not None:
            starts[policy] = bisect_right(ends, char)  # the first token that ends behind it
    return Prompt(tuple(encoded["input_ids"]), starts)


def _parts_of(messages: list[dict[str, str]]) -> dict[int | str, Conversation]:
    """What shows where policies begin: the first so many messages, and how the last user message goes on an answer."""
    lengths, parts = {len(messages)}, dict[int | str, Conversation]()
    if messages[0]["role"] == "system":
        lengths.add(1)
    index = _last_user(messages)
    if index is not None:
        # What the message itself adds, its header first, shows when it follows an answer: a conversation that begins
        # with it may begin with a default system message, and an earlier answer may be rendered unlike a last one.
        lengths.add(index + 1)
        user = messages[index]
        opening = [user, {"role": "assistant", "content": _mark(user)}]
        parts |= {"opening": Conversation(opening), "again": Conversation([*opening, user])}
    return parts | {length: Conversation(messages[:length]) for length in lengths}


def _last_user(messages: Sequence[Mapping[str, str]]) -> int | None:
    return max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)


def _mark(message: Mapping[str, str]) -> str:
    """What the message does not say."""
    mark = "\ue000"
    while mark in message["content"]:
        mark += "\ue001"
    return mark


# Each finds a policy's first character in the rendered conversation `full`, or None if the template hides it.


def _system_end(texts: Mapping[int | str, str], messages: list[dict[str, str]], full: str) -> int | None:
    if messages[0]["role"] != "system":
        return 0
    alone = texts[1]
    return len(alone) if full.startswith(alone) and messages[0]["content"].strip() in alone else None


def _turn_start(texts: Mapping[int | str, str], messages: list[dict[str, str]], full: str) -> int | None:
    index = _last_user(messages)
    if index is None:
        return None
    mark = _mark(messages[index])
    after_answer = texts["opening"].rpartition(mark)[2]
    added = texts["again"].partition(mark)[2].removeprefix(after_answer)
    upto = texts[index + 1]
    return len(upto) - len(added) if added and upto.endswith(added) and full.startswith(upto) else None


def _response_start(texts: Mapping[int | str, str], messages: list[dict[str, str]], full: str) -> int | None:
    body = texts[len(messages)]
    return len(body) if full.startswith(body) else None
