"""Adapters as functions: behind a conversation that the base model has read, one of a few labels and its probability.

A function's adapter is invoked by a user message of its own, the last one, and acts from that message on (the policy
`invocation`). The conversation in front of it is read as the base reads it, so every function finds it in the base's
cache, and a call computes the tokens of the invocation alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from molora.activation import Messages
from molora.generation import MAX_TOP_LOGPROBS, Generation, Sampling
from molora.model import MoLoRA, Route
from molora.serving.request import Request


@dataclass(frozen=True)
class Function:
    """What is asked of an adapter.

    Attributes:
        adapter: its name; or "base", to ask the base model in the same words.
        invocation: the text of the user message that invokes it, as it was trained with.
        labels: what it may answer; each begins with another token.
    """

    adapter: str
    invocation: str
    labels: tuple[str, ...] = ("yes", "no")

    def __post_init__(self) -> None:
        if not self.invocation:
            raise ValueError(
                f"the function {self.adapter!r} has an empty invocation; expected the text that invokes it."
            )
        is_text = isinstance(self.labels, str)  # which would be one label for each letter
        if is_text or len(set(self.labels)) < max(2, len(self.labels)) or not all(self.labels):
            raise ValueError(
                f"the function {self.adapter!r} has labels {self.labels!r}; expected two different ones or more, as a "
                "tuple."
            )

    def behind(self, messages: Messages) -> list[Any]:
        """A conversation with the invocation as its last message."""
        return [*messages, {"role": "user", "content": self.invocation}]


@dataclass(frozen=True)
class Verdict:
    """What a function says of one conversation.

    Attributes:
        labels: the function's.
        probabilities: of each label, against the other ones: of its first token, by the model's own distribution.
        num_prompt_tokens: of the conversation and the invocation together.
        num_reused_tokens: of these, those whose keys and values came from the cache.
        num_computed_tokens: that were computed for it.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    num_prompt_tokens: int
    num_reused_tokens: int
    num_computed_tokens: int

    @property
    def label(self) -> str:
        """The most likely one; the first of equally likely ones."""
        return self.labels[self.probabilities.index(max(self.probabilities))]

    @property
    def score(self) -> float:
        """The probability of the first label."""
        return self.probabilities[0]


@dataclass(frozen=True)
class BestOfN:
    """Several drafts of one answer, and what was said of each.

    Attributes:
        drafts: in the order in which they were drawn.
        verdicts: on each draft; equal drafts have the same one.
        best: index of the draft that was taken.
        num_reused_tokens, num_computed_tokens: of all drafts, and of the verdicts on different ones.
    """

    drafts: tuple[Generation, ...]
    verdicts: tuple[Verdict, ...]
    best: int
    num_reused_tokens: int
    num_computed_tokens: int

    @property
    def text(self) -> str:
        """The draft that was taken."""
        return self.drafts[self.best].text

    @property
    def score(self) -> float:
        """Its score."""
        return self.verdicts[self.best].score


def call(m: MoLoRA, function: Function, messages: Messages) -> Verdict:
    """Ask a function about a conversation.

    Raises:
        ValueError: the bank has no such adapter, two labels begin with the same token, the chat template writes them
            into the prompt, or the adapter's invocation tokens are not those of the function's invocation.
        EngineFullError: the engine is full of others' requests.
    """
    return call_each(m, function, [messages])[0]


def call_each(m: MoLoRA, function: Function, conversations: Sequence[Messages]) -> list[Verdict]:
    """`call` on several conversations at once; each of them is found in the cache as far as it is there by then.

    Raises:
        ValueError: see `call`.
        EngineFullError: the engine is full of others' requests; more conversations than it lets wait are asked about
            bit by bit.
    """
    return _call_each(m, function, _first_ids(m, function), conversations)


