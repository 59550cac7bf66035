"""Suite `counters`: no route has history computed again."""

from serving.bench import Bench
from serving.figures import Report
from serving.shapes import NUM_ACTIVE

NUM_NEW = 8


def counters(bench: Bench, report: Report) -> None:
    """One conversation, continued by everyone in turn, then by everyone at once, then twice by the same."""
    engine, adapters = bench.engine, bench.adapters
    history = bench.ids(bench.sizes.conversation)
    engine.generate(bench.request(history, "base", 1))
    before = engine.stats()
    everyone = ["base", *adapters, "auto", {adapters[0]: 0.5, adapters[1]: 0.5}]
    requests = [
        bench.request(history + bench.ids(NUM_ACTIVE), route, NUM_NEW, start=len(history)) for route in everyone
    ]
    outs = [engine.generate(request)[0] for request in requests]
    others = [bench.request(history + bench.ids(NUM_ACTIVE), route, NUM_NEW, start=len(history)) for route in everyone]
    outs += engine.generate(others)
    outs += engine.generate(requests)
    after = engine.stats()
    found = sum(out.num_reused_tokens >= len(history) for out in outs)
    report.add("history tokens computed again", after.num_recomputed_tokens, "tokens", at_most=0)
    report.add(
        "requests that found all of their history",
        found / len(outs),
        "x",
        at_least=1.0,
        num_requests=len(outs),
        history=len(history),
        **{
            name: getattr(after, name) - getattr(before, name)
            for name in ("num_prompt_tokens", "num_cached_tokens", "num_computed_tokens", "num_reencoded_tokens")
        },
    )
