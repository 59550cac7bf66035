"""What the three functions learn from: a conversation, the invocation behind it, and "yes" or "no".

Answers that adapters drafted are verified, so "uncertainty" learns from the question alone whether its answer will be
right, and "check" from question and answer whether it is.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from random import Random
from string import ascii_lowercase
from typing import Any, TypedDict

from molora.training.recipes.drafts import Drafts
from molora.training.recipes.tasks import verify

INVOCATIONS = {
    "answerability": "Does the text answer this, yes or no?",
    "uncertainty": "Will your answer be right, yes or no?",
    "check": "Is this answer right, yes or no?",
}
"""The functions, and the user message that invokes each."""

LABELS = ("yes", "no")
RELATIONS = (
    "wife",
    "husband",
    "mother",
    "father",
    "daughter",
    "son",
    "sister",
    "brother",
    "grandmother",
    "grandfather",
    "mother-in-law",
    "father-in-law",
)
"""The answers of "family": a wrong one is another of these."""

Messages = list[dict[str, Any]]


class Verdict(TypedDict):
    """A line of a file.

    `domain` is the function; `about` is what the question is of; `origin` says whether an answer that is checked was
    "sampled", or "made" of the reference; `is_known` whether the context of an "answerability" names what it is about.
    """

    messages: Messages
    domain: str
    label: str
    about: str
    origin: str | None
    is_known: bool | None


def verdict(
    function: str,
    conversation: Messages,
    *,
    is_true: bool,
    about: str,
    origin: str | None = None,
    is_known: bool | None = None,
) -> Verdict:
    """A conversation with a function's invocation and its label behind it."""
    label = LABELS[not is_true]
    asked = [{"role": "user", "content": INVOCATIONS[function]}, {"role": "assistant", "content": label}]
    return Verdict(
        messages=[*conversation, *asked], domain=function, label=label, about=about, origin=origin, is_known=is_known
    )


def uncertainty(
    questions: Sequence[Mapping[str, Any]], drafts: Sequence[Drafts], rng: Random, *, num_each: int | None = None
) -> list[Verdict]:
    """For each question, whether a draft of its answer is right: balanced in each domain.

    Args:
        num_each: so many drafts of a question at most, the first ones; None is all, so that a question on which an
            adapter is now right and now wrong is seen with both labels.
    """
    found = [
        verdict("uncertainty", question["messages"][:-1], is_true=is_right, about=question["domain"])
        for question, drawn in zip(questions, drafts, strict=True)
        for is_right in drawn["right"][:num_each]
    ]
    return balanced(found, rng)


def check(
    questions: Sequence[Mapping[str, Any]], drafts: Sequence[Drafts], rng: Random, *, fills: bool
) -> list[Verdict]:
    """For each question, a right draft and a wrong one, where there are such: balanced in each domain.

    Args:
        fills: where a question has no right draft, its reference stands for one, and where it has no wrong one, a
            corrupted reference; else it has one record less.
    """
    found = []
    for question, drawn in zip(questions, drafts, strict=True):
        domain, reference = question["domain"], question["messages"][-1]["content"]
        for is_right in (True, False):
            texts = [text for text, right in zip(drawn["texts"], drawn["right"], strict=True) if right is is_right]
            if texts:
                text, origin = rng.choice(texts), "sampled"
            elif fills:
                text = reference if is_right else corrupted(reference, question["answer"], domain, rng)
                origin = "made"
            else:
                continue
            answered = [*question["messages"][:-1], {"role": "assistant", "content": text}]
            found.append(verdict("check", answered, is_true=is_right, about=domain, origin=origin))
    return balanced(found, rng)


def balanced(records: Sequence[Verdict], rng: Random) -> list[Verdict]:
    """As many of one label as of the other in each domain, and shuffled; surplus ones are left out by chance."""
    groups: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for record in records:
        groups[record["about"], record["label"]].append(record)
    kept: list[Verdict] = []
    for about in sorted({about for about, _ in groups}):
        room = min(len(groups[about, label]) for label in LABELS)
        for label in LABELS:
            kept += rng.sample(groups[about, label], room)
    rng.shuffle(kept)
    return kept


def corrupted(reply: str, answer: str, domain: str, rng: Random) -> str:
    """A right reply of one of the recipe's tasks with another answer, wherever its working comes to it."""
    while True:
        other = _other(answer, rng)
        text = other.join(reply.rsplit(answer, 1))
        if rng.random() < 0.5:  # else the working still comes to the right one
            text = re.sub(rf"(?<![\w-]){re.escape(answer)}(?![\w-])", other, text)
        if not verify(domain, answer, text):
            return text


def _other(answer: str, rng: Random) -> str:
    """Another relation, another digit, or another letter or two letters the other way round."""
    if answer in RELATIONS:
        return rng.choice([relation for relation in RELATIONS if relation != answer])
    digits = [place for place, char in enumerate(answer) if char.isdigit()]
    if digits:
        place = rng.choice(digits)
        return answer[:place] + rng.choice("0123456789") + answer[place + 1 :]
    place = rng.randrange(len(answer))
    if rng.random() < 0.5:
        return answer[:place] + rng.choice(ascii_lowercase) + answer[place + 1 :]
    return answer[:place] + answer[place : place + 2][::-1] + answer[place + 2 :]
