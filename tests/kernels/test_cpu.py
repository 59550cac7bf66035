"""The CPU's forward, held against the definition; `test_values.py` covers it once more behind the ops."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_kernels import make_plan, ops, routed_linear
from molora_kernels.cpu import TakenAdapters, find_token, routed_linears_cpu
from torch import Tensor

ROUTES = ("uniform", "identical", "distinct", "zipf", "none", "duplicates")
LIMITS = {torch.float64: 2e-7, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # gates are float32

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
    y = TakenAdapters(lora_a, lora_b, scaling).add_(F.linear(x[None], weight, bias), x[None], token)
    return y[0]


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@given(shape=shapes)
@settings(max_examples=60, derandomize=True)
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


@pytest.mark.parametrize("written", [("lora_a",), ("lora_b",), ("scaling",), ("lora_a", "lora_b", "scaling")])
def test_what_was_taken_is_known_to_be_old(written: tuple[str, ...], make: Callable, solve: Callable) -> None:
    old, new = make(seed=1, routes="identical"), make(seed=2, routes="identical")
    old = old.replace(lora_b=old.lora_b.transpose(0, 1).contiguous().transpose(0, 1))  # as a bank's lies
    x, weight, bias, *tensors, gates = old.tensors
    taken = TakenAdapters(*tensors)
    token = find_token(old.plan, gates)
    assert token
    taken.add_(F.linear(x[None], weight, bias), x[None], token)  # takes the adapter out
    assert taken.are_of(*tensors)
    for moved in range(3):
        assert not taken.are_of(*(each.clone() if i == moved else each for i, each in enumerate(tensors)))

    values = {name: getattr(new, name) for name in written}
    with torch.inference_mode():  # as an engine's thread may be
        for name, value in values.items():
            getattr(old, name).copy_(value)
    if not taken.are_of(*tensors):
        taken = TakenAdapters(*tensors)
    y = taken.add_(F.linear(x[None], weight, bias), x[None], token)[0]
    assert relative_error(y, solve(old.replace(**values))) < 1e-5


def test_nothing_is_taken_from_tensors_whose_writes_nobody_counts(make: Callable) -> None:
    with torch.inference_mode():
        _, _, _, lora_a, lora_b, scaling, _ = (tensor.clone() for tensor in make(routes="identical").tensors)
    taken = TakenAdapters(lora_a, lora_b, scaling)
    assert taken.dtype is None
    assert taken.are_of(lora_a, lora_b, scaling)


@pytest.fixture(scope="session")
def make_many(make_problem: Callable[..., Any]) -> Callable[..., Any]:
    """A problem of several tokens, on the CPU wherever the other tests run."""

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        problem = make_problem(*args, **kwargs)
        return problem.replace(**{name: value.cpu() for name, value in vars(problem).items() if value is not None})

    return on_cpu


def run_many(problem: Any, widths: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    x, weight, bias, lora_a, lora_b, scaling, gates = problem.tensors
    if widths is None:
        lora_a, scaling, widths = lora_a[None], scaling[:, None], weight.shape[:1]
    return routed_linears_cpu(x, weight, bias, lora_a, lora_b, scaling, gates, problem.plan.present, widths)


@given(shape=shapes, num_tokens=st.sampled_from([0, 1, 2, 17, 40]))
@settings(max_examples=60, derandomize=True)
def test_small_integers_of_many_tokens_are_exact(
    make_many: Callable[..., Any], solve: Callable[..., Tensor], shape: dict[str, Any], num_tokens: int
) -> None:
    with torch.no_grad():
        problem = make_many(num_tokens=num_tokens, integers=True, **shape)
        assert torch.equal(run_many(problem)[0].double(), solve(problem))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("routes", ROUTES)
def test_error_of_many_tokens(
    make_many: Callable[..., Any], solve: Callable[..., Tensor], dtype: torch.dtype, routes: str
) -> None:
    problem = make_many(48, 80, 96, 3, 24, 2, dtype=dtype, routes=routes)
    (y,) = run_many(problem)
    assert y.dtype == dtype
    assert relative_error(y, solve(problem)) < 1.2 * LIMITS[dtype]  # the base is rounded before its adapters come


def test_many_tokens_ignore_gates_of_no_adapter_and_adapters_that_overflow(
    make_many: Callable[..., Any], solve: Callable[..., Tensor]
) -> None:
    problem = make_many(12, num_adapters=4, top_k=2, routes="distinct")
    problem.ids[::3] = -1
    expected = solve(problem)
    problem.gates[problem.ids < 0] = torch.nan
    problem.lora_a[1] *= torch.finfo(torch.float32).max  # x A[1] is infinite for every token
    others = (problem.ids != 1).all(dim=1)
    (y,) = run_many(problem)
    assert relative_error(y[others], expected[others]) < 1e-5
    assert torch.equal(y[::3], torch.nn.functional.linear(problem.x, problem.weight, problem.bias)[::3])
    assert not y[~others].isfinite().all()


def test_adapters_beyond_those_that_act_are_not_read(
    make_many: Callable[..., Any], solve: Callable[..., Tensor]
) -> None:
    problem = make_many(9, num_adapters=6, top_k=2)
    problem.ids[:] = torch.tensor([3, 2])
    expected = solve(problem)
    for tensor in (problem.lora_a, problem.lora_b, problem.scaling):
        tensor[[0, 1, 4, 5]] = torch.nan
    assert relative_error(run_many(problem)[0], expected) < 1e-5


def test_siblings_equal_separate_linears(make_many: Callable[..., Any]) -> None:
    widths = (20, 7, 7)
    merged = make_many(out_features=sum(widths), num_siblings=len(widths), integers=True)
    start = 0
    for g, (y, width) in enumerate(zip(run_many(merged, widths), widths, strict=True)):
        rows = slice(start, start + width)
        alone = merged.replace(
            weight=merged.weight[rows],
            bias=merged.bias[rows],
            lora_a=merged.lora_a[g],
            lora_b=merged.lora_b[:, rows],
            scaling=merged.scaling[:, g],
        )
        assert torch.equal(y, run_many(alone)[0])
        start += width


@pytest.mark.parametrize("recorded", [False, True])
def test_the_ops_take_it_where_nothing_is_recorded(
    make_many: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    problem = make_many(5)
    calls = []
    monkeypatch.setattr(ops, "routed_linears_cpu", lambda *args: calls.append(1) or routed_linears_cpu(*args))
    with torch.set_grad_enabled(recorded):
        y = routed_linear(problem.x.requires_grad_(recorded), *problem.args[1:], impl="torch")
    assert y.requires_grad == recorded
    assert bool(calls) != recorded
