"""The plan: which adapters each token gets, and an order in which neighbours share one.

Legend: T tokens, K top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from molora_kernels.backend import triton_runs_on


@dataclass(frozen=True)
class Plan:
    """One routing decision per token, shared by every adapted linear of a forward.

    Attributes:
        ids: [T, K] int32, contiguous, each in [-1, num_adapters); -1 is no adapter.
        num_adapters: E.
        order: [T] int32, the tokens sorted by their smallest active id, those without one last, so that a tile
            of consecutive entries meets few adapters. None on a device where no Triton kernel can run.
    """

    ids: Tensor
    num_adapters: int
    order: Tensor | None


def make_plan(ids: Tensor, num_adapters: int, check: bool = False) -> Plan:
    """Plan the routes of T tokens, on the device of `ids` and without waiting for it.

    It can be captured in a CUDA graph, with ids that change between replays, unless `check` is set.

    Args:
        ids: [T, K] int32, the adapters of each token; -1 is none. Equal ids in one row add up.
        num_adapters: E, at least 1.
        check: raise if an id lies outside [-1, E), at the price of a wait for the device. Without it such an id
            acts as -1.

    Raises:
        ValueError: ids is not an int32 matrix with a column, num_adapters is not positive, or `check` found an
            id out of range.
    """
    if ids.dtype != torch.int32 or ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(
            f"ids must be an int32 tensor [T, k] with k >= 1, got {ids.dtype} {list(ids.shape)}; "
            "for one adapter per token pass ids[:, None].to(torch.int32)"
        )
    if num_adapters < 1:
        raise ValueError(f"num_adapters must be at least 1, got {num_adapters}")
    valid_TK = (ids >= 0) & (ids < num_adapters)
    if check:
        wrong = ids[~valid_TK & (ids != -1)]
        if wrong.numel():
            raise ValueError(
                f"ids must lie in [-1, {num_adapters}), got {wrong[0].item()}; use -1 for a token without an adapter"
            )
    ids_TK = torch.where(valid_TK, ids, -1).contiguous()
    if not triton_runs_on(ids.device):
        return Plan(ids_TK, num_adapters, order=None)
    smallest_T = torch.where(valid_TK, ids, num_adapters).amin(dim=1)
    return Plan(ids_TK, num_adapters, order=smallest_T.argsort(stable=True).to(torch.int32))
