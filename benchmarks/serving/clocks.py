"""Clocks: how long the engine takes, from outside, and turns that make two times comparable."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TypeVar

from molora.generation import Generation
from molora.serving.engine import Engine
from molora.serving.request import Request

NUM_STEADY_TOKENS = 4  # of the last sequence, before a decode step counts
T = TypeVar("T")


def in_turns(sides: Mapping[str, Callable[[], T]], repeats: int, *, warm_up: bool = True) -> dict[str, list[T]]:
    """What each side gives, `repeats` times: A, B, A, B, ...; once more before, to warm up, which is dropped."""
    results: dict[str, list[T]] = {name: [] for name in sides}
    for turn in range(-1 if warm_up else 0, repeats):
        for name, side in sides.items():
            result = side()
            if turn >= 0:
                results[name].append(result)
    return results


def beside(base: Callable[[], T], others: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[tuple[T, T]]]:
    """For each of the others, (base, other) of every turn, one right after the other; a turn to warm up is dropped.

    For what takes seconds on a machine that others use as well.
    """
    pairs: dict[str, list[tuple[T, T]]] = {name: [] for name in others}
    for turn in range(-1, repeats):
        for name, other in others.items():
            pair = base(), other()
            if turn >= 0:
                pairs[name].append(pair)
    return pairs


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Of each turn."""
    return [a / b for a, b in zip(over, under, strict=True)]


def wait_until_idle(engine: Engine) -> None:
    """What was cancelled has ended."""
    while (stats := engine.stats()).num_running or stats.num_waiting:
        time.sleep(0.001)


def first_token(engine: Engine, request: Request) -> tuple[float, Generation]:
    """Seconds from token ids in to the first token out, and the answer, which is to be one token."""
    wait_until_idle(engine)
    start_s = time.perf_counter()
    with engine.submit(request) as stream:
        next(stream)
        seconds = time.perf_counter() - start_s
        return seconds, stream.result


def stamps(engine: Engine, request: Request) -> list[float]:
    """Seconds from the submission to each token of one answer."""
    wait_until_idle(engine)
    start_s = time.perf_counter()
    with engine.submit(request) as stream:
        return [time.perf_counter() - start_s for _ in stream]


def all_answers(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds for all answers, submitted at once."""
    wait_until_idle(engine)
    start_s = time.perf_counter()
    engine.generate(requests)
    return time.perf_counter() - start_s


def clients(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds for all answers, each one asked for and read by a client in a thread of its own."""
    wait_until_idle(engine)
    threads = [threading.Thread(target=_read, args=(engine, request)) for request in requests]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start_s


def decode_steps(
    engine: Engine, requests: Sequence[Request], num_steps: int, *, until: Callable[[], bool] = lambda: True
) -> list[tuple[float, float]]:
    """When each decode step began and ended, while all requests decode; the answers' rest is not computed.

    One stream is read, that of the request which came last: a step gives each sequence one token.

    Args:
        until: more steps are clocked until it is true.

    Raises:
        RuntimeError: an answer ended too early; ask for longer ones.
    """
    wait_until_idle(engine)
    ends: list[float] = []
    with ExitStack() as stack:
        streams = [stack.enter_context(engine.submit(request)) for request in requests]
        for index, _ in enumerate(streams[-1], 1):
            if index >= NUM_STEADY_TOKENS:
                ends.append(time.perf_counter())
            if len(ends) > num_steps and until():
                break
        if engine.stats().num_running != len(requests):
            raise RuntimeError("an answer ended while steps were clocked; ask for longer ones.")
    return list(pairwise(ends))


def _read(engine: Engine, request: Request) -> None:
    with engine.submit(request) as stream:
        for _ in stream:
            pass
