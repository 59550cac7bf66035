"""The bound on a text's characters holds for every text that the tokenizer reads, and is given up where none holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from molora.text_limit import TextLimit, text_limit
from molora.tiny import byte_tokenizer

BYTES = {f"<0x{i:02X}>": i for i in range(256)}
FOUR_IN_ONE = "\u03b1\u0313\u0300\u0345"  # NFC makes one character of these
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def tokenizer_of(model, *, normalizer=None, pre_tokenizer=None, added=()):
    backend = Tokenizer(model)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_level(**parts):
    vocab = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    return tokenizer_of(BPE(vocab | {"aa": 256}, [("a", "a")]), **{"pre_tokenizer": BYTE_LEVEL, **parts})


def fallback(**parts):
    return tokenizer_of(BPE(BYTES | {"a": 256, "\u2581": 257}, [], byte_fallback=True), **parts)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (byte_tokenizer(), len("<|endoftext|>")),
        (byte_level(), 2),
        (byte_level(added=["<long>"]), 6),
        (byte_level(normalizer=normalizers.NFC()), 8),
        (byte_level(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTE_LEVEL])), 2),
        (fallback(normalizer=normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])), 6),
    ],
)
@pytest.mark.parametrize("text", ["a" * 64, " " * 64, FOUR_IN_ONE * 8, "<long>" * 8, "<|endoftext|>" * 8])
def test_no_text_has_fewer_tokens_than_the_bound_says(tokenizer, expected, text):
    limit = text_limit(tokenizer, len(tokenizer(text)["input_ids"]))
    assert limit.max_chars == expected * len(tokenizer(text)["input_ids"])
    limit.check(text)


@given(st.lists(st.sampled_from(["a", " ", "\u00e9", "\u2713", "\U0001f600", "<long>", FOUR_IN_ONE])).map("".join))
def test_nor_any_other(text):
    for tokenizer in (byte_level(normalizer=normalizers.NFKC(), added=["<long>"]), fallback()):
        text_limit(tokenizer, len(tokenizer(text)["input_ids"])).check(text)


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(normalizer=normalizers.Strip()),
        byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
        byte_level(normalizer=normalizers.Replace("  ", " ")),
        byte_level(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), BYTE_LEVEL])),
        byte_level(added=[AddedToken("<m>", lstrip=True)]),
        tokenizer_of(BPE({"a": 0, "b": 1}, []), pre_tokenizer=BYTE_LEVEL),
        tokenizer_of(BPE({"a": 0, "b": 1}, [], byte_fallback=True)),
        tokenizer_of(WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
        object(),
    ],
)
def test_where_a_token_may_stand_for_any_number_there_is_no_bound(tokenizer):
    assert text_limit(tokenizer, 10) is None


def test_characters_that_the_tokenizer_lacks_do_not_count():
    vocab = [character for character in pre_tokenizers.ByteLevel.alphabet() if character != "z"]
    tokenizer = tokenizer_of(BPE({character: i for i, character in enumerate(vocab)}, []), pre_tokenizer=BYTE_LEVEL)
    text = "zazz\u00e9"
    assert len(tokenizer(text)["input_ids"]) == 3
    limit = text_limit(tokenizer, 3)
    assert limit == TextLimit(3, "z")
    limit.check(text)
    with pytest.raises(ValueError, match="has 4 characters, but the model reads at most 3"):
        limit.check(text + "bbz")
