"""Measuring a bank by verified answers: molora eval BANK --data FILE --out FILE

Each row of the result is one way to route the same items: base, each adapter for everything, all of them at once, the
right ones given, and the learned router. Answers are greedy, and checked by the recipe's verifiers. Plots beside it
show what the router does token by token.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

import molora
from molora.activation import Activation
from molora.benchmark import source_commit
from molora.files import write_atomic
from molora.generation import Generation
from molora.model import MoLoRA, Route
from molora.router import KeyRouter
from molora.training.examples import encode, read_records
from molora.training.given import answer_as_given
from molora.training.plots import draw, png
from molora.training.question import Question
from molora.training.recipes.tasks import TASKS
from molora.training.route_page import RoutedExample, route_page
from molora.training.router_report import column_names, routed_tokens, router_scores, router_statistics
from molora.training.scores import best_single, paired_difference, score, score_answers

MAX_NEW_TOKENS = 192  # of an answer; those of three tasks take up to 171
AT_ONCE = 256  # questions that the engine has; it refuses more
NUM_EXAMPLES = 6  # of each kind that are shown with their routes


def answer(
    m: MoLoRA,
    questions: Sequence[Question],
    routes: Sequence[Route],
    *,
    max_new_tokens: int,
    activations: Sequence[Activation | None] | None = None,
) -> list[str]:
    """Greedy answers on the model's engine.

    Args:
        activations: where each question is activated; None is by its route's own policy.
    """
    outs = generate(m, questions, routes, max_new_tokens=max_new_tokens, activations=activations)
    return [out.text for out in outs]


def generate(
    m: MoLoRA,
    questions: Sequence[Question],
    routes: Sequence[Route],
    *,
    max_new_tokens: int,
    activations: Sequence[Activation | None] | None = None,
) -> list[Generation]:
    """`answer`, with all that is known of how each answer came about."""
    outs: list[Generation] = []
    running: deque[Any] = deque()

    def finish() -> None:
        stream = running.popleft()
        for _ in stream:
            pass
        outs.append(stream.result)

    for question, route, activation in zip(questions, routes, activations or repeat(None), strict=False):
        if len(running) == AT_ONCE:
            finish()
        running.append(m.stream(question.messages, route=route, activation=activation, max_new_tokens=max_new_tokens))
    while running:
        finish()
    return outs


def routes_by_sequence(m: MoLoRA, questions: Sequence[Question], *, batch_size: int = 256) -> list[Route]:
    """One route for each whole question: the router's column with most probability over the user's turn."""
    names, prompts = column_names(m), [m.render(question.messages) for question in questions]
    starts = [prompt.starts.get("turn", 0) for prompt in prompts]
    scores = router_scores(m, [prompt.token_ids for prompt in prompts], starts, batch_size=batch_size)
    shares = (scores_TC[start:].softmax(-1).sum(0) for start, scores_TC in zip(starts, scores, strict=True))
    return [names[column] for column in torch.stack([*shares]).argmax(-1).tolist()]


def evaluate(
    m: MoLoRA,
    questions: Sequence[Question],
    ways: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    activations: Sequence[Activation | None] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Accuracy of each way to route, over all questions and by domain, one way after another.

    `by_item` has a digit for each question, 1 where its answer is right, so that ways can be compared in pairs.

    Args:
        ways: "base", "auto", an adapter's name; "given", the right adapter on every token; "sequence", one adapter for
            the whole question, by the router; "uniform", all adapters at once in equal shares.
        activations: where each question is activated; None is by its route's own policy. "given" takes that where a
            question has several parts.
    """
    for way in ways:
        texts = _answers(m, questions, way, max_new_tokens, activations)
        yield way, score_answers(questions, texts)


def _answers(
    m: MoLoRA,
    questions: Sequence[Question],
    way: str,
    max_new_tokens: int,
    activations: Sequence[Activation | None] | None,
) -> list[str]:
    routes: list[Route]
    match way:
        case "given":
            if any(len(question.domains) > 1 for question in questions):
                return answer_as_given(m, questions, max_new_tokens=max_new_tokens)
            known = {entry.name for entry in m.bank.adapters}  # what none of them answers is base's
            routes = [domain if (domain := question.domains[0]) in known else "base" for question in questions]
        case "sequence":
            routes = routes_by_sequence(m, questions)
        case "uniform":
            names = [entry.name for entry in m.bank.adapters]
            routes = [{name: 1 / len(names) for name in names}] * len(questions)
        case _:
            routes = [way] * len(questions)
    return answer(m, questions, routes, max_new_tokens=max_new_tokens, activations=activations)


