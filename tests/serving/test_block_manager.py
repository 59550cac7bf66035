import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.serving import block_manager, children
from molora.serving.block_manager import NEVER, BlockManager, BlockTable, Source

BASE = Source()
ROUTE = b"digest of a route"
OTHER = b"digest of another"
IDS = list(range(100, 122))


def run(manager: BlockManager, ids: list[int], source: Source = BASE) -> BlockTable:
    """A sequence from its opening to the last of its tokens computed."""
    table = manager.open(ids, source)
    assert manager.grow(table, len(ids))
    manager.copied(table)
    manager.commit(table, ids, len(ids))
    return table


def cached(manager: BlockManager, ids: list[int], source: Source = BASE) -> int:
    table = manager.open(ids, source)
    found = table.num_cached
    manager.close(table)
    return found


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=40, block_size=4)


def test_it_imports_the_standard_library_children_and_notes_alone() -> None:
    tree = ast.parse(Path(block_manager.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}
    assert others == {"molora.serving.children", "molora.serving.notes"}


def test_a_sequence_is_found_again_with_its_partial_tail(manager: BlockManager) -> None:
    table = run(manager, IDS)
    assert table.num_cached == 0
    again = manager.open(IDS, BASE)
    assert again.num_cached == len(IDS)
    assert again.blocks[:5] == table.blocks[:5]
    assert [(copy.source, copy.num_tokens) for copy in again.copies] == [(table.blocks[5], 2)]
    assert again.blocks[5] == again.copies[0].target != table.blocks[5]


@pytest.mark.parametrize("start", [0, 3, 4, 9, 12, 22])
def test_tokens_before_activation_are_shared_by_every_route(manager: BlockManager, start: int) -> None:
    run(manager, IDS)
    assert cached(manager, IDS, Source(start, ROUTE)) == start
    run(manager, IDS, Source(start, ROUTE))
    assert cached(manager, IDS, Source(start, ROUTE)) == len(IDS)
    assert cached(manager, IDS, Source(start, OTHER)) == start
    assert cached(manager, IDS) == len(IDS)


@pytest.mark.parametrize("start", [5, 7, 8, 9])
def test_the_base_finds_what_a_route_read_before_it_acted(manager: BlockManager, start: int) -> None:
    run(manager, IDS, Source(start, ROUTE))
    assert cached(manager, IDS) == start
    assert cached(manager, IDS, Source(12, OTHER)) == start


@pytest.mark.parametrize("start", [2, 4, 5, 8, 13])
def test_another_start_of_the_same_route_is_another_content(manager: BlockManager, start: int) -> None:
    run(manager, IDS, Source(6, ROUTE))
    assert cached(manager, IDS, Source(start, ROUTE)) == min(start, 6)


def test_salts_and_domains_share_nothing(manager: BlockManager) -> None:
    run(manager, IDS, Source(salt=b"tenant"))
    assert cached(manager, IDS) == 0
    assert cached(manager, IDS, Source(salt=b"tenant")) == len(IDS)
    keys = {tuple(run(BlockManager(9, 4, domain), IDS).keys) for domain in (b"", b"other")}
    assert len(keys) == 2


def test_a_diverging_prompt_takes_what_agrees(manager: BlockManager) -> None:
    run(manager, IDS)
    assert cached(manager, [*IDS[:10], 0, 0, 0, 0]) == 10
    assert cached(manager, [*IDS[:8], 0]) == 8
    assert cached(manager, [0, *IDS]) == 0
    assert cached(manager, IDS[:6]) == 6


def test_a_running_sequence_is_found_as_far_as_it_is(manager: BlockManager) -> None:
    table = manager.open(IDS, BASE)
    assert manager.grow(table, len(IDS))
    assert cached(manager, IDS) == 0
    manager.commit(table, IDS, 6)
    assert cached(manager, IDS) == 6
    manager.commit(table, IDS, 13)
    assert cached(manager, IDS) == 13


def test_among_many_conversations_the_longest_agreement_is_copied() -> None:
    """Also where the nearest one in tokens agrees less, as its tokens were computed otherwise."""
    manager = BlockManager(num_blocks=900, block_size=8)
    for number in range(400):
        manager.close(run(manager, [1, 2, 3, 4, 5, number], Source(2 + number % 4, ROUTE)))
    manager.close(run(manager, [1, 2, 3, 4, 5, 77, 9], Source(3, OTHER)))
    third = b"digest of a third"
    for start, route, agreed in ((2, ROUTE, 5), (3, OTHER, 6), (3, third, 3), (5, third, 5), (6, third, 5)):
        assert cached(manager, [1, 2, 3, 4, 5, 77, 8], Source(start, route)) == agreed


@pytest.mark.parametrize("source", [BASE, Source(8, ROUTE), Source(8, OTHER), Source(10, ROUTE), Source(11, OTHER)])
def test_many_conversations_that_were_computed_otherwise_are_not_gone_through(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They agree in a message's header, which the route of each has read: nothing of it is another route's."""
    manager = BlockManager(num_blocks=900, block_size=8)
    system, header = [1] * 8, [2, 3, 4]
    for number in range(400):
        manager.close(run(manager, [*system, *header, number], Source(8, ROUTE)))
    compared: list[int] = []
    count_common = children._count_common
    monkeypatch.setattr(children, "_count_common", lambda a, b: compared.append(1) or count_common(a, b))
    assert cached(manager, [*system, *header, 77, 5], source) == (12 if source == Source(8, ROUTE) else 8)
    assert len(compared) < 9


def test_what_could_be_found_and_is_computed_counts_as_recomputed(manager: BlockManager) -> None:
    first, second, late, active = (manager.open(IDS, s) for s in (BASE, BASE, BASE, Source(6, ROUTE)))
    for table in (first, second):  # side by side, neither could have found the other's
        assert manager.grow(table, len(IDS))
        manager.commit(table, IDS, len(IDS))
    assert set(first.blocks).isdisjoint(second.blocks)
    assert first.num_recomputed == second.num_recomputed == 0
    manager.step += 1
    assert manager.grow(late, len(IDS))
    manager.commit(late, IDS, 7)
    manager.step += 1
    manager.commit(late, IDS, len(IDS))
    assert late.num_recomputed == 20
    assert manager.grow(active, len(IDS))
    manager.commit(active, IDS, len(IDS))
    assert active.num_recomputed == 4, "of the active blocks there were none"


@pytest.mark.parametrize("start", [0, 3, 4, 9, 22])
@pytest.mark.parametrize("new_start", [0, 3, 4, 9, 12, 22, NEVER])
def test_tokens_that_are_held_as_active_only_are_encoded_again(
    manager: BlockManager, start: int, new_start: int
) -> None:
    manager.close(run(manager, IDS, Source(start, ROUTE)))
    table = manager.open([*IDS, 7, 8, 9], BASE if new_start == NEVER else Source(new_start, ROUTE))
    if new_start == start:
        assert (table.num_cached, table.num_reencoded) == (22, 0)
    else:
        assert table.num_cached == min(start, new_start)
        assert table.num_reencoded == max(0, min(new_start, 22) - start)
    manager.close(table)
    assert manager.open([1, *IDS], BASE).num_reencoded == 0
    assert manager.open(IDS, Source(salt=b"salt")).num_reencoded == 0


def test_tokens_encoded_again_are_found_from_then_on(manager: BlockManager) -> None:
    run(manager, IDS, Source(3, ROUTE))
    assert run(manager, IDS).num_reencoded == 19
    table = manager.open(IDS, BASE)
    assert (table.num_cached, table.num_reencoded) == (22, 0)


def test_notes_are_found_with_their_tokens(manager: BlockManager) -> None:
    table = manager.open(IDS, BASE)
    assert manager.grow(table, len(IDS))
    notes = [f"note on {token}" for token in IDS]
    manager.commit(table, IDS, 9, notes)
    manager.commit(table, IDS, 22, notes)
    assert manager.open([*IDS, 5], BASE).notes[:] == notes
    assert manager.open(IDS[:7], BASE).notes[:] == notes[:7]
    assert manager.open([*IDS[:10], 5, 5, 5], BASE).notes[:] == notes[:10]


def test_what_is_announced_is_coming_until_it_has_come_or_is_given_up(manager: BlockManager) -> None:
    keys = manager.keys(IDS, BASE)
    assert len(keys) == 6
    assert manager.first_missing(keys) == keys[1]
    table, other = manager.open(IDS, BASE, keys), manager.open(IDS, BASE, keys)
    for each in (table, other):
        assert manager.grow(each, len(IDS))
        manager.announce(each, keys)
    manager.commit(table, IDS, 10)
    assert [manager.is_coming(key) for key in keys] == [False, True, True, True, True, True]
    manager.commit(other, IDS, 9)
    assert [manager.is_coming(key) for key in keys] == [False, False, False, True, True, True]
    assert manager.first_missing(keys) == keys[3]
    manager.close(table)
    manager.close(other)
    assert not any(map(manager.is_coming, keys))
    assert not manager._coming


def test_a_second_copy_of_a_block_is_not_kept() -> None:
    manager = BlockManager(num_blocks=3, block_size=4)
    tables = [manager.open(IDS[:4], BASE) for _ in range(2)]
    for table in tables:
        assert manager.grow(table, 4)
        manager.commit(table, IDS[:4], 4)
    for table in tables:
        manager.close(table)
    manager.close(run(manager, [5] * 8))
    assert manager.num_evicted == 0  # the second copy and the block that was never used were enough
    table = run(manager, IDS[:8])
    assert table.num_cached == 4
    assert len(table.keys) == 3


def test_the_end_of_the_oldest_conversation_goes_first() -> None:
    manager = BlockManager(num_blocks=7, block_size=4)
    old, new = IDS[:12], [5] * 12
    for ids in (old, new):
        manager.close(run(manager, ids))
    assert manager.num_free == 7
    manager.close(run(manager, [6] * 8))
    assert manager.num_evicted == 1
    assert cached(manager, old) == 8
    assert cached(manager, new) == 12


def test_too_little_room_changes_nothing() -> None:
    manager = BlockManager(num_blocks=3, block_size=4)
    table = manager.open(IDS, BASE)
    assert not manager.grow(table, 13)
    assert table.blocks == []
    assert manager.num_free == 3
    assert manager.grow(table, 12)
    assert manager.num_free == 0
    manager.commit(table, IDS, 10)
    full = manager.open(IDS, BASE)  # no block is left to copy the tail into
    assert full.num_cached == 8
    assert not full.copies
    manager.close(full)
    manager.close(table)
    assert manager.num_free == 3


def test_a_copys_source_outlives_its_owner_until_it_is_copied() -> None:
    manager = BlockManager(num_blocks=2, block_size=4)
    table = run(manager, IDS[:3])
    again = manager.open(IDS[:3], BASE)
    manager.close(table)
    assert manager.num_free == 0
    manager.copied(again)
    assert manager.num_free == 1


@pytest.mark.parametrize("wrong", [3, 9, 23])
def test_what_cannot_be_computed_is_refused(manager: BlockManager, wrong: int) -> None:
    table = manager.open(IDS, BASE)
    assert manager.grow(table, 8)
    manager.commit(table, IDS, 4)
    with pytest.raises(ValueError, match="num_computed must be from 4 to the 22 tokens and 8 places"):
        manager.commit(table, IDS, wrong)


@pytest.mark.parametrize("make", [lambda: BlockManager(0, 4), lambda: BlockManager(4, 0), lambda: Source(-1, ROUTE)])
def test_sizes_and_starts_are_checked(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="at least"):
        make()


def test_active_tokens_need_a_route() -> None:
    with pytest.raises(ValueError, match="digest"):
        Source(3)


def _num_common(first: list[object], second: list[object]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@dataclass
class Running:
    ids: list[int]
    table: BlockTable


class Memory:
    """What would stand in the cache: each place holds how its token came about."""

    def __init__(self, manager: BlockManager, num_blocks: int) -> None:
        self.manager = manager
        self.places: dict[tuple[int, int], object] = {}
        self.num_blocks = num_blocks

    def content(self, running: Running, position: int) -> object:
        source = running.table.source
        is_active = position >= source.activation_start
        acting = (source.route_digest, source.activation_start) if is_active else None
        return tuple(running.ids[: position + 1]), source.salt, acting

    def place(self, table: BlockTable, position: int) -> tuple[int, int]:
        size = self.manager.block_size
        return table.blocks[position // size], position % size

    def copy(self, table: BlockTable) -> None:
        for copy in table.copies:
            for offset in range(copy.num_tokens):
                self.places[copy.target, offset] = self.places[copy.source, offset]
        self.manager.copied(table)

    def longest(self, ids: list[int], source: Source) -> int:
        """How many tokens a search through every block finds: whole blocks in turn, then what one more begins with.

        A second copy that is still in use is not looked for.
        """
        size, found = self.manager.block_size, 0
        wanted = Running(ids, BlockTable(source))
        contents = [
            [self.places[number, offset] for offset in range(len(block.token_ids))]
            for number, block in enumerate(self.manager._blocks)
            if number not in self.manager._empty and (block.parent or block.acting_parent)
        ]
        while True:
            own = [self.content(wanted, position) for position in range(found, min(found + size, len(ids)))]
            agreed = max((_num_common(own, held) for held in contents), default=0)
            found += agreed
            if agreed < size:
                return found

    def compute(self, running: Running, end: int, others: list[Running]) -> None:
        table = running.table
        for position in range(table.num_computed, end):
            block, offset = self.place(table, position)
            assert all(block not in other.table.blocks for other in others if other is not running)
            self.places[block, offset] = self.content(running, position)
        notes = [self.content(running, position) for position in range(end)]
        self.manager.commit(table, running.ids, end, notes)

    def check(self, running: Running) -> None:
        table = running.table
        assert table.notes[:] == [self.content(running, position) for position in range(table.num_cached)]
        assert table.num_reencoded <= max(0, table.source.activation_start - table.num_cached)
        for position in range(running.table.num_computed):
            assert self.places[self.place(running.table, position)] == self.content(running, position)


SOURCES = [BASE, Source(salt=b"salt"), *(Source(start, route) for start in (0, 2, 3, 5) for route in (ROUTE, OTHER))]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["open", "run", "run", "extend", "compute", "close"]),
        st.integers(0, 9),
        st.sampled_from(SOURCES),
        st.integers(1, 9).flatmap(lambda length: st.lists(st.integers(0, 1), min_size=length, max_size=length)),
    ),
    min_size=10,
    max_size=40,
)


@given(steps=STEPS, block_size=st.sampled_from([1, 2, 3]), num_blocks=st.sampled_from([4, 9, 30]))
@settings(max_examples=400, derandomize=True)
def test_no_block_is_leaked_shared_wrongly_or_freed_twice(
    steps: list[tuple[str, int, Source, list[int]]], block_size: int, num_blocks: int
) -> None:
    manager = BlockManager(num_blocks, block_size)
    memory = Memory(manager, num_blocks)
    sequences: list[Running] = []
    for action, which, source, ids in steps:
        running = sequences[which % len(sequences)] if sequences else None
        if action in ("open", "run"):
            longest = memory.longest(ids, source)
            sequences.append(Running(ids, manager.open(ids, source)))
            if manager.num_free < 2 and not sequences[-1].table.copies:  # no room for a copy and what it is made from
                longest -= longest % block_size
            assert sequences[-1].table.num_cached == longest
            memory.copy(sequences[-1].table)
            if action == "run" and manager.grow(sequences[-1].table, len(ids)):
                memory.compute(sequences[-1], len(ids), sequences)
        elif running is None:
            continue
        elif action == "extend" and running.table.num_computed == len(running.ids):
            running.ids = running.ids + ids
        elif action == "compute":
            end = min(len(running.ids), running.table.num_computed + which)
            if manager.grow(running.table, end):
                memory.compute(running, end, sequences)
        elif action == "close":
            manager.close(running.table)
            sequences.remove(running)
        for other in sequences:
            memory.check(other)
        used = {block for other in sequences for block in other.table.blocks}
        assert manager.num_free == num_blocks - len(used)
    for running in sequences:
        manager.close(running.table)
    assert manager.num_free == num_blocks
    held = sum(block.base_key is not None for block in manager._blocks)
    assert manager._by_base_key.total() == held
    whole = manager.open([0] * (num_blocks * block_size), Source(salt=b"another"))
    assert manager.grow(whole, num_blocks * block_size)
    assert sorted(whole.blocks) == list(range(num_blocks))


def test_never_is_beyond_any_context() -> None:
    assert BASE.activation_start == NEVER > 10**12


def test_a_block_whose_place_another_one_takes_is_found_by_nothing() -> None:
    """Two that hold the same tokens: the first one's sequence has ended when the second one is full."""
    manager = BlockManager(4, 2)
    tables = [manager.open([0, 1], Source()) for _ in range(2)]
    for table in tables:
        manager.grow(table, 2)
    for table in tables:
        manager.step += 1
        manager.commit(table, [0, 1], 2)
        manager.close(table)
    for ids in ([0, 2], [7] * 4, [0, 1, 5]):
        table = manager.open(ids, Source())
        assert manager.grow(table, len(ids))
        manager.copied(table)
        manager.commit(table, ids, len(ids))
        assert len(table.keys) == 1 + len(ids) // 2
        manager.close(table)
    assert manager.num_free == 4
