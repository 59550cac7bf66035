"""Many tokens of two adapters each, and many columns: a sorted pass for each of the two.

Sorted by one adapter, tokens meet all the others in every block, and the fused regime would walk all columns. So a
token's smaller id goes through the sorted GEMM, in the plan's order, and its larger one is added by the grouped
kernels, in an order of its own: y is rounded twice.

Legend: T tokens, K = 2 adapters of a token, E adapters, G sibling linears, R rank, I in-features, O out-features of
all siblings.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels.fused import fused
from molora_kernels.grouped import expand_, shrink
from molora_kernels.plan_tables import build_tables


@triton.jit
def _split_fwd_kernel(ids_ptr, gates_ptr, ids_KT_ptr, gates_KT_ptr, T, BLOCK_T: tl.constexpr):
    """The smaller active id of each token and its gate, then the other."""
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    left_T = tl.load(ids_ptr + 2 * t_T, mask=t_T < T, other=-1)
    right_T = tl.load(ids_ptr + 2 * t_T + 1, mask=t_T < T, other=-1)
    swap_T = (right_T >= 0) & ((left_T < 0) | (right_T < left_T))
    left_gate_T = tl.load(gates_ptr + 2 * t_T, mask=t_T < T, other=0.0)
    right_gate_T = tl.load(gates_ptr + 2 * t_T + 1, mask=t_T < T, other=0.0)
    tl.store(ids_KT_ptr + t_T, tl.where(swap_T, right_T, left_T), mask=t_T < T)
    tl.store(ids_KT_ptr + T + t_T, tl.where(swap_T, left_T, right_T), mask=t_T < T)
    tl.store(gates_KT_ptr + t_T, tl.where(swap_T, right_gate_T, left_gate_T), mask=t_T < T)
    tl.store(gates_KT_ptr + T + t_T, tl.where(swap_T, left_gate_T, right_gate_T), mask=t_T < T)


def sort_twice(
    x_TI: Tensor,
    w_OI: Tensor,
    bias_O: Tensor | None,
    a_GERI: Tensor,
    b_EOR: Tensor,
    scaling_EG: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    order_T: Tensor,
    offsets: Tensor,
    spans: Tensor,
    widths: tuple[int, ...],
) -> Tensor:
    """`routed_linears` for two adapters a token, where `fused.suits` holds; [T, O]."""
    T, E = len(ids_TK), len(b_EOR)
    ids_KT1 = torch.empty(2, T, 1, dtype=torch.int32, device=x_TI.device)
    gates_KT1 = torch.empty(2, T, 1, dtype=torch.float32, device=x_TI.device)
    _split_fwd_kernel[triton.cdiv(T, 256),](ids_TK, gates_TK, ids_KT1, gates_KT1, T, BLOCK_T=256)
    (first, second), (first_gates, second_gates) = ids_KT1, gates_KT1
    factors = (a_GERI, b_EOR, scaling_EG)
    y_TO, *_ = fused(x_TI, w_OI, bias_O, *factors, first_gates, first, order_T, offsets, spans, widths, sort=True)
    _, order_of_second, offsets_of_second, *_ = build_tables(second, E)
    routing = (second, order_of_second, offsets_of_second)
    h_T1C = shrink(x_TI, a_GERI, scaling_EG, second_gates, *routing)
    expand_(y_TO, h_T1C, b_EOR, *routing, widths)
    return y_TO
