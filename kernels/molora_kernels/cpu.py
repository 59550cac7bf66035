"""The CPU's forward: what `reference.py` computes, in fewer steps, and only for the adapters that act.

On a CPU the host reads ids for nothing, so it knows which adapters act. One token with one adapter, a decode step, adds
two small products to the base's; they take hardly longer than their calls, so every call that is saved counts. Else
the adapters stand side by side as in the reference, but all is done in place: copies of y cost more than the adapters'
arithmetic, which is also why tokens are not gathered by adapter. There is no backward here, and nothing is checked
(`ops.py` does that).

Legend: T tokens, K top-k, E adapters, P adapters that act, G sibling linears, R rank, C = G * R, I in-features,
O out-features of all siblings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Lone(NamedTuple):
    """One token with one adapter, which stands in these columns of its ids and gates."""

    adapter: int
    columns: list[int]


class SideBySide(NamedTuple):
    """Any tokens with any adapters.

    Attributes:
        adapters: the P adapters that act on some token, ascending; a slice where they are consecutive.
        num_adapters: P.
        place_TK: int64, the place of each id among those adapters, P where there is none.
        off_TP: True where an adapter does not act on a token.
    """

    adapters: slice | list[int]
    num_adapters: int
    place_TK: Tensor
    off_TP: Tensor


Present = Lone | SideBySide | None
"""What the host knows of a plan's ids, for all linears that share the plan; None where no adapter acts."""


def find_present(ids_TK: Tensor) -> Present:
    """Read a plan's `ids`, each -1 or an adapter."""
    ids = ids_TK.tolist()
    adapters = sorted({adapter for row in ids for adapter in row if adapter >= 0})
    if not adapters:
        return None
    if len(ids) == len(adapters) == 1:
        return Lone(adapters[0], [column for column, adapter in enumerate(ids[0]) if adapter >= 0])
    first, end, num_adapters = adapters[0], adapters[-1] + 1, len(adapters)
    place_of = {adapter: place for place, adapter in enumerate(adapters)}
    place_TK = torch.tensor([[place_of.get(adapter, num_adapters) for adapter in row] for row in ids])
    off_TP = torch.ones(len(ids), num_adapters + 1, dtype=torch.bool).scatter_(1, place_TK, False)[:, :-1]
    return SideBySide(slice(first, end) if end - first == num_adapters else adapters, num_adapters, place_TK, off_TP)


def routed_linears_cpu(
    x_TI: Tensor,
    w_OI: Tensor,
    bias_O: Tensor | None,
    a_ECI: Tensor,
    b_EOR: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    present: Present,
    out_features: Sequence[int],
) -> tuple[Tensor, ...]:
    """`routed_linears_reference` on CPU tensors of which none needs a gradient, given `find_present(ids_TK)`."""
    widths = list(out_features)
    y_TO = F.linear(x_TI, w_OI, bias_O)
    y_per_sibling = _split(y_TO, widths, dim=1)
    if isinstance(present, Lone):
        adapter, columns = present
        h_1C, b_OR, gates_K = F.linear(x_TI, a_ECI[adapter]), b_EOR[adapter], gates_TK.tolist()[0]
        gate = sum([gates_K[column] for column in columns])
        h_per_sibling = _split(h_1C, [b_OR.shape[1]] * len(widths), dim=1)
        b_per_sibling = _split(b_OR, widths, dim=0)
        for y, h, b, scale in zip(y_per_sibling, h_per_sibling, b_per_sibling, scaling_EG.tolist()[adapter], strict=True):
            y.addmm_(h, b.t(), alpha=gate * scale)
    elif isinstance(present, SideBySide):
        adapters, num_adapters, place_TK, off_TP = present
        num_tokens = x_TI.shape[0]
        h_TPGR = F.linear(x_TI, a_ECI[adapters].flatten(0, 1)).view(num_tokens, num_adapters, len(widths), -1)
        gate_TP = gates_TK.new_zeros(num_tokens, num_adapters + 1).scatter_add_(1, place_TK, gates_TK)[:, :-1]
        h_TPGR.masked_fill_(off_TP[:, :, None, None], 0)  # not a product: 0 * inf is not 0
        h_TPGR.mul_((gate_TP[:, :, None] * scaling_EG[adapters])[..., None])
        b_POR = b_EOR[adapters]
        for g, (y, b) in enumerate(zip(y_per_sibling, _split(b_POR, widths, dim=1), strict=True)):
            y.addmm_(h_TPGR[:, :, g].flatten(1), b.transpose(0, 1).flatten(1).t())
    return y_per_sibling


def _split(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
    return x.split_with_sizes(sizes, dim) if len(sizes) > 1 else (x,)
