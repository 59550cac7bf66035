"""Suite `invoke`: time to the first token of an adapter or the router that is invoked on a long history."""

import statistics

from serving import ceilings, over_http
from serving.bench import Bench
from serving.checks import check_same_tokens
from serving.clocks import first_token, in_turns, ratios
from serving.figures import Report, spread
from serving.shapes import NUM_ACTIVE

LEAST = {8192: 30.0, 32768: 120.0, 65536: 250.0}  # by tokens of history
LEAST_TFLOPS = 400.0


def invoke(bench: Bench, report: Report) -> None:
    """From token ids in to token out, with the base model's history in the cache, against reading it all again."""
    engine, adapter = bench.engine, bench.adapters[0]
    longest = bench.ids(max(bench.sizes.histories))
    with over_http.served(engine) as connection:
        for length in bench.sizes.histories:
            history = longest[:length]
            engine.generate(bench.request(history, "base", 1))
            check_reuse(bench, report, history)

            def invoked(route: str, history: list[int] = history) -> float:
                return first_token(engine, bench.invocation(history, route, 1))[0]

            def over_http_s(history: list[int] = history) -> float:
                ids = history + bench.ids(NUM_ACTIVE)
                model = f"{bench.m.bank.name}:{adapter}"
                return over_http.first_token_s(connection, model, ids, len(history))

            times = in_turns(
                {
                    "reading again": lambda history=history: first_token(
                        engine, bench.reading_again(history, adapter, 1)
                    )[0],
                    "adapter": lambda: invoked(adapter),
                    "router": lambda: invoked("auto"),
                    "adapter over HTTP": over_http_s,
                },
                bench.repeats,
            )
            report_length(bench, report, length, times)


def check_reuse(bench: Bench, report: Report, history: list[int]) -> None:
    """Every token of the history is found, and the answer is that of a cache without it."""
    request = bench.invocation(history, bench.adapters[0], 1)
    _, found = first_token(bench.engine, request)
    if (found.num_reused_tokens, found.num_computed_tokens) != (len(history), NUM_ACTIVE):
        raise RuntimeError(
            f"of {len(history)} tokens of history {found.num_reused_tokens} were found and "
            f"{found.num_computed_tokens} tokens computed; the cache is too small for this suite."
        )
    ids = found.token_ids[: found.num_prompt_tokens]
    cold = bench.request(ids, bench.adapters[0], 1, start=len(history), salt=bench.salt())
    _, computed = first_token(bench.engine, cold)
    check_same_tokens(f"after {len(history)} tokens", found.generated_ids, computed.generated_ids)
    report.checked(f"the token after {len(history)} cached tokens is that after computed ones")


def report_length(bench: Bench, report: Report, length: int, times: dict[str, list[float]]) -> None:
    again_s = statistics.median(times["reading again"])
    flops = ceilings.prompt_flops(bench.m.model, length + NUM_ACTIVE)
    report.add(
        f"reading {length} tokens again",
        flops / again_s / 1e12,
        "TFLOP/s",
        at_least=LEAST_TFLOPS if length in LEAST else None,
        first_token_ms=1e3 * again_s,
    )
    for name in ("adapter", "router", "adapter over HTTP"):
        found = spread(ratios(times["reading again"], times[name]))
        report.add(
            f"{name} after {length} tokens, times sooner",
            found["median"],
            "x",
            at_least=None if "HTTP" in name else LEAST.get(length),
            **found,
            first_token_ms=1e3 * statistics.median(times[name]),
            reading_again_ms=1e3 * again_s,
        )
