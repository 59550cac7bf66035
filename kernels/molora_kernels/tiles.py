"""How the fused regime cuts its work, and what a cut costs. Knows nothing about kernels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Tiles:
    """How y is cut: block_t tokens by block_o rows of W, in a pipeline of num_stages blocks of 64 in-features.

    H is cut into items of h_tokens by block_j columns. cost_us is the time of a tile and its epilogue at 4096
    in-features, on an H200 (kernels/results): but for the largest, bytes from the L2 cache bound it.
    """

    block_t: int
    block_o: int
    block_j: int
    num_stages: int
    num_registers: int
    cost_us: float

    @property
    def h_tokens(self) -> int:
        return 256 if self.block_o == 256 else self.block_t

    @property
    def item_cost_us(self) -> float:
        return min(self.cost_us, _COST_OF_A_ROW_US * (self.h_tokens + self.block_j))

    def count_items(self, num_tokens: int, num_columns: int) -> int:
        return _cdiv(num_tokens, self.h_tokens) * _cdiv(num_columns, self.block_j)

    def count_tiles(self, num_tokens: int, out_features: int) -> int:
        return _cdiv(num_tokens, self.block_t) * _cdiv(out_features, self.block_o)


_TILES = (
    Tiles(128, 256, 128, num_stages=4, num_registers=168, cost_us=44.0),
    Tiles(128, 128, 128, num_stages=5, num_registers=168, cost_us=23.8),
    Tiles(128, 64, 64, num_stages=8, num_registers=104, cost_us=16.0),
    Tiles(64, 64, 64, num_stages=11, num_registers=80, cost_us=11.5),
)
_SMALLEST_BLOCK_J = 32
_COST_OF_A_ROW_US = 0.09  # of 4096 in-features, from the L2 cache


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)


def choose_tiles(num_tokens: int, widths: tuple[int, ...], num_columns: int, device: torch.device) -> Tiles | None:
    """The tiles whose rounds over the GPU take least, of those that no boundary between siblings cuts.

    Where a last round has room for them, smaller items of H are ready sooner.
    """
    whole = [tiles for tiles in _TILES if all(width % tiles.block_o == 0 for width in widths[:-1])]
    finer = [replace(tiles, block_j=tiles.block_j >> i) for tiles in whole for i in range(3)]
    candidates = tuple(tiles for tiles in finer if tiles.block_j >= _SMALLEST_BLOCK_J)
    return _cheapest(candidates, num_tokens, sum(widths), num_columns, device)


def choose_backward_tiles(num_tokens: int, in_features: int, num_columns: int, device: torch.device) -> Tiles:
    """Likewise where the right operands' rows are summed over: the kernel then halves no tile by columns."""
    candidates = tuple(tiles for tiles in _TILES if tiles.block_t == 128)
    tiles = _cheapest(candidates, num_tokens, in_features, num_columns, device)
    assert tiles is not None
    return tiles


def sizes_of_cuts(
    sizes: Iterable[int], linears: Iterable[tuple[Sequence[int], int]], device: torch.device
) -> list[int]:
    """Of these numbers of tokens, the first for each way to cut that any of them brings.

    Args:
        linears: of each, the siblings' widths and the columns of their adapters.
    """
    shapes = {(tuple(widths), num_columns) for widths, num_columns in linears}
    seen: set[Tiles | None] = {None}
    found = []
    for size in sizes:
        cuts = {choose_tiles(size, *shape, device) for shape in shapes}
        if not cuts <= seen:
            found.append(size)
            seen |= cuts
    return found


@lru_cache(maxsize=4096)
def _cheapest(
    candidates: tuple[Tiles, ...], num_tokens: int, out_features: int, num_columns: int, device: torch.device
) -> Tiles | None:
    num_sms = count_sms(device)

    def cost(tiles: Tiles) -> tuple[float, int]:
        """Programs take the work in turns, items first: of the first program, and of the first that has no item."""
        num_items = tiles.count_items(num_tokens, num_columns)
        num_tiles = tiles.count_tiles(num_tokens, out_features)
        rounds, rounds_of_items = _cdiv(num_items + num_tiles, num_sms), _cdiv(num_items, num_sms)
        first = rounds_of_items * tiles.item_cost_us + (rounds - rounds_of_items) * tiles.cost_us
        return max(first, _cdiv(num_tiles, num_sms) * tiles.cost_us), tiles.block_j

    return min(candidates, key=cost, default=None)


def count_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
