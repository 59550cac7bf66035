"""Suite `cpu`: the engine against transformers' own `generate`, and adapters invoked on cached histories.

Both sides get the same prompt and write the same number of tokens, greedy and without an early end. Neither finds
anything in a cache, unless the figure is about that.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from molora.serving.request import Request
from serving.bench import Bench
from serving.checks import check_same_tokens
from serving.clocks import clients, first_token, in_turns, ratios, stamps, wait_until_idle
from serving.figures import Report, spread
from serving.shapes import NUM_ACTIVE

LEAST_ALONE, LEAST_OF_CLIENTS = 0.9, 2.0
NUM_CLIENTS = 8


@dataclass(frozen=True)
class CpuSizes:
    """
    Attributes:
        contexts: tokens of a prompt, and how many new ones are written after it.
        histories: tokens before an adapter is invoked.
    """

    contexts: tuple[tuple[int, int], ...]
    histories: tuple[int, ...]


DEMO = CpuSizes(contexts=((32, 64), (1024, 32), (4096, 32)), histories=(1024, 4096, 7936))
TINY = CpuSizes(contexts=((8, 6), (64, 4)), histories=(32, 64))


class Plain:
    """The base model as transformers alone runs it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = copy.deepcopy(model.generation_config)
        self._config.eos_token_id = None
        self._config.do_sample = False
        self._config.temperature = self._config.top_p = self._config.top_k = None

    def stamps(self, ids: list[int], num_new: int) -> list[float]:
        """Seconds from the call to each new token."""
        clock = _Clock()
        self._generate(ids, num_new, clock)
        return clock.stamps

    def answer(self, ids: list[int], num_new: int) -> list[int]:
        return self._generate(ids, num_new, None)

    def _generate(self, ids: list[int], num_new: int, clock: "_Clock | None") -> list[int]:
        inputs = torch.tensor([ids])
        self._config.max_new_tokens = self._config.min_new_tokens = num_new
        out = self._model.generate(
            inputs, attention_mask=torch.ones_like(inputs), generation_config=self._config, streamer=clock
        )
        return out[0, len(ids) :].tolist()


class _Clock:
    """A streamer, as `generate` takes it: it is given the prompt first, and then each token."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self._start_s = time.perf_counter()
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.stamps.append(time.perf_counter() - self._start_s)
        self._has_prompt = True

    def end(self) -> None:
        pass


def cpu(bench: Bench, report: Report, plain: Plain, sizes: CpuSizes) -> None:
    check_against_generate(bench, report, plain, *sizes.contexts[0])
    few, many = sizes.contexts[0], sizes.contexts[1:]
    whole_answers(bench, report, plain, *few)
    for context, num_new in many:
        steps_after_context(bench, report, plain, context, num_new)
    for length in sizes.histories:
        invoked_on_history(bench, report, length)


def check_against_generate(bench: Bench, report: Report, plain: Plain, context: int, num_new: int) -> None:
    """What the engine writes for the base is what `generate` writes."""
    for _ in range(2):
        ids = bench.ids(context)
        (out,) = bench.engine.generate(bench.request(ids, "base", num_new))
        check_same_tokens("base", out.generated_ids, plain.answer(ids, num_new))
    report.checked("base writes the tokens of transformers' generate", num_new_tokens=num_new)


def whole_answers(bench: Bench, report: Report, plain: Plain, context: int, num_new: int) -> None:
    """Tokens a second of short prompts and their answers, end to end: alone, and of clients at once."""
    prompts = [bench.ids(context) for _ in range(NUM_CLIENTS)]
    routes = ["base", bench.adapters[0], *(["auto"] if bench.m.bank.has_router else [])]

    def request(ids: list[int], route: str) -> Request:
        return bench.request(ids, route, num_new, start=0, salt=bench.salt())

    def alone(route: str) -> list[float]:
        return stamps(bench.engine, request(prompts[0], route))

    def together(route: str) -> list[float]:
        return [clients(bench.engine, [request(ids, route) for ids in prompts])]

    sides: dict[str, Callable[[], list[float]]] = {"generate": lambda: plain.stamps(prompts[0], num_new)}
    sides |= {f"{route} alone": lambda route=route: alone(route) for route in routes}
    sides |= {f"{route} together": lambda route=route: together(route) for route in routes}
    turns = in_turns(sides, bench.repeats)
    whole = {name: [each[-1] for each in found] for name, found in turns.items()}
    for route in routes:
        label = "base" if route == "base" else f"{'routed' if route == 'auto' else 'explicit'}, active from token 0"
        add_ratio(
            report,
            f"{label}: 1 client, {context} tokens of context, of generate's tokens/s",
            ratios(whole["generate"], whole[f"{route} alone"]),
            at_least=LEAST_ALONE if route == "base" else None,
            generate_tokens_per_s=num_new / statistics.median(whole["generate"]),
            tokens_per_s=num_new / statistics.median(whole[f"{route} alone"]),
            decode_alone=statistics.median(
                ratios(step_s(turns["generate"]), step_s(turns[f"{route} alone"])),
            ),
        )
        add_ratio(
            report,
            f"{label}: {NUM_CLIENTS} clients, of generate's tokens/s at batch 1",
            [NUM_CLIENTS * each for each in ratios(whole["generate"], whole[f"{route} together"])],
            at_least=LEAST_OF_CLIENTS if route == "base" else None,
            tokens_per_s=NUM_CLIENTS * num_new / statistics.median(whole[f"{route} together"]),
        )


def steps_after_context(bench: Bench, report: Report, plain: Plain, context: int, num_new: int) -> None:
    """Decode steps after a long prompt; the prompt itself, which both sides read, is reported beside."""
    ids, adapter = bench.ids(context), bench.adapters[0]

    def engine(route: str) -> list[float]:
        return stamps(bench.engine, bench.request(ids, route, num_new, start=0, salt=bench.salt()))

    sides = {"generate": lambda: plain.stamps(ids, num_new), "base": lambda: engine("base")}
    sides["explicit, active from token 0"] = lambda: engine(adapter)
    if bench.m.bank.has_router:
        sides["routed, active from token 0"] = lambda: engine("auto")
    turns = in_turns(sides, bench.repeats)
    for name in list(sides)[1:]:
        add_ratio(
            report,
            f"{name}: 1 client, decode after {context} tokens, of generate's tokens/s",
            ratios(step_s(turns["generate"]), step_s(turns[name])),
            at_least=LEAST_ALONE if name == "base" else None,
            generate_step_ms=1e3 * statistics.median(step_s(turns["generate"])),
            step_ms=1e3 * statistics.median(step_s(turns[name])),
            prompt_alone=statistics.median(
                ratios([each[0] for each in turns["generate"]], [each[0] for each in turns[name]])
            ),
        )


def invoked_on_history(bench: Bench, report: Report, length: int) -> None:
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
    times = in_turns(sides, bench.repeats)
    for name in list(sides)[1:]:
        add_ratio(
            report,
            f"{name} invoked after {length} tokens, times sooner than reading again",
            ratios(times["reading again"], times[name]),
            first_token_ms=1e3 * statistics.median(times[name]),
            reading_again_ms=1e3 * statistics.median(times["reading again"]),
        )
    wait_until_idle(engine)


def step_s(turns: list[list[float]]) -> list[float]:
    """Of each turn, the median time between tokens."""
    return [statistics.median(end - begin for begin, end in pairwise(each)) for each in turns]


def add_ratio(
    report: Report, name: str, samples: list[float], *, at_least: float | None = None, **details: Any
) -> None:
    found = spread(samples)
    report.add(name, found["median"], "x", at_least=at_least, **found, **details)
