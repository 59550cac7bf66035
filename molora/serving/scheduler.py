"""Which tokens of which sequences the next step computes. It imports no torch and knows nothing about models.

A step has room for a number of tokens. Sequences get it in the order in which they came: each one that decodes a single
token, each one that still reads its prompt as large a chunk as is left. Sequences that wait are let in, in order, while
there are blocks for all of their tokens. Where blocks run out, the sequence that came last gives up its own and waits
again, first in line; what it had is found, or computed anew, when there is room.

A step may be planned while the one before it runs (see `can_run_ahead`). What that one computes counts as computed, and
the token that it draws as one that is there but not known: a sequence that ends with it is in one step too many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import MutableSequence
from dataclasses import dataclass, field, replace
from itertools import count

from molora.serving.block_manager import BlockManager, BlockTable, Copy, Source
from molora.serving.notes import Notes


@dataclass(eq=False)
class Sequence:
    """One prompt and its continuation.

    Attributes:
        token_ids: the prompt's, and those drawn so far.
        max_tokens: how many there may ever be.
        reads_cache: False to compute every token of the prompt, whatever is found of it.
        keys: of the prompt's blocks, if the caller has them; forgotten when it is let in.
        notes: on each token that was found or computed, kept when the sequence gives up its blocks.
        table: its blocks while it runs, None while it waits.
        num_cached, num_reencoded: of the prompt, when it was first let in (see `BlockTable`).
        num_recomputed: of all its tables.
        num_replayed: tokens that it computed again after it had given up its blocks.
        num_in_flight: tokens that steps which are not done write.
        num_pending: tokens that steps which are not done draw.
    """

    token_ids: MutableSequence[int]
    source: Source
    max_tokens: int
    reads_cache: bool = True
    keys: list[bytes] | None = None  # while it waits
    notes: Notes[object] = field(default_factory=Notes, init=False)
    table: BlockTable | None = field(default=None, init=False)
    num_cached: int = field(default=-1, init=False)
    num_reencoded: int = field(default=0, init=False)
    num_recomputed: int = field(default=0, init=False)
    num_replayed: int = field(default=0, init=False)
    num_in_flight: int = field(default=0, init=False)
    num_pending: int = field(default=0, init=False)
    arrival: int = field(default=-1, init=False)
    awaits: bytes | None = field(default=None, init=False)  # while it waits


@dataclass(frozen=True)
class Work:
    """A sequence's part of a step.

    Attributes:
        first: the first token that is computed.
        num_tokens: how many are.
        step: its number, as the block manager counts.
        draws: whether they reach the last token, so that the next one is drawn from its logits.
        writes: False where the whole sequence was found: its last token runs again for its logits alone.
        copies: of blocks, to be done before the step.
    """

    sequence: Sequence
    first: int
    num_tokens: int
    step: int
    draws: bool
    writes: bool = True
    copies: tuple[Copy, ...] = ()


class Scheduler:
    """Attributes: num_preempted, how often a sequence had to give up its blocks."""

    def __init__(self, blocks: BlockManager, *, max_step_tokens: int, max_sequences: int) -> None:
        """
        Raises:
            ValueError: a step could not hold one token of each sequence.
        """
        if not 1 <= max_sequences <= max_step_tokens:
            raise ValueError(
                f"max_sequences must be from 1 to max_step_tokens, got {max_sequences} and {max_step_tokens}."
            )
        self.num_preempted = 0
        self._blocks = blocks
        self._num_blocks = blocks.num_free
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order in which they came
        self._arrivals = count()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def can_run_ahead(self) -> bool:
        """Whether a step can be planned before the last one is done: nobody would have to make way in it."""
        return self._blocks.num_free >= len(self._running)  # a block for each, at most, after those of its prompt

    def add(self, sequence: Sequence) -> None:
        """
        Raises:
            ValueError: it has no tokens, or could not be finished even alone.
        """
        if not 0 < len(sequence.token_ids) <= sequence.max_tokens:
            raise ValueError(
                f"a sequence must begin with 1 to max_tokens = {sequence.max_tokens} tokens, "
                f"got {len(sequence.token_ids)}."
            )
        num_places = self._num_blocks * self._blocks.block_size
        if sequence.max_tokens > num_places:
            raise ValueError(
                f"{sequence.max_tokens} tokens do not fit into the cache of {num_places}; ask for fewer, or give it "
                "more memory."
            )
        sequence.arrival = next(self._arrivals)
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Stop a sequence, finished or not; what it computed can still be found."""
        if sequence.table is not None:
            self._running.remove(sequence)
            self._close(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def plan(self) -> list[Work]:
        """The next step; empty only if there is no sequence, or all wait for a step to be done.

        Its blocks are there. `done` must follow for each part in turn, unless the sequence was removed.
        """
        self._blocks.step += 1
        works: list[Work] = []
        room = self._max_step_tokens
        for index, sequence in enumerate(list(self._running)):
            if sequence.table is None or not room:  # it was preempted just now
                continue
            if sequence.num_pending and len(sequence.token_ids) + sequence.num_pending == sequence.max_tokens:
                continue  # what it waits for is its last token
            # One place each is kept for those behind, so that a long prompt stops nobody's decoding.
            num_behind = len(self._running) - index - 1
            work = self._plan(sequence, max(1, room - num_behind))
            if work is not None:
                works.append(work)
                room -= work.num_tokens
        for sequence in list(self._waiting):
            if not room or len(self._running) == self._max_sequences:
                break
            if self._must_wait(sequence):
                continue
            work = self._admit(sequence, room)
            if work is None:
                break
            works.append(work)
            room -= work.num_tokens
        for work in works:
            work.sequence.num_in_flight += work.num_tokens * work.writes
            work.sequence.num_pending += work.draws
        return works

    def done(self, work: Work) -> None:
        """A sequence's part of a step was computed, its copies too, and `notes` has one on each of its tokens.

        Drawn tokens are appended after this.
        """
        sequence, table = work.sequence, work.sequence.table
        assert table is not None
        self._blocks.copied(table)
        sequence.num_pending -= work.draws
        if work.writes:
            sequence.num_in_flight -= work.num_tokens
            end = work.first + work.num_tokens
            self._blocks.commit(table, sequence.token_ids, end, sequence.notes, step=work.step)

    def _must_wait(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute the next block that this one needs."""
        if not sequence.reads_cache:
            return False
        if sequence.keys is None:
            sequence.keys = self._blocks.keys(sequence.token_ids, sequence.source)
        if sequence.awaits is None or not self._blocks.is_coming(sequence.awaits):
            sequence.awaits = self._blocks.first_missing(sequence.keys)
        return sequence.awaits is not None and self._blocks.is_coming(sequence.awaits)

    def _admit(self, sequence: Sequence, room: int) -> Work | None:
        keys = sequence.keys or self._blocks.keys(sequence.token_ids, sequence.source)
        if sequence.reads_cache:
            table = self._blocks.open(sequence.token_ids, sequence.source, keys)
        else:
            table = self._blocks.open([], sequence.source, keys[:1])
        if not self._blocks.grow(table, len(sequence.token_ids)):
            # What a copy is made from takes a block that the sequence itself may need.
            self._blocks.give_up_copies(table)
            if not self._blocks.grow(table, len(sequence.token_ids)):
                self._blocks.close(table)
                return None
        sequence.table, sequence.keys, sequence.awaits = table, None, None
        self._blocks.announce(table, keys)
        if sequence.num_cached < 0:
            sequence.num_cached, sequence.num_reencoded = table.num_cached, table.num_reencoded
        if sequence.notes:
            sequence.notes += table.notes[len(sequence.notes) :]
        else:
            sequence.notes = table.notes
        work = replace(self._cut(sequence, room), copies=tuple(table.copies))
        self._waiting.remove(sequence)
        self._running.append(sequence)
        self._running.sort(key=lambda running: running.arrival)
        return work

    def _plan(self, sequence: Sequence, room: int) -> Work | None:
        """None if the sequence itself had to make way."""
        assert sequence.table is not None
        work = self._cut(sequence, room)
        while not self._blocks.grow(sequence.table, work.first + work.num_tokens):
            last = self._running[-1]
            self._preempt(last)
            if last is sequence:
                return None
        return work

    def _cut(self, sequence: Sequence, room: int) -> Work:
        assert sequence.table is not None
        step = self._blocks.step
        num_tokens = len(sequence.token_ids) + sequence.num_pending
        num_computed = sequence.table.num_computed + sequence.num_in_flight
        if num_computed == num_tokens:
            return Work(sequence, num_tokens - 1, 1, step, draws=True, writes=False)
        chunk = min(room, num_tokens - num_computed)
        return Work(sequence, num_computed, chunk, step, draws=num_computed + chunk == num_tokens)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        self._running.remove(sequence)
        self._close(sequence)
        self._waiting.appendleft(sequence)

    def _close(self, sequence: Sequence) -> None:
        assert sequence.table is not None
        sequence.num_recomputed += sequence.table.num_recomputed
        self._blocks.close(sequence.table)
        sequence.table = None
        sequence.num_in_flight = sequence.num_pending = 0
