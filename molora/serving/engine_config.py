"""What an engine is made with, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """
    Attributes:
        kv_cache_bytes: memory for keys and values; None is 1 GiB on a CPU, most of what is free on a GPU.
        block_size: tokens of a block: what is shared and evicted at once; None is 64 on a CPU, 128 on a GPU.
        max_step_tokens: tokens that a step computes at most; a longer prompt is read in several steps. None is 512 on a
            CPU, 2048 on a GPU.
        max_sequences: that run at once.
        max_waiting: requests that wait; one more is refused.
    """

    kv_cache_bytes: int | None = None
    block_size: int | None = None
    max_step_tokens: int | None = None
    max_sequences: int = 64
    max_waiting: int = 256

    def __post_init__(self) -> None:
        for name in ("kv_cache_bytes", "block_size", "max_step_tokens", "max_sequences", "max_waiting"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a whole number of 1 or more.")
        if self.max_step_tokens is not None and self.max_sequences > self.max_step_tokens:
            raise ValueError(
                f"max_sequences is {self.max_sequences}, over max_step_tokens, {self.max_step_tokens}: a step must "
                "have room for a token of each sequence."
            )


@dataclass(frozen=True)
class EngineStats:
    """A moment's counts. Those of tokens are totals since the start.

    Attributes:
        num_cached_tokens: prompt tokens whose keys and values were found.
        num_computed_tokens: rows that entered layer 0, but for those that were computed ahead and thrown away.
        num_recomputed_tokens: base tokens that were computed while they could be found: 0.
        num_reencoded_tokens: tokens that were found as active ones only, and computed once as base.
        num_replayed_tokens: tokens computed again after preemption.
        num_adapter_tokens: how many tokens each adapter acted on, by name; "base" for those on which none did.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    num_evicted_blocks: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_reencoded_tokens: int = 0
    num_replayed_tokens: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0
    num_adapter_tokens: dict[str, int] = field(default_factory=dict)
