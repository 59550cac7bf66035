"""Blocks of one parent: the nearest one is found, and not all are looked at for it."""

from hypothesis import given
from hypothesis import strategies as st

from molora.serving.children import Children

TOKENS = st.lists(st.integers(0, 2), max_size=6)


def num_common(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@given(blocks=st.lists(st.tuples(TOKENS, TOKENS, st.booleans(), st.booleans()), max_size=12), wanted=TOKENS)
def test_one_that_agrees_longest_is_found(
    blocks: list[tuple[list[int], list[int], bool, bool]], wanted: list[int]
) -> None:
    children, held = Children(), {}
    for number, (begin, more, settles, goes) in enumerate(blocks):
        token_ids = list(begin)
        children.add(number, token_ids)
        token_ids += more  # it grows where it lies
        if settles:
            children.settle(number)
            children.settle(number)
        if goes:
            children.remove(number, token_ids)
        else:
            held[number] = token_ids
    assert len(children) == len(held)
    if held:
        number, common = children.nearest(wanted)
        assert common == num_common(wanted, held[number])
        assert common == max(num_common(wanted, token_ids) for token_ids in held.values())


class Counted(list[int]):
    """Tokens that count how often they were cut, which is how they are compared with those that are wanted."""

    num_cuts = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        Counted.num_cuts += isinstance(index, slice)
        return super().__getitem__(index)


def test_of_many_only_the_neighbours_are_looked_at() -> None:
    children = Children()
    for number in range(2000):
        children.add(number, Counted([7, 7, 7, number, 1]))
        children.settle(number)
    Counted.num_cuts = 0
    assert children.nearest([7, 7, 7, 1234, 2]) == (1234, 4)
    assert 0 < Counted.num_cuts < 6
