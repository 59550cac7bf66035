"""Measuring a bank by verified answers: python -m molora.training.evaluate --bank DIR --data FILE --out FILE

Each row of the result is one way to route the same items: base, each adapter for everything, routes given by hand
(each item's own adapter), and the learned router. Answers are decoded greedily in batches and checked by the
recipe's verifiers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import molora
from molora.activation import check_message
from molora.benchmark import source_commit
from molora.files import write_atomic
from molora.model import MoLoRA, Route
from molora.training.examples import read_records
from molora.training.recipes import verify, verify_composite


@dataclass(frozen=True)
class Question:
    """One held-out item: the messages to answer, its domains and reference answers in order."""

    messages: list[dict[str, str]]
    domains: tuple[str, ...]
    answers: tuple[str, ...]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Question:
        messages = [check_message(message, index) for index, message in enumerate(record["messages"][:-1])]
        single = isinstance(record["domain"], str)
        domains = (record["domain"],) if single else tuple(record["domain"])
        return cls(messages, domains, (record["answer"],) if single else tuple(record["answer"]))

    def is_right(self, text: str) -> bool:
        if len(self.domains) == 1:
            return verify(self.domains[0], self.answers[0], text)
        return all(verify_composite(self.domains, self.answers, text))


@torch.inference_mode()
def answer(
    m: MoLoRA, questions: Sequence[Question], routes: Sequence[Route], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers in left-padded batches, each question activated by its route's own policy."""
    prompts = [m.render(question.messages) for question in questions]
    starts = [m.activation_start(prompt, route) for prompt, route in zip(prompts, routes, strict=True)]
    texts = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i].token_ids))
    for batch in _chunks(order, batch_size):
        width = max(len(prompts[i].token_ids) for i in batch)
        input_ids = torch.full((len(batch), width), m.tokenizer.pad_token_id, device=m.decoder.device)
        mask = torch.zeros_like(input_ids)
        for row, i in enumerate(batch):
            ids = torch.tensor(prompts[i].token_ids, device=input_ids.device)
            input_ids[row, width - len(ids) :] = ids
            mask[row, width - len(ids) :] = 1
        with m.routing([starts[i] for i in batch], [routes[i] for i in batch]):
            out = m.model.generate(
                input_ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=m.tokenizer.pad_token_id,
            )
        for row, i in enumerate(batch):
            texts[i] = m.tokenizer.decode(out[row, width:], skip_special_tokens=True)
    return texts


def evaluate(
    m: MoLoRA, questions: Sequence[Question], ways: Sequence[str], *, max_new_tokens: int = 96, batch_size: int = 500
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Accuracy of each way to route, over all questions and by domain, one way after another.

    `by_item` has a digit for each question, 1 where its answer is right, so that ways can be compared in pairs.

    Args:
        ways: "base", "auto", "given" (each question's own adapter; single-domain questions only), or an adapter's name.
    """
    for way in ways:
        routes: list[Route] = [question.domains[0] if way == "given" else way for question in questions]
        texts = answer(m, questions, routes, max_new_tokens=max_new_tokens, batch_size=batch_size)
        is_right = [question.is_right(text) for question, text in zip(questions, texts, strict=True)]
        right, total = Counter[str](), Counter[str]()
        for question, yes in zip(questions, is_right, strict=True):
            domain = question.domains[0] if len(question.domains) == 1 else "composite"
            total[domain] += 1
            right[domain] += yes
        by_domain = {domain: right[domain] / total[domain] for domain in sorted(total)}
        by_item = "".join(str(int(yes)) for yes in is_right)
        yield way, {"accuracy": right.total() / total.total(), "by_domain": by_domain, "by_item": by_item}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m molora.training.evaluate", description="Measure a bank.")
    parser.add_argument("--bank", required=True, help="the bank's folder")
    parser.add_argument("--base", help="local folder of the base model; the bank's own if not given")
    parser.add_argument("--data", required=True, help="held-out items, a .jsonl file of the recipes")
    parser.add_argument("--out", required=True, type=Path, help="where the figures are written, as JSON")
    parser.add_argument("--ways", nargs="+", help="ways to route; all of them if not given")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--limit", type=int, help="only the first so many items")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(arguments)
    # What no adapter answers has no verifier either.
    verified = [record for record in read_records(args.data) if record.get("domain") is not None][: args.limit]
    if not verified:
        parser.error(f"no record of {args.data} has a domain, so nothing there can be verified")
    questions = [Question.from_record(record) for record in verified]
    m = molora.load(args.bank, base=args.base, device=args.device, dtype=args.dtype)
    names = [entry.name for entry in m.bank.adapters]
    composite = any(len(question.domains) > 1 for question in questions)
    ways = args.ways or ["base", *names, *([] if composite else ["given"]), "auto"]
    measured_with = environment(m)  # before the run: a checkout may move on while it lasts
    figures: dict[str, Any] = {
        "command": " ".join(["python -m molora.training.evaluate", *(arguments or sys.argv[1:])]),
        "data": args.data,
        "num_items": len(questions),
        "bank": {"name": m.bank.name, "router": None if m.bank.config.router is None else m.bank.config.router.digest},
        "environment": measured_with,
        "results": {},
    }
    for way, figure in evaluate(m, questions, ways, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size):
        print(f"{way:>12}  {figure['accuracy']:.3f}  {figure['by_domain']}", flush=True)
        figures["results"][way] = figure
        write_atomic(args.out, json.dumps(figures, indent=2) + "\n")  # a long run that breaks off keeps what it has


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


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


if __name__ == "__main__":
    main()
