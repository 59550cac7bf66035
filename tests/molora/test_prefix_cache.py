import pytest
import torch
from transformers import DynamicCache

from molora.prefix_cache import Encoding, PrefixCache

BASE = Encoding(0, None)
X4, X6, Y4 = Encoding(4, "x"), Encoding(6, "x"), Encoding(4, "y")
IDS = tuple(range(10, 20))


def filled(length: int, *, mark: float = 0.0, num_layers: int = 2) -> DynamicCache:
    """Keys that hold their own positions and a mark."""
    cache = DynamicCache()
    keys = torch.arange(length, dtype=torch.float32).view(1, 1, length, 1) + mark
    for layer in range(num_layers):
        cache.update(keys.clone(), -keys, layer)
    return cache


def routes(encoding: Encoding, length: int) -> list:
    return [[] if t < encoding.base_length(length) else [(encoding.digest, 1.0)] for t in range(length)]


def put(store: PrefixCache, ids: tuple[int, ...], encoding: Encoding, *, mark: float = 0.0) -> None:
    store.put([*ids, 99], encoding, routes(encoding, len(ids)), filled(len(ids), mark=mark))


@pytest.mark.parametrize(
    ("old", "new", "num_reused", "num_reencoded"),
    [
        (BASE, BASE, 9, 0),
        (BASE, X4, 4, 0),
        (X4, X4, 9, 0),
        (X4, BASE, 4, 5),
        (X4, X6, 4, 2),
        (X6, X4, 4, 0),
        (X4, Y4, 4, 0),
        (Encoding(99, "x"), BASE, 9, 0),
        (BASE, Encoding(99, "x"), 9, 0),
        (Encoding(0, "x"), BASE, 0, 9),
        (Encoding(0, "x"), Encoding(0, "y"), 0, 0),
        (Encoding(7, None), BASE, 9, 0),
    ],
)
def test_what_may_be_reused(old, new, num_reused, num_reencoded):
    store = PrefixCache()
    put(store, IDS, old)
    reuse = store.take(IDS, new)
    assert (reuse.num_reused, reuse.num_reencoded, reuse.num_recomputed) == (num_reused, num_reencoded, 0)
    assert list(reuse.routes) == routes(old, 10)[:num_reused]
    assert reuse.cache.get_seq_length() == num_reused


def test_the_longest_prefix_wins_and_is_a_copy():
    store = PrefixCache()
    put(store, IDS[:6], BASE, mark=100)
    put(store, (*IDS[:3], 50), BASE, mark=200)
    reuse = store.take((*IDS[:8], 51), BASE)
    assert reuse.num_reused == 6
    assert reuse.cache.layers[1].keys.flatten().tolist() == [100, 101, 102, 103, 104, 105]
    reuse.cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    reuse.cache.layers[1].keys.zero_()
    again = store.take((*IDS[:8], 51), BASE)
    assert again.cache.layers[1].values.flatten().tolist() == [-100, -101, -102, -103, -104, -105]


def test_the_last_token_is_always_left_to_compute():
    store = PrefixCache()
    put(store, IDS, BASE)
    assert store.take(IDS[:1], BASE).num_reused == 0
    assert store.take(IDS[:4], BASE).num_reused == 3
    assert store.take((1, 2), BASE).num_reused == 0


def test_a_sequence_that_is_continued_is_replaced():
    store = PrefixCache()
    put(store, IDS[:5], X4)
    put(store, IDS, X4)
    assert len(store) == 1
    put(store, IDS, Y4)
    assert len(store) == 2, "another route's tokens are not the same"
    put(store, IDS, BASE)
    put(store, IDS, Encoding(3, None))
    assert len(store) == 3


def test_the_least_recently_used_goes_first():
    store = PrefixCache(max_sequences=2)
    first, second, third = ((start, start + 1, start + 2) for start in (10, 20, 30))
    put(store, first, BASE)
    put(store, second, BASE)
    store.take((*first, 5), BASE)
    put(store, third, BASE)
    assert len(store) == 2
    assert [store.take((*ids, 5), BASE).num_reused for ids in (first, second, third)] == [3, 0, 3]
    store.clear()
    assert len(store) == 0
    assert store.take((*first, 5), BASE).num_reused == 0


def test_nothing_is_kept():
    store = PrefixCache(max_sequences=0)
    put(store, IDS, BASE)
    assert len(store) == 0
    assert store.take(IDS, BASE).num_reused == 0
    with pytest.raises(ValueError, match="max_sequences is -1; expected 0"):
        PrefixCache(-1)


def test_nothing_was_computed():
    store = PrefixCache()
    store.put(IDS, BASE, [], DynamicCache())
    assert len(store) == 0


def test_a_forward_that_failed_leaves_no_trace():
    """It may have written keys into some layers, and into none of the others."""
    store = PrefixCache()
    cache = filled(4)
    cache.update(torch.full((1, 1, 3, 1), 77.0), torch.full((1, 1, 3, 1), 77.0), 0)
    store.put(IDS[:7], BASE, routes(BASE, 4), cache)
    reuse = store.take(IDS, BASE)
    assert reuse.num_reused == 4
    assert [layer.keys.flatten().tolist() for layer in reuse.cache.layers] == [[0, 1, 2, 3]] * 2
    store.clear()
    first_layer_only = DynamicCache()
    first_layer_only.update(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), 0)
    store.put(IDS[:3], BASE, [], first_layer_only)
    assert len(store) == 0
