"""Measuring a bank by the perplexity of text: molora eval BANK --data FILE --out FILE, where the records have a `text`.

Each row of the result is one way to route the same texts, active from their first token. No route is labelled.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.files import write_atomic
from molora.model import MoLoRA, Route
from molora.training.evaluate import source
from molora.training.examples import BASE, read_records

MAX_LOGITS = 1 << 28  # of a batch of more than one text: a GiB in float32
NUM_TOKENS_AT_ONCE = 512  # whose log-probabilities are in float32


@dataclass(frozen=True)
class TextLoss:
    """What one way to route makes of a text.

    Attributes:
        nll: negative log-likelihood of all its tokens but the first, in nats.
        num_tokens: how many tokens that are.
        routed: how many of the tokens that predict those each adapter acted on, by its gates; what is left is base's.
    """

    nll: float
    num_tokens: int
    routed: Mapping[str, float]


@dataclass(frozen=True)
class Losses:
    """What one way to route makes of several texts."""

    texts: tuple[TextLoss, ...]

    @property
    def nll(self) -> float:
        """In nats."""
        return math.fsum(text.nll for text in self.texts)

    @property
    def num_tokens(self) -> int:
        return sum(text.num_tokens for text in self.texts)

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nll / self.num_tokens)

    @property
    def shares(self) -> dict[str, float]:
        """The share of the tokens that each adapter acted on, and base's."""
        names = sorted({name for text in self.texts for name in text.routed})
        return {name: sum(text.routed.get(name, 0) for text in self.texts) / self.num_tokens for name in names}

    def among(self, indices: Sequence[int]) -> Losses:
        return Losses(tuple(self.texts[i] for i in indices))


