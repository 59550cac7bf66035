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
from numpy.typing import NDArray
from torch import Tensor

from molora.generation import Sampling, TokenLogprob

NOTHING = -1
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

    @property
    def is_free(self) -> bool:
        """Whether neither it nor the next one depends on more of the answer than the device knows."""
        return self.bitmask is None and not self.is_adjusted and self.sampling.logprobs is None

    @property
    def is_adjusted(self) -> bool:
        """Whether its logits are changed by what was said, or by biases."""
        return self.sampling.is_penalized or bool(self.sampling.logit_bias)


class Parts(NamedTuple):
    """Which parts of choosing a batch needs: graphs differ by it. A part that no row needs changes nothing.

    Attributes:
        draws: some row has a temperature; else all are greedy.
        filters: some row that draws has top-k, top-p or min-p.
        masks: some row has a grammar.
    """

    draws: bool
    filters: bool
    masks: bool


COLUMNS = 5  # of a batch's table: temperature, top_k, top_p, min_p and the number in [0, 1)


def parts_of(draws: Sequence[Draw]) -> Parts:
    drawn = [each.sampling for each in draws if each.sampling.temperature > 0]
    filters = any(sampling.top_k or sampling.top_p < 1 or sampling.min_p for sampling in drawn)
    return Parts(bool(drawn), filters, any(each.bitmask is not None for each in draws))


