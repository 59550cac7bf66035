"""Single tokens as text and bytes, for log-probabilities. It knows tokenizers, and nothing of requests or answers."""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """What each id of a vocabulary stands for.

    A token may be a part of a character. Its bytes say which; as text it is written as OpenAI does, `bytes:\\xf0\\x9f`,
    so that different tokens stay different.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._bytes_of_char = _byte_alphabet() if _is_byte_level(tokenizer) else None
        self.to_bytes = lru_cache(maxsize=1 << 16)(self._to_bytes)
        self.to_text = lru_cache(maxsize=1 << 16)(self._to_text)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _to_text(self, token_id: int) -> str:
        data = self.to_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _to_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # an id past the tokenizer's own, of a padded vocabulary
            return b""
        if self.is_special(token_id):
            return str(piece).encode()
        if self._bytes_of_char is not None:
            if all(char in self._bytes_of_char for char in piece):
                return bytes(self._bytes_of_char[char] for char in piece)
            return str(piece).encode()  # an added token
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return str(piece).replace("\u2581", " ").encode()


class Offsets:
    """Where tokens begin in the text that they make up, in characters."""

    def __init__(self, start: int = 0) -> None:
        self._offset = start
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> int:
        """The next token's beginning; a token that goes on with a character begins where that one does."""
        begin = self._offset
        self._offset += len(self._decoder.decode(data))
        return begin

    def extend(self, tokens: Iterable[bytes]) -> list[int]:
        return [self.push(data) for data in tokens]


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    return any(part["type"] == "ByteLevel" for part in [state, *state.get("decoders", [])])


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: a printable Latin-1 character is itself, the others follow from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