def measure_bank(
    m: MoLoRA,
    data: str,
    out: Path,
    *,
    ways: Sequence[str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    limit: int | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Every way's figures on the items of a file, written as JSON after each way.

    Where the router is one of the ways, and tokens have labels, its statistics on the items and their reference answers
    are among the figures; the folder `<out>.plots` gets them as plots, and a page of example routes.

    Args:
        data: held-out items, a .jsonl file of the recipes.
        ways: see `evaluate`; all of them if None.
        limit: only the first so many items.
        command: what made the file, for whoever reads it.

    Raises:
        ValueError: nothing in the data can be verified, or a record is malformed or too long; the message names it.
    """
    # What no adapter answers has no verifier either.
    verified = [record for record in read_records(data) if record.get("domain") is not None][:limit]
    if not verified:
        raise ValueError(f"no record of {data} has a domain, so nothing there can be verified.")
    names = [entry.name for entry in m.bank.adapters]
    questions = _questions(verified, data, m, max_new_tokens)
    unknown = sorted({*(ways or ())} - {"base", "auto", "given", "sequence", "uniform", *names})
    if unknown:
        raise ValueError(f"unknown ways {unknown}; expected base, auto, given, sequence, uniform or one of {names}.")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; expected a file to write.")
    has_keys = isinstance(m.decoder.router, KeyRouter)
    if "sequence" in (ways or ()) and not has_keys:
        raise ValueError("way 'sequence' asks the scores of a router, and this bank has none that gives any.")
    if "uniform" in (ways or ()) and not names:
        raise ValueError("way 'uniform' blends adapters, and this bank has none.")
    routed = [way for way, applies in (("sequence", has_keys), ("auto", m.bank.has_router)) if applies]
    ways = ways or ["base", *names, *(["uniform"] if names else []), "given", *routed]
    results: dict[str, Any] = {}
    figures = source(m, data, command) | {"num_items": len(questions), "results": results}
    for way, figure in evaluate(m, questions, ways, max_new_tokens=max_new_tokens):
        results[way] = figure
        alone = [results[name]["by_item"] for name in names if name in results]
        if names and len(alone) == len(names) and "best single" not in results:
            results["best single"] = score(questions, [digit == "1" for digit in best_single(alone)])
        if "auto" in results:
            for other in results.values():
                other["auto_minus_this"] = paired_difference(results["auto"]["by_item"], other["by_item"])
        print(f"{way:>12}  {figure['accuracy']:.3f}  {figure['by_domain']}", flush=True)
        write_atomic(out, json.dumps(figures, indent=2) + "\n")  # a long run that breaks off keeps what it has
    if "auto" in ways and isinstance(m.decoder.router, KeyRouter):
        starts = [m.activation_start(m.render(question.messages)) for question in questions]
        statistics = router_statistics(m, [encode(record, m.tokenizer) for record in verified], starts)
        if statistics.num_tokens:
            figures["router"] = statistics.to_json(column_names(m))
            write_atomic(out, json.dumps(figures, indent=2) + "\n")
            folder = out.with_name(f"{out.name}.plots")
            for name, plot in draw(statistics, column_names(m)).items():
                write_atomic(folder / f"{name}.png", png(plot))
            write_atomic(folder / "routes.html", _route_page(m, questions, max_new_tokens))
            print(f"plots and example routes are in {folder}", flush=True)
    return figures


def _route_page(m: MoLoRA, questions: Sequence[Question], max_new_tokens: int) -> str:
    """A few questions of each kind, of as many domains as there are."""
    seen, rounds = Counter[tuple[str, ...]](), list[int]()
    for question in questions:
        rounds.append(seen[question.domains])
        seen[question.domains] += 1
    various = [question for _, question in sorted(zip(rounds, questions, strict=True), key=lambda pair: pair[0])]
    kinds = {
        "One task": [question for question in various if len(question.domains) == 1],
        "Several tasks": [question for question in various if len(question.domains) > 1],
    }
    examples = {kind: _examples(m, each[:NUM_EXAMPLES], max_new_tokens) for kind, each in kinds.items()}
    return route_page(f"Routes of {m.bank.name}", column_names(m)[1:], examples)


def _examples(m: MoLoRA, questions: Sequence[Question], max_new_tokens: int) -> list[RoutedExample]:
    outs = generate(m, questions, ["auto"] * len(questions), max_new_tokens=max_new_tokens)
    turns = [m.render(question.messages).starts.get("turn", 0) for question in questions]
    return [
        RoutedExample(question.domains, question.answers, question.parts_right(out.text), *routed_tokens(m, out, turn))
        for question, out, turn in zip(questions, outs, turns, strict=True)
    ]


def _questions(records: Sequence[Mapping[str, Any]], data: str, m: MoLoRA, max_new_tokens: int) -> list[Question]:
    questions: list[Question] = []
    for number, record in enumerate(records, 1):
        try:
            question = Question.from_record(record, m.tokenizer)
            m.check_lengths(m.render(question.messages), max_new_tokens)
        except KeyError as error:
            raise ValueError(f"{data}, verifiable record {number} has no {error}; expected held-out items.") from None
        except ValueError as error:
            raise ValueError(f"{data}, verifiable record {number}: {error}") from None
        strange = sorted(set(question.domains) - set(TASKS))
        if strange or not question.domains:
            raise ValueError(f"{data}, verifiable record {number}: no verifier for {strange}; there are {list(TASKS)}.")
        questions.append(question)
    return questions


def source(m: MoLoRA, data: str, command: str) -> dict[str, Any]:
    """Where figures come from; asked for before the run, since a checkout may move on while it lasts."""
    router = m.bank.config.router
    return {
        "command": command,
        "data": data,
        "bank": {"name": m.bank.name, "router": None if router is None else router.digest},
        "environment": environment(m),
    }


def environment(m: MoLoRA) -> dict[str, str]:
    """What a figure was measured with: device, dtype, versions, commit."""
    import transformers

    device = m.decoder.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(m.model.dtype).removeprefix("torch."),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "molora": molora.__version__,
        "commit": source_commit() or "unknown",
    }
