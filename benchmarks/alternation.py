"""Thousands of requests for twenty adapters that come and go, each answer held against that of the same request alone.

    python benchmarks/alternation.py --requests 10000 --out benchmarks/results/alternation-cpu.json

A tiny random base in float32 on a CPU, whose cache is too small for what runs at once. Several clients ask the same
engine in turn for base, the router, one adapter of twenty, or a blend of two, greedily or by draws of a seed. There are
about a hundred prompts, so that the same tokens are met under many routes, and many share their beginnings. Meanwhile
adapters are loaded, unloaded and replaced under the same name, and every sixth client leaves after a few tokens. Then
each request is asked again, alone, of an engine whose cache is empty and in which nothing else runs. Requests are
submitted while no adapter is being loaded, so that it is known which versions each of them meets.
"""

import argparse
import json
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from serving.machine import describe_machine

import molora
from molora.adapter import random_adapter
from molora.bank import Bank, BaseInfo
from molora.digest import base_digest
from molora.files import write_atomic
from molora.model import MoLoRA
from molora.router import KeyRouter, RouterConfig
from molora.serving.engine import EngineFullError, NoFreeSlotError
from molora.serving.request import Request, RequestError
from molora.tiny import make_tiny_base

NUM_ADAPTERS, NUM_SLOTS, NUM_CLIENTS = 20, 8, 12
MANY = 1000  # requests, among which everything happens
VERSIONS = ("first", "second")  # of each adapter's weights
ROUTABLE = ("left", "right")
SHAPES = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
EARLY_LINEARS, LINEARS = (
    {f"model.layers.{layer}.{path}": shape for layer in layers for path, shape in SHAPES.items()}
    for layers in ((0,), (1, 2, 3))
)


@dataclass(frozen=True)
class Asked:
    """A request that was taken, and what came of it.

    Attributes:
        versions: of the adapters that it names, when it was taken.
    """

    request: Request
    versions: tuple[tuple[str, str], ...]
    ids: tuple[int, ...]
    routes: tuple[Any, ...]