def table_of(draws: Sequence[Draw]) -> NDArray[np.float64]:
    """[D, COLUMNS]."""
    samplings = [each.sampling for each in draws]
    rows = [(s.temperature, s.top_k, s.top_p, s.min_p, each.uniform) for s, each in zip(samplings, draws, strict=True)]
    return np.array(rows, np.float64).reshape(len(draws), COLUMNS)


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) that the token at `position` of answer `index` is drawn with."""
    packed = struct.pack("<Qqq", seed % (1 << 64), index, position)
    digest = blake2b(packed, digest_size=8, person=b"molora-draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(logits_DV: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[TokenLogprob | None]]:
    """The next token of each row, and its log-probability where that is asked for."""
    if not draws:
        return [], []
    device, parts, adjusted_DV = logits_DV.device, parts_of(draws), logits_DV
    if any(each.is_adjusted for each in draws):
        adjusted_DV = torch.stack([adjust(logits_V, each) for logits_V, each in zip(logits_DV, draws, strict=True)])
    masks_DW = None
    if parts.masks:
        allows_all = torch.full((-(-logits_DV.shape[1] // 32),), -1, dtype=torch.int32)
        masks_DW = torch.stack([allows_all if each.bitmask is None else each.bitmask for each in draws]).to(device)
    ids_D = choose(adjusted_DV, torch.from_numpy(table_of(draws)).to(device), masks_DW, parts)
    return ids_D.tolist(), logprobs_of(logits_DV, ids_D, draws)


def choose(logits_DV: Tensor, table_D5: Tensor, masks_DW: Tensor | None, parts: Parts) -> Tensor:
    """The next tokens, int64 [D]; `NOTHING` where the model's numbers overflowed.

    Args:
        logits_DV: of any floating dtype, penalties and biases included.
        table_D5: float64, as `table_of` makes it.
        masks_DW: int32, a bit for each token that may be chosen; None if `parts` has no masks.
    """
    if masks_DW is not None:
        logits_DV = logits_DV.masked_fill(~unpack(masks_DW, logits_DV.shape[1]), -torch.inf)
    greedy_D = torch.where(logits_DV.amax(-1).isfinite(), greedy(logits_DV), NOTHING)
    if not parts.draws:
        return greedy_D
    temperature_D, top_k_D, top_p_D, min_p_D, uniform_D = table_D5.unbind(1)
    scaled_DV = logits_DV.double()
    scaled_DV = scaled_DV - scaled_DV.amax(-1, keepdim=True)
    probs_DV = (scaled_DV / temperature_D.clamp(min=SMALLEST_TEMPERATURE)[:, None]).softmax(-1)
    if parts.filters:
        probs_DV = probs_DV * _passes(probs_DV, top_k_D, top_p_D, min_p_D)
    # In the order of ids, whatever the filters needed, so that a row is drawn alike beside rows with and without them.
    cdf_DV = probs_DV.cumsum(-1)
    goal_D1 = (uniform_D * cdf_DV[:, -1])[:, None]
    drawn_D = torch.searchsorted(cdf_DV, goal_D1, right=True)[:, 0]
    # Rounding may put the goal at the sum itself: then it is the last token that has any probability.
    last_D = (cdf_DV < cdf_DV[:, -1:]).sum(-1)
    return torch.where((temperature_D > 0) & (greedy_D >= 0), torch.minimum(drawn_D, last_D), greedy_D)


def greedy(logits_DV: Tensor) -> Tensor:
    """The most likely tokens; ties go to the lowest id, which argmax does not promise."""
    ids_V = torch.arange(logits_DV.shape[1], device=logits_DV.device)
    is_best_DV = logits_DV == logits_DV.amax(-1, keepdim=True)
    return torch.where(is_best_DV, ids_V, logits_DV.shape[1]).amin(-1).clamp(max=logits_DV.shape[1] - 1)


def _passes(probs_DV: Tensor, top_k_D: Tensor, top_p_D: Tensor, min_p_D: Tensor) -> Tensor:
    """Which tokens the filters leave: at least the most likely one."""
    sorted_DV, order_DV = probs_DV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(probs_DV.shape[1], device=probs_DV.device)
    passes_DV = (top_k_D[:, None] <= 0) | (rank_V < top_k_D[:, None])
    left_DV = sorted_DV * passes_DV
    before_DV = left_DV.cumsum(-1) - left_DV
    passes_DV &= (top_p_D[:, None] >= 1) | (before_DV < top_p_D[:, None] * left_DV.sum(-1, keepdim=True))
    passes_DV &= sorted_DV >= min_p_D[:, None] * sorted_DV[:, :1]
    passes_DV |= rank_V == 0
    return torch.zeros_like(passes_DV).scatter(-1, order_DV, passes_DV)


def adjust(logits_V: Tensor, each: Draw) -> Tensor:
    """Logits under penalties and biases, float32; as they are if the row has none."""
    sampling, logits_V = each.sampling, logits_V.float()
    if sampling.is_penalized:
        logits_V = penalize(logits_V, sampling, each.prompt_ids, each.answer_ids)
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits_V.device)
        values = torch.tensor(list(sampling.logit_bias.values()), device=logits_V.device, dtype=torch.float32)
        logits_V = logits_V.index_add(0, ids, values)
    return logits_V


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


def unpack(masks_DW: Tensor, num_ids: int) -> Tensor:
    """The bits of int32 words, the lowest first, as bool [D, num_ids]."""
    bits = torch.arange(32, device=masks_DW.device, dtype=torch.int32)
    return ((masks_DW[..., None] >> bits) & 1).bool().flatten(-2)[:, :num_ids]


def logprobs_of(logits_DV: Tensor, ids_D: Tensor, draws: Sequence[Draw]) -> list[TokenLogprob | None]:
    """Of the drawn tokens under the model's own distribution, for the rows that ask."""
    found: list[TokenLogprob | None] = [None] * len(draws)
    ids_D = ids_D.clamp(min=0)
    asking = [row for row, each in enumerate(draws) if each.sampling.logprobs is not None]
    if asking:
        nums_top = [draws[row].sampling.logprobs or 0 for row in asking]
        logprobs = read_logprobs(logits_DV[asking].float().log_softmax(-1), ids_D[asking], max(nums_top))
        for row, logprob, num_top in zip(asking, logprobs, nums_top, strict=True):
            found[row] = TokenLogprob(logprob.token_id, logprob.logprob, logprob.top[:num_top])
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
