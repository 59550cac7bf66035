"""Answers that match a JSON schema or a regular expression: which tokens may come next.

llguidance does the matching, within limits. It passes over words of a schema that it does not know, and there are short
texts that keep it busy in spite of its limits: so a schema is read here first, and only what is enforced goes on.

Legend: V vocabulary, W = ceil(V / 32) words of a mask, whose lowest bit of the first word is token 0's.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Collection
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora.display import one_line
from molora.generation import Grammar

if TYPE_CHECKING:
    import llguidance

MAX_BYTES = 64 << 10
MAX_SCHEMAS = 500
MAX_REFERENCES = 100  # different ones: llguidance follows a chain of them on its stack
MAX_BRANCHES = 100  # of all anyOf and oneOf together: each of them is followed at once
MAX_MULTIPLE_OF = 500
MAX_REGEX_CHARS = 2048  # in a JSON schema of all patterns together
MAX_WHITESPACE = 24  # in a row, between the parts of a JSON text: some models go on with it forever
MAX_DIGITS, MAX_EXPONENT = 15, 22  # of numbers
TRIAL_TOKENS = 8
ANY_OBJECT = '{"type": "object"}'
JSON_OPTIONS = {
    "whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{MAX_WHITESPACE}}}",
    "json_allowed_escapes": 'nrbtf\\"',  # with \u, a property could be written twice, and only once be checked
}

ANNOTATIONS = frozenset({"title", "description", "default", "examples", "example", "deprecated", "discriminator"}) | {
    *("readOnly", "writeOnly", "$comment", "$schema", "$id", "id", "contentEncoding", "contentMediaType")
}
NEUTRAL = {"uniqueItems": False, "minContains": 0, "nullable": False}  # they ask for nothing
DEFINITIONS = ("$defs", "definitions")
SCHEMA_MAPS = ("properties", *DEFINITIONS)
SCHEMA_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
WHOLE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # each stands alone
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({*BOUNDS, "multipleOf"}),
}
KNOWN = frozenset({"type", *WHOLE, *DEFINITIONS}).union(*KEYWORDS.values())


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Any thread may call it."""

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
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, sorted(ends)
        self._tokens: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """
        Raises:
            ValueError: it is malformed, asks for something that cannot be enforced, is too large, or nothing matches
                it; the message says which. Or the model's tokenizer is of a kind that cannot be followed.
        """
        from llguidance import LLMatcher

        name = "the regular expression" if grammar.kind == "regex" else "the JSON schema"
        try:
            num_bytes = len(grammar.text.encode())
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds half a surrogate pair, which no text has.") from None
        if num_bytes > MAX_BYTES:
            raise ValueError(f"{name} has {num_bytes} bytes; expected {MAX_BYTES} at most.")
        try:
            text = ANY_OBJECT if grammar.kind == "json_object" else grammar.text
            start = _regex_rule(text) if grammar.kind == "regex" else _json_rule(text)
        except RecursionError:
            raise ValueError(f"{name} is nested too deeply.") from None
        # Where one text is forced, its tokenization would be as well, found anew at each token: slow if it is long.
        rules = f'%llguidance {{"no_forcing": true}}\nstart: {start}\n'
        with self._lock:  # one at a time: each takes up to a second
            matcher = LLMatcher(self._build(), rules, log_level=0, limits=_limits())
            if matcher.is_error():
                raise ValueError(f"{name} cannot be followed: {_reason(matcher)}")
            compiled = CompiledGrammar(matcher, self._end_ids, self._vocab_size)
            try:
                _try(compiled)
            except ValueError as error:
                raise ValueError(f"{name} cannot be followed: {error}") from None
        return compiled

    def _build(self) -> llguidance.LLTokenizer:
        from llguidance.hf import from_tokenizer

        if self._tokens is None:
            try:
                self._tokens = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._end_ids)
            except BaseException as error:  # a panic of Rust is no Exception
                if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                    raise
                reason = one_line(error)
                raise ValueError(f"no grammar can be followed with this model's tokenizer: {reason}") from None
        return self._tokens


