"""All stages and rows of several seeds on every GPU at once, a process and a log each.

A stage begins when the one that it builds on is there, and rows when their stage is. A GPU trains one stage at a time;
beside it some groups of rows are measured, whose processes wait for the host most of the time.
"""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition, Thread

import torch

from quality.training import ROUTERS

OF_BANK = (
    *("given", "whole", "classifier", "uniform", "alone", "merges", "update merges", "random"),
    *("top-2", "sparse", "soft", "removed", "starts", "turns", "arrow", "xlora"),
)
STAGE_OF = dict.fromkeys(OF_BANK, "bank")
STAGE_OF |= {"plain starts": "plain", "joint turns": "joint", "key": "open"}  # a group's is of its own name otherwise


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        kind: train or eval.
        part: a stage, or a group of rows.
        needs: names of the jobs that it comes behind.
        share: which of how many shares of the stage's adapters; empty is all.
    """

    kind: str
    seed: int
    part: str
    needs: frozenset[str]
    share: str = ""

    @property
    def name(self) -> str:
        return f"seed {self.seed} {self.kind} {self.part} {self.share}".strip()

    @property
    def options(self) -> list[str]:
        """What overrides the options of the command that is typed."""
        part = ["--stages", self.part] if self.kind == "train" else ["--rows-of", self.part]
        return ["--seed", str(self.seed), *part, *(["--share", self.share] if self.share else [])]


def jobs_of(seeds: Sequence[int], stages: Sequence[str], groups: Sequence[str], num_shares: int = 1) -> list[Job]:
    """In the order in which they are begun, as asked; routers bring the training of their adapters along.

    Whatever else a job needs and is not asked for is taken to be there.

    Args:
        num_shares: of the stage adapters, each a job.
    """
    if "adapters" not in stages and not ROUTERS.keys().isdisjoint(stages):
        stages = ["adapters", *stages]
    shares = [f"{share}/{num_shares}" for share in range(1, num_shares + 1)] if num_shares > 1 else [""]
    adapters = {seed: [Job("train", seed, "adapters", frozenset(), share) for share in shares] for seed in seeds}
    found: list[Job] = []
    for stage in stages:
        for seed in seeds:
            needs = frozenset(job.name for job in adapters[seed]) if stage in ROUTERS else frozenset()
            found += adapters[seed] if stage == "adapters" else [Job("train", seed, stage, needs)]
    found += [
        Job("eval", seed, group, frozenset({f"seed {seed} train {STAGE_OF.get(group, group)}"}))
        for group in groups
        for seed in seeds
    ]
    names = {job.name for job in found}
    return [replace(job, needs=job.needs & names) for job in found]


class Board:
    """What is to be done, and what has been."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting, self.done, self.failed = list(jobs), set[str](), set[str]()
        self._running, self._is_stopped = set[subprocess.Popen[bytes]](), False
        self._changed = Condition()

    def stop(self) -> None:
        """Whoever asks gets no more, and what runs is terminated."""
        with self._changed:
            self._is_stopped = True
            self.failed |= {job.name for job in self.waiting}
            self.waiting.clear()
            for process in self._running:
                process.terminate()
            self._changed.notify_all()

    def wait_for(self, process: subprocess.Popen[bytes]) -> int:
        """Its return code."""
        with self._changed:
            self._running.add(process)
            if self._is_stopped:
                process.terminate()
        try:
            return process.wait()
        finally:
            with self._changed:
                self._running.discard(process)

    def take(self, kind: str) -> Job | None:
        """The next job of this kind, once what it needs is done; None when none is left."""
        with self._changed:
            while True:
                self._drop()
                own = [job for job in self.waiting if job.kind == kind]
                ready = [job for job in own if job.needs <= self.done]
                if ready or not own:
                    break
                self._changed.wait()
            if not ready:
                return None
            self.waiting.remove(ready[0])
            return ready[0]

    def end(self, job: Job, *, well: bool) -> None:
        with self._changed:
            (self.done if well else self.failed).add(job.name)
            self._changed.notify_all()

    def _drop(self) -> None:
        """Jobs that need one that failed have failed."""
        while hopeless := [job for job in self.waiting if job.needs & self.failed]:
            for job in hopeless:
                self.waiting.remove(job)
                self.failed.add(job.name)
                print(f"{job.name}: left out", flush=True)
            self._changed.notify_all()


def run_all(args: Namespace) -> None:
    """
    Raises:
        SystemExit: a process failed.
    """
    if args.evals_per_device < 1:
        raise SystemExit(f"--evals-per-device is {args.evals_per_device}; expected 1 or more.")
    if args.share != (1, 1):
        raise SystemExit("--share is of train; expected --shares, which gives each job its own.")
    if not 1 <= args.shares <= len(args.domains) + 1:
        raise SystemExit(f"--shares is {args.shares}; expected 1 to {len(args.domains) + 1}, the number of adapters.")
    logs = args.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    gpus = [None] if args.device == "cpu" or not torch.cuda.is_available() else _gpus()
    board = Board(jobs_of(args.seeds, args.stages, args.rows_of, args.shares))
    kinds = ["train", *["eval"] * args.evals_per_device]
    num_threads = max(1, (os.cpu_count() or 1) // (len(gpus) * len(kinds)))
    workers = [Thread(target=_work, args=(board, kind, gpu, num_threads, logs)) for gpu in gpus for kind in kinds]
    signal.signal(signal.SIGTERM, _exit)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        board.stop()
    if board.failed:
        raise SystemExit(f"{len(board.failed)} of {len(board.failed | board.done)} failed; what is done is kept.")


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def _work(board: Board, kind: str, gpu: str | None, num_threads: int, logs: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    script, *typed = sys.argv
    typed.remove("all")
    while (job := board.take(kind)) is not None:
        log, begin_s, well = logs / f"{job.name.replace(' ', '-').replace('/', '-of-')}.log", time.perf_counter(), False
        try:
            with log.open("w") as file:
                command = [sys.executable, script, kind, *typed, *job.options]
                well = board.wait_for(subprocess.Popen(command, env=environment, stdout=file, stderr=file)) == 0
            said = f"{time.perf_counter() - begin_s:.0f} s" if well else f"failed, see {log}"
        except OSError as error:  # this worker goes on: others may wait for what only it takes
            said = f"was not begun: {error}"
        print(f"{job.name}: {said}", flush=True)
        board.end(job, well=well)
