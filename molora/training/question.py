"""A held-out item of the recipe's, and whether an answer to it is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molora.activation import check_message
from molora.training.examples import encode
from molora.training.recipes import verify, verify_composite


@dataclass(frozen=True)
class Question:
    """One held-out item: the messages to answer, its domains and reference answers in order.

    Attributes:
        labels: the domain of each token of the prompt, as training has them; None where nothing is known.
    """

    messages: list[dict[str, str]]
    domains: tuple[str, ...]
    answers: tuple[str, ...]
    labels: tuple[str | None, ...] = ()

    @classmethod
    def from_record(cls, record: Mapping[str, Any], tokenizer: Any = None) -> Question:
        """
        Raises:
            ValueError: its domain and its answer are not texts, or lists of as many, or it cannot be encoded.
            KeyError: one of them is not there.
        """
        domains, answers = _texts(record, "domain"), _texts(record, "answer")
        if isinstance(record["domain"], str) != isinstance(record["answer"], str) or len(domains) != len(answers):
            raise ValueError(
                f"domain is {record['domain']!r} and answer {record['answer']!r}; expected an answer for each domain."
            )
        if not isinstance(record["messages"], list):
            raise ValueError(f"messages must be a list, not {record['messages']!r}.")
        messages = [check_message(message, index) for index, message in enumerate(record["messages"][:-1])]
        labels: tuple[str | None, ...] = ()
        if tokenizer is not None:
            example = encode({**record, "labels_only": False}, tokenizer)
            labels = example.domains[: example.learned.index(True)]
        return cls(messages, domains, answers, labels)

    def is_right(self, text: str) -> bool:
        return all(self.parts_right(text))

    def parts_right(self, text: str) -> tuple[bool, ...]:
        """For each of its domains, whether its part of the answer is right."""
        if len(self.domains) == 1:
            return (verify(self.domains[0], self.answers[0], text),)
        return tuple(verify_composite(self.domains, self.answers, text))


def _texts(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = record[key]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} is {value!r}; expected a text, or a list of one for each part.")
    return tuple(texts)
