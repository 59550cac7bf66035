"""Readers of what clients send: conversations and grammars."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from molora.activation import POLICIES, Prompt, render, resolve
from molora.generation import Grammar
from molora.serving.chat import ChatRequest
from molora.serving.errors import explain
from molora.serving.grammar import GrammarCompiler
from molora.text_limit import text_limit
from molora.tiny import byte_tokenizer

Reader = Callable[[bytes], object]
MAX_TOKENS = 1000
NUM_FOLLOWED = 20
KINDS = ("regex", "json_schema", "json_object")
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hé ✓"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<|im_end|>\n"},
        {"role": "user", "content": ""},
    ],
    [{"role": "user", "content": "\ue000\ue001\ud83d", "name": None, "tool_calls": []}],
    [{"role": "tool", "content": None}],
)
REGEXES = (
    "[a-z]+@[a-z]+(\\.[a-z]+)+",
    "^(yes|no)$",
    "\\d{4}-\\d{2}",
    "(a*)*|\\D\\S",
    "[^\\W\\d]\\x41a?",
    "(?i)é|€+",
    "a{2,5}?b",
)
SCHEMAS: tuple[Any, ...] = (
    True,
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
    {"$defs": {"node": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "$ref": "#/$defs/node"},
    {"type": "array", "prefixItems": [{"enum": ["a", 1, None]}], "items": {"const": 1}, "minItems": 1, "maxItems": 9},
    {"type": "string", "pattern": "^[A-Z]{2}-\\d+$", "minLength": 2, "maxLength": 40},
    {"type": "string", "format": "date"},
    {"oneOf": [{"type": "number", "multipleOf": 0.5}, {"type": "boolean"}], "title": "x"},
    {"type": ["number", "null"], "exclusiveMinimum": 1e22, "exclusiveMaximum": -0.1},
)


def chat(folder: Path) -> tuple[Reader, tuple[bytes, ...]]:
    """The body of a chat request, or its messages alone, up to the prompt and its activation points."""
    tokenizer = byte_tokenizer()
    limit = text_limit(tokenizer, MAX_TOKENS)

    def read(made: bytes) -> object:
        raw = json.loads(made)
        if isinstance(raw, dict) and "messages" in raw:  # as the server does
            try:
                body = ChatRequest.model_validate(raw)
            except ValidationError as error:
                explain(RequestValidationError([each | {"loc": ("body", *each["loc"])} for each in error.errors()]))
                raise
            raw = [message.plain for message in body.messages]
            _ = body.grammar, body.stop_strings, body.max_new_tokens
        prompt = render(tokenizer, raw, limit=limit)
        check_starts(prompt)
        return prompt

    bodies = [{"model": "some", "messages": messages} for messages in CONVERSATIONS]
    more = {"stop": ["a"], "logit_bias": {"5": -100}, "route": {"a": 0.5}, "activation": "turn", "n": 2, "seed": 1}
    formats = [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"metadata": {"a": "b"}},
    ]
    bodies += [bodies[0] | each for each in (more, *formats)]
    seeds = (*CONVERSATIONS, *bodies, "some text", [1, 2, 3])
    return read, tuple(json.dumps(each).encode() for each in seeds)


def check_starts(prompt: Prompt) -> None:
    """Each policy begins in the prompt, or is refused."""
    for policy in POLICIES:
        with suppress(ValueError):
            start = resolve(prompt, policy, invocation_tokens=[5])  # type: ignore[arg-type]
            assert 0 <= start <= len(prompt.token_ids), (policy, start)


def grammar(folder: Path) -> tuple[Reader, tuple[bytes, ...]]:
    """A regular expression or a schema, of the kind that the first byte says, and the first tokens of an answer."""
    compiler = GrammarCompiler(byte_tokenizer(), 512)

    def read(made: bytes) -> object:
        kind = KINDS[made[0] % len(KINDS) if made else 0]
        matcher = compiler.compile(Grammar(kind, made[1:].decode("utf-8", "surrogatepass"))).matcher()  # type: ignore[arg-type]
        for step in range(NUM_FOLLOWED):
            ids = matcher.more()
            if not len(ids):
                break
            matcher.accept(int(ids[step * 7919 % len(ids)]))
        return None

    seeds = [bytes([KINDS.index("regex")]) + each.encode() for each in REGEXES]
    seeds += [bytes([KINDS.index("json_schema")]) + json.dumps(each).encode() for each in SCHEMAS]
    return read, tuple(seeds)


REQUESTS: Mapping[str, Callable[[Path], tuple[Reader, tuple[bytes, ...]]]] = {
    "chat messages": chat,
    "grammars": grammar,
}
