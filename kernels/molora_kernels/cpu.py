"""One token on the CPU: a decode step, where the host's own work decides.

A token's products with its adapters take no longer than calling them, and the base's weights, as they stream through
the caches, leave none of the host's code and data there: to check, cast and slice a linear's tensors costs more than
the adapters' arithmetic. So the host reads the routes once a forward (`find_token`), a linear slices an adapter once
for all (`AdapterViews`), and is left with three calls for each adapter that acts.

There is no backward here, and nothing is checked (`ops.py` does that).

Legend: T tokens, K top-k, E adapters, R rank, I in-features, O out-features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from molora_kernels.plan import Plan

Token = list[tuple[int, float]]
"""The adapters of one token with their gates. Equal adapters add up; none is the base."""


def find_token(plan: Plan, gates_TK: Tensor) -> Token | None:
    """The routes of a forward of one token; None where there are more, or `AdapterViews` would not do.

    It would not off the CPU, under autocast, or where operations do not `act_at_once`.
    """
    if len(plan.ids) != 1 or plan.ids.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not act_at_once():
        return None
    routes = zip(plan.ids[0].tolist(), gates_TK[0].tolist(), strict=True)
    return [(adapter, gate) for adapter, gate in routes if adapter >= 0]


def act_at_once() -> bool:
    """Whether operations run as they are called, recorded neither by autograd nor by a compiler."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class AdapterViews:
    """The adapters of one linear, each sliced when it first acts. They follow the tensors' values.

    Attributes:
        dtype: of A and B, which x must share; None where A and B differ.
    """

    def __init__(self, a_ERI: Tensor, b_EOR: Tensor, scaling_E: Tensor) -> None:
        self._a_ERI, self._b_EOR, self._scaling_E = a_ERI.detach(), b_EOR.detach(), scaling_E.detach()
        self.dtype = a_ERI.dtype if a_ERI.dtype == b_EOR.dtype else None
        self._views: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def show(self, a_ERI: Tensor, b_EOR: Tensor, scaling_E: Tensor) -> bool:
        """Whether these are the tensors in view; one that was moved or cast has other memory."""
        return (
            self._a_ERI.data_ptr() == a_ERI.data_ptr()
            and self._b_EOR.data_ptr() == b_EOR.data_ptr()
            and self._scaling_E.data_ptr() == scaling_E.data_ptr()
        )

    def add_(self, y_11O: Tensor, x_11I: Tensor, token: Token) -> Tensor:
        """y += gate * scaling * B (A x) for each of the token's adapters."""
        for adapter, gate in token:
            if adapter not in self._views:
                b_1RO = self._b_EOR[adapter : adapter + 1].mT
                self._views[adapter] = self._a_ERI[adapter], b_1RO, self._scaling_E[adapter]
            a_RI, b_1RO, scaling = self._views[adapter]
            y_11O.baddbmm_(F.linear(x_11I, a_RI), b_1RO, alpha=gate * scaling.item())
        return y_11O
