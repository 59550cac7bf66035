"""The model of one GPU: what fits in its memory, how long a step takes, and what it settles to at a load.

Every GPU runs a server of its own with the whole base; a gateway deals out the requests. A step reads the base's
weights, the adapters of its sequences, and its sequences' keys and values:

    step_s = bytes / bytes_per_s + num_layers * layer_s + batch * sequence_s + adapted layers * adapted_layer_s

Prompts are read in the same steps and take their arithmetic beside that, a share p of the GPU's time, so that an
answer's tokens come every token_s = step_s / (1 - p), and batch = requests_per_s * answer_tokens * token_s (Little).
"""

from dataclasses import dataclass

from scaling.base import Base
from scaling.parts import Adapters, Costs, Gpu, Routing, Traffic
from scaling.popularity import Placement
from scaling.prefixes import Found, find_prefixes
from scaling.returns import Returns
from scaling.roots import find_root

CACHE_SHARE = 0.9  # of what is free beside the model: `GPU_CACHE_SHARE` of molora/serving/engine.py
MOST_ROUNDS, SETTLED, LEAST_REST = 50, 1e-4, 1e-3


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What is planned: the parts, and how many requests run at once on a GPU (`EngineConfig.max_sequences`)."""

    gpu: Gpu
    base: Base
    adapters: Adapters
    traffic: Traffic
    costs: Costs
    routing: Routing = "prefix"
    max_sequences: int = 64

    def __post_init__(self) -> None:
        if self.max_sequences < 1:
            raise ValueError(f"max_sequences is {self.max_sequences}; expected 1 or more.")
        if self.adapters.first_layer >= self.base.num_layers:
            raise ValueError(
                f"adapters act from layer {self.adapters.first_layer} on; the base has {self.base.num_layers}."
            )


def step_s(fleet: Fleet, *, batch: float, kv_tokens: float, num_adapters: float) -> float:
    """One decode step.

    Args:
        kv_tokens: of all its sequences together.
        num_adapters: different ones among them; 0 is a step of the base alone.
    """
    gpu, base, costs = fleet.gpu, fleet.base, fleet.costs
    num_bytes = kv_tokens * base.token_bytes + num_adapters * fleet.adapters.num_bytes(base)
    weights_s = max(base.step_bytes / gpu.bytes_per_s, 2 * base.num_layer_weights * batch / costs.flops_per_s)
    adapted_s = costs.adapted_layer_s * (base.num_layers - fleet.adapters.first_layer) if num_adapters else 0.0
    return (
        weights_s + num_bytes / gpu.bytes_per_s + costs.layer_s * base.num_layers + costs.sequence_s * batch + adapted_s
    )


def load_s(fleet: Fleet) -> float:
    """Reading an adapter, and what the host does with its bytes, the copy to the GPU included."""
    num_bytes = fleet.adapters.num_bytes(fleet.base)
    return num_bytes / fleet.gpu.storage_bytes_per_s + num_bytes / fleet.costs.host_bytes_per_s


def kv_tokens(fleet: Fleet, num_slots: int) -> int:
    """That the cache has room for beside the base and the slots.

    Raises:
        ValueError: the base, the slots or one conversation do not fit.
    """
    gpu, base = fleet.gpu, fleet.base
    free = gpu.memory_bytes - gpu.context_bytes - base.num_bytes
    if free <= 0:
        raise ValueError(
            f"the base takes {base.num_bytes / 1e9:.1f} GB, and the GPU has {gpu.memory_bytes / 1e9:.1f} GB, of which "
            f"{gpu.context_bytes / 1e9:.1f} are taken. Take a smaller base or dtype, or a larger GPU: a base is not "
            "shared out over several."
        )
    slots = num_slots * fleet.adapters.slot_bytes(base)
    if slots >= free:
        raise ValueError(
            f"{num_slots} slots take {slots / 1e9:.1f} GB beside the base, and {free / 1e9:.1f} GB are free: there is "
            f"room for {int(free // fleet.adapters.slot_bytes(base))}, and none for a cache then. Ask for fewer."
        )
    tokens = int(CACHE_SHARE * (free - slots) / base.token_bytes)
    if tokens < fleet.traffic.longest:
        raise ValueError(
            f"the cache has room for {tokens} tokens beside the base and {num_slots} slots, and a conversation grows "
            f"to {fleet.traffic.longest}. Ask for fewer slots, or take a larger GPU."
        )
    return tokens


@dataclass(frozen=True)
class Steady:
    """What a GPU settles to.

    Attributes:
        reading_s: of a turn's prompt, by itself.
        returns: of a conversation's turns.
    """

    batch: float
    token_s: float
    reading_s: float
    found: Found
    returns: Returns
    max_requests_per_s: float


def settle(fleet: Fleet, placement: Placement, *, requests_per_s: float, room: int, num_gpus: int) -> Steady:
    """Of one GPU, from an empty one on: how long answers take decides what stays in the cache, and this how long they
    take, so that beyond some load a cache that is too small helps nobody any more.

    Args:
        room: tokens that the cache holds.
    """
    traffic, base, costs = fleet.traffic, fleet.base, fleet.costs
    prompt, answer = traffic.mean_prompt_tokens, traffic.answer_tokens
    max_batch = min(fleet.max_sequences, room / (prompt + answer))

    def step_of(batch: float) -> float:
        asked = placement.num_asked(batch)
        return step_s(fleet, batch=batch, kv_tokens=batch * (prompt + answer / 2), num_adapters=asked)

    token_s = step_of(1.0)
    for _ in range(MOST_ROUNDS):
        before_s = token_s
        returns = Returns.of(traffic, answer * token_s, num_gpus, fleet.routing)
        found = find_prefixes(traffic, returns, requests_per_s=requests_per_s, cache_tokens=room)
        reading_s = base.prompt_flops(found.computed_tokens, prompt - found.computed_tokens) / costs.flops_per_s
        rest = max(1 - requests_per_s * reading_s, LEAST_REST)
        batch = min(find_root(lambda many: many / step_of(max(many, 1)), requests_per_s * answer / rest), max_batch)
        token_s = step_of(max(batch, 1)) / rest
        if abs(token_s - before_s) < SETTLED * token_s:
            break
    most = 1 / (reading_s + answer * step_of(max_batch) / max_batch)
    return Steady(batch, token_s, reading_s, found, returns, most)