def perplexity(m: MoLoRA, texts: Sequence[str], route: Route, *, batch_size: int = 8) -> Losses:
    """Read texts along one route, which may act from their first token on.

    Raises:
        ValueError: there is no text, one has fewer than two tokens or more than the model reads, or the route is
            unknown.
    """
    ids = [_token_ids(m, text, number) for number, text in enumerate(texts, 1)]
    if not ids:
        raise ValueError("there are no texts to read.")
    found: dict[int, TextLoss] = {}
    for batch in _batches([len(each) for each in ids], batch_size, MAX_LOGITS // m.vocab_size):
        width = max(len(ids[i]) for i in batch)  # padded behind: nothing sees what follows it
        ids_BT = torch.tensor([[*ids[i], *[0] * (width - len(ids[i]))] for i in batch])
        logits_BTV, routes_BT = m.logits(ids_BT, [0] * len(batch), route)
        for i, logits_TV, routes_T in zip(batch, logits_BTV, routes_BT, strict=True):
            num_tokens = len(ids[i]) - 1
            targets_T = torch.tensor(ids[i][1:], device=logits_TV.device)
            routed: dict[str, float] = defaultdict(float)
            for pairs in routes_T[:num_tokens]:
                for name, gate in (*pairs, (BASE, max(0.0, 1 - sum(gate for _, gate in pairs)))):
                    routed[name] += gate
            found[i] = TextLoss(_nll(logits_TV[:num_tokens], targets_T), num_tokens, routed)
    return Losses(tuple(found[i] for i in range(len(ids))))


def _token_ids(m: MoLoRA, text: str, number: int) -> tuple[int, ...]:
    ids = m.render(text).token_ids if text else ()
    if not 2 <= len(ids) <= m.max_context:
        raise ValueError(f"text {number} has {len(ids)} tokens; expected 2 to {m.max_context}, what the model reads.")
    return ids


def _batches(lengths: Sequence[int], batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices of texts, those of like lengths together; `max_tokens` with padding, but for a text alone."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[i] > max_tokens):
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _nll(logits_TV: Tensor, targets_T: Tensor) -> float:
    total = 0.0
    for first in range(0, len(targets_T), NUM_TOKENS_AT_ONCE):
        chunk = slice(first, first + NUM_TOKENS_AT_ONCE)
        losses_T = F.cross_entropy(logits_TV[chunk].float(), targets_T[chunk], reduction="none")
        total += losses_T.sum(dtype=torch.float64).item()
    return total


def ratio(ours: Losses, theirs: Losses) -> dict[str, float]:
    """Our perplexity over theirs on the same texts, and its 95% interval (normal, for a ratio of sums over texts)."""
    differences = [(a.nll - b.nll, a.num_tokens) for a, b in zip(ours.texts, theirs.texts, strict=True)]
    mean = (ours.nll - theirs.nll) / ours.num_tokens
    spread = math.sqrt(math.fsum((difference - mean * num_tokens) ** 2 for difference, num_tokens in differences))
    half = 1.96 * spread / ours.num_tokens
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def best_single(alone: Sequence[Losses]) -> Losses:
    """Of each text the best of several adapters, each alone for all of it: an oracle's choice."""
    columns = zip(*(losses.texts for losses in alone), strict=True)
    return Losses(tuple(min(column, key=lambda text: text.nll) for column in columns))


def holds_texts(data: Path) -> bool:
    """Whether a file's first record is a text to read, and not a question to answer."""
    return "text" in next(iter(read_records(data)), {})


def measure_texts(
    m: MoLoRA, data: str, out: Path, *, ways: Sequence[str] | None = None, limit: int | None = None, command: str = ""
) -> dict[str, Any]:
    """Every way's figures on the texts of a file, written as JSON after each way.

    `auto_over_this` compares the router's perplexity with each way's, on all texts and by domain; "mixed" are the texts
    of several domains.

    Args:
        data: a .jsonl file of `python -m molora.training.recipes.texts`, or any whose records have a `text`.
        ways: "base", "auto", an adapter's name; "uniform", all adapters at once in equal shares; all of them if None.
        limit: only the first so many texts.
        command: what made the file, for whoever reads it.

    Raises:
        ValueError: a record has no text that can be read, or a way is unknown.
    """
    records = list(read_records(data))[:limit]
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("text"), str):
            raise ValueError(f"{data}, record {number}: expected a `text`, a string; there are {sorted(record)}.")
    names = [entry.name for entry in m.bank.adapters]
    if unknown := sorted({*(ways or ())} - {"base", "auto", "uniform", *names}):
        raise ValueError(f"unknown ways {unknown} to read a text; expected base, auto, uniform or one of {names}.")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; expected a file to write.")
    groups = {"all": list(range(len(records)))}
    for index, record in enumerate(records):
        groups.setdefault(_domain(record), []).append(index)
    ways = ways or ["base", *names, *(["uniform"] if names else []), *(["auto"] if m.bank.has_router else [])]
    results: dict[str, Any] = {}
    figures = source(m, data, command) | {"num_texts": len(records), "results": results}
    losses: dict[str, Losses] = {}
    for way in ways:
        route: Route = {name: 1 / len(names) for name in names} if way == "uniform" else way
        losses[way] = perplexity(m, [record["text"] for record in records], route)
        if names and losses.keys() >= {*names} and "best single" not in losses:
            losses["best single"] = best_single([losses[name] for name in names])
        results.update({name: _row(each, losses.get("auto"), groups) for name, each in losses.items()})
        figures["num_tokens"] = [text.num_tokens for text in losses[way].texts]
        by_domain = {group: round(value, 3) for group, value in results[way]["by_domain"].items()}
        print(f"{way:>12}  {results[way]['perplexity']:.3f}  {by_domain}", flush=True)
        write_atomic(out, json.dumps(figures, indent=2) + "\n")  # a long run that breaks off keeps what it has
    return figures


def _domain(record: Mapping[str, Any]) -> str:
    domains = {part.get("domain") or "text" for part in record.get("parts", ())}
    return "mixed" if len(domains) > 1 else domains.pop() if domains else "text"


def _row(losses: Losses, auto: Losses | None, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    by_group = {group: losses.among(indices) for group, indices in sorted(groups.items())}
    row: dict[str, Any] = {
        "perplexity": losses.perplexity,
        "by_domain": {group: each.perplexity for group, each in by_group.items() if group != "all"},
        "shares": {
            group: {name: round(share, 4) for name, share in each.shares.items() if share > 1e-4}
            for group, each in by_group.items()
        },
        "by_text": [round(text.nll, 4) for text in losses.texts],
    }
    if auto is not None:
        row["auto_over_this"] = {group: ratio(auto.among(groups[group]), each) for group, each in by_group.items()}
    return row
