"""How the fused regime cuts its work, by shape alone."""

from collections.abc import Iterator

import pytest
import torch
from molora_kernels import tiles

HOPPER = torch.device("meta")  # whose multiprocessors are counted for it


@pytest.fixture(autouse=True)
def num_sms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "count_sms", lambda _: 132)
    tiles._cheapest.cache_clear()
    yield
    tiles._cheapest.cache_clear()


@pytest.mark.parametrize(
    "linears",
    [
        [((576, 192, 192), 120), ((576,), 40), ((1536, 1536), 80), ((576,), 40)],
        [((4096, 1024, 1024), 384), ((4096,), 128), ((14336, 14336), 256), ((4096,), 128)],
    ],
    ids=["135m", "8b"],
)
def test_few_sizes_bring_every_way_to_cut(linears: list[tuple[tuple[int, ...], int]]) -> None:
    found = tiles.sizes_of_cuts(range(513, 8192, 64), linears, HOPPER)
    assert found[0] == 513
    assert 1 < len(found) <= 12
    cuts = {tiles.choose_tiles(size, *linear, HOPPER) for size in found for linear in linears}
    for size in range(513, 8193):
        assert {tiles.choose_tiles(size, *linear, HOPPER) for linear in linears} <= cuts


def test_linears_that_no_tile_suits_bring_none() -> None:
    assert tiles.sizes_of_cuts(range(65, 8192, 64), [((24, 40), 16)], HOPPER) == []
