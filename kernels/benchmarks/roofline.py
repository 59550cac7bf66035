"""The least time that a case can take: bytes that must move and products that must be summed, each once."""

from dataclasses import dataclass

from benchmarks.shapes import Shape


@dataclass(frozen=True)
class Cost:
    num_bytes: float
    flops: float


@dataclass(frozen=True)
class Roofline:
    """What the device reaches on large copies and large matrix products; flops are those of 16-bit inputs."""

    bytes_per_s: float
    flops_per_s: float

    def floor_us(self, cost: Cost) -> float:
        return max(cost.num_bytes / self.bytes_per_s, cost.flops / self.flops_per_s) * 1e6


def base_cost(shape: Shape, item_bytes: int) -> Cost:
    """The frozen linear alone."""
    num_out = sum(shape.out_features)
    elements = num_out * shape.in_features + shape.tokens * (shape.in_features + num_out)
    return Cost(elements * item_bytes, 2 * shape.tokens * shape.in_features * num_out)


def forward_cost(shape: Shape, item_bytes: int, adapters_in_use: int, routed: int) -> Cost:
    """The base, and A and B of the adapters in use. `routed` counts the pairs of a token and an adapter."""
    base = base_cost(shape, item_bytes)
    of_adapter = shape.rank * (len(shape.out_features) * shape.in_features + sum(shape.out_features))
    return Cost(base.num_bytes + adapters_in_use * of_adapter * item_bytes, base.flops + 2 * routed * of_adapter)


def backward_cost(shape: Shape, item_bytes: int, adapters_in_use: int, routed: int) -> Cost:
    """Forward and backward: W, A, B and x are read twice; y, dx, dA and dB are written; dy is read."""
    base, forward = base_cost(shape, item_bytes), forward_cost(shape, item_bytes, adapters_in_use, routed)
    adapters = Cost(forward.num_bytes - base.num_bytes, forward.flops - base.flops)
    # Of the base's three operands the backward pass reads W and dy and writes dx; x is read again for dA.
    num_bytes = 2 * base.num_bytes + shape.tokens * shape.in_features * item_bytes + 3 * adapters.num_bytes
    return Cost(num_bytes, 2 * base.flops + 3 * adapters.flops)
