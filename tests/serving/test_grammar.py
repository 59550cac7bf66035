"""Grammars: whatever is drawn at random under their masks matches, and whatever cannot be followed is refused."""

import ast
import json
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from molora import Grammar
from molora.serving import grammar as grammar_module
from molora.serving.grammar import ANNOTATIONS, KNOWN, GrammarCompiler, Matcher
from molora.tiny import byte_tokenizer

VOCAB_SIZE = 512  # wider than the tokenizer's 259
END = 2
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCAB_SIZE)


def schema(**keys: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(keys))


def regex(text: str) -> Grammar:
    return Grammar("regex", text)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


def draw(matcher: Matcher, rng: random.Random, *, max_tokens: int = 4000) -> str:
    """A random answer. After a while it closes what is open, so that it comes to an end."""
    closing = set(ids_of('"]}0\n'))
    ids: list[int] = []
    while not matcher.is_finished and not (may_end(matcher) and rng.random() < 0.2):
        assert len(ids) < max_tokens
        may_come = set(matcher.more().tolist())
        short = may_come & closing if len(ids) > 60 and rng.random() < 0.8 else set()
        ids.append(rng.choice(sorted(short or may_come)))
        matcher.accept(ids[-1])
    assert may_end(matcher)
    return str(TOKENIZER.decode(ids))


def may_end(matcher: Matcher) -> bool:
    return bool(int(matcher.bitmask()[0]) >> END & 1)


