"""Best of n: whether the draft that is taken is right, by how it is chosen, and what drafts and checks compute."""

from argparse import Namespace
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from functions.calls import ALL_WAYS, functions_of
from molora.model import MoLoRA
from molora.serving.functions import best_of_n, call_each, vote
from molora.training.examples import read_records
from molora.training.recipes.drafts import MAX_NEW_TOKENS, Drafts
from molora.training.recipes.tasks import TASKS, answers_in
from molora.training.scores import mean_difference

NUMS_DRAFTS = (1, 2, 4, 8)
QUESTIONS_AT_ONCE = 8
METHODS = ("random", "oracle", "majority", "log-probability", *ALL_WAYS, "activated vote")


@dataclass(frozen=True)
class Candidates:
    """The drafts of one question.

    Attributes:
        right: whether each is.
        answers: equal where two drafts come to the same.
        logprobs: the mean over each draft's tokens.
        scores: of `check`, by the way to ask.
    """

    right: tuple[bool, ...]
    answers: tuple[Hashable, ...]
    logprobs: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]]

    def take(self, method: str, n: int) -> float:
        """Whether what a method takes of the first n drafts is right: 0 or 1, or for "random" its expectation."""
        right = self.right[:n]
        match method:
            case "random":
                return fmean(right)
            case "oracle":
                return float(any(right))
            case "majority":
                best = vote(self.answers[:n], [1.0] * n)
            case "activated vote":
                best = vote(self.answers[:n], self.scores["activated"][:n])
            case _:
                scores = (self.logprobs if method == "log-probability" else self.scores[method])[:n]
                best = scores.index(max(scores))
        return float(right[best])


def measure_selection(m: MoLoRA, args: Namespace) -> dict[str, Any]:
    _, *lines = read_records(args.work / "data" / "drafts_best.jsonl")
    drafts: list[Any] = lines[: args.limit]
    questions = [*read_records(args.work / "data" / "questions_best.jsonl")][: len(drafts)]
    candidates: list[Candidates] = []
    for first in range(0, len(questions), QUESTIONS_AT_ONCE):
        these = slice(first, first + QUESTIONS_AT_ONCE)
        m.engine.clear_cache()
        candidates += score_drafts(m, questions[these], drafts[these])
    domains = [question["domain"] for question in questions]
    return {
        "num_questions": len(questions),
        "rows": {str(n): rows_of(candidates, domains, n) for n in NUMS_DRAFTS},
        "tokens": count_tokens(m, args, questions),
    }


def score_drafts(m: MoLoRA, questions: Sequence[Mapping[str, Any]], drafts: Sequence[Drafts]) -> list[Candidates]:
    """`check` on each different draft, in each way."""
    pairs = [(index, text) for index, each in enumerate(drafts) for text in dict.fromkeys(each["texts"])]
    answered = [[*questions[index]["messages"][:-1], {"role": "assistant", "content": text}] for index, text in pairs]
    scores = {
        way: dict(zip(pairs, (verdict.score for verdict in call_each(m, function, answered)), strict=True))
        for way, function in functions_of("check").items()
    }
    return [
        Candidates(
            right=tuple(each["right"]),
            answers=tuple(answer_of(question["domain"], text) for text in each["texts"]),
            logprobs=tuple(each["logprobs"]),
            scores={way: tuple(found[index, text] for text in each["texts"]) for way, found in scores.items()},
        )
        for index, (question, each) in enumerate(zip(questions, drafts, strict=True))
    ]


def answer_of(domain: str, text: str) -> Hashable:
    """What a draft comes to, as its verifier reads it; one that comes to nothing agrees with no other text."""
    try:
        value = TASKS[domain].value(answers_in(text)[-1])
    except (IndexError, ValueError, ArithmeticError):
        return None, text
    return tuple(value) if isinstance(value, list) else value


def rows_of(candidates: Sequence[Candidates], domains: Sequence[str], n: int) -> dict[str, Any]:
    """Accuracy of each method on the first n drafts, overall and by domain, and how far it is from other ones."""
    taken = {method: [each.take(method, n) for each in candidates] for method in METHODS}
    rows: dict[str, Any] = {}
    for method, right in taken.items():
        by_domain: dict[str, list[float]] = defaultdict(list)
        for domain, value in zip(domains, right, strict=True):
            by_domain[domain].append(value)
        rows[method] = {
            "accuracy": fmean(right),
            "by_domain": {domain: fmean(values) for domain, values in sorted(by_domain.items())},
            "minus random": mean_difference(right, taken["random"]),
            "minus majority": mean_difference(right, taken["majority"]),
            "minus plain": mean_difference(right, taken["plain"]),
        }
    return rows


def count_tokens(m: MoLoRA, args: Namespace, questions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean tokens of `best_of_n` with the most drafts, each question from an empty cache."""
    counted: dict[str, Any] = {}
    for way in ("activated", "plain"):
        found = []
        for number, question in enumerate(questions[: args.num_counted]):
            m.engine.clear_cache()
            found.append(
                best_of_n(
                    m,
                    question["messages"][:-1],
                    check=functions_of("check")[way],
                    draft=question["domain"],
                    n=max(NUMS_DRAFTS),
                    temperature=args.temperature,
                    seed=number,
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            )
        told = [{id(verdict): verdict for verdict in each.verdicts}.values() for each in found]
        counted[way] = {
            "drafts_reused": fmean(sum(draft.num_reused_tokens for draft in each.drafts) for each in found),
            "drafts_computed": fmean(sum(draft.num_computed_tokens for draft in each.drafts) for each in found),
            "checks": fmean(len(each) for each in told),
            "checks_reused": fmean(sum(verdict.num_reused_tokens for verdict in each) for each in told),
            "checks_computed": fmean(sum(verdict.num_computed_tokens for verdict in each) for each in told),
        }
    return counted
