"""What the fused regimes do outside their GEMM, which needs a Hopper GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from molora_kernels import backend, make_plan, routed_linear
from torch import Tensor

pairing = pytest.importorskip("molora_kernels.pairing")
fused = pytest.importorskip("molora_kernels.fused")


@pytest.fixture(autouse=True)
def _needs_triton(device: torch.device) -> None:
    if not backend.triton_runs_on(device):
        pytest.skip("no Triton")


@pytest.mark.parametrize("shape", [(5, 8, 8, 1, 2), (70, 20, 24, 5, 3), (140, 8, 8, 130, 2)])
def test_each_of_two_adapters_has_its_pass(
    make_problem: Callable, solve: Callable, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    problem = make_problem(*shape, 2)
    problem.ids[0] = -1
    problem.ids[1] = 0
    expected = solve(problem)
    problem.gates[problem.ids < 0] = torch.nan
    plan = problem.plan

    def first_pass(
        x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, *routing: Any, sort: bool
    ) -> tuple[Tensor]:
        scaling, gates, ids, order, *_ = routing
        assert sort
        smallest = torch.where(ids < 0, len(b), ids).squeeze(1)
        assert torch.equal(smallest[order.long()], smallest.sort(stable=True).values)
        return (routed_linear(x, w, bias, a[0], b, scaling[:, 0], gates, make_plan(ids, len(b)), impl="torch"),)

    monkeypatch.setattr(pairing, "fused", first_pass)
    tables = plan.tables
    operands = (problem.x, problem.weight, problem.bias, problem.lora_a.unsqueeze(0), problem.lora_b)
    routing = (problem.scaling.unsqueeze(1), problem.gates, plan.ids, tables.order, tables.offsets, tables.spans)
    y = pairing.sort_twice(*operands, *routing, (len(problem.weight),))
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(65, 5, 24, 1), (7, 3, 70, 8), (33, 1, 1, 3), (1, 2, 65, 2)])
def test_gates_get_the_product_of_kept_ranks(device: torch.device, shape: tuple[int, ...]) -> None:
    num_tokens, num_adapters, rank, top_k = shape
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, num_adapters, (num_tokens, top_k), generator=rng, dtype=torch.int32)
    u, v = torch.randn(2, num_tokens, num_adapters, rank, generator=rng)
    scaling = torch.rand(num_adapters, 1, generator=rng)
    product = (u.double() * v.double()).sum(2) * scaling.double().squeeze(1)
    expected = product.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, 0)
    unselected = torch.ones(num_tokens, num_adapters + 1, dtype=torch.bool)
    unselected.scatter_(1, torch.where(ids < 0, num_adapters, ids).long(), False)
    for kept in (u, v):
        kept[unselected[:, :-1]] = torch.nan  # no tile needs to have written it
    on_device = (tensor.to(device) for tensor in (u.flatten(1), v.flatten(1), scaling, ids))
    torch.testing.assert_close(fused._gates_bwd(*on_device, rank).cpu().double(), expected, rtol=1e-5, atol=1e-5)
