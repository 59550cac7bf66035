"""A base linear with a bank's adapters beside it, obeying the routes of the forward it is in.

Legend: E slots, R padded rank, I in-features, O out-features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from molora_kernels import routed_linear
from molora_kernels.cpu import TakenAdapters, act_at_once
from torch import Tensor, nn

from molora.adapter import LoraWeights
from molora.routing import Routes

if TYPE_CHECKING:
    from molora.siblings import Siblings


SLOTS = ("lora_a_ERI", "lora_b_EOR")
BaseLinear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class RoutedLinear(nn.Module):
    """Stands where an `nn.Linear` stood: same weight, same bias, and nothing else in the state dict.

    Adapter slots have fixed addresses and one padded rank, so loading and replacing an adapter moves no pointer.
    With no plan in its routes it is `base_linear`: torch's own, to the bit, unless an engine put another one there.
    """

    def __init__(
        self, linear: nn.Linear, routes: Routes, *, num_slots: int, max_rank: int, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.routes = routes
        like = linear.weight.new_empty(0, dtype=dtype or linear.weight.dtype)
        a_ERI = like.new_zeros(num_slots, max_rank, self.in_features)
        # Stored by rows of O, as the torch implementation reads it; the other way it would copy B on every call.
        b_EOR = like.new_zeros(self.out_features, num_slots, max_rank).transpose(0, 1)
        self.lora_a_ERI = nn.Parameter(a_ERI, requires_grad=False)
        self.lora_b_EOR = nn.Parameter(b_EOR, requires_grad=False)
        self.scaling_E: Tensor
        self.register_buffer("scaling_E", torch.zeros(num_slots, device=linear.weight.device), persistent=False)
        self.siblings: Siblings | None = None
        self.place = 0  # among them
        self.base_linear: BaseLinear = F.linear
        self._taken: TakenAdapters | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.siblings is not None and (y := self.siblings.take(self.place, x)) is not None:
            return y
        routes = self.routes
        if routes.plan is None or routes.gates_TK is None:
            return self.base_linear(x, self.weight, self.bias)
        if routes.token is not None and act_at_once() and x.ndim == 3:
            # A decode step feels how long a module's attributes take to find.
            own: dict[str, Any] = self._parameters
            buffers: dict[str, Any] = self._buffers
            tensors = own["lora_a_ERI"], own["lora_b_EOR"], buffers["scaling_E"]
            if self._taken is None or not self._taken.are_of(*tensors):
                self._taken = TakenAdapters(*tensors)
            if self._taken.dtype == x.dtype:
                return self._taken.add_(F.linear(x, own["weight"], self.bias), x, routes.token)
        y = routed_linear(
            x.reshape(-1, self.in_features),
            self.weight,
            self.bias,
            self.lora_a_ERI,
            self.lora_b_EOR,
            self.scaling_E,
            routes.gates_TK,
            routes.plan,
            impl=routes.impl,
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in SLOTS:
            del destination[prefix + name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        slots = {prefix + name: self.get_parameter(name) for name in SLOTS}
        super()._load_from_state_dict({**state_dict, **slots}, prefix, *args)

    @property
    def computed_at_once(self) -> tuple[list[int], int]:
        """Widths of the linears that one call of the kernels computes, and how many columns their adapters have."""
        widths = [self.out_features] if self.siblings is None else self.siblings.out_features
        return widths, len(widths) * self.lora_a_ERI[..., 0].numel()

    @torch.no_grad()
    def set_slot(self, slot: int, weights: LoraWeights | None) -> None:
        """Copy an adapter's pair into a slot, zero-padded to the slot's rank; None empties the slot."""
        self.lora_a_ERI[slot].zero_()
        self.lora_b_EOR[slot].zero_()
        self.scaling_E[slot] = 0.0
        if weights is not None:
            self.lora_a_ERI[slot, : weights.rank].copy_(weights.a_RI)
            self.lora_b_EOR[slot, :, : weights.rank].copy_(weights.b_OR)
            self.scaling_E[slot] = weights.scaling
            if not (torch.isfinite(self.lora_a_ERI[slot]).all() and torch.isfinite(self.lora_b_EOR[slot]).all()):
                raise ValueError(
                    f"the adapter's weights overflow {self.lora_a_ERI.dtype}; load it in bfloat16 or float32."
                )

    def get_slot(self, slot: int, rank: int) -> LoraWeights:
        """The pair in a slot, as copies on the CPU without the padding."""
        a_RI = self.lora_a_ERI[slot, :rank].detach().cpu().clone()
        b_OR = self.lora_b_EOR[slot, :, :rank].detach().cpu().clone()
        return LoraWeights(a_RI, b_OR, float(self.scaling_E[slot]))

    def extra_repr(self) -> str:
        num_slots, max_rank, _ = self.lora_a_ERI.shape
        return f"{self.in_features}, {self.out_features}, slots={num_slots}, rank={max_rank}"
