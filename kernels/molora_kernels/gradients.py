"""The backward pass of `routed_linears` under Triton: what it keeps, and by which kernels it differentiates.

Legend: T tokens, K top-k, G sibling linears, E adapters, R rank, J = E * R, I in-features, O out-features of all
siblings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molora_kernels.backend import HAS_TRITON, fusing

if HAS_TRITON:
    from molora_kernels.grouped_backward import Wanted, grouped_backward


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
    u: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, G and, unless u is a tensor [0], dgates; see `fused_backward`."""
    dy, weight, lora_a = (addressable(tensor) for tensor in (dy, weight, lora_a))
    routing = (scaling.float().contiguous(), gates.float().contiguous(), ids, order, spans)
    with torch.cuda.device_of(dy):  # type: ignore[no-untyped-call]
        dx, g, dgates = fusing.fused_backward(dy, weight, lora_a[0], lora_b, *routing, u if len(u) else None)
    return dx, whole_rows(g), gates.new_empty(0) if dgates is None else dgates.to(gates.dtype)


@_dx_triton.register_fake
def _fake_dx(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy, weight, lora_a, gates, u = args[0], args[1], args[2], args[5], args[9]
    g = dy.new_empty(dy.shape[0], (lora_a.shape[1] * lora_a.shape[2] + 7) // 8 * 8)
    return dy.new_empty(dy.shape[0], weight.shape[1]), g, gates.new_empty(gates.shape if len(u) else 0)


@torch.library.custom_op("molora::routed_linears_grads", mutates_args=())
def _grads_triton(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    gates: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    out_features: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routing = (scaling.float().contiguous(), gates.float().contiguous(), ids, order, offsets)
    with torch.cuda.device_of(dy):  # type: ignore[no-untyped-call]
        widths, wants = tuple(out_features), Wanted(*wanted)
        dx, da, db, dgates = grouped_backward(dy, x, weight, lora_a, lora_b, *routing, widths, wants)
    return dx, da, db, dgates.to(gates.dtype)


@_grads_triton.register_fake
def _fake_grads(*args: Any) -> tuple[Tensor, ...]:
    x, (_, _, _, lora_a, lora_b, _, gates, *_, wanted) = args[1], args
    grads = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        lora_a.new_empty(lora_a.transpose(0, 1).shape).transpose(0, 1),
        torch.empty_like(lora_b),
        torch.empty_like(gates, memory_format=torch.contiguous_format),
    )
    return tuple(grad if needed else grad.new_empty(0) for grad, needed in zip(grads, wanted, strict=True))


def addressable(tensor: Tensor) -> Tensor:
    """The same values where the copy engine can read them."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def whole_rows(matrix: Tensor) -> Tensor:
    """A matrix with the padding that its rows have in memory."""
    return matrix.as_strided((matrix.shape[0], matrix.stride(0)), (matrix.stride(0), 1))


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.out_features, ctx.kept_h, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, dy_TO: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError('these gradients cannot be differentiated again (create_graph=True); use impl="torch"')
    if dy_TO is None:
        return (None,) * 16
    differentiate = _differentiate_fused if ctx.kept_h else _differentiate_grouped
    with torch.autocast(dy_TO.device.type, enabled=False):
        return *differentiate(ctx, dy_TO), *[None] * 9


def _differentiate_fused(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
    """dx, G and dgates by kernels, dA = G^T x and dB = dy^T H by the library: G and H are masked, so one product serves
    all adapters, and sums in a fixed order."""
    x_TI, weight, _, a_1ERI, b_EOR, scaling_E1, gates_TK, ids_TK, order, _, spans, *_, h_TJ, u_TJ = ctx.saved_tensors
    _, _, _, needs_a, needs_b, _, needs_gates, *_ = ctx.needs_input_grad
    _, E, R, _ = a_1ERI.shape
    routing = (scaling_E1, gates_TK, ids_TK, order, spans)
    dx, g_TJ, dgates = _dx_triton(dy_TO, weight, a_1ERI, b_EOR, *routing, u_TJ)
    da = (g_TJ[:, : E * R].t() @ x_TI).view_as(a_1ERI) if needs_a else None
    db = (dy_TO.t() @ h_TJ[:, : E * R]).view(-1, E, R).transpose(0, 1) if needs_b else None
    return dx, None, None, da, db, None, dgates if needs_gates else None


def _differentiate_grouped(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
    x_TI, weight, _, *routed, order, offsets, _, _, _, _, _ = ctx.saved_tensors
    needs_x, _, _, needs_a, needs_b, _, needs_gates, *_ = ctx.needs_input_grad
    wanted = [needs_x, needs_a, needs_b, needs_gates]
    grads = _grads_triton(dy_TO, x_TI, weight, *routed, order, offsets, ctx.out_features, wanted)
    dx, da, db, dgates = (grad if needed else None for grad, needed in zip(grads, wanted, strict=True))
    return dx, None, None, da, db, None, dgates
