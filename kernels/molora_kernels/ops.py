"""The public ops: they validate, cast at the border and choose an implementation and, by shape, its regime.

Legend: T tokens, K top-k, G sibling linears, E adapters, R rank, I in-features, O out-features of all siblings.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from molora_kernels.backend import HAS_TRITON, INTERPRETED, fusing, triton_runs_on
from molora_kernels.cpu import routed_linears_cpu
from molora_kernels.gradients import addressable, backward, save_for_backward, whole_rows
from molora_kernels.plan import Plan
from molora_kernels.reference import routed_linears_reference
from molora_kernels.tiles import sizes_of_cuts

if HAS_TRITON:
    from molora_kernels import decode as decoding
    from molora_kernels.arithmetic import may_overlap
    from molora_kernels.grouped import grouped
if fusing is not None:
    from molora_kernels.pairing import sort_twice

Impl = Literal["auto", "torch", "triton"]

_MAX_FUSED_COLUMNS = 256  # of all adapters: beyond it the columns that a token did not select cost more than sorting
_MAX_UNSORTED_TOKENS = 256  # of so few, sorting takes longer than the columns that it saves
_MAX_UNSORTED_TOKENS_OF_A_BLEND = 1024  # likewise sorting twice
_MAX_UNSORTED_COLUMNS = 4096  # beyond it, walking the adapters of a block costs less
_MAX_SORTED_SCRATCH = 2**27  # elements of h, most of them never touched

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    gates: Tensor,
    plan: Plan,
    impl: Impl = "auto",
) -> Tensor:
    """Base linear plus each token's gated adapters.

    Semantics:
        y[t] = weight @ x[t] + bias
             + sum_k gates[t, k] * scaling[e] * lora_b[e] @ (lora_a[e] @ x[t]),  e = plan.ids[t, k]

    A token whose ids are all -1 gets exactly the base result: to the bit what the same call gives with a plan of no
    adapters (`weight @ x` as the kernel that runs computes it). Products accumulate in float32. The weights of every
    adapter must be finite, selected or not.

    It can be captured in a CUDA graph, with ids that change between replays. Gradients flow to x, lora_a, lora_b and
    gates, each in its own dtype. Those that Triton computes cannot be differentiated again, nor by torch.func. Its
    backward pass is grouped by adapter and works on scratch of k ranks a token; on Hopper, if x needs a gradient, for
    one linear, more than 64 tokens in 16 bits and up to 256 columns of adapters, it is one fused kernel, for which the
    forward keeps h [T, E * R], and as much again if gates need one. There, what is not finite in x or dy reaches the
    gradients of all adapters, even at a token without one. On Hopper,
    programs of a launch may wait for each other: do not run these calls on streams of different priority beside other
    kernels that wait so.

    Args:
        x: [T, I] float32, float16 or bfloat16; impl="torch" also takes float64. Autocast does not change the result.
        weight: [O, I], frozen. It, lora_a and lora_b are cast to x's dtype.
        bias: [O] or None, frozen.
        lora_a: [E, R, I]; rows past an adapter's own rank are zero.
        lora_b: [E, O, R].
        scaling: [E] float32, alpha / r, or alpha / sqrt(r) with rsLoRA; frozen.
        gates: [T, k] float32, ignored where plan.ids is -1.
        plan: from `make_plan`, on x's device.
        impl: "torch" (K-concat), "triton" (the kernels, in the regime that suits the shape), or "auto": Triton for x on
            a GPU unless it is float64 or differentiated forwards, else torch.

    Returns:
        [T, O] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or impl="triton" without a GPU or interpreter, for float64 or in
            forward-mode differentiation.
    """
    return routed_linears(
        x,
        weight,
        bias,
        lora_a.unsqueeze(0),
        lora_b,
        scaling.unsqueeze(-1),
        gates,
        plan,
        out_features=weight.shape[:1],
        impl=impl,
    )[0]


def routed_linears(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    gates: Tensor,
    plan: Plan,
    *,
    out_features: Sequence[int],
    impl: Impl = "auto",
) -> tuple[Tensor, ...]:
    """`routed_linear` for G linears that share an input (q, k, v; gate, up), with one base GEMM and one shrink.

    Semantics:
        y_g = routed_linear(x, weight[O_g], bias[O_g], lora_a[g], lora_b[:, O_g], scaling[:, g], gates, plan)
        where O_g are the g-th out_features[g] rows of the merged weight

    Args:
        x: [T, I].
        weight: [O, I], the siblings' weights merged by rows, O = sum(out_features).
        bias: [O] or None.
        lora_a: [G, E, R, I]; R is the siblings' common, padded rank.
        lora_b: [E, O, R].
        scaling: [E, G] float32.
        gates: [T, k] float32.
        plan: from `make_plan`.
        out_features: the G widths.
        impl: as in `routed_linear`.

    Returns:
        G tensors [T, out_features[g]] in x's dtype; they may be views of one [T, O].

    Raises:
        ValueError: as in `routed_linear`.
    """
    _check(x, weight, bias, lora_a, lora_b, scaling, gates, plan, out_features)
    widths = list(out_features)
    weight, bias = weight.detach().to(x.dtype), None if bias is None else bias.detach().to(x.dtype)
    lora_a, lora_b, scaling = lora_a.to(x.dtype), lora_b.to(x.dtype), scaling.detach()
    with torch.autocast(x.device.type, enabled=False):
        keep_h = _keeps_h(x, lora_a, lora_b)
        if _choose(impl, x, lora_a, lora_b, gates) == "torch":
            operands = (x, weight, bias, lora_a, lora_b, scaling, gates)
            if x.device.type == "cpu" and not _is_recorded(x, lora_a, lora_b, gates):
                return routed_linears_cpu(*operands, plan.present, widths)
            return routed_linears_reference(*operands, plan.ids, widths)
        assert plan.tables is not None  # its ids are on x's device, where Triton runs
        tables = plan.tables
        y, *_ = _routed_linears_triton(
            x,
            weight,
            bias,
            lora_a,
            lora_b,
            scaling,
            gates,
            plan.ids,
            tables.order,
            tables.offsets,
            tables.spans,
            tables.groups,
            tables.num_groups,
            widths,
            keep_h,
            keep_h and gates.requires_grad,
        )
        return tuple(y.split_with_sizes(widths, dim=1)) if len(widths) > 1 else (y,)  # a split's gradient is a copy


def sizes_to_compile(
    sizes: Iterable[int], linears: Iterable[tuple[Sequence[int], int]], device: torch.device
) -> list[int]:
    """Of these numbers of tokens, those that bring kernels which no earlier one brings; elsewhere than on Hopper, none.

    Triton compiles a kernel anew for sizes that are multiples of 16: that counts as the same here.

    Args:
        sizes: more than 64 tokens each.
        linears: for each, `out_features` and the columns G * E * R of its adapters.
    """
    if fusing is None or not fusing.runs_on(device):
        return []
    unsorted = [*linears]
    return sizes_of_cuts(sizes, [*unsorted, *((widths, 0) for widths, _ in unsorted)], device)


def base_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of a frozen weight, for forwards without adapters and without gradients.

    Up to 64 tokens of 16 bits, on Hopper or later, go through the kernel that `routed_linear` decodes with: in a chain
    of kernels its programs wait for the end of the one before it, where cuBLAS's are only launched then.

    Args:
        x: [..., I].
        weight: [O, I], of x's dtype.
        bias: [O] or None.

    Returns:
        [..., O]
    """
    if torch.is_grad_enabled() or not (HAS_TRITON and x.is_cuda):
        return F.linear(x, weight, bias)
    y: Tensor = _base_linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.reshape(*x.shape[:-1], len(weight))


