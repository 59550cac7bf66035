"""Per-token LoRA adapters on one frozen linear. Knows nothing about models, banks or routers."""

from molora_kernels.ops import base_linear, routed_linear, routed_linears, sizes_to_compile
from molora_kernels.plan import Plan, make_plan

__all__ = ["Plan", "base_linear", "make_plan", "routed_linear", "routed_linears", "sizes_to_compile"]
