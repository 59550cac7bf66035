"""The CPU's forward: each adapter computes its own tokens only, so the price is that of the adapters that act.

`reference.py` computes every adapter for every token, in a dozen small steps; a decode step of one token would spend
as long on those as on the base. Here the host reads the ids, once a plan, and each linear that shares the plan runs two
products for each adapter in it. This file has no backward, and checks nothing (`ops.py` does).

Legend: T tokens, N tokens of one group, K top-k, E adapters, G sibling linears, R rank, C = G * R, I in-features,
O out-features of all siblings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Group(NamedTuple):
    """The tokens that have one adapter in one column of the plan's ids; no token is in it twice.

    Attributes:
        adapter: the adapter's index.
        column: the column of ids and gates.
        tokens: [N] int64, ascending; a slice where they are consecutive.
    """

    adapter: int
    column: int
    tokens: Tensor | slice


def group_tokens(ids_TK: Tensor) -> tuple[Group, ...]:
    """The groups of a plan's `ids`, ordered by column and adapter. It reads the ids on the host."""
    tokens_of: dict[tuple[int, int], list[int]] = {}
    for token, row in enumerate(ids_TK.tolist()):
        for column, adapter in enumerate(row):
            if adapter >= 0:
                tokens_of.setdefault((column, adapter), []).append(token)
    return tuple(Group(adapter, column, _as_index(tokens)) for (column, adapter), tokens in sorted(tokens_of.items()))


def _as_index(tokens: list[int]) -> Tensor | slice:
    start, end = tokens[0], tokens[-1] + 1
    return slice(start, end) if end - start == len(tokens) else torch.tensor(tokens)


def routed_linears_cpu(
    x_TI: Tensor,
    w_OI: Tensor,
    bias_O: Tensor | None,
    a_ECI: Tensor,
    b_EOR: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    groups: Sequence[Group],
    out_features: Sequence[int],
) -> tuple[Tensor, ...]:
    """`routed_linears_reference` without gradients, on CPU tensors and the groups of a plan's ids.

    The rows of tokens without an adapter are written by the base's product alone. A low precision rounds y once for
    every adapter of a token, where the reference rounds it once for all of them.
    """
    y_TO = F.linear(x_TI, w_OI, bias_O)
    widths = list(out_features)
    if len(x_TI) == 1:  # a decode step, where each step counts: its factors are numbers, and no row is picked
        gates_K, scaling = gates_TK[0].tolist(), scaling_EG.tolist()
        for adapter, column, _ in groups:
            factors_G = [gates_K[column] * scale for scale in scaling[adapter]]
            _add_(y_TO, F.linear(x_TI, a_ECI[adapter]), b_EOR[adapter], factors_G, widths)
        return _siblings(y_TO, widths)
    for adapter, column, tokens in groups:
        h_NC = F.linear(x_TI[tokens], a_ECI[adapter])
        factors_NG = gates_TK[tokens, column, None] * scaling_EG[adapter]
        h_NC.unflatten(1, (len(widths), -1)).mul_(factors_NG[:, :, None])
        y_NO = y_TO[tokens]  # a view where the tokens are consecutive, else a copy
        _add_(y_NO, h_NC, b_EOR[adapter], [1.0] * len(widths), widths)
        if isinstance(tokens, Tensor):
            y_TO.index_copy_(0, tokens, y_NO)
    return _siblings(y_TO, widths)


def _add_(y_NO: Tensor, h_NC: Tensor, b_OR: Tensor, factors_G: list[float], widths: list[int]) -> None:
    """y_g += factors[g] * h_g B_g^T for each sibling g."""
    rank = b_OR.shape[1]
    siblings = zip(
        _siblings(y_NO, widths),
        _siblings(h_NC, [rank] * len(widths)),
        b_OR.split_with_sizes(widths) if len(widths) > 1 else (b_OR,),
        factors_G,
        strict=True,
    )
    for y, h, b, factor in siblings:
        y.addmm_(h, b.t(), alpha=factor)


def _siblings(x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    return x.split_with_sizes(widths, dim=1) if len(widths) > 1 else (x,)
