"""What a task asks, whatever its wording, and the phrases that several tasks' facts and workings share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Entry = dict[str, Any]  # what a reasoning-gym generator makes


@dataclass(frozen=True)
class Item:
    """One thing to ask.

    Attributes:
        key: equal for two items that ask the same, whatever their wording or order.
        facts: what fills the braces of the domain's wordings.
        working: one line that leads to the answer, or nothing.
        answer: the right answer.
        is_common: whether it may be asked outside of training.
    """

    key: str
    facts: Mapping[str, str]
    working: str
    answer: str
    is_common: bool = True

    @property
    def reply(self) -> str:
        return "\n".join(filter(None, (self.working, f"Answer: {self.answer}")))


def listed(texts: Sequence[str]) -> str:
    """'a, b and c'"""
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def sums(first: str, signed: Sequence[str]) -> str:
    """Each step in turn: '8', ['+18', '-4'] gives '8 + 18 = 26. 26 - 4 = 22.'"""
    steps, total = [], int(first)
    for term in signed:
        steps.append(f"{total} {term[0]} {term[1:]} = {total + int(term)}.")
        total += int(term)
    return " ".join(steps)


def list_forms(numbers: Sequence[str]) -> dict[str, str]:
    """A list of numbers in each of the forms that wordings ask for."""
    commas = ", ".join(numbers)
    return {
        "commas": commas,
        "spaces": " ".join(numbers),
        "brackets": f"[{commas}]",
        "semicolons": "; ".join(numbers),
        "lines": "\n".join(numbers),
        "bullets": "\n".join(f"- {number}" for number in numbers),
        "prose": listed(numbers),
    }
