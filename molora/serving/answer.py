"""One answer while it is written: its tokens, their text and routes, and what ends it."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast

from molora.generation import FinishReason, Generation, Sampling, Token, TokenLogprob, TokenRoute
from molora.serving.notes import Notes
from molora.serving.runner import Drawn
from molora.serving.sampling import Draw, uniform
from molora.serving.scheduler import Sequence
from molora.serving.stream import Stream
from molora.serving.text import Decode, TextStream
from molora.slots import Hold, ResolvedRoute

if TYPE_CHECKING:
    from torch import Tensor


class Matcher(Protocol):
    """What an answer must match, as far as it has come."""

    @property
    def is_finished(self) -> bool: ...

    def bitmask(self) -> Tensor: ...

    def accept(self, token_id: int) -> None: ...


@dataclass(eq=False)
class Answer:
    """
    Attributes:
        index: which of its request's n answers it is.
        tokens: the prompt's and its own, as the scheduler knows them.
        hold: what its route may use; None for base.
        eos_ids: the model's end tokens, unless they are to be ignored.
        matcher: what it must match; None if anything goes.
        decode: the tokenizer's.
        finish_reason: what ended it; None while it is written.
    """

    stream: Stream
    index: int
    tokens: Sequence
    route: ResolvedRoute
    hold: Hold | None
    activation_start: int
    sampling: Sampling
    seed: int
    eos_ids: Collection[int]
    matcher: Matcher | None
    decode: Decode
    finish_reason: FinishReason | None = field(default=None, init=False)
    num_computed: int = field(default=0, init=False)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens.token_ids)
        depends = self.sampling.temperature or self.sampling.is_penalized or self.matcher is not None
        self._plain = None if depends else Draw(self.sampling, (), (), 0.0)  # the same for each token
        self.place = -1  # of its draw among those of the last step that it was in
        self._text = TextStream(self.decode, self.sampling.stop)
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._submitted_s = time.monotonic()
        self._begun_s = self._first_token_s = self._finished_s = 0.0

    @property
    def num_generated(self) -> int:
        return len(self.tokens.token_ids) - self.num_prompt_tokens

    @property
    def num_reused(self) -> int:
        """Prompt tokens that were found. Of a prompt that was found whole, the last one runs again for its logits."""
        return min(self.tokens.num_cached, self.num_prompt_tokens - 1)

    @property
    def routes(self) -> Notes[TokenRoute]:
        """Of each token that was found or computed, by digests."""
        return cast("Notes[TokenRoute]", self.tokens.notes)

    def begun(self) -> None:
        """It is part of a step."""
        if not self._begun_s:
            self._begun_s = time.monotonic()

    def draw(self, num_ahead: int = 0) -> Draw:
        """What its next token is chosen by, or the one `num_ahead` tokens later."""
        if self._plain is not None:
            return self._plain
        ids, num_prompt, penalized = self.tokens.token_ids, self.num_prompt_tokens, self.sampling.is_penalized
        return Draw(
            self.sampling,
            ids[:num_prompt] if penalized else (),
            ids[num_prompt:] if penalized else (),
            uniform(self.seed, self.index, self.num_generated + num_ahead) if self.sampling.temperature else 0.0,
            None if self.matcher is None else self.matcher.bitmask(),
        )

    def push(self, drawn: Drawn) -> Token:
        """The next token was drawn, on a route that is the last of `routes`."""
        token_id = drawn.token_id
        if not self.num_generated:
            self._first_token_s = time.monotonic()
        self.tokens.token_ids.append(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)
        reason = self._finish_reason(token_id)
        piece = self._text.push(token_id, last=reason is not None)
        if self._text.stopped:
            reason = "stop"
        self._pieces.append(piece)
        if drawn.logprob is not None:
            self._logprobs.append(drawn.logprob)
        route = self._name(self.routes.last)
        return Token(token_id, piece, route, self.index, drawn.candidates, drawn.logprob, reason)

    def finish(self, reason: FinishReason) -> None:
        self._finished_s = time.monotonic()
        self.finish_reason = reason

    @cached_property
    def result(self) -> Generation:
        """What came of it, once it is finished. It is as long as the prompt, so whoever asks for it makes it."""
        assert self.finish_reason is not None
        tokens, num_prompt = self.tokens, self.num_prompt_tokens
        asked = self.sampling.prompt_logprobs is not None and self.index == 0
        return Generation(
            text="".join(self._pieces),
            token_ids=[*self.stream.prompt_ids, *tokens.token_ids[num_prompt:]],
            routes=[*self._named(len(tokens.token_ids) - 1), ()],
            num_prompt_tokens=num_prompt,
            num_generated_tokens=self.num_generated,
            activation_start=None if self.route.is_base else self.activation_start,
            num_reused_tokens=self.num_reused,
            num_computed_tokens=self.num_computed,
            num_recomputed_tokens=tokens.num_recomputed,
            num_reencoded_tokens=tokens.num_reencoded,
            finish_reason=self.finish_reason,
            num_replayed_tokens=tokens.num_replayed,
            choice=self.index,
            logprobs=None if self.sampling.logprobs is None else self._logprobs,
            prompt_logprobs=[None, *self.prompt_logprobs] if asked else None,
            queue_s=self._begun_s - self._submitted_s,
            first_token_s=self._first_token_s - self._submitted_s,
            total_s=self._finished_s - self._submitted_s,
        )

    def _name(self, route: TokenRoute) -> TokenRoute:
        return self.hold.name(route) if route and self.hold is not None else ()

    def _named(self, num_tokens: int) -> list[TokenRoute]:
        """The routes of the first tokens; those before activation are base."""
        num_base = min(num_tokens, self.activation_start)
        return [()] * num_base + [self._name(route) for route in self.routes[num_base:num_tokens]]

    def _finish_reason(self, token_id: int) -> FinishReason | None:
        if token_id in self.eos_ids or token_id in self.sampling.stop_token_ids:
            return "stop"
        if self.matcher is not None and self.matcher.is_finished:
            return "stop"
        return "length" if len(self.tokens.token_ids) == self.tokens.max_tokens else None
