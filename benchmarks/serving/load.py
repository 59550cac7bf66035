"""Suite `load`: decode steps while an adapter is loaded into a slot."""

import statistics
import threading
import time

from serving.bench import Bench
from serving.clocks import decode_steps
from serving.decode import Decoding
from serving.figures import Report
from serving.models import random_adapter_for
from serving.shapes import NUM_ADAPTERS

MOST = 2.0
NUM_LOADS = 4


def load(bench: Bench, report: Report) -> None:
    """Base and half of the adapters run; others, in all layers, come into the slots of those that do not."""
    assert bench.shape is not None
    decoding, folder = Decoding(bench), bench.folder / "loaded"
    modules = {path: (linear.out_features, linear.in_features) for path, linear in bench.m.decoder.linears.items()}
    for index in range(NUM_LOADS):
        adapter = random_adapter_for(modules, bench.shape, bench.m.model.dtype, bench.seed + 100 + index)
        adapter.write(folder / str(index))
    running = ["base", *bench.adapters[: NUM_ADAPTERS // 2]]
    batch = min(32, bench.sizes.batches[-1])
    requests = decoding.requests([running[index % len(running)] for index in range(batch)])
    decode_steps(bench.engine, requests, bench.sizes.num_steps)
    quiet = [end - begin for begin, end in decode_steps(bench.engine, requests, bench.sizes.num_steps)]
    loads: list[tuple[float, float]] = []
    errors: list[Exception] = []

    def load_all() -> None:
        pause_s = 8 * statistics.median(quiet)
        try:
            for index in range(NUM_LOADS):
                time.sleep(pause_s)
                begin = time.perf_counter()
                bench.engine.load_adapter(f"loaded-{index}", folder / str(index))
                loads.append((begin, time.perf_counter()))
            time.sleep(pause_s)
        except Exception as error:
            errors.append(error)

    loader = threading.Thread(target=load_all)
    loader.start()
    steps = decode_steps(bench.engine, requests, bench.sizes.num_steps, until=lambda: not loader.is_alive())
    loader.join()
    if errors:
        raise errors[0]
    for index in range(NUM_LOADS):
        bench.engine.unload_adapter(f"loaded-{index}")
    during = [end - begin for begin, end in steps if any(begin < done and end > start for start, done in loads)]
    median = statistics.median(end - begin for begin, end in steps)
    report.add(
        f"slowest step of batch {batch} during {NUM_LOADS} loads, over the median",
        max(during) / median,
        "x",
        at_most=MOST,
        median_step_ms=1e3 * median,
        slowest_step_ms=1e3 * max(during),
        num_steps_during_loads=len(during),
        load_ms=[1e3 * (done - start) for start, done in loads],
        slowest_without_loads=max(quiet) / statistics.median(quiet),
    )
