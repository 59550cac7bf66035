"""Answers that a bank's adapters draft to questions, verified: one line of a file for each question, in its order.

A run that is broken off goes on behind the last whole line.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from molora.model import MoLoRA
from molora.training.recipes.tasks import verify

AT_ONCE = 256  # drafts that the engine has; it refuses more
MAX_NEW_TOKENS = 128  # of a draft


class Drafts(TypedDict):
    """The drafts of one question; `logprobs` are means over a draft's tokens."""

    texts: list[str]
    right: list[bool]
    logprobs: list[float]


def draft(
    m: MoLoRA,
    questions: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    num_drafts: int,
    temperature: float,
    seed: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    limit: int | None = None,
) -> list[Drafts]:
    """Draw drafts of each question by the adapter of its domain, and write them to `out`.

    Args:
        questions: records of the recipe, whose `answer` the drafts are verified against.
        limit: only those of the first so many questions; more may be drawn later.

    Raises:
        ValueError: what is in `out` was drawn of other questions, by another bank or with other settings; or the bank
            lacks an adapter.
    """
    head = {
        "questions": sha256(json.dumps(list(questions)).encode()).hexdigest(),
        "adapters": {domain: m.bank[domain].digest for domain in sorted({each["domain"] for each in questions})},
        "num_drafts": num_drafts,
        "temperature": temperature,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
    }
    done = _done(out, head)
    with out.open("a", encoding="utf-8") as file:
        for drawn in _draw(m, questions[len(done) : limit], len(done), head):
            done.append(drawn)
            file.write(json.dumps(drawn) + "\n")
            file.flush()
    return done[:limit]


def _done(out: Path, head: Mapping[str, Any]) -> list[Drafts]:
    """What is there already; a line that was broken off goes."""
    lines = out.read_bytes().split(b"\n")[:-1] if out.is_file() else []
    if lines and json.loads(lines[0]) != head:
        raise ValueError(
            f"{out} holds drafts of other questions, by other adapters or with other settings; move it away, or write "
            "to another folder."
        )
    lines = lines or [json.dumps(head).encode()]
    out.write_bytes(b"".join(line + b"\n" for line in lines))
    return [json.loads(line) for line in lines[1:]]


def _draw(m: MoLoRA, questions: Sequence[Mapping[str, Any]], first: int, head: Mapping[str, Any]) -> Iterator[Drafts]:
    """Of question number `first` and those that follow it."""
    num_drafts = head["num_drafts"]
    running: deque[tuple[Mapping[str, Any], list[Any]]] = deque()
    for number, question in enumerate(questions, first):
        if (len(running) + 1) * num_drafts > AT_ONCE and running:
            yield _verified(*running.popleft())
        streams = [
            m.stream(
                question["messages"][:-1],
                route=question["domain"],
                temperature=head["temperature"],
                seed=(head["seed"] << 32) + number * num_drafts + index,
                max_new_tokens=head["max_new_tokens"],
                logprobs=0,
            )
            for index in range(num_drafts)
        ]
        running.append((question, streams))
    for each in running:
        yield _verified(*each)


def _verified(question: Mapping[str, Any], streams: Sequence[Any]) -> Drafts:
    outs = []
    for stream in streams:
        for _ in stream:
            pass
        outs.append(stream.result)
    return Drafts(
        texts=[out.text for out in outs],
        right=[verify(question["domain"], question["answer"], out.text) for out in outs],
        logprobs=[round(fmean(token.logprob for token in out.logprobs), 4) for out in outs],
    )