def allowed(matcher: Matcher) -> set[int]:
    mask = matcher.bitmask()
    assert mask.dtype == torch.int32
    assert mask.shape == (VOCAB_SIZE // 32,)
    return {token for token in range(VOCAB_SIZE) if int(mask[token // 32]) >> token % 32 & 1}


def matches(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    matcher = compiler.compile(grammar).matcher()
    try:
        for token in ids_of(text):
            matcher.accept(token)
    except ValueError:
        return False
    return may_end(matcher)


NODE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["name", "next"],
}
PERSON: dict[str, Any] = {
    "$defs": {"node": NODE},
    "title": "Person",
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 3, "maximum": 140},
        "height": {"type": ["number", "null"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", 1, None]}, "minItems": 1, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-\\d+$"},
        "chain": {"$ref": "#/$defs/node"},
        "day": {"type": "string", "format": "date"},
    },
    "required": ["age", "tags", "chain"],
}


def is_node(value: Any) -> bool:
    if value is None:
        return True
    name_fits = isinstance(value["name"], str) and 1 <= len(value["name"]) <= 4
    return set(value) == {"name", "next"} and name_fits and is_node(value["next"])


def test_random_answers_match_a_nested_schema(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(schema(**PERSON))
    seen: set[str] = set()
    for seed in range(40):
        value = json.loads(draw(compiled.matcher(), random.Random(seed)))
        seen |= set(value)
        assert {"age", "tags", "chain"} <= set(value) <= set(PERSON["properties"])
        assert type(value["age"]) is int
        assert 3 <= value["age"] <= 140
        assert value.get("height") is None or isinstance(value["height"], (int, float))
        assert 1 <= len(value["tags"]) <= 3
        assert all(tag in ("a", "b\n", 1, None) for tag in value["tags"])
        assert re.fullmatch(r"[A-Z]{2}-\d+", value.get("code", "AB-1"))
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", value.get("day", "2020-02-02"))
        assert value["chain"] is not None
        assert is_node(value["chain"])
    assert seen == set(PERSON["properties"])


@pytest.mark.parametrize(
    "text",
    [
        "[a-z]+@[a-z]+(\\.[a-z]+)+",
        "^(yes|no)$",
        "\\d{4}-\\d{2}",
        "(- .+\\n)+",
        "[^\\W\\d]\\x41a?",
        "a{2,5}?b*",
        "é|€+|😀",
        "(?i)abc|[^\\s]",
        "(?P<a>a*)*|\\D\\S\\.",
    ],
)
def test_random_answers_match_a_regex(compiler: GrammarCompiler, text: str) -> None:
    compiled = compiler.compile(regex(text))
    for seed in range(40):
        answer = draw(compiled.matcher(), random.Random(seed))
        assert re.fullmatch(text, answer, re.ASCII), answer


def test_any_object_is_an_object(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(Grammar("json_object"))
    answers = [json.loads(draw(compiled.matcher(), random.Random(seed))) for seed in range(30)]
    assert all(isinstance(answer, dict) for answer in answers)
    assert any(answers)
    assert matches(compiler, Grammar("json_object"), '{"a": [1, {"b": null}]}')
    assert not matches(compiler, Grammar("json_object"), "[]")


@pytest.mark.parametrize(
    ("keys", "good", "bad"),
    [
        ({"type": "object"}, ["{}", '{"a": 1}'], ["1"]),
        ({"type": "array"}, ["[]", '[1, "a"]'], ["{}"]),
        ({"type": "array", "minItems": 1, "maxItems": 2}, ["[1]", '[1, "a"]'], ["[]", "[1, 2, 3]"]),
        ({"properties": {"a": {}}, "required": ["a"]}, ['{"a": [1]}'], ["{}", '{"a": 1, "b": 2}']),
        ({"properties": {"a": {}}, "additionalProperties": True}, ['{"a": 1, "b": 2}', "{}"], []),
        ({"required": ["z"], "additionalProperties": {"type": "null"}}, ['{"z": null}'], ["{}", '{"z": 1}']),
        ({"oneOf": [{"type": "integer"}, {"const": "x"}]}, ["3", '"x"'], ['"y"']),
        ({"oneOf": [{"minimum": 3}, {"const": 2}], "discriminator": {}}, ["3", "2"], ["1"]),
        ({"allOf": [{"minimum": 3, "type": "integer"}], "description": "three up"}, ["3"], ["2"]),
        ({"type": "string", "maxLength": 2}, ['"ab"', '""', '"é€"', '"\\n"'], ['"abc"', '"\t"', '"a\x01"']),
        ({"minLength": 2}, ['"ab"'], ['"a"', "1"]),
        ({"type": "string", "pattern": "a"}, ['"bab"'], ['"b"']),
        ({"type": "string", "pattern": '^["\\\\]$'}, ['"\\\\"', '"\\""'], ['"a"', '"""']),
        ({"type": "string", "pattern": "^.$"}, ['"a"'], ['"\\n"', '"ab"']),
        ({"type": "string", "pattern": "^\\w\\d$", "maxLength": 2}, ['"a1"'], ['"é1"', '"a٣"']),
        ({"pattern": "^a*$", "minLength": 2, "maxLength": 3}, ['"aa"', '"aaa"'], ['"a"', '"aaaa"']),
        ({"type": "integer", "multipleOf": 7}, ["14", "-7"], ["13"]),
        ({"multipleOf": 0.01}, ["1.25"], ["1.255"]),
        ({"type": "object", "minProperties": 1}, ['{"a": 1}'], ["{}"]),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "null"}}, ['{"b": null}'], ['{"\\u0061": null}']),
        ({"exclusiveMinimum": 0, "maximum": 1}, ["0.5", "1"], ["0", "0.0", "1.5"]),
        ({"type": "string", "default": 0.1 + 0.2}, ['"a"'], ["1"]),
        ({"const": {"a": [0.1, "x"]}}, ['{"a": [0.1, "x"]}'], ['{"a": [0.1]}']),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 3}, ["3"], ["4"]),
        ({"type": "string", "enum": ["é"], "default": 1}, ['"é"'], ['"e"']),
        ({"type": "integer", "exclusiveMinimum": 0}, ["1", "10"], ["0", "-1", "1.0"]),
        ({"type": "string", "format": "uuid"}, ['"4ab1e2d0-0c5b-4cf5-8f5b-0d3d3c1c8c11"'], ['"a"']),
        ({"items": {"type": "integer"}, "uniqueItems": False}, ["[1, 1]"], ['["a"]']),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, ["[null]"], ["[1]", "[null, 1]"]),
    ],
)
def test_schemas_mean_what_they_say(
    compiler: GrammarCompiler, keys: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert matches(compiler, schema(**keys), text), text
    for text in bad:
        assert not matches(compiler, schema(**keys), text), text


NUMBERS = st.decimals(-10_000, 10_000, places=4).map(float) | st.integers(-(10**15) + 1, 10**15 - 1)


@settings(max_examples=100)
@given(NUMBERS, NUMBERS, st.booleans(), st.integers(0, 1 << 30))
def test_numbers_keep_their_bounds(
    compiler: GrammarCompiler, low: float, high: float, is_whole: bool, seed: int
) -> None:
    keys = {"minimum": min(low, high), "exclusiveMaximum": max(low, high)}
    try:
        compiled = compiler.compile(schema(type="integer" if is_whole else "number", **keys))
    except ValueError:
        return
    value = json.loads(draw(compiled.matcher(), random.Random(seed)))
    assert keys["minimum"] <= value < keys["exclusiveMaximum"]


TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("\n\t"), max_size=9)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100)
@given(VALUES)
def test_a_constant_is_the_only_answer(compiler: GrammarCompiler, value: Any) -> None:
    assert json.loads(draw(compiler.compile(schema(const=value)).matcher(), random.Random(0))) == value


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("a.c", ["abc"], ["a\nc"]),
        ("\\x41a", ["Aa"], ["\x1a", "A"]),
        ("\\x{42}\\u000A", ["B\n"], ["BJ"]),
        ("[\\x41-C]\\D", ["Bx"], ["B1", "Dx"]),
        ("a|b$", ["a", "b"], ["ax"]),
        ("\\d", ["1"], ["a", "٣"]),
        ("\\[[\\[]/\\(?x", ["[[/x", "[[/(x"], ["[/x"]),
        ("(?:ab)+|(?<name>c)", ["abab", "c"], ["abc"]),
        ("a\\$", ["a$"], ["a"]),
        ("^a\\\\$", ["a\\"], ["a$"]),
    ],
)
def test_regexes_mean_what_they_say(compiler: GrammarCompiler, text: str, good: list[str], bad: list[str]) -> None:
    assert all(matches(compiler, regex(text), each) for each in good)
    assert not any(matches(compiler, regex(text), each) for each in bad)


