"""What the engine's thread does with the answers that run: plan a step, launch it, and see to what it left.

It knows nothing of threads, prompts or checks: answers come in whole, and go to their streams.

Two steps may be in the works: while one is on the GPU, the next is planned and launched, where the scheduler can run
ahead of what the first one draws.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from molora.display import one_line
from molora.generation import TokenRoute
from molora.serving.answer import Answer
from molora.serving.block_manager import BlockManager, BlockTable
from molora.serving.packing import Row
from molora.serving.request import EngineError
from molora.serving.runner import Drawn, Flight, Runner, StepOutput
from molora.serving.sampling import NOTHING
from molora.serving.scheduler import Scheduler, Work
from molora.serving.scheduler import Sequence as Tokens
from molora.serving.stream import Stream

logger = logging.getLogger(__name__)


class Steps:
    """The answers that run, one step after another.

    Attributes:
        answers: that have not ended, by what the scheduler knows of them.
        blocks, scheduler: new ones after `forget`.
        counts: totals since the start, by their names in `EngineStats`.
        adapter_counts: tokens by the name of the adapter that acted on them.
    """

    def __init__(
        self,
        runner: Runner,
        lock: AbstractContextManager[Any],
        *,
        domain: bytes,
        max_step_tokens: int,
        max_sequences: int,
    ) -> None:
        """
        Args:
            lock: the model's, held while a step is launched.
            domain: what all keys of the cache depend on, beside tokens and routes.
        """
        self.runner, self._lock, self._domain = runner, lock, domain
        self._max_step_tokens, self._max_sequences = max_step_tokens, max_sequences
        self.answers: dict[Tokens, Answer] = {}
        self.counts: Counter[str] = Counter()
        self.adapter_counts: Counter[str] = Counter()
        self._launched: _Launched | None = None  # the step in flight
        self.blocks, self.scheduler = self._new_cache()

    @property
    def is_idle(self) -> bool:
        """Nothing runs, and no step is in flight."""
        return not self.answers and self._launched is None

    def add(self, answer: Answer) -> None:
        """Let an answer run."""
        self.answers[answer.tokens] = answer
        self.scheduler.add(answer.tokens)

    def end(self, stream: Stream) -> None:
        """Let none of a stream's answers run any more."""
        for answer in stream.answers:
            self._drop(answer)
        stream.release()

    def fail_all(self, error: Exception) -> None:
        """Everything that runs ends so."""
        self._fail(list(self.answers.values()), error)

    def step(self) -> None:
        """Launch the next step, and see to what the last one left, in this order where that can be."""
        last = self._launched
        if last is not None and not self.scheduler.can_run_ahead:
            self.land()
            last = None
        step = self._launch(is_alone=last is None) if self.answers else None
        if last is not None:
            self.land()
        self._launched = step
        if step is not None and step.flight.is_landed:
            self.land()

    def land(self) -> None:
        """See to what the step in flight left, if there is one; for answers that ended meanwhile that is nothing."""
        step, self._launched = self._launched, None
        if step is None:
            return
        try:
            out = step.flight.land()
        except Exception as error:
            self._fail_step(step.answers, error)
            return
        self.counts["num_steps"] += 1
        drawn = iter(out.drawn)
        for index, (work, answer) in enumerate(zip(step.works, step.answers, strict=True)):
            token = next(drawn) if work.draws else None
            if answer.tokens not in self.answers:
                continue
            self._note(work, answer, out, index)
            self.scheduler.done(work)
            if token is not None:
                try:
                    self._push(answer, token)
                except Exception as error:  # of its text or its grammar: its own matter
                    logger.exception("an answer could not go on")
                    self._fail([answer], EngineError(f"the answer could not go on: {one_line(error)}"))

    def forget(self) -> None:
        """Begin with an empty cache."""
        self.counts["num_preemptions"] += self.scheduler.num_preempted
        self.counts["num_evicted_blocks"] += self.blocks.num_evicted
        self.blocks, self.scheduler = self._new_cache()

    def _launch(self, *, is_alone: bool) -> _Launched | None:
        """
        Args:
            is_alone: no step is in flight, so that somebody can run.

        Returns:
            None if nobody can run now, or the launch failed.
        """
        works = self.scheduler.plan()
        if not works:
            if is_alone:
                raise RuntimeError("sequences wait, and none of them can ever run")
            return None
        answers = [self.answers[work.sequence] for work in works]
        try:
            with self._lock:
                if copies := [copy for work in works for copy in work.copies]:
                    self.runner.copy(copies)
                rows = [self._row(work, answer) for work, answer in zip(works, answers, strict=True)]
                drawing = [answer for work, answer in zip(works, answers, strict=True) if work.draws]
                draws = [answer.draw(answer.tokens.num_pending - 1) for answer in drawing]
                flight = self.runner.launch(rows, draws)
        except Exception as error:  # whatever a model may raise, out of memory included
            self.land()  # whoever ends with that step did not need this one
            self._fail_step(answers, error)
            return None
        for place, answer in enumerate(drawing):
            answer.place = place
        return _Launched(works, answers, flight)

    def _row(self, work: Work, answer: Answer) -> Row:
        table, tokens = _table(work), answer.tokens
        end = work.first + work.num_tokens
        answer.begun()
        # Of each prompt token once, also where a prompt is read again after it had to make way.
        first_next = max(0, len(answer.prompt_logprobs) - work.first)
        last_next = min(end + 1, answer.num_prompt_tokens)
        next_ids = [] if tokens.reads_cache else tokens.token_ids[work.first + 1 + first_next : last_next]
        token_ids, follows = tokens.token_ids[work.first : end], -1
        if end > len(tokens.token_ids):  # the last one is being drawn
            token_ids.append(0)
            follows = answer.place
        return Row(
            token_ids=token_ids,
            first=work.first,
            blocks=table.blocks[: -(-end // self.runner.block_size)],
            draws=work.draws,
            writes=work.writes,
            activation_start=answer.activation_start,
            route=answer.route,
            hold=answer.hold,
            follows=follows,
            known=answer.routes[work.first : end],
            next_ids=next_ids,
            first_next=first_next,
            num_top=answer.sampling.prompt_logprobs or 0,
        )

    def _note(self, work: Work, answer: Answer, out: StepOutput, index: int) -> None:
        """Keep the routes of what was computed, each token's once."""
        tokens = answer.tokens
        num_known = max(0, min(len(tokens.notes) - work.first, work.num_tokens))
        fresh: list[TokenRoute] = out.routes[index][num_known:]
        tokens.notes += fresh
        for route in fresh:
            if route and answer.hold is not None:
                for digest, _ in route:
                    self.adapter_counts[answer.hold.names[digest]] += 1
            else:
                self.adapter_counts["base"] += 1
        answer.prompt_logprobs += out.prompt_logprobs[index]
        answer.num_computed += work.num_tokens
        self.counts["num_computed_tokens"] += work.num_tokens
        if work.writes:
            tokens.num_replayed += num_known
            self.counts["num_replayed_tokens"] += num_known

    def _push(self, answer: Answer, drawn: Drawn) -> None:
        if drawn.token_id == NOTHING:
            raise OverflowError("the model's numbers overflowed; are the route's weights too large?")
        is_first = not answer.num_generated
        if is_first and answer.index == 0:  # of the prompt, which is one for all answers
            self.counts["num_cached_tokens"] += answer.num_reused
            self.counts["num_reencoded_tokens"] += answer.tokens.num_reencoded
        token = answer.push(drawn)
        self.counts["num_generated_tokens"] += 1
        if token.finish_reason is not None:
            self._drop(answer)
            answer.finish(token.finish_reason)
        answer.stream.put(token)
        if is_first and answer.index == 0:
            for other in answer.stream.answers[1:]:  # they find the prompt that was read for the first one
                self.add(other)

    def _drop(self, answer: Answer) -> None:
        if self.answers.pop(answer.tokens, None) is not None:
            self.scheduler.remove(answer.tokens)
            self.counts["num_recomputed_tokens"] += answer.tokens.num_recomputed

    def _fail(self, answers: Sequence[Answer], error: Exception) -> None:
        for stream in {id(answer.stream): answer.stream for answer in answers}.values():
            self.end(stream)
            stream.fail(error)

    def _fail_step(self, answers: Sequence[Answer], error: Exception) -> None:
        """Only this step's requests end."""
        self.counts["num_failed_steps"] += 1
        failure = EngineError(f"the step failed: {one_line(error)}")
        failure.__cause__ = error
        self._fail([answer for answer in answers if answer.tokens in self.answers], failure)

    def _new_cache(self) -> tuple[BlockManager, Scheduler]:
        blocks = BlockManager(self.runner.num_blocks, self.runner.block_size, self._domain)
        return blocks, Scheduler(blocks, max_step_tokens=self._max_step_tokens, max_sequences=self._max_sequences)


@dataclass(frozen=True)
class _Launched:
    """A step and whose parts it has."""

    works: list[Work]
    answers: list[Answer]
    flight: Flight


def _table(work: Work) -> BlockTable:
    assert work.sequence.table is not None
    return work.sequence.table
