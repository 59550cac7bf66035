"""The CPU's forward: what `reference.py` computes, in fewer steps, and only for the adapters that act.

On a CPU the host reads ids for nothing, so it knows which adapters act. They stand side by side as in the reference, but
all is done in place: copies of y cost more than the adapters' arithmetic, which is also why tokens are not gathered by
adapter.

A decode step is a case of its own. The products of one token take no longer than it takes to call them, and the base's
weights, streaming through the caches, leave none of the host's code and data there: checks and views that are made for
each linear cost as much as the adapters. So `find_token` reads the routes once a forward, `adapter_views` are made once
a bank, and between them a linear is left with two calls for each adapter.

Nothing here has a backward, and nothing is checked (`ops.py` does that).

Legend: T tokens, K top-k, G sibling linears, E adapters, P adapters that act, R rank, I in-features, O out-features of
all siblings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Token = list[tuple[int, float]]
"""The adapters of one token with their gates. Equal adapters add up; none is the base."""


class Present(NamedTuple):
    """What the host knows of a plan's ids, for all linears that share the plan.

    Attributes:
        first, end: the P adapters from the lowest that acts to the highest; a choice among them would be a copy.
        place_TK: int64, the place of each id among those adapters, P where there is none.
        off_TP: True where an adapter does not act on a token.
    """

    first: int
    end: int
    place_TK: Tensor
    off_TP: Tensor


class AdapterView(NamedTuple):
    """One adapter of one linear, as views of the linear's tensors."""

    a_RI: Tensor
    b_1RO: Tensor
    scaling: Tensor


def find_present(ids_TK: Tensor) -> Present | None:
    """Read a plan's `ids`, each -1 or an adapter; None if no adapter acts."""
    present = [adapter for row in ids_TK.tolist() for adapter in row if adapter >= 0]
    if not present:
        return None
    first, end = min(present), max(present) + 1
    place_TK = torch.where(ids_TK < 0, end - first, ids_TK - first).long()
    off_TP = torch.ones(len(ids_TK), end - first + 1, dtype=torch.bool).scatter_(1, place_TK, False)[:, :-1]
    return Present(first, end, place_TK, off_TP)


def routed_linears_cpu(
    x_TI: Tensor,
    w_OI: Tensor,
    bias_O: Tensor | None,
    a_GERI: Tensor,
    b_EOR: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    present: Present | None,
    out_features: Sequence[int],
) -> tuple[Tensor, ...]:
    """`routed_linears_reference` on CPU tensors of which none needs a gradient, given `find_present(ids_TK)`."""
    y_TO = F.linear(x_TI, w_OI, bias_O)
    widths = list(out_features)
    y_per_sibling = y_TO.split_with_sizes(widths, dim=1)
    if present is None:
        return y_per_sibling
    first, end, place_TK, off_TP = present
    a_GPRI, b_POR, scaling_PG = a_GERI[:, first:end], b_EOR[first:end], scaling_EG[first:end]
    num_tokens, (num_siblings, num_adapters, rank, _) = x_TI.shape[0], a_GPRI.shape
    gate_TP = gates_TK.new_zeros(num_tokens, num_adapters + 1).scatter_add_(1, place_TK, gates_TK)[:, :-1]
    h_TGPR = F.linear(x_TI, a_GPRI.flatten(0, 2)).view(num_tokens, num_siblings, num_adapters, rank)
    h_TGPR.masked_fill_(off_TP[:, None, :, None], 0)  # not a product: 0 * inf is not 0
    h_TGPR.mul_((gate_TP[:, None, :] * scaling_PG.t())[..., None])
    b_per_sibling = b_POR.split_with_sizes(widths, dim=1)
    for g, (y, b) in enumerate(zip(y_per_sibling, b_per_sibling, strict=True)):
        y.addmm_(h_TGPR[:, g].flatten(1), b.transpose(0, 1).flatten(1).t())
    return y_per_sibling


def find_token(ids_TK: Tensor, gates_TK: Tensor, num_adapters: int) -> Token | None:
    """The routes of a forward of one token, where `add_adapters_` may serve it; None everywhere else."""
    if ids_TK.shape[0] != 1 or ids_TK.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    routes = zip(ids_TK[0].tolist(), gates_TK[0].tolist(), strict=True)
    return [(adapter, gate) for adapter, gate in routes if 0 <= adapter < num_adapters]


def adapter_views(a_ERI: Tensor, b_EOR: Tensor, scaling_E: Tensor) -> list[AdapterView]:
    """The adapters of a linear. They follow changes of the tensors' values; B is read fastest when stored by rows of R."""
    b_ERO = b_EOR.detach().mT
    return [AdapterView(a_RI, b_ERO[e : e + 1], scaling_E[e]) for e, a_RI in enumerate(a_ERI.detach())]


def add_adapters_(y_11O: Tensor, x_11I: Tensor, adapters: Sequence[AdapterView], token: Token) -> None:
    """y += sum of gate * scaling * B (A x) over the token's adapters, all in one dtype."""
    for adapter, gate in token:
        a_RI, b_1RO, scaling = adapters[adapter]
        y_11O.baddbmm_(F.linear(x_11I, a_RI), b_1RO, alpha=gate * scaling.item())
