"""The models that are measured, and how much each suite does on them."""

from dataclasses import dataclass
from typing import Any

NUM_ADAPTERS = 8
NUM_ACTIVE = 16  # tokens that invoke an adapter


@dataclass(frozen=True)
class Sizes:
    """
    Attributes:
        context: tokens of history before decoding begins.
        batches: sequences that decode at once; the last is the largest.
        num_steps: decode steps of one sample.
        longest_answer: of sequences whose decode steps are clocked, until they are cancelled.
        histories: tokens before an adapter is invoked; each one begins like the longest.
        conversation: tokens of the conversation that five adapters are invoked on.
        prompt, answer: tokens of a request of the mixed traffic, at least and at most.
        num_requests: of the mixed traffic.
        max_step_tokens: of the engine.
        num_copied_bytes: of the test for the memory's bandwidth.
    """

    context: int
    batches: tuple[int, ...]
    num_steps: int
    longest_answer: int
    histories: tuple[int, ...]
    conversation: int
    prompt: tuple[int, int]
    answer: tuple[int, int]
    num_requests: int
    max_step_tokens: int
    num_copied_bytes: int

    @property
    def num_cached_tokens(self) -> int:
        """Room in the cache for what a suite keeps: histories stay in it while others are read again."""
        decoding = self.batches[-1] * (self.context + self.longest_answer // 2)
        return max(decoding, 3 * max(self.histories), 7 * self.conversation)


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights.

    Attributes:
        config: fields of its configuration.
        embedding_std: makes the current token about half of what the head reads; see `models.random_model`.
        targets: whether what is to be reached is stated for it.
    """

    name: str
    config: dict[str, Any]
    rank: int
    embedding_std: float
    sizes: Sizes
    targets: bool = False

    @property
    def router_layer(self) -> int:
        """A quarter of the layers stand below the router."""
        return int(self.config["num_hidden_layers"]) // 4


_LLAMA_3 = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
_FULL = Sizes(
    context=1024,
    batches=(1, 2, 4, 8, 16, 32, 64),
    num_steps=48,
    longest_answer=3072,
    histories=(8192, 32768, 65536),
    conversation=32768,
    prompt=(64, 256),
    answer=(96, 288),
    num_requests=128,
    max_step_tokens=8192,
    num_copied_bytes=1 << 31,
)
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "8b",
            _LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
            rank=16,
            embedding_std=8.0,
            sizes=_FULL,
            targets=True,
        ),
        Shape(
            "1b",
            _LLAMA_3 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
            rank=16,
            embedding_std=2.0,
            sizes=_FULL,
        ),
        Shape(  # for tests on a CPU
            "tiny",
            {
                "vocab_size": 512,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "max_position_embeddings": 2048,
                "initializer_range": 0.1,
            },
            rank=4,
            embedding_std=0.7,
            sizes=Sizes(
                context=32,
                batches=(1, 4),
                num_steps=4,
                longest_answer=1024,
                histories=(32, 64),
                conversation=64,
                prompt=(8, 24),
                answer=(2, 6),
                num_requests=10,
                max_step_tokens=64,
                num_copied_bytes=1 << 20,
            ),
        ),
    )
}
