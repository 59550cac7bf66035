"""The backward pass of `routed_linears` under Triton: what it keeps, and by which kernels it differentiates.

Legend: T tokens, K top-k, G sibling linears, E adapters, R rank, J = E * R, I in-features, O out-features of all
siblings.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molora_kernels.backend import fusing
from molora_kernels.reference import routed_linears_reference


@torch.library.custom_op("molora::routed_linear_dx", mutates_args=())
def _dx_triton(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    gates: Tensor,
    ids: Tensor,
    order: Tensor,
    spans: Tensor,
) -> tuple[Tensor, Tensor]:
    dy, weight, lora_a = (addressable(tensor) for tensor in (dy, weight, lora_a))
    routing = (scaling.float().contiguous(), gates.float().contiguous(), ids, order, spans)
    with torch.cuda.device_of(dy):  # type: ignore[no-untyped-call]
        dx, g = fusing.fused_backward(dy, weight, lora_a[0], lora_b, *routing)
    return dx, whole_rows(g)


@_dx_triton.register_fake
def _fake_dx(dy: Tensor, weight: Tensor, lora_a: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    num_columns = lora_a.shape[1] * lora_a.shape[2]
    return dy.new_empty(dy.shape[0], weight.shape[1]), dy.new_empty(dy.shape[0], (num_columns + 7) // 8 * 8)


def addressable(tensor: Tensor) -> Tensor:
    """The same values where the copy engine can read them."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def whole_rows(matrix: Tensor) -> Tensor:
    """A matrix with the padding that its rows have in memory."""
    return matrix.as_strided((matrix.shape[0], matrix.stride(0)), (matrix.stride(0), 1))


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.out_features, ctx.kept_h = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, dy_TO: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError('these gradients cannot be differentiated again (create_graph=True); use impl="torch"')
    if dy_TO is None:
        return (None,) * 15
    differentiate = _differentiate_fused if ctx.kept_h else _differentiate_reference
    with torch.autocast(dy_TO.device.type, enabled=False):
        return *differentiate(ctx, dy_TO), *[None] * 8


def _differentiate_fused(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
    """dx and G by the kernel, dA = G^T x and dB = dy^T H by the library: both are masked, so one product serves all
    adapters, and sums in a fixed order."""
    x_TI, weight, _, a_1ERI, b_EOR, scaling_E1, gates_TK, ids_TK, order, _, spans, *_, h_TJ = ctx.saved_tensors
    needs_x, _, _, needs_a, needs_b, _, needs_gates, *_ = ctx.needs_input_grad
    _, E, R, _ = a_1ERI.shape
    dx = da = db = dgates = None
    if needs_x or needs_a:
        dx, g_TJ = _dx_triton(dy_TO, weight, a_1ERI, b_EOR, scaling_E1, gates_TK, ids_TK, order, spans)
        if needs_a:
            da = (g_TJ[:, : E * R].t() @ x_TI).view_as(a_1ERI)
    if needs_b:
        db = (dy_TO.t() @ h_TJ[:, : E * R]).view(-1, E, R).transpose(0, 1)
    if needs_gates:
        u_TER = F.linear(x_TI, a_1ERI.flatten(0, 2)).view(-1, E, R).float()
        v_TER = (dy_TO @ b_EOR.transpose(0, 1).flatten(1)).view(-1, E, R).float()
        dgate_TE = (u_TER * v_TER).sum(dim=2) * scaling_E1.squeeze(1)
        dgates = dgate_TE.gather(1, ids_TK.clamp(min=0).long()).masked_fill(ids_TK < 0, 0).to(gates_TK.dtype)
    return dx if needs_x else None, None, None, da, db, None, dgates


def _differentiate_reference(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
    """Recompute the torch implementation and differentiate it: exact wherever the forward ran."""
    *tensors, ids = ctx.saved_tensors[:8]
    needed = [tensor is not None and need for tensor, need in zip(tensors, ctx.needs_input_grad, strict=False)]
    leaves: list[Any] = [
        tensor if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip(tensors, needed, strict=True)
    ]
    operands = (*leaves, ids, ctx.out_features)
    with torch.enable_grad():
        y_per_sibling = routed_linears_reference(*operands)
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(y_per_sibling, wanted, dy_TO.split_with_sizes(ctx.out_features, dim=1)))
    return tuple(next(grads) if need else None for need in needed)
