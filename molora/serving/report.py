"""What the host wants to know of a step's routes, in one piece, so that it comes over with one copy.

Legend: N tokens, D rows that draw, K adapters a token, C the router's likeliest columns that are reported.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora.routing import RouteRecord

NUM_CANDIDATES = 2


class Layout(NamedTuple):
    """What lies where: slots and gates [N, K], columns and their probabilities [D, C]. C is 0 without scores."""

    num_tokens: int
    num_adapters: int
    num_drawing: int
    num_candidates: int


class Report(NamedTuple):
    """
    Attributes:
        slots_NK, gates_NK: of each token.
        columns_DC, probs_DC: the router's likeliest columns for each token that draws, best first.
    """

    slots_NK: NDArray[np.int32]
    gates_NK: NDArray[np.float32]
    columns_DC: NDArray[np.int32]
    probs_DC: NDArray[np.float32]


def write_report(record: RouteRecord, drawing_D: Tensor, temperature: float) -> tuple[Tensor, Layout]:
    """A forward's routes as int32 [:], on its device.

    Args:
        record: of one packed row.
        drawing_D: the tokens that draw.
        temperature: the router's.
    """
    _, num_tokens, num_adapters = record.slots.shape
    parts = [record.slots.flatten(), record.gates.float().flatten().view(torch.int32)]
    num_candidates = 0
    if record.logits is not None:
        num_candidates = min(NUM_CANDIDATES, record.logits.shape[-1])
        probs_DC, columns_DC = (record.logits[0, drawing_D].float() / temperature).softmax(-1).topk(num_candidates)
        parts += [columns_DC.int().flatten(), probs_DC.flatten().view(torch.int32)]
    return torch.cat(parts), Layout(num_tokens, num_adapters, len(drawing_D), num_candidates)


def read_report(report: NDArray[np.int32], layout: Layout) -> Report:
    """`write_report`, read back on the host."""
    num_routes = layout.num_tokens * layout.num_adapters
    routes = report[: 2 * num_routes].reshape(2, layout.num_tokens, layout.num_adapters)
    candidates = report[2 * num_routes :].reshape(2, layout.num_drawing, layout.num_candidates)
    return Report(routes[0], routes[1].view(np.float32), candidates[0], candidates[1].view(np.float32))
