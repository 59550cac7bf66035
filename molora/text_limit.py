"""Texts that certainly have too many tokens, known before they are tokenized.

This module knows tokenizers, but no model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

# One character of a normal form stands for at most four of its canonical decomposition.
NORMAL_FORMS = {"NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4}
KEEPS_ALL = {"ByteLevel", "Digits", "Metaspace", "Prepend"}


@dataclass(frozen=True)
class TextLimit:
    """
    Attributes:
        max_chars: of a text that may have few enough tokens.
        dropped: characters that do not count, because the tokenizer has nothing for them.
    """

    max_chars: int
    dropped: str = ""

    def check(self, text: str) -> None:
        """
        Raises:
            ValueError: the text is too long.
        """
        num_chars = len(text)
        if num_chars > self.max_chars:
            num_chars -= sum(map(text.count, self.dropped))
        if num_chars > self.max_chars:
            raise ValueError(
                f"the prompt has {num_chars} characters, but the model reads at most {self.max_chars}, whatever their "
                "tokens; shorten it."
            )


def text_limit(tokenizer: Any, max_tokens: int) -> TextLimit | None:
    """What texts of at most so many tokens keep to; None where a token may stand for any number of characters.

    A token has at least a character, or a byte, for each character of the text, so that the longest one bounds them
    all, as long as the tokenizer drops nothing, merges no unknown characters and lets no special token take the spaces
    beside it. Whatever is not known to keep to this counts as unbounded.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, BPE):
        return None
    parts = [*_parts(backend.normalizer, "normalizers"), *_parts(backend.pre_tokenizer, "pretokenizers")]
    takes_spaces = any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if takes_spaces or not all(map(_keeps_all, parts)):
        return None
    vocab, dropped = tokenizer.get_vocab(), ""
    if any(part["type"] == "ByteLevel" for part in parts):
        # Beyond ASCII, each character has a byte from 0x80 to 0xBF. Some vocabularies lack rare bytes.
        if not all(_bytes(chr(i))[1] in vocab for i in range(0x80, 0xC0)):
            return None
        dropped = "".join(chr(i) for i in range(0x80) if _bytes(chr(i)) not in vocab)
    elif not backend.model.byte_fallback or not all(f"<0x{i:02X}>" in vocab for i in range(256)):
        return None
    longest = max(map(len, vocab)) * max([1, *(NORMAL_FORMS.get(part["type"], 1) for part in parts)])
    return TextLimit(max_tokens * longest, dropped)


def _bytes(character: str) -> str:
    """As byte-level vocabularies write them."""
    return str(ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)[0][0])


def _parts(step: Any, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    part = json.loads(step.__getstate__())
    return list(part[name]) if part["type"] == "Sequence" else [part]


def _keeps_all(part: dict[str, Any]) -> bool:
    if part["type"] == "Split":
        return bool(part["behavior"] != "Removed")
    if part["type"] == "Replace":
        return len(part["pattern"].get("String", part["content"] + "?")) <= len(part["content"])
    return part["type"] in KEEPS_ALL or part["type"] in NORMAL_FORMS
