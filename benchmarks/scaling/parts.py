"""What is planned with, beside the base: a GPU, adapters, traffic and costs. Sizes are bytes, times seconds."""

from dataclasses import dataclass
from typing import Literal

from scaling.base import LINEARS, Base, check_positive

Routing = Literal["prefix", "affinity", "round-robin"]  # the first is the one that this project has
ROUTINGS: tuple[Routing, ...] = ("prefix", "affinity", "round-robin")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """
    Attributes:
        memory_bytes: what CUDA reports as the device's own.
        context_bytes: what the driver, torch and CUDA graphs take of it.
        bytes_per_s: read from its memory at best, measured.
        storage_bytes_per_s: of the disk or the network that adapters are read from.
    """

    memory_bytes: float
    context_bytes: float
    bytes_per_s: float
    storage_bytes_per_s: float

    def __post_init__(self) -> None:
        check_positive(self)


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Adapters of one shape.

    Attributes:
        number: of all that may be asked for.
        first_layer: that they act in; they act in all behind it.
        targets: the linears that they act on.
        zipf: the i-th most popular one is asked for in proportion to 1 / i**zipf; 0 is all alike.
    """

    number: int
    rank: int = 16
    first_layer: int = 0
    targets: tuple[str, ...] = LINEARS
    zipf: float = 1.0

    def __post_init__(self) -> None:
        if self.number < 1 or self.rank < 1 or self.first_layer < 0 or self.zipf < 0:
            raise ValueError("number and rank of adapters must be at least 1, first_layer and zipf at least 0.")
        if not self.targets or set(self.targets) - set(LINEARS):
            raise ValueError(f"targets are {', '.join(self.targets)}; expected some of {', '.join(LINEARS)}.")

    def num_bytes(self, base: Base) -> int:
        """Of one adapter's weights, on disk and as a step reads them."""
        widths = sum(sum(base.linears[target]) for target in self.targets)
        return self.rank * widths * (base.num_layers - self.first_layer) * base.item_bytes

    def slot_bytes(self, base: Base) -> int:
        """Of one slot: a server that loads adapters has room for them on every linear of every layer."""
        return self.rank * sum(map(sum, base.linears.values())) * base.num_layers * base.item_bytes


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Conversations, each with one adapter. A request is one turn of one.

    Attributes:
        requests_per_s: of all GPUs together.
        system_tokens: that all conversations begin with.
        user_tokens, answer_tokens: of each turn.
        turns: of a conversation.
        think_s: from an answer to the next turn, on average; exponentially distributed.
        keeps_active: adapters act on the whole conversation (activation `system`), so that a turn finds all that came
            before. Else they act on the last turn only (`turn`): all before is the base's, shared with every adapter,
            and a turn encodes the one before it once more, as base.
    """

    requests_per_s: float
    system_tokens: int = 200
    user_tokens: int = 150
    answer_tokens: int = 200
    turns: int = 4
    think_s: float = 30.0
    keeps_active: bool = False

    def __post_init__(self) -> None:
        for name in ("requests_per_s", "user_tokens", "answer_tokens", "turns", "think_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0.")
        if self.system_tokens < 0:
            raise ValueError(f"system_tokens is {self.system_tokens}; expected 0 or more.")

    @property
    def turn_tokens(self) -> int:
        return self.user_tokens + self.answer_tokens

    @property
    def longest(self) -> int:
        """Tokens of a conversation when it ends."""
        return self.system_tokens + self.turns * self.turn_tokens

    @property
    def mean_prompt_tokens(self) -> float:
        """Of a turn's prompt, all before it included."""
        return self.system_tokens + (self.turns - 1) / 2 * self.turn_tokens + self.user_tokens


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was fitted to measured times.

    Attributes:
        layer_s: of a step for each layer, beside what it reads.
        sequence_s: of a step for each sequence.
        adapted_layer_s: of a step for each layer in which some adapter acts, beside what it reads.
        flops_per_s: of reading prompts.
        host_bytes_per_s: of an adapter's bytes through the host: parsed, digested, copied to a slot's tensors.
    """

    layer_s: float
    sequence_s: float
    adapted_layer_s: float
    flops_per_s: float
    host_bytes_per_s: float

    def __post_init__(self) -> None:
        check_positive(self)