@torch.library.custom_op("molora::base_linear", mutates_args=())
def _base_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == weight.dtype and may_overlap(x.device) and decoding.suits(x, weight):
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            return decoding.base(x, weight, None if bias is None else bias.contiguous())
    return F.linear(x, weight, bias)


@_base_linear.register_fake
def _fake_base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keeps_h(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether a backward pass will come that is the fused one, which gives dx, and for which the forward keeps h."""
    (num_siblings, num_adapters, rank, _), num_out = lora_a.shape, lora_b.shape[1]
    return (
        fusing is not None
        and torch.is_grad_enabled()
        and x.requires_grad
        and fusing.runs_on(x.device)
        and x.dtype in (torch.float16, torch.bfloat16)
        and num_siblings == 1
        and x.shape[0] > decoding.MAX_TOKENS
        and num_adapters * rank <= _MAX_FUSED_COLUMNS
        and x.shape[1] % 8 == 0
        and num_out % 8 == 0
    )


def _has_tangent(*tensors: Tensor) -> bool:
    return any(unpack_dual(tensor).tangent is not None for tensor in tensors)  # type: ignore[no-untyped-call]


def _is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd, in either direction, or a compiler looks on: then nothing may be done in place."""
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return needs_grad or torch.compiler.is_compiling() or _has_tangent(*tensors)


def _choose(impl: str, x: Tensor, *others: Tensor) -> str:
    has_tangent = _has_tangent(x, *others)
    if impl == "auto":
        suits = HAS_TRITON and x.is_cuda and x.dtype in _TRITON_DTYPES and not has_tangent
        return "triton" if suits else "torch"
    if impl not in ("torch", "triton"):
        raise ValueError(f'impl must be "auto", "torch" or "triton", got {impl!r}')
    if impl == "triton":
        if not triton_runs_on(x.device):
            raise ValueError(
                f'impl="triton" needs a GPU and Triton, got tensors on {x.device}; use impl="auto", or set '
                "TRITON_INTERPRET=1 before the first import to interpret the kernels"
            )
        if x.dtype not in _TRITON_DTYPES:
            raise ValueError(f'impl="triton" takes float32, float16 or bfloat16, got {x.dtype}; use impl="torch"')
        if has_tangent:
            raise ValueError('impl="triton" has no forward-mode derivative; use impl="auto" or "torch"')
    return impl


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    gates: Tensor,
    plan: Plan,
    out_features: Sequence[int],
) -> None:
    """Everything the host knows: nothing here waits for the device."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [T, I], got {x.dtype} {list(x.shape)}; flatten x to rows")
    if lora_b.ndim != 3:
        raise ValueError(f"lora_b must be [E, O, R], got {list(lora_b.shape)}")
    num_tokens, in_features = x.shape
    num_adapters, num_siblings, rank, top_k = plan.num_adapters, len(out_features), lora_b.shape[2], plan.ids.shape[1]
    for name, tensor, legend, shape in (
        ("weight", weight, "[O, I]", (sum(out_features), in_features)),
        ("bias", bias, "[O]", (sum(out_features),)),
        ("lora_a", lora_a, "[G, E, R, I]", (num_siblings, num_adapters, rank, in_features)),
        ("lora_b", lora_b, "[E, O, R]", (num_adapters, sum(out_features), rank)),
        ("scaling", scaling, "[E, G]", (num_adapters, num_siblings)),
        ("plan.ids", plan.ids, "[T, k]", (num_tokens, top_k)),
        ("gates", gates, "[T, k]", (num_tokens, top_k)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            expected, got = list(shape), list(tensor.shape)
            if name == "lora_a" and num_siblings == 1 and got[:1] == [1]:  # as routed_linear's caller knows it
                legend, expected, got = "[E, R, I]", expected[1:], got[1:]
            raise ValueError(
                f"{name} must be {legend} = {expected}, got {got}; here x is {list(x.shape)}, "
                f"lora_b {list(lora_b.shape)}, out_features {list(out_features)}, plan.num_adapters {num_adapters}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move them to one device")


def _choose_regime(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, widths: tuple[int, ...]
) -> str:
    """Which kernels run, by shape alone; kernels/README.md says what was measured.

    decode: up to 64 tokens, bound by the bytes of the base weight. fused: more tokens on Hopper, while the columns of
    all adapters are few. sorted: the same kernel for many columns, on tokens grouped by their one adapter, or by the
    first of two. grouped: everything else, float32 and strides that no copy engine takes among it.
    """
    num_tokens, (_, num_adapters, rank, _) = x.shape[0], lora_a.shape
    if INTERPRETED or x.dtype == torch.float32:
        return "grouped"
    if decoding.suits(x, weight):
        return "decode"
    if fusing is not None and fusing.suits(x, weight, lora_a, widths):
        top_k, num_columns = ids.shape[1], num_adapters * rank
        few = {1: _MAX_UNSORTED_TOKENS, 2: _MAX_UNSORTED_TOKENS_OF_A_BLEND}.get(top_k, num_tokens)
        if num_columns <= (_MAX_FUSED_COLUMNS if num_tokens > few else _MAX_UNSORTED_COLUMNS):
            return "fused"
        num_spans, in_features = -(-num_tokens // 128), x.shape[1]
        walks_little = num_columns <= num_spans * in_features  # into the columns of all spans, against the base
        siblings_are_whole = len(widths) == 1 or num_columns % 64 == 0  # a step reads 64 columns and may not read on
        fits = num_tokens * lora_a[..., 0].numel() <= _MAX_SORTED_SCRATCH
        if (top_k == 1 or num_tokens > few) and walks_little and siblings_are_whole and fits:
            return "sorted"
    return "grouped"


@torch.library.custom_op("molora::routed_linears", mutates_args=())
def _routed_linears_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    gates: Tensor,
    ids: Tensor,
    order: Tensor,
    offsets: Tensor,
    spans: Tensor,
    groups: Tensor,
    num_groups: Tensor,
    out_features: Sequence[int],
    keep_h: bool,
    keep_u: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    widths, scaling, gates = tuple(out_features), scaling.float().contiguous(), gates.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0]), *_kept(x, lora_a, False, False)
    if keep_h:
        x, weight, lora_a = (addressable(tensor) for tensor in (x, weight, lora_a))
    operands = (x, weight, bias, lora_a, lora_b, scaling, gates, ids)
    regime = "fused" if keep_h else _choose_regime(x, weight, lora_a, lora_b, ids, widths)
    tables = (order, offsets, spans)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        if regime == "decode":
            y = decoding.decode(*operands, groups, num_groups, widths)
        elif regime == "sorted" and ids.shape[1] == 2:
            y = sort_twice(*operands, *tables, widths)
        elif regime in ("fused", "sorted"):
            y, h, u = fusing.fused(*operands, *tables, widths, sort=regime == "sorted", keep_h=keep_h, keep_u=keep_u)
            if keep_h:
                return y, whole_rows(h), x.new_empty(0) if u is None else whole_rows(u)
        else:
            y = grouped(*operands, order, offsets, widths)
    return y, *_kept(x, lora_a, False, False)


def _kept(x: Tensor, lora_a: Tensor, keep_h: bool, keep_u: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], (lora_a.shape[1] * lora_a.shape[2] + 7) // 8 * 8)  # rows of whole 16 bytes
    return x.new_empty(shape if keep_h else 0), x.new_empty(shape if keep_u else 0)


@_routed_linears_triton.register_fake
def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, lora_a, (keep_h, keep_u) = args[0], args[1], args[3], args[14:]
    return x.new_empty(x.shape[0], weight.shape[0]), *_kept(x, lora_a, keep_h, keep_u)


_routed_linears_triton.register_autograd(backward, setup_context=save_for_backward)