def test_an_answer_ends_where_nothing_may_follow(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(regex("ab?")).matcher()
    assert not matcher.is_finished
    assert allowed(matcher) == set(ids_of("a"))
    matcher.accept(*ids_of("a"))
    assert not matcher.is_finished
    assert allowed(matcher) == {END, *ids_of("b")}
    assert matcher.more().tolist() == ids_of("b")
    matcher.accept(*ids_of("b"))
    assert matcher.is_finished
    assert allowed(matcher) == {END}
    matcher.accept(END)
    assert matcher.is_finished
    assert allowed(matcher) == {END}
    with pytest.raises(ValueError, match="does not match"):
        matcher.accept(*ids_of("b"))


def test_an_answer_may_be_empty(compiler: GrammarCompiler) -> None:
    assert allowed(compiler.compile(regex("")).matcher()) == {END}


def test_a_token_that_does_not_match_changes_nothing(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(regex("ab")).matcher()
    for token in (*ids_of("b"), END, 0, 300, VOCAB_SIZE - 1, VOCAB_SIZE, -1):
        with pytest.raises(ValueError, match=f"token {token} does not match"):
            matcher.accept(token)
    matcher.accept(*ids_of("a"))


def test_a_json_answer_is_finished_at_its_last_brace(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(schema(properties={"a": {"type": "null"}}, required=["a"])).matcher()
    for token in ids_of('{"a":null'):
        matcher.accept(token)
        assert not matcher.is_finished
    matcher.accept(*ids_of("}"))
    assert matcher.is_finished


def test_special_tokens_and_padding_never_come() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE, end_ids=[1, 2])
    matcher = compiler.compile(regex("[^x]*")).matcher()
    assert allowed(matcher) & {0, 1, 2, *range(259, VOCAB_SIZE)} == {1, 2}
    odd = GrammarCompiler(TOKENIZER, 261).compile(regex("[^x]*")).matcher().bitmask()
    assert odd.shape == (9,)
    assert int(odd[8]) >> 3 & 1 == 0


def test_special_tokens_are_not_what_they_look_like(compiler: GrammarCompiler) -> None:
    grammar = regex("<\\|im_start\\|>x?")
    assert allowed(compiler.compile(grammar).matcher()) == set(ids_of("<"))


def test_an_end_token_that_is_text_comes_only_at_an_end() -> None:
    newline = ids_of("\n")[0]
    matcher = GrammarCompiler(TOKENIZER, VOCAB_SIZE, end_ids=[END, newline]).compile(regex("a\n?b?\n?")).matcher()
    assert allowed(matcher) == set(ids_of("a"))
    matcher.accept(*ids_of("a"))
    assert allowed(matcher) == {END, newline, *ids_of("b")}
    with pytest.raises(ValueError, match="tokens can spell"):
        GrammarCompiler(TOKENIZER, VOCAB_SIZE, end_ids=[END, newline]).compile(regex("a\nb"))


def tokenizer_of(*tokens: str) -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate(("<end>", *tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_what_no_token_can_spell_is_an_error() -> None:
    compiler = GrammarCompiler(tokenizer_of("a", "b"), 32)
    matcher = compiler.compile(regex("b|a{40}z")).matcher()
    for _ in range(39):
        matcher.accept(1)
    with pytest.raises(ValueError, match="nothing that this model's tokens can spell"):
        matcher.accept(1)
    with pytest.raises(ValueError, match="the regular expression cannot be followed: nothing matches"):
        compiler.compile(regex("z"))


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece()])
def test_a_tokenizer_whose_bytes_are_unknown_is_refused(decoder: Any) -> None:
    tokenizer = tokenizer_of("a")
    tokenizer.backend_tokenizer.decoder = decoder
    with pytest.raises(ValueError, match="no grammar can be followed with this model's tokenizer: can't determine"):
        GrammarCompiler(tokenizer, 32).compile(regex("a"))
    with pytest.raises(
        ValueError, match="no grammar can be followed with this model's tokenizer: vocab size too small"
    ):
        GrammarCompiler(TOKENIZER, 32).compile(regex("a"))


def test_matchers_of_one_grammar_are_apart(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(regex("ab"))
    first, second = compiled.matcher(), compiled.matcher()
    first.accept(*ids_of("a"))
    assert allowed(second) == set(ids_of("a"))
    assert allowed(first) == set(ids_of("b"))


def test_whitespace_is_bounded(compiler: GrammarCompiler) -> None:
    for text, fits in (("[" + " " * 20 + "]", True), ("[" + " " * 30 + "]", False), ("[] ", False)):
        assert matches(compiler, schema(type="array"), text) is fits


REFUSED = [
    (Grammar("json_schema", ""), "is no JSON"),
    (Grammar("json_schema", "{"), "is no JSON"),
    (Grammar("json_schema", '{"minimum": NaN}'), "has NaN, which is too large"),
    (Grammar("json_schema", '{"minimum": 1e999}'), "has Infinity, which is too large"),
    (schema(const=(1 << 53) + 1), "too large a number"),
    (schema(type="number", exclusiveMinimum=10**400, maximum=0.5), "too large a number"),
    (schema(enum=[0.1 + 0.2]), "too exact"),
    (schema(minimum=1e-30), "too exact"),
    (schema(minimum=1e300), "too large"),
    (schema(exclusiveMinimum=0, maximum=0.5), "excludes a bound"),
    (schema(minimum=-0.5, exclusiveMaximum=0), "excludes a bound"),
    (Grammar("json_schema", "[" * 60_000), "nested too deeply"),
    (Grammar("json_schema", '{"items":' * 150 + "{}" + "}" * 150), "recursion limit"),
    (Grammar("json_schema", '{"const":' + "[" * 900 + "]" * 900 + "}"), "recursion limit"),
    (Grammar("json_schema", '{"const":"' + "x" * 70_000 + '"}'), "bytes; expected"),
    (Grammar("json_schema", "3"), "expected a schema"),
    (Grammar("json_schema", "false"), "nothing matches"),
    (Grammar("json_schema", '"\ud800"'), "surrogate"),
    (schema(properties={f"p{i}": {} for i in range(2000)}), "more than 500 schemas"),
    (schema(**{"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(101)}}), "more than 100 schemas"),
    (schema(anyOf=[{}] * 101), "more than 100 branches"),
    (schema(properties={f"p{i}": {"pattern": "a" * 100} for i in range(30)}), "longer than 2048 together"),
    *((schema(**{key: {}}), f"# of the JSON schema has {key}, which") for key in ("not", "if", "contains", "maximumm")),
    (schema(properties={"a": {"not": {}}}), "#/properties/a of the JSON schema has not,"),
    (schema(**{"x-guidance": {"lenient": True}}), "has x-guidance,"),
    (schema(patternProperties={}), "patternProperties"),
    (schema(nullable=True), "nullable"),
    (schema(uniqueItems=True), "uniqueItems"),
    (schema(prefixItems=[], additionalItems=False), "additionalItems"),
    (schema(items=[{}]), "expected a schema"),
    (schema(anyOf=[{"type": "null"}], properties={}), "anyOf beside properties"),
    (schema(allOf=[{}, {}]), "several schemas"),
    (schema(oneOf=[{"minimum": 1}, {"maximum": 2}]), "write anyOf"),
    (schema(minLength=1, minimum=1), "several types"),
    (schema(enum=[]), "anyOf is empty"),
    (schema(enum=[1], type="string"), "incompatible types"),
    (schema(enum=["a\x01"]), "control characters"),
    (schema(const="\x7f"), "control characters"),
    (schema(type={}), "type must be"),
    (schema(type=[]), "cannot be followed"),
    (schema(type=["any"]), "Invalid type: any"),
    (schema(type="string", minLength=-1), "minLength"),
    (schema(type="string", maxLength=1 << 40), "cannot be followed"),
    (schema(type="string", minLength=3, maxLength=2), "greater than maxLength"),
    (schema(type="string", minLength=True), "minLength"),
    (schema(type="string", pattern=3), "'pattern'"),
    (schema(type="string", format=3), "'format'"),
    (schema(type="string", format="anything"), "Unknown format: anything"),
    (schema(type="string", pattern="(?=a)b"), "look-around"),
    (schema(type="string", pattern="a\\"), "ends in a backslash"),
    (schema(type="string", pattern="[a&&b]"), "in a set"),
    (schema(type="integer", minimum="1"), "'minimum'"),
    (schema(type="integer", minimum=5, maximum=4), "greater than maximum"),
    (schema(type="integer", multipleOf=10_000), "over 500"),
    (schema(properties=[]), "no object of schemas"),
    (schema(anyOf=3), "no list of schemas"),
    (schema(properties={"\ud800": {}}), "cannot be followed"),
    (schema(required=[1]), "'required'"),
    (schema(required=["a"], additionalProperties=False), "'a' is unsatisfiable"),
    (schema(properties={"a": {}}, required=["b"]), "'b' is unsatisfiable"),
    (schema(properties={"a": {}}, minProperties=1), "minProperties beside properties"),
    (schema(minProperties=2), "minProperties of the JSON schema is over 1"),
    (schema(**{"$ref": "http://example.org/schema"}), "has no http"),
    (schema(**{"$ref": "file:///etc/hosts"}), "has no file"),
    (schema(**{"$ref": "#/$defs/a"}), "has no #/"),
    (schema(default={"maximumm": 3}, items={"$ref": "#/default"}), "has no #/default"),
    (schema(**{"$ref": 3}), "$ref must be a string"),
    (schema(**{"$ref": "#"}), "nothing matches"),
    (schema(**{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "nothing"),
    *((regex(text), "cannot be followed") for text in ("[", "[]", "a{", "{,3}", "\\1", "\\b", "\\cJ", "a^b", "a$b")),
    *((regex(text), "cannot be followed") for text in ("*", "[z-a]", "a|*", "a{3,1}", "(a", "a)", "\\x{110000}")),
    *((regex(text), "look-around") for text in ("(?=a)a", "(?<!a)b")),
    *((regex(text), "in a set") for text in ("[a&&b]", "[a--b]", "[[:alpha:]]")),
    *((regex(text), "not supported") for text in ("(?x)a # b\nc", "(?ix:a)", "(?u:\\w)", "a++", "a{2}+", "a{ 2}")),
    (schema(items={"$id": "http://example.org/schema"}), "has $id"),
    (regex("(" * 900 + ")" * 900), "cannot be followed"),
    (regex("a[^\\s\\S]"), "nothing matches"),
    (regex("a\\"), "ends in a backslash"),
    (regex("\ud800"), "surrogate"),
    (regex("a" * 5000), "characters"),
    (regex("\\w?" * 600), "too many expressions"),
]


@pytest.mark.parametrize(("grammar", "words"), REFUSED)
def test_what_cannot_be_followed_is_refused(compiler: GrammarCompiler, grammar: Grammar, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        compiler.compile(grammar)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def chain(make: Any, num: int) -> Grammar:
    links = {f"a{i}": make({"$ref": f"#/$defs/a{i + 1}"}) for i in range(num)}
    return schema(**{"$defs": links | {f"a{num}": {}}, "$ref": "#/$defs/a0"})


def many(make: Any) -> Grammar:
    return schema(properties={f"p{i}": make(i) for i in range(490)}, required=["p0", "p1"])


ITSELF = {"$ref": "#"}
HOSTILE = [
    schema(properties={f"p{i}": {} for i in range(499)}),
    schema(properties={f"p{i}": {} for i in range(200)}, minProperties=3, maxProperties=100),
    schema(enum=["a" * 30_000, "a" * 29_999]),
    schema(enum=[[i] for i in range(6000)]),
    schema(oneOf=[{"properties": {"k": {"const": i}}, "required": ["k"]} for i in range(99)]),
    schema(anyOf=[ITSELF] * 99 + [{"type": "null"}]),
    schema(anyOf=[{"type": "array", "items": ITSELF}] * 100),
    schema(anyOf=[{"type": "array", "prefixItems": [ITSELF] * 4}] * 95),
    schema(anyOf=[{"type": "array", "items": ITSELF, "maxItems": 10_000 + i} for i in range(100)]),
    schema(anyOf=[{"type": "string", "pattern": f".*a.{{9{i % 10}}}b"} for i in range(100)]),
    schema(anyOf=[{"type": "integer", "multipleOf": 500 - i} for i in range(100)]),
    schema(type="array", maxItems=10**9),
    schema(type="array", minItems=10**9),
    schema(type="string", maxLength=10**9, minLength=10**8),
    schema(type="string", pattern="^a{1000000000}$"),
    chain(lambda link: {"items": link}, 99),
    chain(lambda link: {"prefixItems": [link], "minItems": 1}, 99),
    chain(lambda link: {"allOf": [link]}, 99),
    chain(lambda link: link, 490),
    many(lambda _: {"type": "string", "format": "uri", "maxLength": 1000}),
    many(lambda i: {"type": "array", "maxItems": 100_000 + i}),
    many(lambda i: {"type": "object", "maxProperties": 10**6 + i}),
    many(lambda i: {"type": "integer", "multipleOf": 500 - i % 99, "minimum": -i, "maximum": i * 98_765_432}),
    *(schema(type="string", pattern=text, format="email", maxLength=900) for text in (".*" * 1000, "(.*a)?" * 300)),
    *(regex(text * (2048 // len(text))) for text in (".", ".*", "\\w?", "\\W+", "(a|b*)*", "(.*a)?", "(x*y*)+")),
    *(regex(text) for text in ("((.{1,100}){1,100}){1,100}", "(a{1000}){1000}", "a{1000000000}", "(.*a.{900}){900}")),
    regex("(?i)" + "[k-\u212a]" * 400),
    regex("".join(f"[{chr(0x4E00 + i)}-{chr(0x9000 + i)}]*" for i in range(340))),
    regex("|".join(f"[a-z]{{{i}}}{i}" for i in range(150))),
]


@pytest.mark.parametrize("grammar", HOSTILE, ids=lambda grammar: grammar.text[:40])
def test_hostile_grammars_are_followed_quickly_or_refused(compiler: GrammarCompiler, grammar: Grammar) -> None:
    start_s = time.thread_time()
    try:
        matcher = compiler.compile(grammar).matcher()
    except ValueError:
        return
    finally:
        assert time.thread_time() - start_s < 4, "about a second at most, on a machine that is four times slower"
    rng = random.Random(0)
    for _ in range(40):
        if not len(ids := matcher.more()):
            return
        start_s = time.thread_time()
        try:
            matcher.accept(int(rng.choice(ids)))
        except ValueError:  # its own limits
            return
        finally:
            assert time.thread_time() - start_s < 1


WORDS = ("type", "anyOf", "oneOf", "allOf", "enum", "const", "$ref", "not", "object", "#")
KEYS = st.sampled_from([*WORDS, *sorted(ANNOTATIONS | KNOWN), "x-guidance", "maximumm"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
SCHEMAS = st.dictionaries(
    KEYS,
    JSON | st.sampled_from(["object", "string", "array", "integer", "#", "#/$defs/object", [{}], {"object": {}}]),
    max_size=5,
)


@settings(max_examples=300)
@given(SCHEMAS)
def test_no_schema_does_harm(compiler: GrammarCompiler, keys: dict[str, Any]) -> None:
    _survives(compiler, Grammar("json_schema", json.dumps(keys)))


@settings(max_examples=300)
@given(st.text(st.sampled_from('ab.*+?{}()[]|^$\\d1,-uxw\0é😀\n"') | st.characters(), max_size=14))
def test_no_regex_does_harm(compiler: GrammarCompiler, text: str) -> None:
    _survives(compiler, regex(text))


def _survives(compiler: GrammarCompiler, grammar: Grammar) -> None:
    try:
        matcher = compiler.compile(grammar).matcher()
    except ValueError:
        return
    rng = random.Random(0)
    for _ in range(20):
        if matcher.is_finished:
            return
        token = rng.choice(matcher.more().tolist())
        try:
            matcher.accept(token)
        except ValueError:  # a dead end
            return


def test_threads_compile_side_by_side() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    found: list[str] = []
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for index in range(10):
                text = f"x{(seed + index) % 7}[a-z]*"
                answer = draw(compiler.compile(regex(text)).matcher(), random.Random(seed))
                assert re.fullmatch(text, answer)
                found.append(answer)
                compiler.compile(schema(**PERSON, description=str(seed * 10 + index)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(found) == 60


def test_compiling_lets_other_threads_run(compiler: GrammarCompiler) -> None:
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before, start_s = ticks[0], time.monotonic()
    while time.monotonic() - start_s < 0.2:
        compiler.compile(many(lambda i: {"type": "array", "maxItems": 1000 + i}))
    stop.set()
    thread.join()
    assert ticks[0] - before > 20


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no end token"):
        GrammarCompiler(TOKENIZER, VOCAB_SIZE, end_ids=[])


def test_llguidance_is_imported_when_it_is_needed() -> None:
    """Few servers are asked for grammars."""
    module = ast.parse(Path(grammar_module.__file__).read_text())
    imported = [alias.name for node in module.body if isinstance(node, ast.Import) for alias in node.names]
    assert "json" in imported
    assert "llguidance" not in imported
