"""The base model as transformers alone runs it: its own `generate`, greedy and without an early end."""

import copy
import time
from typing import Any

import torch
from transformers import DynamicCache

from molora.injection import cache_argument

READ_AT_ONCE = 512  # tokens, outside of clocks


class Plain:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = copy.deepcopy(model.generation_config)
        self._config.eos_token_id = None
        self._config.do_sample = False
        self._config.temperature = self._config.top_p = self._config.top_k = None

    def stamps(self, ids: list[int], num_new: int) -> list[float]:
        """Seconds from the call to each new token."""
        clock = _Clock()
        self._generate(ids, num_new, streamer=clock)
        return clock.stamps

    def answer(self, ids: list[int], num_new: int) -> list[int]:
        out: list[int] = self._generate(ids, num_new)[0, len(ids) :].tolist()
        return out

    @torch.inference_mode()
    def read(self, ids: list[int]) -> DynamicCache:
        """The keys and values of a prompt but its last token."""
        cache = DynamicCache()
        for first in range(0, len(ids) - 1, READ_AT_ONCE):
            part = torch.tensor([ids[first : min(first + READ_AT_ONCE, len(ids) - 1)]])
            self._model(input_ids=part, use_cache=True, logits_to_keep=1, **{cache_argument(self._model): cache})
        return cache

    def stamps_after(self, cache: DynamicCache, ids: list[int], num_new: int) -> list[float]:
        """`stamps` where the prompt has been read."""
        own = {cache_argument(self._model): copy.deepcopy(cache)}
        clock = _Clock()
        self._generate(ids, num_new, streamer=clock, **own)
        return clock.stamps

    def _generate(self, ids: list[int], num_new: int, **options: Any) -> torch.Tensor:
        inputs = torch.tensor([ids])
        self._config.max_new_tokens = self._config.min_new_tokens = num_new
        out: torch.Tensor = self._model.generate(
            inputs, attention_mask=torch.ones_like(inputs), generation_config=self._config, **options
        )
        return out


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
