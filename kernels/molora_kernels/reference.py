"""The definition of correct, in plain torch: K-concat, differentiable by autograd, on any device.

The ranks of all adapters stand side by side, so a bank of E adapters is two GEMMs and the route is a mask between
them: H = x A_all^T, zero except where a token selected the adapter, then y = (x W^T + bias) + H B_all. It costs
E * R columns whatever the routes are. It knows nothing about Triton, and checks nothing (`ops.py` does).

Legend: T tokens, K top-k, G sibling linears, E adapters, R rank, I in-features, O out-features of all siblings.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def routed_linears_reference(
    x_TI: Tensor,
    w_OI: Tensor,
    bias_O: Tensor | None,
    a_GERI: Tensor,
    b_EOR: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    out_features: Sequence[int],
) -> tuple[Tensor, ...]:
    """`routed_linears` on operands that share x's dtype, and a plan's `ids`."""
    num_tokens, (num_siblings, num_adapters, rank, _) = x_TI.shape[0], a_GERI.shape
    base_TO = F.linear(x_TI, w_OI, bias_O)

    # Column E collects the gates of no adapter and is dropped, so whatever they hold (NaN too) goes nowhere.
    column_TK = torch.where(ids_TK < 0, num_adapters, ids_TK).long()
    gate_TE = gates_TK.new_zeros(num_tokens, num_adapters + 1).scatter_add(1, column_TK, gates_TK)[:, :-1]
    off_TE = column_TK.new_ones(num_tokens, num_adapters + 1, dtype=torch.bool).scatter(1, column_TK, False)[:, :-1]

    h_TGER = F.linear(x_TI, a_GERI.flatten(0, 2)).view(num_tokens, num_siblings, num_adapters, rank)
    h_TGER = h_TGER.masked_fill(off_TE[:, None, :, None], 0)  # not a product: 0 * inf is not 0
    h_TGER = (h_TGER * (gate_TE[:, None, :] * scaling_EG.t())[..., None]).to(x_TI.dtype)

    # addmm adds the base inside the GEMM's accumulator, so the adapters' share is never rounded by itself.
    # B_all is flattened as [O, E * R]: a view where the bank stores it so, else a copy of whole rows.
    widths = list(out_features)
    siblings = zip(base_TO.split_with_sizes(widths, dim=1), b_EOR.split_with_sizes(widths, dim=1), strict=True)
    return tuple(
        torch.addmm(base, h_TGER[:, g].flatten(1), b.transpose(0, 1).flatten(1).t())
        for g, (base, b) in enumerate(siblings)
    )