def _call_each(
    m: MoLoRA, function: Function, first_ids: Sequence[int], conversations: Sequence[Messages]
) -> list[Verdict]:
    prompts = [function.behind(messages) for messages in conversations]
    sampling = Sampling(max_new_tokens=1, logprobs=MAX_TOP_LOGPROBS)
    outs = m.engine.generate([Request(prompt=each, route=function.adapter, sampling=sampling) for each in prompts])
    found = [dict(_logprob(out).top) for out in outs]
    num_computed = [out.num_computed_tokens for out in outs]
    # What is not among the likeliest tokens is drawn by force, behind the same prompt, for its log-probability alone.
    rare = [(index, token_id) for index, known in enumerate(found) for token_id in first_ids if token_id not in known]
    forced = [
        Request(
            prompt=prompts[index],
            route=function.adapter,
            sampling=Sampling(max_new_tokens=1, logprobs=0, logit_bias={token_id: 1e6}),
        )
        for index, token_id in rare
    ]
    for (index, token_id), out in zip(rare, m.engine.generate(forced), strict=True):
        found[index][token_id] = _logprob(out).logprob
        num_computed[index] += out.num_computed_tokens
    return [
        Verdict(
            labels=function.labels,
            probabilities=_shares([known[token_id] for token_id in first_ids]),
            num_prompt_tokens=out.num_prompt_tokens,
            num_reused_tokens=out.num_reused_tokens,
            num_computed_tokens=computed,
        )
        for out, known, computed in zip(outs, found, num_computed, strict=True)
    ]


def best_of_n(
    m: MoLoRA,
    messages: Messages,
    *,
    check: Function,
    draft: Route = "auto",
    n: int = 4,
    temperature: float = 1.0,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    answer_of: Callable[[str], Hashable] = str.strip,
) -> BestOfN:
    """Draw several answers to a conversation, and pick the one that a function thinks most of.

    The drafts read the conversation once, by their own route. The function reads it as the base does, with a draft
    behind it: once for all drafts, which it then reads one by one.

    Args:
        check: its first label says that an answer is good.
        draft: who drafts: the router, an adapter, a blend or the base.
        n: drafts.
        temperature, seed, max_new_tokens: of the drafts; see `molora.Sampling`.
        answer_of: what a draft's text comes to; drafts of equal answers vote together.

    Raises:
        ValueError: see `call`; or a setting of the drafts is wrong. Raised before anything is drafted.
        EngineFullError: see `call`; the drafts are lost if it comes behind them.
    """
    sampling = Sampling(n=n, temperature=temperature, seed=seed, max_new_tokens=max_new_tokens)
    first_ids = _first_ids(m, check)
    m.activation_start(m.render(check.behind(messages)), check.adapter)
    drafts = m.engine.generate([Request(prompt=messages, route=draft, sampling=sampling)])
    texts = list(dict.fromkeys(out.text for out in drafts))
    answered = [[*messages, {"role": "assistant", "content": text}] for text in texts]
    # The first one alone, so that the others find the conversation even where it fills no block of the cache.
    told = [*_call_each(m, check, first_ids, answered[:1]), *_call_each(m, check, first_ids, answered[1:])]
    verdict_of = dict(zip(texts, told, strict=True))
    verdicts = tuple(verdict_of[out.text] for out in drafts)
    read: list[Generation | Verdict] = [*drafts, *told]
    return BestOfN(
        drafts=tuple(drafts),
        verdicts=verdicts,
        best=vote([answer_of(out.text) for out in drafts], [verdict.score for verdict in verdicts]),
        num_reused_tokens=sum(each.num_reused_tokens for each in read),
        num_computed_tokens=sum(each.num_computed_tokens for each in read),
    )


def vote(answers: Sequence[Hashable], weights: Sequence[float]) -> int:
    """The index of the first draft of the answer with most weight; of equal ones, of that which came first."""
    total: dict[Hashable, float] = defaultdict(float)
    for answer, weight in zip(answers, weights, strict=True):
        total[answer] += weight
    return answers.index(max(total, key=total.__getitem__))


def _first_ids(m: MoLoRA, function: Function) -> list[int]:
    """The token with which each label begins behind a generation prompt."""
    asked = function.behind(())
    prompt = m.render(asked).token_ids
    first_ids = []
    for label in function.labels:
        ids = m.render([*asked, {"role": "assistant", "content": label}]).token_ids
        if ids[: len(prompt)] != prompt:
            raise ValueError(
                "the chat template renders a prompt differently once it is answered; no label has a place."
            )
        first_ids.append(ids[len(prompt)])
    if len(set(first_ids)) < len(first_ids):
        raise ValueError(
            f"labels {function.labels} of the function {function.adapter!r} begin with the same token, so the first "
            "token does not tell them apart; choose others."
        )
    return first_ids


def _logprob(out: Generation) -> Any:
    assert out.logprobs is not None
    return out.logprobs[0]


def _shares(logprobs: Sequence[float]) -> tuple[float, ...]:
    """Their softmax."""
    highest = max(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    return tuple(weight / sum(weights) for weight in weights)
