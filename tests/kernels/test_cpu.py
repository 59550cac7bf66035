"""One token on the CPU, held against the definition."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_kernels import make_plan
from molora_kernels.cpu import AdapterViews, find_token
from torch import Tensor

ROUTES = ("uniform", "identical", "distinct", "zipf", "none", "duplicates")
LIMITS = {torch.float64: 2e-7, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}  # gates are float32

shapes = st.fixed_dictionaries(
    {
        "in_features": st.sampled_from([1, 7, 70]),
        "out_features": st.sampled_from([1, 9, 131]),
        "num_adapters": st.sampled_from([1, 2, 5]),
        "rank": st.sampled_from([1, 8, 65]),
        "top_k": st.sampled_from([1, 2, 8]),
        "routes": st.sampled_from(ROUTES),
        "bias": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def make(make_problem: Callable[..., Any]) -> Callable[..., Any]:
    """A problem of one token, on the CPU wherever the other tests run."""

    def on_cpu(**kwargs: Any) -> Any:
        problem = make_problem(1, **kwargs)
        return problem.replace(**{name: value.cpu() for name, value in vars(problem).items() if value is not None})

    return on_cpu


def run(problem: Any) -> Tensor:
    x, weight, bias, lora_a, lora_b, scaling, gates = problem.tensors
    token = find_token(problem.plan, gates)
    assert token is not None
    y = AdapterViews(lora_a, lora_b, scaling).add_(F.linear(x[None], weight, bias), x[None], token)
    return y[0]


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@given(shape=shapes)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_small_integers_are_exact(make: Callable, solve: Callable, shape: dict[str, Any]) -> None:
    problem = make(**shape, integers=True)
    with torch.no_grad():
        assert torch.equal(run(problem).double(), solve(problem))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_error_against_float64(make: Callable, solve: Callable, dtype: torch.dtype, top_k: int) -> None:
    problem = make(in_features=80, out_features=960, rank=24, top_k=top_k, dtype=dtype, routes="distinct")
    y = run(problem)
    assert y.dtype == dtype
    assert relative_error(y, solve(problem)) < LIMITS[dtype]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gates_of_no_adapter_are_ignored(make: Callable, solve: Callable, value: float) -> None:
    problem = make(top_k=4)
    problem.ids[0] = torch.tensor([1, -1, 1, 3])  # 3 is out of range
    expected = solve(problem)
    problem.gates[0, 1] = problem.gates[0, 3] = value
    assert relative_error(run(problem), expected) < 1e-5
    problem.ids[:], problem.gates[:] = -1, value
    assert torch.equal(run(problem), F.linear(problem.x, problem.weight, problem.bias))


def test_adapters_that_do_not_act_are_not_read(make: Callable, solve: Callable) -> None:
    problem = make(num_adapters=4)
    problem.ids[0] = torch.tensor([2, 0])
    expected = solve(problem)
    for tensor in (problem.lora_a, problem.lora_b, problem.scaling):
        tensor[[1, 3]] = torch.nan
    assert relative_error(run(problem), expected) < 1e-5


def test_operands_may_be_strided(make: Callable, solve: Callable) -> None:
    problem = make(top_k=3, routes="distinct")
    strided = problem.replace(
        x=torch.stack([problem.x, -problem.x], dim=2)[:, :, 0],
        lora_a=problem.lora_a.mT.contiguous().mT,
        lora_b=problem.lora_b.transpose(0, 1).contiguous().transpose(0, 1),
        gates=torch.stack([problem.gates, -problem.gates], dim=2)[:, :, 0],
    )
    assert relative_error(run(strided), solve(problem)) < 1e-5


def test_operands_are_left_as_they_were(make: Callable) -> None:
    problem = make(routes="distinct")
    before = [tensor.clone() for tensor in problem.tensors]
    run(problem)
    assert all(torch.equal(tensor, old) for tensor, old in zip(problem.tensors, before, strict=True))


def test_a_token_is_found_only_where_operations_act_at_once() -> None:
    ids, gates = torch.tensor([[2, -1, 0, 3, 2]], dtype=torch.int32), torch.tensor([[1.0, 9.0, 0.5, 9.0, 0.25]])
    plan = make_plan(ids, 3)
    assert find_token(plan, gates) == [(2, 1.0), (0, 0.5), (2, 0.25)]
    assert find_token(make_plan(ids[:, 1:2], 3), gates[:, 1:2]) == []
    assert find_token(make_plan(ids.t(), 3), gates.t()) is None
    assert find_token(make_plan(ids[:0], 3), gates[:0]) is None
    with torch.enable_grad():
        assert find_token(plan, gates) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert find_token(plan, gates) is None
    in_a_trace = torch.compile(lambda: find_token(plan, gates) is None, backend="eager", fullgraph=True)
    assert in_a_trace()


def test_views_follow_values_and_know_their_tensors(make: Callable, solve: Callable) -> None:
    old, new = make(seed=1, routes="identical"), make(seed=2, routes="identical")
    x, weight, bias, lora_a, lora_b, scaling, gates = old.tensors
    views = AdapterViews(lora_a, lora_b, scaling)
    token = find_token(old.plan, gates)
    assert token
    views.add_(F.linear(x[None], weight, bias), x[None], token)  # slices the adapter
    for tensor, value in ((lora_a, new.lora_a), (lora_b, new.lora_b), (scaling, new.scaling)):
        tensor.copy_(value)
    y = views.add_(F.linear(x[None], weight, bias), x[None], token)[0]
    replaced = old.replace(lora_a=new.lora_a, lora_b=new.lora_b, scaling=new.scaling)
    assert relative_error(y, solve(replaced)) < 1e-5

    tensors = (lora_a, lora_b, scaling)
    assert views.show(*tensors)
    for moved in range(3):
        assert not views.show(*(each.clone() if i == moved else each for i, each in enumerate(tensors)))
