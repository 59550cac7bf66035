"""Suite `mixed`: requests to all adapters and the router at once, against the same requests to one adapter."""

import random
import statistics

from molora.serving.request import Request
from serving.bench import Bench
from serving.clocks import all_answers, in_turns, ratios
from serving.figures import Report, spread

LEAST = 0.95


def mixed(bench: Bench, report: Report) -> None:
    """All requests come at once and as many run as the engine lets; each prompt's last quarter is active."""
    sizes = bench.sizes
    lengths = random.Random(bench.seed)
    prompts = [bench.ids(lengths.randint(*sizes.prompt)) for _ in range(sizes.num_requests)]
    answers = [lengths.randint(*sizes.answer) for _ in prompts]
    everyone = [*bench.adapters, "auto"]

    def traffic(names: list[str]) -> list[Request]:
        salt = bench.salt()  # each turn reads its prompts anew
        return [
            bench.request(ids, names[index % len(names)], answers[index], start=len(ids) * 3 // 4, salt=salt)
            for index, ids in enumerate(prompts)
        ]

    times = in_turns(
        {
            "one": lambda: all_answers(bench.engine, traffic(bench.adapters[:1])),
            "all": lambda: all_answers(bench.engine, traffic(everyone)),
        },
        bench.repeats,
    )
    found = spread(ratios(times["one"], times["all"]))
    report.add(
        f"{len(bench.adapters)} adapters and the router, {sizes.batches[-1]} at once, of one adapter's tokens/s",
        found["median"],
        "x",
        at_least=LEAST,
        **found,
        num_requests=len(prompts),
        num_prompt_tokens=sum(map(len, prompts)),
        num_new_tokens=sum(answers),
        **{f"{name}_tokens_per_s": sum(answers) / statistics.median(seconds) for name, seconds in times.items()},
    )
