"""The engine's own adapter slots, on a tiny base on a CPU: which requests find their adapter."""

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import molora
from molora.adapter import random_adapter
from molora.bank import Bank, BaseInfo
from molora.digest import base_digest
from molora.model import MoLoRA
from molora.slots import Hold, ResolvedRoute
from molora.tiny import make_tiny_base
from scaling.dealing import Asked
from scaling.simulate import SlotCache


@contextmanager
def loaded(*, num_slots: int, rank: int) -> Iterator[tuple[MoLoRA, Path]]:
    """A model without adapters of its own, and a folder for files."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        base = make_tiny_base(folder / "base", seed=0, vocab_size=259)
        info = BaseInfo(str(base), base_digest(base))
        Bank.create(folder / "bank", name="bank", base=info, router_layer=0, max_rank=rank)
        yield molora.load(folder / "bank", device="cpu", dtype="float32", num_extra_slots=num_slots), folder


def write_adapter(m: MoLoRA, path: Path, rank: int, seed: int) -> None:
    """One on all linears."""
    modules = {name: (linear.out_features, linear.in_features) for name, linear in m.decoder.linears.items()}
    random_adapter(modules, rank=rank, alpha=rank, generator=torch.Generator().manual_seed(seed)).write(path)


def same_hits(asked: Sequence[Asked], *, number: int, num_slots: int, held_s: float) -> dict[str, int]:
    """Requests of one GPU that found their adapter, as the engine's slots say and as `SlotCache` does.

    Raises:
        RuntimeError: they differ on a request.
    """
    simulated, num_found = SlotCache(num_slots), 0
    running: list[tuple[float, int]] = []
    holds: dict[int, Hold] = {}
    with loaded(num_slots=num_slots, rank=1) as (m, folder):
        for adapter in range(number):
            write_adapter(m, folder / f"{adapter}", rank=1, seed=adapter)
            m.slots.load(f"{adapter}", folder / f"{adapter}")
            simulated.acquire(adapter)
            simulated.release(adapter)
        for index, request in enumerate(asked):
            while running and running[0][0] <= request.time_s:
                _, ended = heapq.heappop(running)
                m.slots.release(holds.pop(ended))
                simulated.release(asked[ended].adapter)
            name = f"{request.adapter}"
            found = m.slots.resident(name)
            holds[index] = m.slots.acquire(ResolvedRoute(False, (name,), (1.0,)))
            if simulated.acquire(request.adapter) != found:
                raise RuntimeError(f"request {index}: the engine's slots {'held' if found else 'lacked'} {name}.")
            heapq.heappush(running, (request.time_s + held_s, index))
            num_found += found
    return {"num_requests": len(asked), "num_found": num_found, "num_adapters": number, "num_slots": num_slots}
