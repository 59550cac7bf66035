"""Token ids become text as they come, and the text ends before a stop string. It knows a tokenizer's `decode` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

Decode = Callable[[list[int]], str]


def decode_of(tokenizer: Any) -> Decode:
    """A tokenizer's `decode` without special tokens; where it does no more than its compiled part, that part's own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "clean_up_tokenization_spaces", True):
        return partial(tokenizer.decode, skip_special_tokens=True)
    return partial(backend.decode, skip_special_tokens=True)


class TextStream:
    """The text of one answer.

    Attributes:
        stopped: a stop string was met; the text before it is all there is.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._num_shown = 0  # characters of the text of these ids that were passed on
        self._held = ""  # it may be the beginning of a stop string

    def push(self, token_id: int, *, last: bool = False) -> str:
        """The text that a token completes: none inside a character, or where a stop string may have begun.

        Args:
            last: no more will come, so that nothing is held back.
        """
        piece = self._complete(token_id, last)
        return self._before_stop(piece, last) if self._stop else piece

    def _complete(self, token_id: int, last: bool) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and not last:
            return ""
        piece, self._num_shown = text[self._num_shown :], len(text)
        # Some tokenizers glue a word to the one before it: keep a few ids as context and forget the rest.
        if len(self._ids) > 10:
            self._ids = self._ids[-5:]
            self._num_shown = len(self._decode(self._ids))
        return piece

    def _before_stop(self, piece: str, last: bool) -> str:
        text = self._held + piece
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        num_held = 0 if last else max(_count_begun(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _count_begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
