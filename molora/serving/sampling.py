"""Choosing the next tokens of a batch.

The draw of an answer's token t is made with one number, which comes from (seed, the answer's index among n, t) alone:
no generator has a state that neighbours, chunks or preemption could move. `choose` and what it calls make no host
synchronization and no shape that depends on data, so they can be captured in a CUDA graph.

Legend: D rows that draw, V vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from molora.generation import Sampling, TokenLogprob

SMALLEST_TEMPERATURE = 1e-6  # below it the most likely token has all there is


@dataclass(frozen=True)
class Draw:
    """What one row's next token is chosen by.

    Attributes:
        prompt_ids, answer_ids: for penalties; empty without.
        uniform: in [0, 1).
        bitmask: int32 [ceil(V / 32)], a bit for each token that its grammar allows; None if it has none.
    """

    sampling: Sampling
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    uniform: float
    bitmask: Tensor | None = None


class Choices(NamedTuple):
    """Filters and draws, [D] each; a temperature of 0 is greedy."""

    temperature_D: Tensor
    top_k_D: Tensor
    top_p_D: Tensor
    min_p_D: Tensor
    uniform_D: Tensor


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) that the token at `position` of answer `index` is drawn with."""
    digest = blake2b(
        struct.pack("<Qqq", seed % (1 << 64), index, position), digest_size=8, person=b"molora-draw"
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@torch.inference_mode()
def draw(logits_DV: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[TokenLogprob | None]]:
    """The next token of each row, and its log-probability where that is asked for."""
    if not draws:
        return [], []
    device, raw_DV = logits_DV.device, logits_DV
    logits_DV = _constrain(logits_DV, draws)
    samplings = [each.sampling for each in draws]
    if all(sampling.temperature == 0 for sampling in samplings):
        ids_D = greedy(logits_DV)
    else:
        columns = np.array(
            [(s.temperature, s.top_k, s.top_p, s.min_p, each.uniform) for s, each in zip(samplings, draws, strict=True)]
        )
        table = torch.from_numpy(columns).to(device)
        filters = any(s.temperature > 0 and (s.top_k or s.top_p < 1 or s.min_p) for s in samplings)
        ids_D = choose(logits_DV, Choices(*table.unbind(1)), filters=filters)
    return ids_D.tolist(), _logprobs(raw_DV, ids_D, samplings)


def greedy(logits_DV: Tensor) -> Tensor:
    """The most likely tokens; ties go to the lowest id, which argmax does not promise."""
    ids_V = torch.arange(logits_DV.shape[1], device=logits_DV.device)
    is_best_DV = logits_DV == logits_DV.amax(-1, keepdim=True)
    return torch.where(is_best_DV, ids_V, logits_DV.shape[1]).amin(-1).clamp(max=logits_DV.shape[1] - 1)


def choose(logits_DV: Tensor, by: Choices, *, filters: bool = True) -> Tensor:
    """Draw from softmax(logits / temperature), as far as the filters leave it; greedy at temperature 0.

    Args:
        filters: False if no row has any; it changes no draw.
    """
    scaled_DV = logits_DV.double()
    scaled_DV = scaled_DV - scaled_DV.amax(-1, keepdim=True)
    scaled_DV = scaled_DV / by.temperature_D.double().clamp(min=SMALLEST_TEMPERATURE)[:, None]
    probs_DV = scaled_DV.softmax(-1)
    if filters:
        probs_DV = probs_DV * _passes(probs_DV, by)
    # In the order of ids, whatever the filters needed, so that a row is drawn alike beside rows with and without them.
    cdf_DV = probs_DV.cumsum(-1)
    goal_D1 = (by.uniform_D.double() * cdf_DV[:, -1])[:, None]
    drawn_D = torch.searchsorted(cdf_DV, goal_D1, right=True)[:, 0]
    # Rounding may put the goal at the sum itself: then it is the last token that has any probability.
    last_D = (cdf_DV < cdf_DV[:, -1:]).sum(-1)
    return torch.where(by.temperature_D > 0, torch.minimum(drawn_D, last_D), greedy(logits_DV))


def _passes(probs_DV: Tensor, by: Choices) -> Tensor:
    """Which tokens the filters leave: at least the most likely one."""
    sorted_DV, order_DV = probs_DV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(probs_DV.shape[1], device=probs_DV.device)
    before_DV = sorted_DV.cumsum(-1) - sorted_DV
    passes_DV = (by.top_k_D[:, None] <= 0) | (rank_V < by.top_k_D[:, None])
    passes_DV &= (by.top_p_D[:, None] >= 1) | (before_DV < by.top_p_D[:, None])
    passes_DV &= sorted_DV >= by.min_p_D[:, None] * sorted_DV[:, :1]
    passes_DV |= rank_V == 0
    return torch.zeros_like(passes_DV).scatter(-1, order_DV, passes_DV)


def _constrain(logits_DV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits under grammars, penalties and biases; the rows that have none are untouched."""
    changed: dict[int, Tensor] = {}
    for row, each in enumerate(draws):
        sampling = each.sampling
        if not (each.bitmask is not None or sampling.is_penalized or sampling.logit_bias):
            continue
        logits_V = logits_DV[row].float()
        if sampling.is_penalized:
            logits_V = penalize(logits_V, sampling, each.prompt_ids, each.answer_ids)
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=logits_V.device)
            values = torch.tensor(list(sampling.logit_bias.values()), device=logits_V.device, dtype=torch.float32)
            logits_V = logits_V.index_add(0, ids, values)
        if each.bitmask is not None:
            logits_V = logits_V.masked_fill(~unpack(each.bitmask.to(logits_V.device), len(logits_V)), -torch.inf)
        changed[row] = logits_V
    if not changed:
        return logits_DV
    return torch.stack([changed.get(row, logits_DV[row].float()) for row in range(len(draws))])


def penalize(logits_V: Tensor, sampling: Sampling, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
    """Logits under the three penalties; see `Sampling`."""
    num_ids, device = len(logits_V), logits_V.device
    counts_V = torch.bincount(torch.tensor(answer_ids, dtype=torch.long, device=device), minlength=num_ids)
    seen_V = counts_V > 0
    if sampling.repetition_penalty != 1:
        stands_V = seen_V.index_fill(0, torch.tensor(prompt_ids, dtype=torch.long, device=device), True)
        penalty = sampling.repetition_penalty
        penalized_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
        logits_V = torch.where(stands_V, penalized_V, logits_V)
    return logits_V - sampling.presence_penalty * seen_V - sampling.frequency_penalty * counts_V


def unpack(bitmask_W: Tensor, num_ids: int) -> Tensor:
    """The bits of int32 words, the lowest first, as bool [num_ids]."""
    bits = torch.arange(32, device=bitmask_W.device, dtype=torch.int32)
    return ((bitmask_W[:, None] >> bits) & 1).bool().flatten()[:num_ids]


def _logprobs(raw_DV: Tensor, ids_D: Tensor, samplings: Sequence[Sampling]) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(samplings)
    asking = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
    if asking:
        num_top = max(samplings[row].logprobs or 0 for row in asking)
        logprobs = read_logprobs(raw_DV[asking].float().log_softmax(-1), ids_D[asking], num_top)
        for row, logprob in zip(asking, logprobs, strict=True):
            found[row] = TokenLogprob(logprob.token_id, logprob.logprob, logprob.top[: samplings[row].logprobs])
    return found


def read_logprobs(logprobs_TV: Tensor, ids_T: Tensor, num_top: int) -> list[TokenLogprob]:
    """Each token's log-probability and the most likely ones at its place, ties to the lowest id."""
    own = logprobs_TV.gather(-1, ids_T[:, None])[:, 0].tolist()
    if not num_top:
        return [TokenLogprob(token, logprob) for token, logprob in zip(ids_T.tolist(), own, strict=True)]
    values, top = logprobs_TV.sort(dim=-1, descending=True, stable=True)  # topk leaves the order of ties open
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, logprobs, strict=True)))
        for token, logprob, ids, logprobs in zip(
            ids_T.tolist(), own, top[:, :num_top].tolist(), values[:, :num_top].tolist(), strict=True
        )
    ]
