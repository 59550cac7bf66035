"""Suite `cpu`: the engine against transformers' own `generate`, and adapters invoked on cached histories.

Both sides get the same prompt and write the same number of tokens, greedy and without an early end. Either both find
the prompt's keys and values, or neither does.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from molora.serving.request import Request
from serving.bench import Bench
from serving.checks import check_same_tokens
from serving.clocks import beside, clients, first_token, in_turns, ratios, stamps
from serving.figures import Report, spread
from serving.plain import Plain
from serving.shapes import NUM_ACTIVE

LEAST_ALONE, LEAST_OF_CLIENTS = 0.9, 2.0
NUM_CLIENTS = 8


FEW_TURNS = 3  # of what takes a minute


@dataclass(frozen=True)
class CpuSizes:
    """
    Attributes:
        prompt, num_new: tokens of whole answers.
        contexts: tokens of prompts before decode steps; the first one's reading is clocked too.
        num_steps: of these.
        histories: tokens before an adapter is invoked; all but the first take `FEW_TURNS`.
    """

    prompt: int
    num_new: int
    contexts: tuple[int, ...]
    num_steps: int
    histories: tuple[int, ...]


DEMO = CpuSizes(prompt=32, num_new=32, contexts=(1024, 4096), num_steps=24, histories=(1024, 4096, 7936))
TINY = CpuSizes(prompt=8, num_new=6, contexts=(32, 64), num_steps=4, histories=(32, 64))


def cpu(bench: Bench, report: Report, plain: Plain, sizes: CpuSizes) -> None:
    check_against_generate(bench, report, plain, sizes)
    whole_answers(bench, report, plain, sizes.prompt, sizes.num_new)
    prompts(bench, report, plain, sizes.contexts[0])
    for context in sizes.contexts:
        steps_after_context(bench, report, plain, context, sizes.num_steps)
    for length in sizes.histories:
        is_short = length == sizes.histories[0]
        invoked_on_history(bench, report, length, bench.repeats if is_short else min(bench.repeats, FEW_TURNS))


def check_against_generate(bench: Bench, report: Report, plain: Plain, sizes: CpuSizes) -> None:
    """What the engine writes for the base is what `generate` writes."""
    for _ in range(2):
        ids = bench.ids(sizes.prompt)
        (out,) = bench.engine.generate(bench.request(ids, "base", sizes.num_new))
        check_same_tokens("base", out.generated_ids, plain.answer(ids, sizes.num_new))
    report.checked("base writes the tokens of transformers' generate", num_new_tokens=sizes.num_new)


def whole_answers(bench: Bench, report: Report, plain: Plain, context: int, num_new: int) -> None:
    """Tokens a second of short prompts and their answers, end to end: alone, and of clients at once."""
    prompts = [bench.ids(context) for _ in range(NUM_CLIENTS)]
    routes = {"base": "base", "explicit, active from token 0": bench.adapters[0]}
    if bench.m.bank.has_router:
        routes["routed, active from token 0"] = "auto"

    def request(ids: list[int], route: str) -> Request:
        return bench.request(ids, route, num_new, start=0, salt=bench.salt())

    def alone(route: str) -> list[float]:
        return stamps(bench.engine, request(prompts[0], route))

    def together(route: str) -> list[float]:
        return [clients(bench.engine, [request(ids, route) for ids in prompts])]

    sides: dict[str, Callable[[], list[float]]] = {}
    for label, route in routes.items():
        sides[f"{label}: 1 client, {context} tokens of context"] = lambda route=route: alone(route)
        sides[f"{label}: {NUM_CLIENTS} clients"] = lambda route=route: together(route)
    pairs = beside(lambda: plain.stamps(prompts[0], num_new), sides, bench.repeats)
    for name, found in pairs.items():
        num_clients, least = (NUM_CLIENTS, LEAST_OF_CLIENTS) if "clients" in name else (1, LEAST_ALONE)
        add_ratio(
            report,
            f"{name}, of generate's tokens/s at batch 1",
            [num_clients * theirs[-1] / ours[-1] for theirs, ours in found],
            at_least=least if name.startswith("base") else None,
            generate_tokens_per_s=num_new / statistics.median(theirs[-1] for theirs, _ in found),
            tokens_per_s=num_clients * num_new / statistics.median(ours[-1] for _, ours in found),
        )


def prompts(bench: Bench, report: Report, plain: Plain, context: int) -> None:
    """Time to the first token of a prompt that nobody has read."""
    ids = bench.ids(context)
    pairs = beside(
        lambda: plain.stamps(ids, 1)[0],
        {"base": lambda: first_token(bench.engine, bench.request(ids, "base", 1, salt=bench.salt()))[0]},
        bench.repeats,
    )["base"]
    add_ratio(
        report,
        f"base: a prompt of {context} tokens, of generate's tokens/s",
        [theirs / ours for theirs, ours in pairs],
        tokens_per_s=context / statistics.median(ours for _, ours in pairs),
    )


def steps_after_context(bench: Bench, report: Report, plain: Plain, context: int, num_steps: int) -> None:
    """Decode steps after a long prompt that both sides have read."""
    ids = bench.ids(context)
    cache = plain.read(ids)

    def engine(route: str) -> list[float]:
        # What is active is generated, so nobody finds it.
        return stamps(bench.engine, bench.request(ids, route, num_steps + 1))

    sides = {"base": lambda: engine("base"), "explicit": lambda: engine(bench.adapters[0])}
    if bench.m.bank.has_router:
        sides["routed"] = lambda: engine("auto")
    pairs = beside(lambda: plain.stamps_after(cache, ids, num_steps + 1), sides, bench.repeats)
    for name, found in pairs.items():
        steps = [(step_s(theirs), step_s(ours)) for theirs, ours in found]
        add_ratio(
            report,
            f"{name}: 1 client, decode after {context} tokens, of generate's tokens/s",
            [theirs / ours for theirs, ours in steps],
            at_least=LEAST_ALONE if name == "base" else None,
            generate_step_ms=1e3 * statistics.median(theirs for theirs, _ in steps),
            step_ms=1e3 * statistics.median(ours for _, ours in steps),
        )


def invoked_on_history(bench: Bench, report: Report, length: int, repeats: int) -> None:
    """Time to the first token of an adapter after history of the base model, against reading the history again."""
    engine, adapter, history = bench.engine, bench.adapters[0], bench.ids(length)
    engine.generate(bench.request(history, "base", 1))
    _, out = first_token(engine, bench.invocation(history, adapter, 1))
    if out.num_computed_tokens > NUM_ACTIVE or out.num_recomputed_tokens:
        raise RuntimeError(f"{out.num_computed_tokens} tokens were computed after {length} tokens of cached history.")
    sides = {
        "reading again": lambda: first_token(engine, bench.reading_again(history, adapter, 1))[0],
        "adapter": lambda: first_token(engine, bench.invocation(history, adapter, 1))[0],
    }
    if bench.m.bank.has_router:
        sides["router"] = lambda: first_token(engine, bench.invocation(history, "auto", 1))[0]
    times = in_turns(sides, repeats, warm_up=False)
    for name in list(sides)[1:]:
        add_ratio(
            report,
            f"{name} invoked after {length} tokens, times sooner than reading again",
            ratios(times["reading again"], times[name]),
            first_token_ms=1e3 * statistics.median(times[name]),
            reading_again_ms=1e3 * statistics.median(times["reading again"]),
        )


def step_s(stamps: list[float]) -> float:
    """The median time between tokens."""
    return statistics.median(end - begin for begin, end in pairwise(stamps))


def add_ratio(
    report: Report, name: str, samples: list[float], *, at_least: float | None = None, **details: Any
) -> None:
    found = spread(samples)
    report.add(name, found["median"], "x", at_least=at_least, **found, **details)
