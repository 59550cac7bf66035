"""Log-probabilities in the shapes of OpenAI's two APIs and of vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from molora.generation import Token, TokenLogprob, TokenRoute
from molora.serving.protocol import PromptLogprob, PromptLogprobs, WithoutRoutes
from molora.serving.token_text import Offsets, TokenTexts

LEAST = -9999.0  # stands for the logarithm of 0, which JSON cannot say; vLLM's value


class TokenReport(BaseModel):
    """The extension field `route` of an entry: the adapters that produced a token, and the router's two best."""

    adapters: TokenRoute
    candidates: list[tuple[str, float]]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class LogprobEntry(WithoutRoutes, TopLogprob):
    """One token of a chat answer. `route` is there if `return_routes` asked for it."""

    top_logprobs: list[TopLogprob]
    route: TokenReport | None = None


class ChatLogprobs(BaseModel):
    content: list[LogprobEntry]
    refusal: None = None


class TextLogprobs(WithoutRoutes):
    """The tokens of a plain completion. The first token of an echoed prompt has null: nothing predicts it.

    `top_logprobs` holds the token itself too, so it may have one entry more than was asked for. `routes` is there if
    `return_routes` asked for it.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    routes: list[TokenReport | None] | None = None


def token_report(token: Token) -> TokenReport:
    return TokenReport(adapters=token.route, candidates=list(token.candidates))


def chat_entry(token: Token, texts: TokenTexts, *, with_route: bool) -> LogprobEntry:
    assert token.logprob is not None
    return LogprobEntry(
        **_named(texts, token.id, token.logprob.logprob),
        top_logprobs=[TopLogprob(**_named(texts, *pair)) for pair in token.logprob.top],
        route=token_report(token) if with_route else None,
    )


def text_logprobs(
    entries: Sequence[TokenLogprob | None],
    ids: Sequence[int],
    widths: Sequence[bytes],
    texts: TokenTexts,
    offsets: Offsets,
    *,
    num_top: int,
    routes: list[TokenReport | None] | None,
) -> TextLogprobs:
    """
    Args:
        entries: for each of `ids`; None where nothing predicts it.
        widths: the bytes that each token adds to the text; none for a special token that is not shown.
        offsets: is moved on past these tokens.
    """
    return TextLogprobs(
        tokens=[texts.to_text(token_id) for token_id in ids],
        token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in entries],
        top_logprobs=[None if entry is None else _top(entry, texts, num_top) for entry in entries],
        text_offset=offsets.extend(widths),
        routes=routes,
    )


def prompt_entries(
    logprobs: Sequence[TokenLogprob | None] | None, texts: TokenTexts, *, num_top: int
) -> PromptLogprobs | None:
    """vLLM's `prompt_logprobs`."""
    return None if logprobs is None else [_prompt_entry(entry, texts, num_top) for entry in logprobs]


def _prompt_entry(entry: TokenLogprob | None, texts: TokenTexts, num_top: int) -> dict[str, PromptLogprob] | None:
    if entry is None:
        return None
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, start=1)}
    pairs = dict([(entry.token_id, entry.logprob), *entry.top[:num_top]])
    return {
        str(token_id): PromptLogprob(
            logprob=_finite(logprob), rank=ranks.get(token_id), decoded_token=texts.to_text(token_id)
        )
        for token_id, logprob in pairs.items()
    }


def _top(entry: TokenLogprob, texts: TokenTexts, num_top: int) -> dict[str, float]:
    """Best first. Of two tokens that are written alike, the better one stays."""
    top: dict[str, float] = {}
    for token_id, logprob in [*entry.top[:num_top], (entry.token_id, entry.logprob)]:
        top.setdefault(texts.to_text(token_id), _finite(logprob))
    return top


def _named(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": texts.to_text(token_id), "logprob": _finite(logprob), "bytes": list(texts.to_bytes(token_id))}


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST
