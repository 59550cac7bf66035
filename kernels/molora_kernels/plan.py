"""The plan: which adapters each token gets, and the tables that the kernels walk.

Legend: T tokens, K top-k, E adapters.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from molora_kernels.backend import HAS_TRITON, triton_runs_on
from molora_kernels.cpu import Present, find_present

if HAS_TRITON:
    from molora_kernels.plan_tables import build_tables


@dataclass(frozen=True)
class Tables:
    """What the Triton kernels read beside the ids; all int32, on the device.

    Attributes:
        order: [T], the tokens sorted by their smallest active id, those without one last; stable.
        offsets: [E + 1], where each adapter's run begins in `order`; the last entry is where inactive tokens begin.
        spans: [T / 128, 2], the lowest and the highest id of each 128 tokens; (E, -1) where none is active.
        groups: [min(E, T * K)], the adapters present, ascending; for more than 128 tokens empty.
        num_groups: [1], how many of `groups` are written; likewise.
    """

    order: Tensor
    offsets: Tensor
    spans: Tensor
    groups: Tensor
    num_groups: Tensor


@dataclass(frozen=True)
class Plan:
    """One routing decision per token, shared by every adapted linear of a forward.

    Attributes:
        ids: [T, K] int32, contiguous, each in [-1, num_adapters); -1 is no adapter.
        num_adapters: E, of the bank.
        tables: None on a device where no Triton kernel can run.
    """

    ids: Tensor
    num_adapters: int
    tables: Tables | None

    @cached_property
    def present(self) -> Present | None:
        """What the host knows of the ids of a plan on the CPU; None where no adapter acts."""
        return find_present(self.ids)


def make_plan(ids: Tensor, num_adapters: int, check: bool = False) -> Plan:
    """Plan the routes of T tokens, on the device of `ids` and without waiting for it.

    It is one launch for up to 128 tokens and two for more, and can be captured in a CUDA graph, with ids that change
    between replays, unless `check` is set.

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
    if check:
        wrong = ids[(ids < -1) | (ids >= num_adapters)]
        if wrong.numel():
            raise ValueError(
                f"ids must lie in [-1, {num_adapters}), got {wrong[0].item()}; use -1 for a token without an adapter"
            )
    if triton_runs_on(ids.device):
        ids_TK, *tables = _build_tables(ids, num_adapters)
        return Plan(ids_TK, num_adapters, Tables(*tables))
    return Plan(torch.where((ids >= 0) & (ids < num_adapters), ids, -1).contiguous(), num_adapters, None)


@torch.library.custom_op("molora::make_plan", mutates_args=())
def _build_tables(ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(ids):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        return build_tables(ids, num_adapters)


@_build_tables.register_fake
def _fake(ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (T, K), E, small = ids.shape, num_adapters, ids.shape[0] <= 128
    sizes = [(T, K), (T,), (E + 1,), ((T + 127) // 128, 2), (min(E, T * K) if small else 0,), (1 if small else 0,)]
    ids_TK, order, offsets, spans, groups, num_groups = (ids.new_empty(size) for size in sizes)
    return ids_TK, order, offsets, spans, groups, num_groups
