"""Single tokens as text and bytes, of byte-level tokenizers and of SentencePiece's kind."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from molora.serving.token_text import Offsets, TokenTexts
from molora.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def texts():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("größer →", normalized=False)])
    return TokenTexts(tokenizer)


def test_the_bytes_of_a_text_are_those_of_its_tokens(texts):
    text = "Größe ✓ \U0001f600\n\t\x7f\xa0­"
    ids = byte_tokenizer()(text)["input_ids"]
    assert b"".join(texts.to_bytes(token_id) for token_id in ids) == text.encode()


def test_every_token_is_written_differently(texts):
    assert len({texts.to_text(token_id) for token_id in range(260)}) == 260
    assert texts.to_text(0) == "<|endoftext|>"
    assert texts.to_text(259) == "größer →"
    assert texts.to_text(byte_tokenizer()("é")["input_ids"][0]) == "bytes:\\xc3"


def test_ids_past_the_tokenizers_own_are_empty(texts):
    assert (texts.to_text(300), texts.to_bytes(2**31 - 1)) == ("", b"")


def test_pieces_with_a_mark_for_spaces():
    vocab = {"<unk>": 0, "▁the": 1, "<0x0A>": 2, "<0xE2>": 3, "re": 4}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [texts.to_text(token_id) for token_id in range(5)] == ["<unk>", " the", "\n", "bytes:\\xe2", "re"]


def test_offsets_count_characters():
    assert Offsets().extend([b"a", b"\xc3", b"\xa9", b"b", b"", b"c"]) == [0, 1, 1, 2, 3, 3]
    offsets = Offsets(10)
    assert (offsets.push(b"ab"), offsets.push(b"c")) == (10, 12)
