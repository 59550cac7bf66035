"""What the Triton kernels here share: the dot, the rounding, the order of launches and the tiles of siblings' outputs.

Legend: T tokens, O out-features of all siblings.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # as TRITON_INTERPRET stands now, for @triton.jit below


@triton.jit
def dot(left, right, acc):
    """acc + left @ right, summed in float32 and without TF32."""
    if INTERPRETED:  # the interpreter holds bfloat16 as uint16 and would multiply those
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """float32 to dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates, and subnormals wrongly: do it before
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def wait_for_previous():
    """Wait until the kernel launched before is done and what it wrote is seen, where launches may overlap."""
    if not INTERPRETED:
        gdc_wait()


@triton.jit
def let_next_start():
    """The next kernel may start beside this one once every program has said so; it must wait for what it reads."""
    if not INTERPRETED:
        gdc_launch_dependents()


def may_overlap(device: torch.device) -> bool:
    """Whether a launch may overlap the one before it: on CUDA, from compute capability 9.0 on."""
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlapping(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch that overlaps the one before it, where it may."""
    overlap = may_overlap(device)
    return {"OVERLAP": overlap, **({"launch_pdl": True} if overlap else {})}


@triton.jit
def find_rows(tile, WIDTHS: tl.constexpr, BLOCK_O: tl.constexpr):
    """The rows of O that a tile covers, as (sibling, first row, end of the sibling's rows); none crosses siblings."""
    sibling, first, end, start = 0, 0, 0, 0
    for g in tl.static_range(len(WIDTHS)):
        here = tile >= 0
        sibling = tl.where(here, g, sibling)
        first = tl.where(here, start + tile * BLOCK_O, first)
        end = tl.where(here, start + WIDTHS[g], end)
        start += WIDTHS[g]
        tile -= (WIDTHS[g] + BLOCK_O - 1) // BLOCK_O
    return sibling, first, end


def count_row_tiles(widths: tuple[int, ...], block_o: int) -> int:
    return sum(triton.cdiv(width, block_o) for width in widths)


def power_of_two(size: int, at_least: int = 16, at_most: int = 2**30) -> int:
    """The least power of two that holds size, within bounds; tl.dot takes no block under 16."""
    return int(max(at_least, min(at_most, triton.next_power_of_2(size))))
