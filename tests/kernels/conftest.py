"""Random problems, and the answer that everything is held against: a float64 loop over tokens.

Without a GPU the Triton kernels run in Triton's interpreter: `tests/conftest.py` sees to it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from molora_kernels import Plan, make_plan
from molora_kernels.backend import triton_runs_on
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a CUDA machine `pytest -m gpu` runs this whole folder, on the GPU."""
    if DEVICE.type == "cuda":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker("gpu")


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> None:
    """Without a GPU the kernels run in it."""


@dataclass(frozen=True)
class Problem:
    """The tensors of one call. Its `args` and `out_features=` make a call of routed_linears."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    gates: Tensor
    ids: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.lora_a, self.lora_b, self.scaling, self.gates

    @property
    def plan(self) -> Plan:
        return make_plan(self.ids, len(self.lora_b))

    @property
    def args(self) -> tuple[Tensor | Plan | None, ...]:
        return *self.tensors, self.plan

    def replace(self, **changes: Tensor | None) -> "Problem":
        return replace(self, **changes)


def _draw_ids(routes: str, num_tokens: int, num_adapters: int, top_k: int, rng: torch.Generator) -> Tensor:
    shape = (num_tokens, top_k)
    if routes == "uniform":  # -1 and an id out of range included
        ids = torch.randint(-1, num_adapters + 1, shape, generator=rng)
    elif routes == "identical":
        ids = torch.full(shape, num_adapters - 1)
    elif routes == "distinct":
        ids = (torch.arange(num_tokens)[:, None] + torch.arange(top_k)) % num_adapters
    elif routes == "zipf":
        weights = 1 / torch.arange(1, num_adapters + 1)
        ids = torch.multinomial(weights, 1 + num_tokens * top_k, replacement=True, generator=rng)[1:].view(shape)
    elif routes == "none":
        ids = torch.full(shape, -1)
    elif routes == "duplicates":
        ids = torch.randint(-1, num_adapters, (num_tokens, 1), generator=rng).expand(shape)
    else:
        raise ValueError(f"unknown routes {routes!r}")
    return ids.to(torch.int32)


def _make_problem(
    num_tokens: int = 17,
    in_features: int = 24,
    out_features: int = 33,
    num_adapters: int = 3,
    rank: int = 3,
    top_k: int = 2,
    *,
    num_siblings: int = 1,
    routes: str = "uniform",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    integers: bool = False,
    seed: int = 0,
) -> Problem:
    """Values of about one, or integers and powers of two small enough that float32 sums them exactly."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=rng).to(DEVICE, dtype)
        return (torch.randn(shape, generator=rng) / fan_in**0.5).to(DEVICE, dtype)

    def draw_factor(*shape: int) -> Tensor:
        if integers:
            return (2.0 ** torch.randint(-1, 2, shape, generator=rng)).to(DEVICE)
        return (torch.rand(shape, generator=rng) + 0.5).to(DEVICE)

    siblings = () if num_siblings == 1 else (num_siblings,)
    return Problem(
        x=draw(num_tokens, in_features),
        weight=draw(out_features, in_features, fan_in=in_features),
        bias=draw(out_features) if bias else None,
        lora_a=draw(*siblings, num_adapters, rank, in_features, fan_in=in_features),
        lora_b=draw(num_adapters, out_features, rank, fan_in=rank),
        scaling=draw_factor(num_adapters, *siblings),
        gates=draw_factor(num_tokens, top_k),
        ids=_draw_ids(routes, num_tokens, num_adapters, top_k, rng).to(DEVICE),
    )


def _solve(problem: Problem) -> Tensor:
    """routed_linear by its definition, one token and one adapter at a time, in float64; differentiable."""
    x, weight, bias, lora_a, lora_b, scaling, gates = (
        None if tensor is None else tensor.cpu().double() for tensor in problem.tensors
    )
    rows = []
    for t, ids in enumerate(problem.ids.tolist()):
        y = weight @ x[t] + (0 if bias is None else bias)
        for k, e in enumerate(ids):
            if 0 <= e < len(lora_a):
                y = y + gates[t, k] * scaling[e] * (lora_b[e] @ (lora_a[e] @ x[t]))
        rows.append(y)
    return torch.stack(rows) if rows else x.new_empty(0, len(weight))


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    return _make_problem


@pytest.fixture(scope="session")
def solve() -> Callable[[Problem], Tensor]:
    return _solve


@pytest.fixture(scope="session", params=["torch", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and not triton_runs_on(DEVICE):
        pytest.skip("no Triton, or test_the_triton_kernels_are_tested_here fails and says why")
    return str(request.param)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE
