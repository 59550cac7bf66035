"""Accuracy of answers, and differences between two ways to answer the same items."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from molora.training.question import Question


def score(questions: Sequence[Question], is_right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy over all and by domain, and who is right, item by item."""
    right, total = Counter[str](), Counter[str]()
    for question, yes in zip(questions, is_right, strict=True):
        domain = question.domains[0] if len(question.domains) == 1 else "composite"
        total[domain] += 1
        right[domain] += yes
    return {
        "accuracy": right.total() / total.total(),
        "by_domain": {domain: right[domain] / total[domain] for domain in sorted(total)},
        "by_item": "".join(str(int(yes)) for yes in is_right),
    }


def score_answers(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, Any]:
    """`score` of their answers, as the verifiers read them."""
    return score(questions, [question.is_right(text) for question, text in zip(questions, texts, strict=True)])


def best_single(figures: Sequence[str]) -> str:
    """Where at least one of several adapters, each alone for the whole sequence, is right: an oracle's choice."""
    return "".join(max(digits) for digits in zip(*figures, strict=True))


def paired_difference(ours: str, theirs: str) -> dict[str, float]:
    """`mean_difference` of two ways' `by_item`."""
    return mean_difference([*map(int, ours)], [*map(int, theirs)])


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Mean difference of two ways on the same items, and its 95% interval (normal, over items)."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.pstdev(differences) / math.sqrt(len(differences))
    return {"difference": mean, "low": mean - half, "high": mean + half}
