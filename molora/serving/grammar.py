"""Answers that match a JSON schema or a regular expression: which tokens may come next.

xgrammar does the matching. What it does not enforce it leaves out in silence, and there are short texts that keep it
busy for minutes: so a grammar is read here first, bounded, and followed for a few tokens before it is accepted.

Legend: V vocabulary, W = ceil(V / 32) words of a mask, whose lowest bit of the first word is token 0's.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from molora.display import one_line
from molora.generation import Grammar

if TYPE_CHECKING:
    import xgrammar

MAX_BYTES = 64 << 10
MAX_DEPTH = 32
MAX_SCHEMAS = 1000
MAX_CHARS = 600  # that all strings of bounded length have together; each counts as COUNTED_CHARS at most
COUNTED_CHARS = 200  # beyond these, a longer string takes no longer to compile
MAX_REGEX_CHARS = 4096
MAX_QUANTIFIERS = 48
MAX_REPEATS = 256  # of anything in a regular expression, where counts are nested their product
MAX_WHITESPACE = 24  # in a row, between the parts of a JSON text: some models go on with it forever
TRIAL_TOKENS, TRIAL_S = 32, 1.0
CACHE_SIZE = 64

HALVES = r"\ud800-\udfff"  # of surrogate pairs, which are no characters of UTF-8
ANY_CHAR = rf"[^\n{HALVES}]"

ANNOTATIONS = frozenset({"title", "description", "default", "examples", "example", "deprecated", "discriminator"}) | {
    *("readOnly", "writeOnly", "$comment", "$schema", "$id", "id", "contentEncoding", "contentMediaType")
}
DEFINITIONS = ("$defs", "definitions")
KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
COUNTS = frozenset({"minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength"})
FORMATS = frozenset({"date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "email", "uri"})
PYTHON_TYPES: Mapping[str, Any] = {
    **{"object": dict, "array": list, "string": str, "integer": (int, float), "number": (int, float)},
    **{"boolean": bool, "null": type(None)},
}
NEUTRAL: Mapping[str, Any] = {"uniqueItems": False, "minContains": 0, "nullable": False}  # they ask for nothing


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the last ones. Any thread may call it."""

    def __init__(self, tokenizer: Any, vocab_size: int, *, end_ids: Collection[int] | None = None) -> None:
        """
        Args:
            vocab_size: the width of the logits, which may be more than the tokenizer's: what is beyond never comes.
            end_ids: the tokens that may end an answer; None takes the tokenizer's own.

        Raises:
            ValueError: no token would end an answer.
        """
        ends = {tokenizer.eos_token_id} - {None} if end_ids is None else set(end_ids)
        if not ends:
            raise ValueError("the tokenizer has no end token, so no answer could end where its grammar does.")
        self._end_ids = frozenset(ends)
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiler: xgrammar.GrammarCompiler | None = None
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock, self._build_lock = threading.Lock(), threading.Lock()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """
        Raises:
            ValueError: it is malformed, asks for something that cannot be enforced, is too large or takes too long to
                follow, or nothing matches it; the message says which.
        """
        with self._lock:
            if (kept := self._kept.get(grammar)) is not None:
                self._kept.move_to_end(grammar)
                return kept
        compiled = self._compile(grammar)
        with self._lock:
            self._kept[grammar] = compiled
            while len(self._kept) > CACHE_SIZE:
                self._kept.popitem(last=False)
        return compiled

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        name = "the regular expression" if grammar.kind == "regex" else "the JSON schema"
        try:
            num_bytes = len(grammar.text.encode())
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds half a surrogate pair, which no text has.") from None
        if num_bytes > MAX_BYTES:
            raise ValueError(f"{name} has {num_bytes} bytes; expected {MAX_BYTES} at most.")
        compiler = self._build()
        try:
            if grammar.kind == "regex":
                found = compiler.compile_regex(checked_regex(grammar.text))
            else:
                text = '{"type": "object"}' if grammar.kind == "json_object" else grammar.text
                found = compiler.compile_json_schema(
                    json.dumps(checked_schema(text)), max_whitespace_cnt=MAX_WHITESPACE
                )
        except RuntimeError as error:
            raise ValueError(f"{name} cannot be followed: {_reason(error)}") from None
        compiled = CompiledGrammar(found, self._end_ids, self._vocab_size)
        _try(compiled, name)
        return compiled

    def _build(self) -> xgrammar.GrammarCompiler:
        import xgrammar

        with self._build_lock:
            if self._compiler is None:
                info = xgrammar.TokenizerInfo.from_huggingface(
                    self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=sorted(self._end_ids)
                )
                # A special token is no text: spelled out it would look like some, and then be missing in the answer.
                vocab = list(info.decoded_vocab)
                for token_id in _special_ids(self._tokenizer):
                    if token_id < len(vocab):
                        vocab[token_id] = b""
                info = xgrammar.TokenizerInfo(vocab, vocab_size=self._vocab_size, stop_token_ids=sorted(self._end_ids))
                num_threads = max(1, min(8, (os.cpu_count() or 1) // 2))  # the other half computes
                self._compiler = xgrammar.GrammarCompiler(info, max_threads=num_threads, cache_enabled=False)
            return self._compiler


class CompiledGrammar:
    """A grammar for one tokenizer. Any thread may use it."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, end_ids: Collection[int], vocab_size: int) -> None:
        self._compiled, self._vocab_size = compiled, vocab_size
        bits = np.zeros((2, -(-vocab_size // 32) * 32), np.uint8)
        bits[0, :vocab_size] = 1
        bits[1, list(end_ids)] = 1
        self._all_W, self._ends_W = np.packbits(bits, axis=-1, bitorder="little").view(np.int32)

    def matcher(self) -> Matcher:
        """For one answer, from its beginning."""
        import xgrammar

        mask = xgrammar.allocate_token_bitmask(1, self._vocab_size)
        return Matcher(xgrammar.GrammarMatcher(self._compiled), mask, self._all_W, self._ends_W)


class Matcher:
    """How far one answer has come in its grammar. It belongs to one thread."""

    def __init__(
        self,
        matcher: xgrammar.GrammarMatcher,
        mask_1W: Tensor,
        all_W: NDArray[np.int32],
        ends_W: NDArray[np.int32],
    ) -> None:
        self._matcher, self._mask_1W, self._all_W, self._ends_W = matcher, mask_1W, all_W, ends_W
        self._is_filled = False

    def bitmask(self) -> Tensor:
        """int32 [W], a bit for each token that may come next; it changes with the next token.

        Where nothing may come, the end tokens may, so that something can be drawn.
        """
        if not self._is_filled:
            mask_W = self._mask_1W[0].numpy()
            mask_W[:] = 0
            if not self._matcher.is_terminated():
                self._matcher.fill_next_token_bitmask(self._mask_1W)
                mask_W &= self._all_W  # xgrammar lets the bits after the last token be
            if not mask_W.any():
                mask_W[:] = self._ends_W
            self._is_filled = True
        return self._mask_1W[0]

    def fill(self, bitmask_DW: Tensor, row: int) -> None:
        """Write it to a row of a batch's masks."""
        bitmask_DW[row].copy_(self.bitmask())

    def accept(self, token_id: int) -> None:
        """The answer goes on with a token.

        Raises:
            ValueError: it does not match.
        """
        if self._matcher.is_terminated() or not self._matcher.accept_token(token_id):
            raise ValueError(f"token {token_id} does not match the answer's grammar.")
        self._is_filled = False

    @property
    def allows_end(self) -> bool:
        """Whether the answer matches as it is."""
        return self._matcher.is_terminated() or self._matcher.is_completed()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end token may follow."""
        return not (self.bitmask().numpy() & ~self._ends_W).any()

    def more(self) -> NDArray[np.int64]:
        """The ids that may come next, without the end tokens."""
        words_W = self.bitmask().numpy() & ~self._ends_W
        ids: NDArray[np.int64] = np.unpackbits(words_W.view(np.uint8), bitorder="little").nonzero()[0]
        return ids


def checked_schema(text: str) -> Any:
    """A schema with nothing in it but what is enforced, for xgrammar's strict mode.

    Objects that name properties have no others, unless `additionalProperties` says so; the branches of `oneOf` may
    overlap; a format that is not known says nothing. Everything else is as JSON Schema has it, or refused.

    Raises:
        ValueError: it is no schema, is too large, or has a keyword that cannot be enforced; the message names it.
    """
    try:
        schema = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ValueError(f"the JSON schema is no JSON: {reason}") from None
    reader = _SchemaReader()
    checked = reader.read(schema, "#", 0)
    if missing := sorted(reader.references - reader.paths):
        raise ValueError(f"the JSON schema has no {missing[0]}, which a $ref names; expected '#' or '#/$defs/...'.")
    return checked


class _SchemaReader:
    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.references: set[str] = set()
        self._num_chars = 0

    def read(self, schema: Any, path: str, depth: int) -> Any:
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError(f"{path} of the JSON schema is {one_line(json.dumps(schema))}; expected a schema.")
        self.paths.add(path)
        if depth > MAX_DEPTH or len(self.paths) > MAX_SCHEMAS:
            raise ValueError(
                f"the JSON schema is nested deeper than {MAX_DEPTH}, or holds more than {MAX_SCHEMAS} schemas."
            )
        out: dict[str, Any] = {}
        for key in DEFINITIONS:
            if key in schema:
                out[key] = self._read_all(schema[key], f"{path}/{key}", depth)
        rest = {
            key: value
            for key, value in schema.items()
            if key not in ANNOTATIONS and key not in DEFINITIONS and (key not in NEUTRAL or NEUTRAL[key] != value)
        }
        for key in ("$ref", "const", "enum", "anyOf", "oneOf", "allOf"):
            if key in rest:
                if others := rest.keys() - {key, "type" if key in ("const", "enum") else key}:
                    raise ValueError(f"{path} of the JSON schema has {key} beside {min(others)}; one must go.")
                return out | self._read_whole(key, rest, path, depth)
        return out | self._read_type(rest, path, depth)

    def _read_whole(self, key: str, schema: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        value = schema[key]
        if key == "$ref":
            if not isinstance(value, str):
                raise ValueError(f"{path}/$ref of the JSON schema is no text.")
            self.references.add(value)
            return {"$ref": value}
        if key in ("const", "enum"):
            values = [value] if key == "const" else value
            types = self._types(schema, path) or list(PYTHON_TYPES)
            if not isinstance(values, list) or not values:
                raise ValueError(f"{path}/enum of the JSON schema is no list of values.")
            for each in values:
                if not any(_is_of(each, name) for name in types):
                    raise ValueError(f"{path}/{key} of the JSON schema has a value that is of another type.")
            return {"enum": values}
        if not isinstance(value, list) or not value:
            raise ValueError(f"{path}/{key} of the JSON schema is no list of schemas.")
        if key == "allOf" and len(value) > 1:
            raise ValueError(f"{path}/allOf of the JSON schema has several schemas, which is not supported.")
        branches = [self.read(each, f"{path}/{key}/{index}", depth + 1) for index, each in enumerate(value)]
        return {"anyOf": branches}

    def _read_type(self, schema: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        known = frozenset().union(*KEYWORDS.values()) | {"type"}
        for key in schema:
            if key not in known:
                raise ValueError(f"{path} of the JSON schema has {key}, which is not supported.")
        types = self._types(schema, path)
        if not types:
            types = [name for name, keys in KEYWORDS.items() if name != "integer" and keys & schema.keys()]
            if not types:
                return {}
            if len(types) > 1:
                raise ValueError(f"{path} of the JSON schema has keywords of several types; say which, with type.")
        branches = [self._read_one(name, schema, path, depth) for name in types]
        return branches[0] if len(branches) == 1 else {"anyOf": branches}

    def _types(self, schema: dict[str, Any], path: str) -> list[str]:
        types = schema.get("type", [])
        types = types if isinstance(types, list) else [types]
        if not all(isinstance(name, str) and name in KEYWORDS for name in types) or (not types and "type" in schema):
            raise ValueError(f"{path}/type of the JSON schema is not one of {', '.join(KEYWORDS)}.")
        return types

    def _read_one(self, name: str, schema: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        out = {"type": name} | {key: schema[key] for key in schema if key in KEYWORDS[name]}
        for key in KEYWORDS[name] & out.keys():
            value = out[key]
            if key in COUNTS:
                if not _is_of(value, "number") or value != int(value) or not 0 <= value < 1 << 31:
                    raise ValueError(f"{path}/{key} of the JSON schema is no count.")
                out[key] = int(value)
            elif name in ("integer", "number") and not _is_of(value, "number"):
                raise ValueError(f"{path}/{key} of the JSON schema is no number.")
        if name == "object":
            self._read_object(out, path, depth)
        elif name == "array":
            if "prefixItems" in out:
                out["prefixItems"] = self._read_list(out["prefixItems"], f"{path}/prefixItems", depth)
            elif "items" not in out:
                out["items"] = {}
            if out.get("items", False) is not False:
                out["items"] = self.read(out["items"], f"{path}/items", depth + 1)
        elif name == "string":
            self._read_string(out, path)
        return out

    def _read_object(self, out: dict[str, Any], path: str, depth: int) -> None:
        required = out.get("required", [])
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            raise ValueError(f"{path}/required of the JSON schema is no list of names.")
        properties, more = out.get("properties", {}), out.get("additionalProperties", True)
        missing = [key for key in required if isinstance(properties, dict) and key not in properties]
        if missing and more is False:
            raise ValueError(f"{path} of the JSON schema requires {missing[0]!r} and allows no such property.")
        if isinstance(properties, dict):
            properties = properties | dict.fromkeys(missing, more)
        out["properties"] = self._read_all(properties, f"{path}/properties", depth)
        if more is not False and ("additionalProperties" in out or not properties):
            out["additionalProperties"] = self.read(more, f"{path}/additionalProperties", depth + 1)

    def _read_string(self, out: dict[str, Any], path: str) -> None:
        lengths = [out[key] for key in ("minLength", "maxLength") if key in out]
        if "pattern" in out:
            if lengths:
                raise ValueError(f"{path} of the JSON schema has a pattern and a length; the pattern can say both.")
            if not isinstance(out["pattern"], str):
                raise ValueError(f"{path}/pattern of the JSON schema is no text.")
            if re.search(r'["\x00-\x1f]|\\[\\"nrtfvscxu]', out["pattern"]):
                raise ValueError(
                    f"{path}/pattern of the JSON schema matches quotes, backslashes, spaces of any kind or numbered "
                    "characters, which JSON may write in another way; that is not supported."
                )
            out["pattern"] = checked_regex(out["pattern"])
        if not (isinstance(form := out.pop("format", None), str) or form is None):
            raise ValueError(f"{path}/format of the JSON schema is no text.")
        if form in FORMATS and not lengths and "pattern" not in out:
            out["format"] = form
        if lengths:  # as a pattern, of whose characters xgrammar leaves out what JSON escapes
            low, high = out.pop("minLength", 0), out.pop("maxLength", "")
            if high != "" and low > high:
                raise ValueError(f"{path} of the JSON schema has a minLength over its maxLength.")
            out["pattern"] = f"{ANY_CHAR}{{{low},{high}}}"
        self._num_chars += min(max(lengths, default=0), COUNTED_CHARS)
        if self._num_chars > MAX_CHARS:
            raise ValueError(f"the strings of the JSON schema that have a length are longer than {MAX_CHARS} together.")

    def _read_all(self, schemas: Any, path: str, depth: int) -> dict[str, Any]:
        if not isinstance(schemas, dict):
            raise ValueError(f"{path} of the JSON schema is no object of schemas.")
        return {key: self.read(each, f"{path}/{key}", depth + 1) for key, each in schemas.items()}

    def _read_list(self, schemas: Any, path: str, depth: int) -> list[Any]:
        if not isinstance(schemas, list):
            raise ValueError(f"{path} of the JSON schema is no list of schemas.")
        return [self.read(each, f"{path}/{index}", depth + 1) for index, each in enumerate(schemas)]


_ESCAPE = r"\\(?:u\{[0-9A-Fa-f]{1,6}\}|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2}|c[A-Za-z]|[dDwWsSnrtfv]|[^\w\s])"
_REGEX_PIECE = re.compile(
    rf"""
    (?P<escape> {_ESCAPE} )
    | (?P<set> \[ \^? (?: {_ESCAPE} | [^\]\\\x00] )+ \] )
    | (?P<open> \( (?: \?: | \?<[A-Za-z]+> | (?!\?) ) )
    | (?P<close> \) )
    | (?P<quantifier> [*+?] | \{{ (?P<low>\d{{1,9}}) (?: (?P<comma>,) (?P<high>\d{{1,9}})? )? \}} )
    | (?P<dot> \. )
    | (?P<or> \| )
    | (?P<char> [^\\\[(){{}}*+?^$\x00] )
    """,
    re.VERBOSE,
)


@dataclass
class _Group:
    """An open group of a regular expression.

    Attributes:
        num_repeats: the most that anything in it is repeated.
        is_loose: one of its alternatives begins and ends with something of no fixed length: repeated, there are many
            ways to divide a text among the repeats, and all of them are followed.
        elements: of the present alternative, whether each has no fixed length.
    """

    num_repeats: int = 1
    is_loose: bool = False
    elements: list[bool] = field(default_factory=list)

    def end_alternative(self) -> None:
        self.is_loose |= bool(self.elements) and self.elements[0] and self.elements[-1]
        self.elements.clear()


def checked_regex(text: str) -> str:
    """A regular expression of JavaScript's syntax as xgrammar reads it: without anchors, and without its mistakes.

    Raises:
        ValueError: it is malformed, too large, or has something that cannot be enforced; the message says where.
    """
    body = text.removeprefix("^")
    if body.endswith("$") and (len(body) - len(body[:-1].rstrip("\\"))) % 2:
        body = body[:-1]
    if len(body) > MAX_REGEX_CHARS:
        raise ValueError(f"the regular expression has {len(body)} characters; expected {MAX_REGEX_CHARS} at most.")
    out: list[str] = []
    groups, element, num_quantifiers, at = [_Group()], _Group(), 0, 0
    while at < len(body):
        piece = _REGEX_PIECE.match(body, at)
        if piece is None:
            raise ValueError(
                f"the regular expression cannot be read from {one_line(body[at : at + 20])!r} on: it is malformed, or "
                "has anchors, backreferences, look-around, flags or classes that are not supported."
            )
        group, at = groups[-1], piece.end()
        if piece["open"]:
            groups.append(_Group())
        elif piece["close"]:
            if len(groups) == 1:
                raise ValueError("the regular expression closes a group that was never opened.")
            element = groups.pop()
            element.end_alternative()
            groups[-1].elements.append(element.is_loose)
            groups[-1].num_repeats = max(groups[-1].num_repeats, element.num_repeats)
        elif piece["quantifier"]:
            num_quantifiers += 1
            most = int(piece["high"] or piece["low"] or 1)
            group.num_repeats = max(group.num_repeats, element.num_repeats * most)
            if num_quantifiers > MAX_QUANTIFIERS or group.num_repeats > MAX_REPEATS:
                raise ValueError(
                    f"the regular expression has more than {MAX_QUANTIFIERS} quantifiers, or repeats something more "
                    f"than {MAX_REPEATS} times."
                )
            if element.is_loose and piece[0] != "?" and (most > 1 or not piece["high"]):
                raise ValueError(
                    "the regular expression repeats a group that begins and ends with something of no fixed length; "
                    "let one end be fixed, as in '([a-z]+ )*'."
                )
            if group.elements and not (piece["low"] and not piece["comma"]):
                group.elements[-1] = True
            at += body.startswith("?", at)  # a lazy quantifier matches the same texts
        elif piece["or"]:
            group.end_alternative()
        else:
            element = _Group()
            group.elements.append(False)
        out.append(ANY_CHAR if piece["dot"] else _spelled(piece))
    if len(groups) > 1:
        raise ValueError("the regular expression leaves a group open.")
    return "".join(out)


_NUMBERED = re.compile(
    r"\\(?:u\{([^}]+)\}|(?:x(?=[0-9A-Fa-f]{2})|u(?=[0-9A-Fa-f]{4}))"
    r"([0-9A-Fa-f]{2}(?:(?<=\\u..)[0-9A-Fa-f]{2})?)|c(.)|[^uxc])"
)


def _spelled(piece: re.Match[str]) -> str:
    """A piece of a regular expression whose characters are numbered in braces: `\\x41a` would be read as one number."""
    text = _NUMBERED.sub(_numbered, piece[0])
    if piece["set"] and text.startswith("[^"):
        return f"{text[:-1]}{HALVES}]"
    return f"[^{text.lower()}{HALVES}]" if text in (r"\D", r"\W", r"\S") else text


def _numbered(escape: re.Match[str]) -> str:
    braced, digits, control = escape.groups()
    if not any(escape.groups()):
        return escape[0]
    number = ord(control) % 32 if control else int(braced or digits, 16)
    if number > 0x10FFFF:
        raise ValueError(f"the regular expression has {escape[0]}, which is no character.")
    return rf"\u{{{number:x}}}"


def _try(compiled: CompiledGrammar, name: str) -> None:
    """Follow a grammar for a few tokens at random."""
    matcher, rng = compiled.matcher(), random.Random(0)
    if matcher.is_finished and not matcher.allows_end:
        raise ValueError(f"nothing matches {name}, or nothing that this model's tokens can spell.")
    start_s = time.thread_time()
    for _ in range(TRIAL_TOKENS):
        if not len(ids := matcher.more()):
            break
        matcher.accept(int(rng.choice(ids)))
        if time.thread_time() - start_s > TRIAL_S:
            raise ValueError(f"{name} takes too long to follow; make it simpler: repeats within repeats cost most.")


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {token_id for token_id, token in added.items() if token.special}


def _is_of(value: Any, name: str) -> bool:
    if isinstance(value, bool) and name != "boolean":
        return False
    return isinstance(value, PYTHON_TYPES[name]) and (name != "integer" or value == int(value))


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large a number")
    return value


def _reason(error: RuntimeError) -> str:
    """xgrammar's message without its file and line."""
    return one_line(re.sub(r"^\[[\d:]+\] \S+: ", "", str(error)))
