import ast
import sys
from collections import defaultdict
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
    """A model whose next token is a function of every token before it, read from places in a cache.

    Attributes:
        runs_ahead: a step is launched before the one before it is done, where that can be, as the engine does on a GPU.
        end_id: a token that ends its sequence.
    """

    def __init__(
        self,
        num_blocks: int,
        max_step_tokens: int,
        max_sequences: int,
        *,
        runs_ahead: bool = False,
        end_id: int = -1,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self.block_size = block_size
        self.blocks = BlockManager(num_blocks, block_size)
        self.num_blocks, self.max_step_tokens = num_blocks, max_step_tokens
        self.scheduler = Scheduler(self.blocks, max_step_tokens=max_step_tokens, max_sequences=max_sequences)
        self.runs_ahead, self.end_id = runs_ahead, end_id
        self.cache: dict[tuple[int, int], tuple[int, object]] = {}
        self.num_computed = 0
        self.num_ahead = 0
        self.flight: list[Work] = []
        self.pending: dict[Sequence, list[int]] = defaultdict(list)  # tokens that only the device knows
        self.gone: set[Sequence] = set()

    def step(self) -> list[Work]:
        last, self.flight = self.flight, []
        if last and not self.scheduler.can_run_ahead:
            self.land(last)
            last = []
        self.num_ahead += bool(last)
        works = self.scheduler.plan()
        assert sum(work.num_tokens for work in works) <= self.max_step_tokens
        for work in works:
            self.launch(work)
        self.land(last)
        if self.runs_ahead:
            self.flight = works
        else:
            self.land(works)
        return works or last

    def launch(self, work: Work) -> None:
        sequence, table = work.sequence, work.sequence.table
        assert table is not None
        ids = sequence.token_ids + self.pending[sequence]
        for copy in work.copies:
            for offset in range(copy.num_tokens):
                self.cache[copy.target, offset] = self.cache[copy.source, offset]
        end = work.first + work.num_tokens
        for position in range(work.first, end):
            if work.writes:
                block = table.blocks[position // self.block_size]
                is_active = position >= sequence.source.activation_start
                self.cache[block, position % self.block_size] = ids[position], is_active and sequence.source
                self.num_computed += 1
        if work.draws:
            assert end == len(ids)
            read = [self.cache[table.blocks[p // self.block_size], p % self.block_size] for p in range(end)]
            self.pending[sequence].append(draw(read, sequence.source))

    def land(self, works: list[Work]) -> None:
        for work in works:
            sequence = work.sequence
            if sequence in self.gone:
                continue
            sequence.notes += [
                f"{sequence.token_ids[p]}{sequence.source if p >= sequence.source.activation_start else None}"
                for p in range(len(sequence.notes), work.first + work.num_tokens)
            ]
            self.scheduler.done(work)
            if work.draws:
                sequence.token_ids.append(self.pending[sequence].pop(0))
                if len(sequence.token_ids) == sequence.max_tokens or sequence.token_ids[-1] == self.end_id:
                    self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        self.gone.add(sequence)
        self.scheduler.remove(sequence)


def draw(read: list[tuple[int, object]], source: Source) -> int:
    total = 7
    for token, how in read:
        assert how is False or how == source  # nobody else's active tokens
        total = (total * 31 + token + (17 if how else 0)) % 1009
    return total % 3


def alone(token_ids: list[int], source: Source, max_tokens: int, end_id: int = -1) -> list[int]:
    ids = list(token_ids)
    while len(ids) < max_tokens and not (len(ids) > len(token_ids) and ids[-1] == end_id):
        ids.append(draw([(token, p >= source.activation_start and source) for p, token in enumerate(ids)], source))
    return ids


def test_it_knows_no_torch() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}
    assert others == {"molora.serving.block_manager", "molora.serving.notes"}


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
    model.remove(first)
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
    assert second.notes[:] == [f"{token}None" for token in second.token_ids[:10]], "kept while it waited"
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


@given(
    arrivals=ARRIVALS,
    num_places=st.sampled_from([21, 27, 120]),
    block_size=st.sampled_from([1, 2, 3]),
    sizes=st.sampled_from([(3, 3), (5, 2), (30, 8)]),
    runs_ahead=st.booleans(),
    end_id=st.sampled_from([-1, 2]),
)
@settings(max_examples=1500, derandomize=True)
def test_whatever_happens_beside_it_a_sequence_ends_as_alone(
    arrivals: list[tuple[int, list[int], int, Source, int]],
    num_places: int,
    block_size: int,
    sizes: tuple[int, int],
    runs_ahead: bool,
    end_id: int,
) -> None:
    num_blocks = num_places // block_size
    model = Model(num_blocks, *sizes, runs_ahead=runs_ahead, end_id=end_id, block_size=block_size)
    expected: list[tuple[Sequence, list[int], int]] = []
    for wait, ids, num_new, source, patience in arrivals:
        for _ in range(wait):
            model.step()
        sequence = Sequence(list(ids), source, len(ids) + num_new)
        model.scheduler.add(sequence)
        expected.append((sequence, alone(ids, source, len(ids) + num_new, end_id), patience))
    for step in range(2000):
        if not model.step():
            break
        for sequence, _, patience in expected:
            if patience == step and len(sequence.token_ids) < sequence.max_tokens:
                model.remove(sequence)
    assert model.scheduler.num_running == model.scheduler.num_waiting == 0
    assert model.blocks.num_free == num_blocks
    assert not model.blocks._coming
    for sequence, ids, _ in expected:
        assert sequence.num_recomputed == 0
        assert len(sequence.notes) <= len(sequence.token_ids)
        assert sequence.token_ids == ids[: len(sequence.token_ids)]


def test_a_step_is_planned_before_the_last_one_is_done() -> None:
    model = Model(40, 8, 4, runs_ahead=True)
    sequences = [Sequence([1, 2, token], BASE, 9) for token in (0, 1)]
    for sequence in sequences:
        model.scheduler.add(sequence)
    assert [[work.num_tokens for work in model.step()] for _ in range(7)] == [[3, 3], *[[1, 1]] * 5, [1, 1]]
    assert model.num_ahead == 6
    assert model.step() == []
    for sequence in sequences:
        assert sequence.token_ids == alone(sequence.token_ids[:3], BASE, 9)
    assert model.num_computed == 2 * 8, "none is computed that is not needed"


@pytest.mark.parametrize("num_steps", range(8))
def test_what_is_about_to_be_found_was_not_computed_in_vain(num_steps: int) -> None:
    model = Model(40, 8, 4, runs_ahead=True)
    ids = alone([1, 2], BASE, 9)
    model.scheduler.add(Sequence([1, 2], BASE, 9))
    for _ in range(num_steps):
        model.step()
    other = Sequence(ids[:7], BASE, 8)
    model.scheduler.add(other)
    while model.step():
        pass
    assert other.num_recomputed == 0
