"""Suite `conversation`: five adapters are asked about one long conversation."""

import statistics
from collections.abc import Callable

from molora.serving.request import Request
from serving.bench import Bench
from serving.clocks import all_answers, in_turns, ratios
from serving.figures import Report, spread

NUM_ASKED, NUM_NEW = 5, 16
LEAST_IN_TURN, LEAST_IN_PARALLEL, LEAST_READ_ONCE = 12.0, 35.0, 60.0


def conversation(bench: Bench, report: Report) -> None:
    """End to end, with the base model's conversation in the cache, against plain LoRA, which reads it for each."""
    engine, asked = bench.engine, bench.adapters[:NUM_ASKED]
    told = bench.ids(bench.sizes.conversation)

    def tell() -> None:
        """Where others took its room, the conversation is read again; the clock does not see it."""
        engine.generate(bench.request(told, "base", 1))

    kinds: dict[str, Callable[[list[int], str, int], Request]] = {
        "ours": bench.invocation,
        "plain": bench.reading_again,
    }
    sides: dict[str, Callable[[], float]] = {}
    for kind, request in kinds.items():

        def requests(request: Callable[[list[int], str, int], Request] = request) -> list[Request]:
            return [request(told, adapter, NUM_NEW) for adapter in asked]

        def in_turn(of: Callable[[], list[Request]] = requests) -> float:
            tell()
            return sum(all_answers(engine, [each]) for each in of())

        def in_parallel(of: Callable[[], list[Request]] = requests) -> float:
            tell()
            return all_answers(engine, of())

        sides |= {f"{kind} in turn": in_turn, f"{kind} in parallel": in_parallel}
    times = in_turns(sides, bench.repeats)
    for how, targets in (
        ("in turn", {"": LEAST_IN_TURN}),
        # One figure, two targets: the second one is for attention that reads a shared prefix once for all sequences.
        ("in parallel", {"": LEAST_IN_PARALLEL, ", with the shared prefix read once": LEAST_READ_ONCE}),
    ):
        found = spread(ratios(times[f"plain {how}"], times[f"ours {how}"]))
        for aside, least in targets.items():
            report.add(
                f"{NUM_ASKED} adapters {how} on {len(told)} tokens{aside}, times faster",
                found["median"],
                "x",
                at_least=least,
                **found,
                ours_ms=1e3 * statistics.median(times[f"ours {how}"]),
                plain_ms=1e3 * statistics.median(times[f"plain {how}"]),
            )
