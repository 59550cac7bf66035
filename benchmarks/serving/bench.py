"""A model with its engine, and the requests that are made to it."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from molora.generation import Sampling
from molora.model import MoLoRA
from molora.serving.engine import Engine, EngineConfig
from molora.serving.request import Request
from serving import ceilings, routes
from serving.models import load_random
from serving.shapes import NUM_ACTIVE, Shape, Sizes

HEADROOM = 1.1  # of the cache, above what a suite keeps in it


@dataclass
class Bench:
    """
    Attributes:
        shape: of a random model; None for the demo's.
        folder: for files, gone at the end.
        text_ids: what prompts are cut from; None draws their ids at random.
        forced: the router's entries for each kind of routes (see `routes.fit`); uniform ones unless a suite says more.
        repeats: turns of each measurement.
    """

    m: MoLoRA
    engine: Engine
    shape: Shape | None
    folder: Path
    repeats: int
    seed: int
    text_ids: list[int] | None = None
    forced: dict[str, torch.Tensor] = field(default_factory=dict)
    _random: random.Random = field(init=False)
    _salts: Iterator[int] = field(default_factory=count, init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    @property
    def sizes(self) -> Sizes:
        assert self.shape is not None
        return self.shape.sizes

    @property
    def adapters(self) -> list[str]:
        return [entry.name for entry in self.m.bank.adapters]

    def ids(self, num_tokens: int) -> list[int]:
        """Token ids that no other call gives."""
        if self.text_ids is None:
            return [self._random.randrange(3, self.m.model.config.vocab_size) for _ in range(num_tokens)]
        first = self._random.randrange(len(self.text_ids))
        text = self.text_ids[first:] + self.text_ids[:first]
        return (text * (num_tokens // len(text) + 1))[:num_tokens]

    def salt(self) -> str:
        """A request with it finds nothing in the cache."""
        return f"turn {next(self._salts)}"

    def request(
        self,
        ids: list[int],
        route: str | Mapping[str, float],
        num_new: int,
        *,
        start: int | None = None,
        salt: str = "",
        logprobs: int | None = None,
    ) -> Request:
        """Greedy, and never ended early.

        Args:
            start: the first active token; the whole prompt is base if None.
        """
        return Request(
            prompt=ids,
            route=route,
            activation=len(ids) if start is None else start,
            sampling=Sampling(max_new_tokens=num_new, ignore_eos=True, logprobs=logprobs),
            salt=salt,
        )

    def invocation(self, history: list[int], route: str, num_new: int) -> Request:
        """An adapter or the router, invoked by fresh tokens after a history that the base model has read."""
        return self.request(history + self.ids(NUM_ACTIVE), route, num_new, start=len(history))

    def reading_again(self, history: list[int], adapter: str, num_new: int) -> Request:
        """The same as plain LoRA serves it, whose adapter acts on the history too: nothing of it can be reused."""
        return self.request(history + self.ids(NUM_ACTIVE), adapter, num_new, start=0, salt=self.salt())


@contextmanager
def random_bench(
    shape: Shape, device: torch.device, dtype: torch.dtype, *, has_router: bool, repeats: int, seed: int
) -> Iterator[Bench]:
    """`NUM_ADAPTERS` adapters with a router from its layer on, or without one in all layers (see `load_random`)."""
    with TemporaryDirectory(prefix="molora-benchmark-") as name:
        folder = Path(name)
        m = load_random(folder, shape, device, dtype, has_router=has_router, seed=seed)
        forced = routes.fit(m) if has_router else {}
        if has_router:
            routes.force(m, forced["uniform"])
        sizes = shape.sizes
        config = EngineConfig(
            kv_cache_bytes=ceilings.cache_bytes(m.model, int(sizes.num_cached_tokens * HEADROOM)),
            max_step_tokens=sizes.max_step_tokens,
            max_sequences=sizes.batches[-1],
        )
        engine = Engine(m, config)
        try:
            engine.warm_up()
            yield Bench(m, engine, shape, folder, repeats, seed, forced=forced)
        finally:
            engine.close()
