"""What is asked of a generation, and what comes of it. It imports no torch and knows nothing of how tokens are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

FinishReason = Literal["stop", "length"]
TokenRoute = tuple[tuple[str, float], ...]
"""The adapters that acted on one token, by name, and their gates; empty where the base model ran alone."""

MAX_TOP_LOGPROBS = 20
MAX_CHANGE = 1e6  # of a logit, by biases and penalties


@dataclass(frozen=True)
class Grammar:
    """What an answer must match, from its first character to its last.

    A regular expression means what it does in Python with `re.ASCII`, without look-around, backreferences and `\\b`;
    where llguidance, which follows it, has another syntax (that of Rust's `regex`), it is refused. Only the flag i goes
    further: it joins letters beyond ASCII as well.
    A schema is JSON Schema, and refused where it asks for something that cannot be enforced. Objects that name
    properties have no others, unless `additionalProperties` says so; properties come in the order of the schema, and
    there are at most 24 spaces or line breaks in a row.

    Attributes:
        kind: "json_schema" (text is the schema as JSON), "json_object" (any object; no text) or "regex".
        text: the schema or the expression.
    """

    kind: Literal["json_schema", "json_object", "regex"]
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and where an answer ends.

    The draw of an answer's token t depends only on (seed, the answer's index among n, t) and the logits: never on what
    else runs, how the prompt was cut, or whether the sequence was computed again.

    Attributes:
        max_new_tokens: the answer's length at most; None is the engine's default, or what the context has room for.
        temperature: 0 is greedy, ties to the lowest id; else logits are divided by it, after all that follows but the
            three filters.
        top_k: only the k most likely tokens; 0 is all.
        top_p: of what top_k leaves, only the fewest most likely tokens whose probabilities reach p.
        min_p: only tokens with at least this share of the most likely one's probability.
        seed: None draws one.
        repetition_penalty: divides positive logits of tokens that stand in the prompt or the answer, and multiplies
            negative ones (arXiv 1909.05858).
        presence_penalty, frequency_penalty: are subtracted from the logits of the answer's tokens, once and once for
            each occurrence (OpenAI's definition).
        logit_bias: is added to the logits of these token ids.
        stop: the answer ends before the first of these strings.
        stop_token_ids: the answer ends at the first of these tokens.
        ignore_eos: the model's own end tokens do not end the answer.
        n: answers to the same prompt; it is read once.
        logprobs: report each answer token's log-probability and those of this many most likely ones; they are of the
            model's own distribution, before penalties, temperature and filters. None reports nothing.
        prompt_logprobs: the same for the prompt's tokens, from the second on; such a prompt is read without the cache.
        grammar: the answer matches it.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def is_penalized(self) -> bool:
        """Whether what was said before changes what may be said next."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} is {value!r}; expected a whole number.")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_TOP_LOGPROBS:
                raise ValueError(f"{name} is {value}; expected 0 to {MAX_TOP_LOGPROBS}.")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            if not isinstance(value := getattr(self, name), Real):
                raise ValueError(f"{name} is {value!r}; expected a number.")
        for name, low, high in (
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -MAX_CHANGE, MAX_CHANGE),
            ("frequency_penalty", -MAX_CHANGE, MAX_CHANGE),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; expected a number from {low:g} to {high:g}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0 and at most 1.")
        if not 1 / MAX_CHANGE <= self.repetition_penalty <= MAX_CHANGE:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; expected a number from {1 / MAX_CHANGE:g} to "
                f"{MAX_CHANGE:g} (1 is none)."
            )
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}; expected a whole number of 64 bits.")
        if self.n < 1:
            raise ValueError(f"n is {self.n}; expected 1 or more.")
        if isinstance(self.stop, str) or any(not isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; expected a sequence of strings, such as (',',).")
        if any(not text for text in self.stop):
            raise ValueError("stop has an empty string, which would end every answer at once.")
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
                raise ValueError(f"{name} has token ids that are no whole numbers.")
        if any(not abs(bias) <= MAX_CHANGE for bias in self.logit_bias.values()):
            raise ValueError(f"logit_bias has a number beyond {MAX_CHANGE:g}, or none.")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and the most likely tokens at its place, best first, as (id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        id: its id.
        text: what it completes: empty inside a character, or while it may be the beginning of a stop string.
        route: who produced it.
        choice: which of the request's n answers it belongs to.
        candidates: the router's two most likely choices there, best first, as (adapter's name or "base", probability);
            empty where no router ran.
        logprob: if it was asked for.
        finish_reason: of the answer's last token; None before.
    """

    id: int
    text: str
    route: TokenRoute
    choice: int = 0
    candidates: tuple[tuple[str, float], ...] = ()
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        text: what was generated, without the prompt and without special tokens.
        token_ids: the prompt's ids and then the generated ones, a sampled end token included.
        routes: for each of `token_ids`, the (adapter name, gate) pairs that acted on it *as input*; () is base. The
            last sampled token was never an input and has (). The route that produced token t is `routes[t - 1]`.
        num_prompt_tokens, num_generated_tokens: they add up to `len(token_ids)`.
        activation_start: index of the first token on which adapters could act; None if the base ran alone.
        num_reused_tokens: prompt tokens whose keys and values came from the cache.
        num_computed_tokens: rows that entered layer 0: prompt - reused + generated - 1, and what preemption repeats,
            but not one that was computed ahead and thrown away.
        num_recomputed_tokens: base tokens that were computed although a whole block that held them could be found: 0.
            (Where no block is free to copy into, up to a block of the last ones is computed and not counted here.)
        num_reencoded_tokens: tokens that an earlier request computed as active and this one once as base.
        num_replayed_tokens: tokens computed again because the sequence had to give up its memory for a while.
        finish_reason: "stop" at an end token, a stop string or the grammar's end; "length" at the most tokens allowed.
        choice: which of the request's n answers it is.
        logprobs: of the generated tokens, if asked for.
        prompt_logprobs: of the prompt's tokens, if asked for; None for the first one, which nothing predicts.
        queue_s, first_token_s, total_s: seconds from the submission to the first step, the first token and the end.
    """

    text: str
    token_ids: list[int]
    routes: list[TokenRoute]
    num_prompt_tokens: int
    num_generated_tokens: int
    activation_start: int | None
    num_reused_tokens: int
    num_computed_tokens: int
    num_recomputed_tokens: int
    num_reencoded_tokens: int
    finish_reason: FinishReason
    num_replayed_tokens: int = 0
    choice: int = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0

    @property
    def generated_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def generated_routes(self) -> list[TokenRoute]:
        """For each generated token, the route that produced it."""
        return self.routes[self.num_prompt_tokens - 1 : -1]
