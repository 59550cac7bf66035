"""What a bank's router does on conversations: its scores on them, statistics beside their labels, and example routes.

Legend: B sequences, T tokens, H hidden size, C columns (base and routable adapters).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from molora.generation import Generation
from molora.model import MoLoRA
from molora.router import KeyRouter
from molora.routing import RouteRequest
from molora.training.examples import BASE, IGNORE, Example
from molora.training.route_page import RoutedToken, winner
from molora.training.router_statistics import RouterStatistics

BROKEN = "\ufffd"  # what a decoder writes for a part of a character


def column_names(m: MoLoRA) -> list[str]:
    return [BASE, *(entry.name for entry in m.bank.routable)]


@torch.inference_mode()
def router_scores(
    m: MoLoRA, sequences: Sequence[Sequence[int]], starts: Sequence[int], *, batch_size: int = 256
) -> Iterator[Tensor]:
    """The router's scores on each sequence of token ids, float32 [T, C]; those before its start mean nothing."""
    router = m.decoder.router
    assert isinstance(router, KeyRouter)
    yield from map(router.scores, router_inputs(m, sequences, starts, batch_size=batch_size))


@torch.inference_mode()
def router_inputs(
    m: MoLoRA, sequences: Sequence[Sequence[int]], starts: Sequence[int], *, batch_size: int = 256
) -> Iterator[Tensor]:
    """What the router reads of each sequence, [T, H], if it is asked from the start on."""
    device = m.decoder.device
    for first in range(0, len(sequences), batch_size):
        batch = sequences[first : first + batch_size]
        ids_BT = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
        for row, ids in enumerate(batch):  # padded behind: nothing sees what follows it
            ids_BT[row, : len(ids)] = torch.tensor(ids)
        with m.lock:
            request = RouteRequest(
                torch.tensor(starts[first : first + batch_size], device=device)[:, None],
                auto=torch.ones_like(ids_BT, dtype=torch.bool, device=device),
            )
            hidden = m.decoder.router_input(request, input_ids=ids_BT.to(device), use_cache=False)
        for hidden_TH, ids in zip(hidden, batch, strict=True):
            yield hidden_TH[: len(ids)]


def router_statistics(m: MoLoRA, examples: Sequence[Example], starts: Sequence[int]) -> RouterStatistics:
    """Over the labelled tokens of answered conversations, each active from its start on."""
    router, device = m.decoder.router, m.decoder.device
    assert isinstance(router, KeyRouter)
    columns = {name: column for column, name in enumerate(column_names(m))}
    statistics = RouterStatistics.zeros(len(columns), device)
    all_scores = router_scores(m, [example.token_ids for example in examples], starts, batch_size=64)
    for example, start, scores_TC in zip(examples, starts, all_scores, strict=True):
        labels_T = torch.tensor([columns.get(domain or "", IGNORE) for domain in example.domains])
        labels_T[:start] = IGNORE
        statistics += RouterStatistics.of(
            scores_TC / router.config.temperature,
            labels_T.to(device),
            torch.arange(len(labels_T), device=device),
            torch.tensor(go_on(token_texts(example.token_ids, m.tokenizer)), device=device),
            written_N=torch.tensor(example.learned, device=device),
        )
    return statistics


def routed_tokens(m: MoLoRA, out: Generation, first: int) -> tuple[list[RoutedToken], list[RoutedToken]]:
    """The prompt's tokens from `first` on with who read them, and the answer's with who wrote them."""
    router, start, end = m.decoder.router, out.activation_start, out.num_prompt_tokens
    assert isinstance(router, KeyRouter)
    assert start is not None
    (scores_TC,) = router_scores(m, [out.token_ids], [start])
    probs_TC = (scores_TC / router.config.temperature).softmax(-1).tolist()
    columns, special = column_names(m), {*m.tokenizer.all_special_ids}
    tokens = []
    for index, (token_id, text) in enumerate(zip(out.token_ids, token_texts(out.token_ids, m.tokenizer), strict=True)):
        at = index if index < end else index - 1
        route = None if at < start else out.routes[at]
        probability = 0.0 if route is None else probs_TC[at][columns.index(winner(route))]
        tokens.append(RoutedToken(text, route, probability, token_id in special))
    return tokens[first:end], tokens[end:]


def token_texts(token_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text of those before it: nothing where it ends inside a character."""
    texts: list[str] = []
    first, known = 0, 0  # the tokens from `first` to `known` are shown, and say whether a space stands before the next
    for end in range(1, len(token_ids) + 1):
        shown, text = (tokenizer.decode(token_ids[first:to], clean_up_tokenization_spaces=False) for to in (known, end))
        if text.endswith(BROKEN) and end < len(token_ids):
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        first, known = known, end
    return texts


def go_on(texts: Sequence[str]) -> list[bool]:
    """Whether each token goes on with the word or number that the one before it ends in."""
    return [before[-1:].isalnum() and text[:1].isalnum() for before, text in zip(["", *texts], texts, strict=False)]