def make_bank(folder: Path) -> Path:
    """A bank of two routable adapters, and beside it twenty folders of two versions each."""
    base = make_tiny_base(folder / "base", seed=0, vocab_size=259, max_position_embeddings=1024)
    bank = Bank.create(
        folder / "bank", name="crowd", base=BaseInfo(str(base), base_digest(base)), router_layer=1, max_rank=8
    )
    generator = torch.Generator().manual_seed(0)

    def write(name: str, rank: int) -> Path:
        adapter = random_adapter(LINEARS, rank=rank, alpha=2 * rank, generator=generator, std=0.15)
        adapter.write(folder / "adapters" / name)
        return folder / "adapters" / name

    for name in ROUTABLE:
        bank.add(write(name, 4), activation=0)
    for index in range(NUM_ADAPTERS):
        for version in VERSIONS:
            write(f"{version}/a{index}", 1 + index % 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        router = KeyRouter(RouterConfig(hidden_dim=32, key_dim=16, lora_rank=4), 64, len(ROUTABLE) + 1)
    with torch.no_grad():
        router.hidden.bias.zero_()  # so that every column is taken by some token
        router.query.bias.zero_()
    router.lora = random_adapter(EARLY_LINEARS, rank=4, alpha=16, generator=generator, std=0.2).weights
    bank.set_router(router)
    return bank.path


class Requests:
    """Random requests; the same seed, the same ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.prompts = []
        for _ in range(30):
            beginning = self._ids(self.random.randint(8, 60))
            start = self.random.randrange(len(beginning) + 1)
            endings = [self._ids(self.random.randint(1, 12)) for _ in range(4)]
            self.prompts += [(beginning + ending, start) for ending in endings]

    def next(self) -> Request:
        draw = self.random
        ids, start = draw.choice(self.prompts)
        names = [f"a{index}" for index in draw.sample(range(NUM_ADAPTERS), 2)]
        blend = {names[0]: 0.5, names[1]: 0.25}
        route: Any = draw.choices(["base", "auto", names[0], blend], [1, 2, 6, 1])[0]
        how: dict[str, Any] = {} if draw.random() < 0.5 else {"temperature": 1.0, "seed": draw.randrange(1000)}
        sampling = molora.Sampling(max_new_tokens=draw.randint(1, 12), ignore_eos=True, **how)
        return Request(prompt=ids, route=route, activation=start, sampling=sampling)

    def _ids(self, length: int) -> list[int]:
        return [self.random.randrange(3, 259) for _ in range(length)]


class Crowd:
    """Clients of one engine, and somebody who loads and unloads its adapters."""

    def __init__(self, m: MoLoRA, folder: Path, num_requests: int, seed: int) -> None:
        self.m, self.engine, self.folder, self.num_requests = m, m.engine, folder, num_requests
        self.requests, self.draws = Requests(seed), random.Random(f"crowd {seed}")
        self.loaded: dict[str, str] = {}  # names and versions
        self.lock = threading.Lock()  # of all that is above, so that what a request will meet is known
        self.asked: list[Asked] = []
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.peak_mb: list[float] = []

    def run(self) -> None:
        over = threading.Event()
        keeper = threading.Thread(target=self._noting_faults, args=(self._keep, over))
        clients = [threading.Thread(target=self._noting_faults, args=(self._ask,)) for _ in range(NUM_CLIENTS)]
        for thread in (keeper, *clients):
            thread.start()
        for thread in clients:
            thread.join()
        over.set()
        keeper.join()

    def _noting_faults(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self.faults.append(f"{work.__name__}: {type(error).__name__} {error}")

    def check_slots(self) -> None:
        """When all are gone, every slot can be taken again."""
        for name in sorted(self.loaded):
            self.engine.unload_adapter(name)
        try:
            for index in range(NUM_SLOTS):
                self.engine.load_adapter(
                    f"a{index}", self.folder / "adapters" / VERSIONS[0] / f"a{index}", activation=0
                )
        except NoFreeSlotError:
            self.faults.append(f"only {index} of {NUM_SLOTS} slots are free in the end")

    def _keep(self, over: threading.Event) -> None:
        while not over.wait(0.01):
            with self.lock:
                name, version = f"a{self.draws.randrange(NUM_ADAPTERS)}", self.draws.choice(VERSIONS)
                path = self.folder / "adapters" / version / name
                try:
                    if name not in self.loaded:
                        self.engine.load_adapter(name, path, activation=0)
                        self.counts["loads"] += 1
                    elif self.loaded[name] != version:
                        self.engine.load_adapter(name, path, replace=True)
                        self.counts["replacements"] += 1
                    else:
                        self.engine.unload_adapter(name)
                        self.counts["unloads"] += 1
                        del self.loaded[name]
                        continue
                except NoFreeSlotError:
                    self.counts["no free slot"] += 1
                    if self.loaded:
                        gone = self.draws.choice(sorted(self.loaded))
                        self.engine.unload_adapter(gone)
                        self.counts["unloads"] += 1
                        del self.loaded[gone]
                    continue
                self.loaded[name] = version

    def _ask(self) -> None:
        while True:
            with self.lock:
                if len(self.asked) + self.counts["running"] >= self.num_requests or self.faults:
                    return
                request = self.requests.next()
                leaves_after = self.draws.randrange(4) if self.draws.random() < 1 / 6 else None
                named = _named(request)
                known = all(name in self.loaded for name in named)
                try:
                    stream = self.engine.submit(request)
                except RequestError as error:
                    self.counts["refused, not loaded"] += 1
                    if known or error.field != "route":
                        self.faults.append(f"{request.route} was refused: {error}")
                    continue
                except (NoFreeSlotError, EngineFullError) as error:
                    self.counts[f"refused, {type(error).__name__}"] += 1
                    continue
                if not known:
                    self.faults.append(f"{request.route} was taken, and is not loaded")
                versions = tuple((name, self.loaded.get(name, "")) for name in named)
                self.counts["running"] += 1
            ids, routes, leaves = [], [], False
            with stream:
                for token in stream:
                    ids.append(token.id)
                    routes.append(token.route)
                    if leaves := leaves_after is not None and len(ids) > leaves_after:
                        break
            with self.lock:
                self.counts["running"] -= 1
                self.counts["left early"] += leaves
                if not leaves and len(ids) != request.sampling.max_new_tokens:
                    self.faults.append(f"{len(ids)} tokens of {request.sampling.max_new_tokens} came")
                self.asked.append(Asked(request, versions, tuple(ids), tuple(routes)))
                if len(self.asked) % max(1, self.num_requests // 10) == 0:
                    self.peak_mb.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
                    print(f"{len(self.asked)} answered, peak memory {self.peak_mb[-1]:.0f} MB", flush=True)


def _named(request: Request) -> list[str]:
    if isinstance(request.route, str):
        return [] if request.route in ("base", "auto") else [request.route]
    return list(request.route)


def check(bank: Path, folder: Path, asked: list[Asked]) -> list[dict[str, Any]]:
    """Ask each alone, in an empty cache; what differs."""
    engine = {"kv_cache_bytes": 1 << 20, "block_size": 8}
    m = molora.load(bank, device="cpu", dtype="float32", num_extra_slots=NUM_SLOTS, engine=engine)
    loaded: dict[str, str] = {}
    different = []
    for index, each in sorted(enumerate(asked), key=lambda pair: pair[1].versions):  # to load each seldom
        for name, version in each.versions:
            if loaded.get(name) != version:
                if len(loaded) == NUM_SLOTS and name not in loaded:
                    gone = next(other for other in loaded if other not in dict(each.versions))
                    m.engine.unload_adapter(gone)
                    del loaded[gone]
                path = folder / "adapters" / version / name
                m.engine.load_adapter(name, path, activation=0, replace=name in loaded)
                loaded[name] = version
        m.engine.clear_cache()
        (out,) = m.engine.generate([each.request])
        num_tokens = len(each.ids)
        same_ids = tuple(out.generated_ids[:num_tokens]) == each.ids
        same_routes = [[name for name, _ in route] for route in out.generated_routes[:num_tokens]] == [
            [name for name, _ in route] for route in each.routes
        ]
        if not (same_ids and same_routes):
            where = next((i for i, (a, b) in enumerate(zip(out.generated_ids, each.ids, strict=False)) if a != b), None)
            different.append({"request": index, "route": str(each.request.route), "token": where})
    m.engine.close()
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    head = describe_machine(torch.device("cpu"))
    threads_before = threading.active_count()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bank = make_bank(folder)
        engine = {"kv_cache_bytes": 3 << 17, "block_size": 8, "max_sequences": 10, "max_step_tokens": 48}
        m = molora.load(bank, device="cpu", dtype="float32", num_extra_slots=NUM_SLOTS, engine=engine)
        crowd, begin_s = Crowd(m, folder, args.requests, args.seed), time.monotonic()
        crowd.run()
        took_s, stats = time.monotonic() - begin_s, m.engine.stats()
        m.engine.clear_cache()
        free, blocks = m.engine.stats().num_free_blocks, m.engine.stats().num_blocks
        crowd.check_slots()
        m.engine.close()
        threads_left = threading.active_count() - threads_before
        print(f"{len(crowd.asked)} answers in {took_s:.0f} s; now each of them alone", flush=True)
        different = check(bank, folder, crowd.asked)
    result = head | {
        "seed": args.seed,
        "num_answers": len(crowd.asked),
        "num_different": len(different),
        "different": different[:20],
        "faults": crowd.faults,
        "counts": {name: number for name, number in sorted(crowd.counts.items()) if name != "running"},
        "num_preemptions": stats.num_preemptions,
        "num_evicted_blocks": stats.num_evicted_blocks,
        "num_cached_tokens": stats.num_cached_tokens,
        "num_recomputed_tokens": stats.num_recomputed_tokens,
        "num_failed_steps": stats.num_failed_steps,
        "num_leaked_blocks": blocks - free,
        "num_leaked_threads": threads_left,
        "peak_memory_mb": [round(each) for each in crowd.peak_mb],
    }
    print(json.dumps({name: value for name, value in result.items() if name not in head}, indent=1))
    if args.out is not None:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    bad = ("num_different", "faults", "num_recomputed_tokens", "num_failed_steps", "num_leaked_blocks")
    hard = ("loads", "replacements", "unloads", "left early")  # what has to have happened, if this is to say anything
    easy = [name for name in hard if not crowd.counts[name]]
    easy += [name for name in ("num_preemptions", "num_evicted_blocks", "num_cached_tokens") if not result[name]]
    if args.requests >= MANY and easy:
        print(f"this was too easy: no {', '.join(easy)}")
    is_short = len(crowd.asked) < args.requests or (args.requests >= MANY and bool(easy))
    if is_short or any(result[name] for name in (*bad, "num_leaked_threads")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
