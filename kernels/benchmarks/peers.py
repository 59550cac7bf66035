"""Public kernels, timed where they are installed. Each is called as its own project calls it.

Written against SGLang 0.5.23, vLLM 0.33.0 and Granite Switch 0.1.1; another version that differs fails its check and is
not timed. All take one adapter a token at gate 1, and prepare their routes outside the timed calls as ours does.

Legend: T tokens, E adapters, G siblings, R rank, I in-features, O out-features of all siblings.
"""

from functools import partial
from importlib import import_module
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.methods import Method, scaled_b
from benchmarks.problem import Layer, Problem
from benchmarks.timing import Call

DECODE_TOKENS = 256  # SGLang is told that up to so many tokens are a decode step, else a prefill


def _prepare_sglang(problem: Problem) -> list[Call]:
    """Its triton_v2 backend: the shrink hides behind the base GEMM, by tuned plans for the device."""
    plans = import_module("sglang.srt.lora.dense.plan")
    phases = import_module("sglang.srt.lora.utils").Phase
    workspace = import_module("sglang.srt.lora.workspace").LoraWorkspace()

    shape, x = problem.shape, problem.x
    runner_class = import_module("sglang.srt.lora.dense.runner").DenseLoraRunner
    runner = runner_class(workspace, max_loras=shape.adapters, device=x.device)
    runner.begin_batch(
        token_slots=problem.ids[:, 0].contiguous(),
        lora_ranks=torch.full((shape.adapters,), shape.rank, dtype=torch.int32, device=x.device),
        scalings=problem.scaling,
        num_tokens=shape.tokens,
        phase=phases.DECODE if shape.tokens <= DECODE_TOKENS else phases.PREFILL,
        graph_mode=False,
    )
    offsets = tuple(accumulate(shape.out_features, initial=0))
    plan = runner.plan_for(
        plans.DenseLoraKind.LINEAR, shape.rank, shape.in_features, offsets[-1], num_tokens=shape.tokens
    )

    def call(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        y: Tensor = runner.apply(x, partial(F.linear, x, weight), plan, a=lora_a, b=lora_b, offsets=offsets)
        return y

    return [partial(call, layer.weight, layer.lora_a, layer.lora_b.contiguous()) for layer in problem.layers]


def _prepare_vllm(problem: Problem) -> list[Call]:
    """Its dense path: split-K shrink into float32, then an expand that adds to y."""
    ops = import_module("vllm.lora.ops.triton_ops")
    caches = import_module("vllm.lora.ops.triton_ops.utils")
    caches._LORA_A_PTR_DICT.clear()  # strides by address, and an earlier problem may have had these addresses
    caches._LORA_B_PTR_DICT.clear()

    shape, x = problem.shape, problem.x
    meta = ops.LoRAKernelMeta.make(shape.adapters, shape.tokens, device=x.device)
    meta.prepare_tensors(problem.ids[:, 0].contiguous())
    routes = meta.meta_args(shape.tokens, True)

    def split(layer: Layer) -> tuple[list[Tensor], list[Tensor]]:
        a_of_siblings = layer.lora_a.split_with_sizes([shape.rank] * len(shape.out_features), dim=1)
        b_of_siblings = scaled_b(layer, problem.scaling).split_with_sizes(list(shape.out_features), dim=1)
        return [a.contiguous() for a in a_of_siblings], [b.contiguous() for b in b_of_siblings]

    def call(weight: Tensor, a_of_siblings: list[Tensor], b_of_siblings: list[Tensor]) -> Tensor:
        y = F.linear(x, weight)
        h_GTR = x.new_empty(len(shape.out_features), shape.tokens, shape.rank, dtype=torch.float32)
        ops.lora_shrink(x, a_of_siblings, h_GTR, *routes, 1.0)
        ops.lora_expand(h_GTR, b_of_siblings, y, *routes, offset_start=0, add_inputs=True)
        return y

    return [partial(call, layer.weight, *split(layer)) for layer in problem.layers]


def _prepare_granite_switch(problem: Problem) -> list[Call]:
    """One GEMM with W and every adapter's A, then B in place for the tiles that have an adapter."""
    kernels = import_module("granite_switch.kernels")
    shape, x = problem.shape, problem.x
    num_out, num_siblings = sum(shape.out_features), len(shape.out_features)
    if x.dtype != torch.bfloat16 or any(width % kernels.BLOCK_N for width in shape.out_features):
        raise ValueError(f"takes bfloat16 and multiples of {kernels.BLOCK_N} out-features")
    rank = kernels.promote_rank(shape.rank)
    index_T = problem.ids[:, 0].long() + 1
    tiles = F.pad(index_T, (0, -shape.tokens % kernels.BLOCK_M)).view(-1, kernels.BLOCK_M)
    present = F.one_hot(tiles, shape.adapters + 1).amax(dim=1)[:, 1:]
    bitmask = (present << torch.arange(shape.adapters, device=x.device)).sum(dim=1)
    widths = torch.tensor([width // kernels.BLOCK_N for width in shape.out_features])
    slice_of_tile = torch.arange(num_siblings).repeat_interleave(widths).int().to(x.device)
    columns = [[num_out + g * of_tier for of_tier in kernels.SUPPORTED_RANKS] for g in range(num_siblings)]
    first_column = torch.tensor(columns, dtype=torch.int32, device=x.device)
    adapters_of_tier = tuple(shape.adapters if of_tier == rank else 0 for of_tier in kernels.SUPPORTED_RANKS)

    def pack(layer: Layer) -> tuple[Tensor, Tensor]:
        a_EGRI = layer.lora_a.view(shape.adapters, num_siblings, shape.rank, shape.in_features)
        a_EGRI = F.pad(a_EGRI, (0, 0, 0, rank - shape.rank))
        b_EOR = F.pad(scaled_b(layer, problem.scaling), (0, rank - shape.rank))
        return kernels.build_w_ext(layer.weight, {rank: a_EGRI}), b_EOR.flatten()

    def call(w_ext: Tensor, b_packed: Tensor) -> Tensor:
        y_ext = torch.mm(x, w_ext.t())
        kernels.switch_lora_expand(
            y_ext,
            index_T,
            bitmask,
            b_packed,
            slice_of_tile,
            first_column,
            adapters_of_tier,
            num_siblings,
            kernels.BLOCK_N,
            num_out,
        )
        return y_ext[:, :num_out]

    return [partial(call, *pack(layer)) for layer in problem.layers]


_PEERS = {
    "sglang": ("sglang.srt.lora.dense.runner", _prepare_sglang),
    "vllm": ("vllm.lora.ops.triton_ops", _prepare_vllm),
    "granite-switch": ("granite_switch.kernels", _prepare_granite_switch),
}


def installed_peers() -> list[Method]:
    """The public kernels that can be imported; says which cannot, and why."""
    found = []
    for name, (module, prepare) in _PEERS.items():
        try:
            import_module(module)
        except Exception as error:  # a package without one of its own needs can raise anything
            print(f"{name}: skipped, {module} cannot be imported ({type(error).__name__}: {error})")
        else:
            found.append(Method(name, "public", False, prepare))
    return found