class CompiledGrammar:
    """A grammar for one tokenizer. Any thread may use it."""

    def __init__(self, matcher: llguidance.LLMatcher, end_ids: Collection[int], vocab_size: int) -> None:
        self._matcher = matcher
        bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        bits[list(end_ids)] = 1
        self._ends_W = np.packbits(bits, bitorder="little").view(np.int32)

    def matcher(self) -> Matcher:
        """For one answer, from its beginning."""
        return Matcher(self._matcher.deep_copy(), self._ends_W)


class Matcher:
    """How far one answer has come in its grammar. It belongs to one thread."""

    def __init__(self, matcher: llguidance.LLMatcher, ends_W: NDArray[np.int32]) -> None:
        self._matcher, self._ends_W = matcher, ends_W
        self._mask_W = torch.zeros(len(ends_W), dtype=torch.int32)
        self._words_W: NDArray[np.int32] = self._mask_W.numpy()
        self._fill()

    def bitmask(self) -> Tensor:
        """int32 [W], a bit for each token that may come next; it changes with the next token."""
        return self._mask_W

    def accept(self, token_id: int) -> None:
        """The answer goes on with a token.

        Raises:
            ValueError: it does not match, or no token could follow it, or none that is found in time.
        """
        if not (0 <= token_id < 32 * len(self._words_W) and int(self._words_W[token_id // 32]) >> token_id % 32 & 1):
            raise ValueError(f"token {token_id} does not match the answer's grammar.")
        if not self._matcher.consume_token(token_id):
            raise ValueError(_reason(self._matcher))
        self._fill()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end token may follow."""
        return not (self._words_W & ~self._ends_W).any()

    def more(self) -> NDArray[np.int64]:
        """The ids that may come next, without the end tokens."""
        words_W = self._words_W & ~self._ends_W
        ids: NDArray[np.int64] = np.unpackbits(words_W.view(np.uint8), bitorder="little").nonzero()[0]
        return ids

    def _fill(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._mask_W.data_ptr(), self._mask_W.nbytes)
        if self._matcher.is_error():  # the mask is of the end tokens then
            raise ValueError(_reason(self._matcher))
        if not (self._matcher.is_accepting() or self._matcher.is_stopped()):
            self._words_W &= ~self._ends_W  # an end token may be text as well
            if not self._words_W.any():
                raise ValueError(NOTHING_FITS)


NOTHING_FITS = "nothing matches from there on, or nothing that this model's tokens can spell."


def checked_schema(text: str) -> dict[str, Any]:
    """A schema with nothing in it but what is enforced.

    Objects that name properties have no others, unless `additionalProperties` says so; keywords without a type mean
    their own; the branches of a `oneOf` that has a `discriminator` are taken to be apart. Everything else is as JSON
    Schema has it, or refused: here, or by llguidance.

    Raises:
        ValueError: it is no schema, is too large, or has a keyword that cannot be enforced; the message names it.
    """
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the JSON schema is no JSON: {one_line(error)}") from None
    reader = _SchemaReader()
    checked = reader.read({} if schema is True else schema, "#")
    if checked is False:
        raise ValueError("nothing matches the JSON schema false.")
    if missing := sorted(reader.references - reader.paths):
        raise ValueError(
            f"the JSON schema has no {one_line(missing[0])}, which a $ref names; expected '#' or '#/$defs/...'."
        )
    json.loads(json.dumps(checked), parse_int=_check_number, parse_float=_check_number, parse_constant=_check_number)
    return dict(checked)


class _SchemaReader:
    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.references: set[str] = set()
        self._num_branches = self._num_chars = 0

    def read(self, schema: Any, path: str) -> Any:
        self.paths.add(path)
        if len(self.paths) > MAX_SCHEMAS:
            raise ValueError(f"the JSON schema holds more than {MAX_SCHEMAS} schemas.")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._refusal(path, f"is {one_line(json.dumps(schema))}; expected a schema")
        if path != "#" and (ids := schema.keys() & {"$id", "id"}):  # references below it would start there
            raise self._refusal(path, f"has {min(ids)}, which is only supported for the whole schema")
        out: dict[str, Any] = {}
        for key, value in schema.items():
            if key in KNOWN:
                out[key] = value
            elif key not in ANNOTATIONS and (key not in NEUTRAL or NEUTRAL[key] is not value):
                raise self._refusal(path, f"has {one_line(key)}, which is not supported")
        self._check(out, path)
        for key, value in out.items():
            if key in SCHEMA_MAPS:
                names = {name: name.replace("/", "~1") for name in value}  # as no $ref that llguidance follows has it
                out[key] = {name: self.read(value[name], f"{path}/{key}/{step}") for name, step in names.items()}
            elif key in SCHEMA_LISTS:
                out[key] = [self.read(each, f"{path}/{key}/{index}") for index, each in enumerate(value)]
            elif key in ("items", "additionalProperties"):
                out[key] = self.read(value, f"{path}/{key}")
        if "discriminator" in schema and "oneOf" in out:
            out["anyOf"] = out.pop("oneOf")
        if out.get("properties"):
            out.setdefault("additionalProperties", False)
        return out

    def _check(self, schema: dict[str, Any], path: str) -> None:
        """Refuse what llguidance would let pass, or be long about."""
        for key, value in schema.items():
            if key in SCHEMA_MAPS and not isinstance(value, dict):
                raise self._refusal(f"{path}/{key}", "is no object of schemas")
            if key in SCHEMA_LISTS and not isinstance(value, list):
                raise self._refusal(f"{path}/{key}", "is no list of schemas")
            free = {key, *DEFINITIONS} | ({"type"} if key in ("const", "enum") else set())
            if key in WHOLE and (others := schema.keys() - free):
                raise self._refusal(path, f"has {key} beside {min(others)}; one must go")
            if key in ("const", "enum") and _CONTROL.search(json.dumps(value)):
                raise self._refusal(f"{path}/{key}", "has control characters, which is not supported")
            if key in ("anyOf", "oneOf"):
                self._num_branches += len(value)
        if self._num_branches > MAX_BRANCHES:
            raise ValueError(f"the JSON schema has more than {MAX_BRANCHES} branches of anyOf and oneOf together.")
        if len(schema.get("allOf", ())) > 1:
            raise self._refusal(f"{path}/allOf", "has several schemas, which is not supported")
        if isinstance(reference := schema.get("$ref"), str):
            self.references.add(reference)
            if len(self.references) > MAX_REFERENCES:
                raise ValueError(f"the JSON schema refers to more than {MAX_REFERENCES} schemas.")
        if "type" not in schema and schema.keys().isdisjoint(WHOLE):
            types = [name for name, keys in KEYWORDS.items() if keys & schema.keys()]
            if len(types) > 1:
                raise self._refusal(path, "has keywords of several types; say which, with type")
            if types:
                schema["type"] = types[0]
        if "properties" in schema and (sizes := schema.keys() & {"minProperties", "maxProperties"}):
            raise self._refusal(path, f"has {min(sizes)} beside properties; one must go")
        for key, most in (("minProperties", 1), ("multipleOf", MAX_MULTIPLE_OF)):  # names may come twice
            if isinstance(value := schema.get(key), (int, float)) and abs(value) > most:
                raise self._refusal(f"{path}/{key}", f"is over {most}, which is not supported")
        bounds = {key: schema[key] for key in BOUNDS if type(schema.get(key)) in (int, float)}
        for value in bounds.values():  # they are subtracted, which a large integer and a fraction cannot be
            _check_number(json.dumps(value))
        lows, highs = ([value for key, value in bounds.items() if word in key.lower()] for word in ("min", "max"))
        if lows and highs and min(highs) - max(lows) < 1 and any("exclusive" in key for key in bounds):
            raise self._refusal(path, "excludes a bound of less than a unit, which is not supported")  # it would match
        if isinstance(pattern := schema.get("pattern"), str):
            check_regex(pattern)
            self._num_chars += len(pattern)
            if self._num_chars > MAX_REGEX_CHARS:
                raise ValueError(f"the patterns of the JSON schema are longer than {MAX_REGEX_CHARS} together.")

    def _refusal(self, path: str, what: str) -> ValueError:
        return ValueError(f"{one_line(path)} of the JSON schema {what}.")


_CONTROL = re.compile(r"(?<!\\)(\\\\)*\\u00(?:[01]|7f)")  # as json.dumps writes them
_PIECE = re.compile(r"\\.|\(\?[a-zA-Z]*[xuUR]|\[\^?\]?(?:\\.|[^]\\])*|[*+?}]\+|\{(?=[^}]*\s)[\d,\s]*\}", re.DOTALL)


def check_regex(text: str) -> None:
    """Refuse what llguidance would read in another way than Python and JavaScript do.

    Raises:
        ValueError: it has nested sets, operations on sets, possessive quantifiers, spaces in a count, a flag that is
            not i, m or s, or ends in a backslash.
    """
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise ValueError("the regular expression ends in a backslash.")
    for piece in _PIECE.findall(text):
        if piece[0] == "[" and re.search(r"&&|--|~~|\[", re.sub(r"\\.", "", piece[1:])):
            raise ValueError(
                "the regular expression has '[', '&&', '--' or '~~' in a set; put a backslash before each character."
            )
        if piece[0] not in "[\\":
            raise ValueError(
                f"the regular expression has {piece!r}; flags other than i, m and s, possessive quantifiers and spaces "
                "in counts are not supported."
            )


def _json_rule(text: str) -> str:
    return f"%json {json.dumps(checked_schema(text) | {'x-guidance': JSON_OPTIONS})}"


def _regex_rule(text: str) -> str:
    from llguidance import regex_to_lark

    if len(text) > MAX_REGEX_CHARS:
        raise ValueError(f"the regular expression has {len(text)} characters; expected {MAX_REGEX_CHARS} at most.")
    check_regex(text)
    return f"/{regex_to_lark(text, 'dws')}/"


def _limits() -> llguidance.LLParserLimits:
    """Far from what honest grammars need, and near enough that a hostile one takes no second, and no gigabyte."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=100_000,
        step_max_items=10_000,
        max_lexer_states=30_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def _try(compiled: CompiledGrammar) -> None:
    """Follow a grammar for a few tokens at random."""
    matcher, rng = compiled.matcher(), random.Random(0)
    for _ in range(TRIAL_TOKENS):
        if len(ids := matcher.more()):
            matcher.accept(int(rng.choice(ids)))


def _check_number(text: str) -> None:
    """Of no more digits than llguidance reads exactly."""
    _, digits, exponent = Decimal(text).normalize().as_tuple()
    if len(digits) > MAX_DIGITS or not isinstance(exponent, int) or abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"the JSON schema has {one_line(text):.100}, which is too large a number, or too exact a one.")


def _reason(matcher: llguidance.LLMatcher) -> str:
    """llguidance's message in a line, without the place in our rules and the text that it repeats."""
    error = matcher.get_error().removesuffix("<non-verbose/>")
    if "NoExtension" in error:
        return NOTHING_FITS
    if "coerce_one_of" in error:
        return "the branches of a oneOf may overlap; write anyOf, or constants of one property that tell them apart."
    error = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: |\n   \d+ \| .*", "", error, flags=re.DOTALL)
    return one_line(
        re.sub(r'^invalid regex ".*" \(in regex\): |regex parse error:.*\nerror: ', "", error, flags=re.DOTALL)
    )
