import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.serving import scheduler as module
from molora.serving.block_manager import BlockManager, Source
from molora.serving.scheduler import Scheduler, Sequence, Work

BASE = Source()
BLOCK_SIZE = 3


class Model:
    """A model whose next token is a function of every token before it, read from places in a cache."""

    def __init__(self, num_blocks: int, max_step_tokens: int, max_sequences: int) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.num_blocks, self.max_step_tokens = num_blocks, max_step_tokens
        self.scheduler = Scheduler(self.blocks, max_step_tokens=max_step_tokens, max_sequences=max_sequences)
        self.cache: dict[tuple[int, int], tuple[int, object]] = {}
        self.num_computed = 0

    def step(self) -> list[Work]:
        works = self.scheduler.plan()
        assert sum(work.num_tokens for work in works) <= self.max_step_tokens
        written: set[int] = set()
        for work in works:
            self.run(work, written)
        return works

    def run(self, work: Work, written: set[int]) -> None:
        sequence, table = work.sequence, work.sequence.table
        assert table is not None
        for copy in table.copies:
            for offset in range(copy.num_tokens):
                self.cache[copy.target, offset] = self.cache[copy.source, offset]
        for position in range(work.first, work.first + work.num_tokens):
            if work.writes:
                block = table.blocks[position // BLOCK_SIZE]
                is_active = position >= sequence.source.activation_start
                self.cache[block, position % BLOCK_SIZE] = sequence.token_ids[position], is_active and sequence.source
                written.add(block)
                self.num_computed += 1
        sequence.notes += [
            f"{sequence.token_ids[position]}{sequence.source if position >= sequence.source.activation_start else None}"
            for position in range(len(sequence.notes), work.first + work.num_tokens)
        ]
        self.scheduler.done(work)
        if work.draws:
            read = [self.cache[table.blocks[p // BLOCK_SIZE], p % BLOCK_SIZE] for p in range(len(sequence.token_ids))]
            sequence.token_ids.append(draw(read, sequence.source))
            if len(sequence.token_ids) == sequence.max_tokens:
                self.scheduler.remove(sequence)


def draw(read: list[tuple[int, object]], source: Source) -> int:
    total = 7
    for token, how in read:
        assert how is False or how == source  # nobody else's active tokens
        total = (total * 31 + token + (17 if how else 0)) % 1009
    return total % 3


def alone(token_ids: list[int], source: Source, max_tokens: int) -> list[int]:
    ids = list(token_ids)
    while len(ids) < max_tokens:
        ids.append(draw([(token, p >= source.activation_start and source) for p, token in enumerate(ids)], source))
    return ids


def test_it_knows_no_torch() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "collections", "dataclasses", "itertools", "molora.serving.block_manager"}


def test_prompts_are_read_in_chunks_beside_those_that_decode() -> None:
    model = Model(num_blocks=20, max_step_tokens=4, max_sequences=3)
    short, long = Sequence([1, 2], BASE, 12), Sequence(list(range(10)), BASE, 12)
    model.scheduler.add(short)
    model.scheduler.add(long)
    sizes = [[(work.sequence is long, work.num_tokens, work.draws) for work in model.step()] for _ in range(4)]
    assert sizes[0] == [(False, 2, True), (True, 2, False)]
    assert sizes[1] == sizes[2] == [(False, 1, True), (True, 3, False)]
    assert sizes[3] == [(False, 1, True), (True, 2, True)]


def test_a_younger_prompt_waits_while_an_older_one_takes_the_step() -> None:
    model = Model(num_blocks=20, max_step_tokens=4, max_sequences=3)
    long, short = Sequence(list(range(20)), BASE, 21), Sequence([1], BASE, 9)
    model.scheduler.add(long)
    model.step()
    model.scheduler.add(short)
    model.step()  # the older prompt took all of it
    assert short.table is None
    assert [work.num_tokens for work in model.step()] == [4]
    assert model.scheduler.num_waiting == 1


def test_a_prompt_that_is_found_whole_runs_its_last_token_and_writes_nothing() -> None:
    model = Model(num_blocks=20, max_step_tokens=9, max_sequences=3)
    model.scheduler.add(Sequence([1, 2, 0, 1], BASE, 5))
    model.step()
    again = Sequence([1, 2, 0, 1], BASE, 5)
    model.scheduler.add(again)
    assert [(work.first, work.num_tokens, work.writes) for work in model.step()] == [(3, 1, False)]
    assert again.token_ids == alone([1, 2, 0, 1], BASE, 5)
    assert model.num_computed == 4


def test_a_prefix_that_several_ask_for_is_read_once() -> None:
    model = Model(num_blocks=40, max_step_tokens=8, max_sequences=6)
    prefix = [1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 2]
    wanted = [Sequence([*prefix, end], Source(11, route), 15) for end, route in ((0, b"one"), (1, b"two"), (2, b"six"))]
    for sequence in wanted:
        model.scheduler.add(sequence)
    assert [work.sequence for work in model.step()] == [wanted[0]], "the others wait for what it reads"
    other = Sequence([2, 2, 2], BASE, 5)
    model.scheduler.add(other)
    assert other in [work.sequence for work in model.step()], "who needs nothing of it does not wait"
    while model.step():
        pass
    assert model.num_computed == 14 + 2 * (14 - 11) + 4, "the prefix once; the last of 15 is not computed"
    assert all(sequence.num_recomputed == 0 for sequence in wanted)
    for sequence, end in zip(wanted, (0, 1, 2), strict=True):
        assert sequence.token_ids == alone([*prefix, end], sequence.source, 15)


def test_who_waits_for_a_prefix_reads_it_when_its_reader_is_gone() -> None:
    model = Model(num_blocks=40, max_step_tokens=3, max_sequences=3)
    first, second = (Sequence([1] * 12, BASE, 14) for _ in range(2))
    for sequence in (first, second):
        model.scheduler.add(sequence)
    model.step()
    model.scheduler.remove(first)
    while model.step():
        pass
    assert second.token_ids == alone([1] * 12, BASE, 14)
    assert second.num_cached == 3


def test_a_sequence_that_does_not_read_the_cache_computes_all_of_it() -> None:
    model = Model(num_blocks=40, max_step_tokens=30, max_sequences=8)
    for reads, expected in ((True, 0), (True, 8), (False, 0)):
        sequence = Sequence([1, 2] * 4, BASE, 9, reads_cache=reads)
        model.scheduler.add(sequence)
        model.step()
        assert sequence.num_cached == expected


def test_who_came_last_makes_way_and_goes_on_where_it_was() -> None:
    model = Model(num_blocks=5, max_step_tokens=8, max_sequences=3)
    first, second = Sequence([1] * 4, BASE, 11), Sequence([2] * 4, BASE, 11)
    for sequence in (first, second):
        model.scheduler.add(sequence)
    finished: list[Sequence] = []
    for _ in range(40):
        model.step()
        finished += [sequence for sequence in (first, second) if len(sequence.token_ids) == 11]
    assert model.scheduler.num_preempted > 0
    assert finished[0] is first
    assert first.token_ids == alone([1] * 4, BASE, 11)
    assert second.token_ids == alone([2] * 4, BASE, 11)
    assert second.notes == [f"{token}None" for token in second.token_ids[:10]], "kept while it waited"
    assert model.blocks.num_free == 5


def test_a_sequence_that_is_removed_lets_go_of_its_blocks() -> None:
    model = Model(num_blocks=9, max_step_tokens=8, max_sequences=1)
    running, waiting = Sequence([1] * 4, BASE, 9), Sequence([2] * 4, BASE, 9)
    for sequence in (running, waiting):
        model.scheduler.add(sequence)
    model.step()
    model.scheduler.remove(waiting)
    model.scheduler.remove(running)
    model.scheduler.remove(running)
    assert model.blocks.num_free == 9
    assert model.step() == []


@pytest.mark.parametrize(("num_tokens", "max_tokens"), [(0, 4), (5, 4), (1, 16)])
def test_a_sequence_that_cannot_be_finished_is_refused(num_tokens: int, max_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"must begin with|do not fit"):
        Model(5, 8, 2).scheduler.add(Sequence([1] * num_tokens, BASE, max_tokens))


@pytest.mark.parametrize("sizes", [(8, 0), (2, 3)])
def test_a_step_has_room_for_every_sequence(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="max_sequences"):
        Scheduler(BlockManager(4, 4), max_step_tokens=sizes[0], max_sequences=sizes[1])


SOURCES = [BASE, Source(salt=b"s"), *(Source(start, route) for start in (0, 2, 4) for route in (b"one", b"two"))]
ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before it comes
        st.lists(st.integers(0, 1), min_size=1, max_size=10),
        st.integers(1, 9),
        st.sampled_from(SOURCES),
        st.integers(0, 30),  # steps until it is given up
    ),
    min_size=1,
    max_size=9,
)


@given(arrivals=ARRIVALS, num_blocks=st.sampled_from([7, 9, 40]), sizes=st.sampled_from([(3, 3), (5, 2), (30, 8)]))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_whatever_happens_beside_it_a_sequence_ends_as_alone(
    arrivals: list[tuple[int, list[int], int, Source, int]], num_blocks: int, sizes: tuple[int, int]
) -> None:
    model = Model(num_blocks, *sizes)
    expected: list[tuple[Sequence, list[int], int]] = []
    for wait, ids, num_new, source, patience in arrivals:
        for _ in range(wait):
            model.step()
        sequence = Sequence(list(ids), source, len(ids) + num_new)
        model.scheduler.add(sequence)
        expected.append((sequence, alone(ids, source, len(ids) + num_new), patience))
    for step in range(2000):
        if not model.step():
            break
        for sequence, _, patience in expected:
            if patience == step and len(sequence.token_ids) < sequence.max_tokens:
                model.scheduler.remove(sequence)
    assert model.scheduler.num_running == model.scheduler.num_waiting == 0
    assert model.blocks.num_free == num_blocks
    assert not model.blocks._coming
    for sequence, ids, _ in expected:
        assert len(sequence.notes) <= len(sequence.token_ids)
        assert sequence.token_ids == ids[: len(sequence.token_ids)]
