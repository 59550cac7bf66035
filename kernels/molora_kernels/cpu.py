"""The CPU's forward where nothing is recorded: a host reads the ids of a CPU plan without waiting.

Of several tokens, the adapters from the lowest that acts to the highest stand side by side as in `reference.py`, but
all is done in place: copies of y would cost more than the adapters' arithmetic, which is also why tokens are not
gathered.

Of one token, a decode step, the host's own work decides. A token's products with its adapters take no longer than
calling them, and the base's weights, as they stream through the caches, leave none of the host's code and data there:
to check, cast and slice a linear's tensors costs more than the adapters' arithmetic, and so do B's rows, which lie
apart. So the host reads the routes once a forward (`find_token`), a linear takes an adapter out once for all
(`TakenAdapters`), and is left with two products for each adapter that acts.

There is no backward here, and nothing is checked (`ops.py` does that).

Legend: T tokens, K top-k, G sibling linears, E adapters, P adapters from the lowest that acts to the highest, R rank,
I in-features, O out-features of all siblings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from molora_kernels.plan import Plan

Token = list[tuple[int, float]]
"""The adapters of one token with their gates. Equal adapters add up; none is the base."""


class Present(NamedTuple):
    """What the host knows of a plan's ids, for all linears that share the plan.

    Attributes:
        first, end: the P adapters lie between them; picking out those that act would copy their weights.
        place_TK: int64, the place of each id among those adapters, P where there is none.
        off_T1P1: True where an adapter does not act on a token.
    """

    first: int
    end: int
    place_TK: Tensor
    off_T1P1: Tensor


def find_present(ids_TK: Tensor) -> Present | None:
    """Read a plan's `ids`, each -1 or an adapter; None if no adapter acts."""
    present = ids_TK[ids_TK >= 0]
    if not len(present):
        return None
    first, end = int(present.min()), int(present.max()) + 1
    place_TK = torch.where(ids_TK < 0, end - first, ids_TK - first).long()
    off_TP = torch.ones(len(ids_TK), end - first + 1, dtype=torch.bool).scatter_(1, place_TK, False)[:, :-1]
    return Present(first, end, place_TK, off_TP[:, None, :, None])


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
    """`routed_linears_reference` on CPU tensors of which none needs a gradient, given the plan's `present`."""
    y_TO = F.linear(x_TI, w_OI, bias_O)
    widths = list(out_features)
    y_per_sibling = y_TO.split_with_sizes(widths, dim=1)
    if present is None:
        return tuple(y_per_sibling)
    first, end, place_TK, off_T1P1 = present
    a_GPRI, b_POR, scaling_PG = a_GERI[:, first:end], b_EOR[first:end], scaling_EG[first:end]
    num_tokens, (num_siblings, num_adapters, rank, _) = x_TI.shape[0], a_GPRI.shape
    gate_TP = gates_TK
    if gates_TK.shape[1] > 1:  # else one gate serves all columns, of which the mask leaves one
        gate_TP = gates_TK.new_zeros(num_tokens, num_adapters + 1).scatter_add_(1, place_TK, gates_TK)[:, :-1]
    h_TGPR = F.linear(x_TI, a_GPRI.flatten(0, 2)).view(num_tokens, num_siblings, num_adapters, rank)
    h_TGPR.mul_((gate_TP[:, None, :] * scaling_PG.t())[..., None])
    h_TGPR.masked_fill_(off_T1P1, 0)  # last, since gates of no adapter, and adapters that overflow, leave NaN there
    for g, (y, b) in enumerate(zip(y_per_sibling, b_POR.split_with_sizes(widths, dim=1), strict=True)):
        y.addmm_(h_TGPR[:, g].flatten(1), b.transpose(0, 1).flatten(1).t())
    return tuple(y_per_sibling)


def find_token(plan: Plan, gates_TK: Tensor) -> Token | None:
    """The routes of a forward of one token; None where there are more, or `TakenAdapters` would not do.

    It would not off the CPU, under autocast, or where operations do not `act_at_once`.
    """
    if len(plan.ids) != 1 or plan.ids.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not act_at_once():
        return None
    routes = zip(plan.ids[0].tolist(), gates_TK[0].tolist(), strict=True)
    return [(adapter, gate) for adapter, gate in routes if adapter >= 0]


def act_at_once() -> bool:
    """Whether operations run as they are called, recorded neither by autograd nor by a compiler."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class TakenAdapters:
    """The adapters of one linear, each taken out of the slots when it first acts: A as it lies, B as a copy.

    Attributes:
        dtype: of A and B, which x must share; None where they differ, or where nobody counts what is written to them.
    """

    def __init__(self, a_ERI: Tensor, b_EOR: Tensor, scaling_E: Tensor) -> None:
        self._a_ERI, self._b_EOR, self._scaling_E = a_ERI.detach(), b_EOR.detach(), scaling_E.detach()
        self._written = _written(b_EOR), _written(scaling_E)
        self.dtype = a_ERI.dtype if a_ERI.dtype == b_EOR.dtype and None not in self._written else None
        self._taken: dict[int, tuple[Tensor, Tensor, float]] = {}

    def are_of(self, a_ERI: Tensor, b_EOR: Tensor, scaling_E: Tensor) -> bool:
        """Whether they are these tensors' of now; one that was moved or cast has other memory."""
        return (
            self._a_ERI.data_ptr() == a_ERI.data_ptr()
            and self._b_EOR.data_ptr() == b_EOR.data_ptr()
            and self._scaling_E.data_ptr() == scaling_E.data_ptr()
            and self._written == (_written(b_EOR), _written(scaling_E))
        )

    def add_(self, y_11O: Tensor, x_11I: Tensor, token: Token) -> Tensor:
        """y += gate * scaling * B (A x) for each of the token's adapters."""
        x_I, y_O = x_11I.reshape(-1), y_11O.view(-1)
        for adapter, gate in token:
            if adapter not in self._taken:
                b_OR = self._b_EOR[adapter].contiguous()
                self._taken[adapter] = self._a_ERI[adapter], b_OR, self._scaling_E[adapter].item()
            a_RI, b_OR, scaling = self._taken[adapter]
            y_O.addmv_(b_OR, a_RI.mv(x_I), alpha=gate * scaling)
        return y_11O


def _written(tensor: Tensor) -> int | None:
    """How often a tensor was written to; of one that was made in inference mode nobody knows."""
    return None if tensor.is_inference() else tensor._version
