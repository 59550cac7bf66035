"""How the fused regime cuts its work, and what a cut costs. Knows nothing about kernels."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """How y is cut: block_t tokens by block_o rows of W, in a pipeline of num_stages blocks of 64 in-features.

    H is cut into items of h_tokens by block_j columns. cost_us is the time of a tile and its epilogue at 4096
    in-features, on an H200 (kernels/results): below 256 rows the bytes from the L2 cache bound it, not arithmetic.
    """

    block_t: int
    block_o: int
    num_stages: int
    num_registers: int
    cost_us: float

    @property
    def block_j(self) -> int:
        return min(self.block_o, 128)

    @property
    def h_tokens(self) -> int:
        return 256 if self.block_o == 256 else self.block_t

    def count_items(self, num_tokens: int, num_columns: int) -> int:
        return _cdiv(num_tokens, self.h_tokens) * _cdiv(num_columns, self.block_j)

    def count_tiles(self, num_tokens: int, out_features: int) -> int:
        return _cdiv(num_tokens, self.block_t) * _cdiv(out_features, self.block_o)


_TILES = (
    Tiles(128, 256, 4, 168, 44.0),
    Tiles(128, 128, 5, 168, 22.5),
    Tiles(128, 64, 8, 104, 16.0),
    Tiles(64, 64, 11, 80, 11.5),
)


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)


def choose_tiles(
    num_tokens: int, widths: tuple[int, ...], num_columns: int, device: torch.device, block_t: int | None = None
) -> Tiles | None:
    """The tiles whose rounds over the GPU take least, of those that no boundary between siblings cuts."""
    num_sms = count_sms(device)

    def cost_us(tiles: Tiles) -> float:
        num_items = tiles.count_items(num_tokens, num_columns)
        work = num_items + tiles.count_tiles(num_tokens, sum(widths))
        return _cdiv(work, num_sms) * tiles.cost_us

    fitting = [tiles for tiles in _TILES if block_t in (None, tiles.block_t)]
    whole = [tiles for tiles in fitting if all(width % tiles.block_o == 0 for width in widths[:-1])]
    return min(whole, key=cost_us, default=None)


def count_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
