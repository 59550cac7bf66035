"""What routed_linear and routed_linears return, for every implementation."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_kernels import routed_linear, routed_linears
from torch import Tensor

ROUTES = ("uniform", "identical", "distinct", "zipf", "none", "duplicates")
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}

shapes = st.fixed_dictionaries(
    {
        "num_tokens": st.sampled_from([0, 1, 5, 17, 40]),
        "in_features": st.sampled_from([1, 7, 16, 70]),
        "out_features": st.sampled_from([1, 9, 32, 131]),
        "num_adapters": st.sampled_from([1, 2, 5]),
        "rank": st.sampled_from([1, 3, 8, 24, 48, 65]),
        "top_k": st.sampled_from([1, 2, 3, 8]),
        "routes": st.sampled_from(ROUTES),
        "bias": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected).norm() / expected.norm())


@given(shape=shapes)
@settings(max_examples=40, derandomize=True)
def test_small_integers_are_exact(make_problem: Callable, solve: Callable, impl: str, shape: dict[str, Any]) -> None:
    problem = make_problem(**shape, integers=True)
    y = routed_linear(*problem.args, impl=impl)
    assert y.dtype == torch.float32
    assert torch.equal(y.cpu().double(), solve(problem))


@pytest.mark.parametrize(("dtype", "routes"), list(zip(itertools.cycle(LIMITS), ROUTES, strict=False)))
def test_error_against_float64(
    make_problem: Callable, solve: Callable, impl: str, dtype: torch.dtype, routes: str
) -> None:
    problem = make_problem(48, 80, 96, 3, 24, 2, dtype=dtype, routes=routes)
    y = routed_linear(*problem.args, impl=impl)
    assert y.dtype == dtype
    # The torch path rounds to bfloat16 once more than the kernels do: h = x A^T, before its gate is applied.
    roundings = 1.2 if (impl, dtype) == ("torch", torch.bfloat16) else 1.0
    assert relative_error(y, solve(problem)) < roundings * LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
def test_tokens_without_adapter_get_the_base_bit_for_bit(make_problem: Callable, impl: str, dtype: torch.dtype) -> None:
    problem = make_problem(20, dtype=dtype)
    problem.ids[::2] = -1
    problem.gates[::2] = torch.nan  # ignored there
    problem.x[4] = torch.inf
    base = F.linear(problem.x, problem.weight, problem.bias)
    y = routed_linear(*problem.args, impl=impl)
    torch.testing.assert_close(y[::2], base[::2], rtol=0, atol=0, equal_nan=True)
    assert y[1::2].isfinite().all()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, under the interpreter
def test_an_overflowing_adapter_does_not_touch_other_tokens(make_problem: Callable, solve: Callable, impl: str) -> None:
    problem = make_problem(6, routes="distinct", top_k=1)
    problem.lora_a[0] *= torch.finfo(torch.float32).max  # x A[0] is infinite for every token
    y = routed_linear(*problem.args, impl=impl)
    assert not y[0].isfinite().any()
    others = problem.ids[:, 0].cpu() != 0
    assert relative_error(y.cpu()[others], solve(problem)[others]) < 1e-5


def test_operands_may_be_strided(make_problem: Callable, solve: Callable, impl: str) -> None:
    problem = make_problem(19, top_k=3)
    strided = problem.replace(
        x=torch.stack([problem.x, -problem.x], dim=2)[:, :, 0],
        weight=problem.weight.t().contiguous().t(),
        lora_a=problem.lora_a.mT.contiguous().mT,
        lora_b=problem.lora_b.transpose(0, 1).contiguous().transpose(0, 1),
        bias=problem.bias.repeat_interleave(2)[::2],
        gates=problem.gates.t().contiguous().t(),
        ids=problem.ids.t().contiguous().t(),
    )
    assert relative_error(routed_linear(*strided.args, impl=impl), solve(problem)) < 1e-5


def test_operands_are_cast_to_the_dtype_of_x(make_problem: Callable, impl: str) -> None:
    problem = make_problem()
    low = {name: getattr(problem, name).bfloat16() for name in ("x", "weight", "bias", "lora_a", "lora_b")}
    expected = routed_linear(*problem.replace(**low).args, impl=impl)
    y = routed_linear(*problem.replace(x=low["x"]).args, impl=impl)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


def test_autocast_does_not_change_the_result(make_problem: Callable, impl: str, device: torch.device) -> None:
    problem = make_problem()
    expected = routed_linear(*problem.args, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        y = routed_linear(*problem.args, impl=impl)
    assert torch.equal(y, expected)


def test_siblings_equal_separate_linears(make_problem: Callable, impl: str) -> None:
    widths, rank = (20, 7, 7), 3
    merged = make_problem(out_features=sum(widths), rank=rank, num_siblings=len(widths), integers=True)
    outputs = routed_linears(*merged.args, out_features=widths, impl=impl)
    start = 0
    for g, (y, width) in enumerate(zip(outputs, widths, strict=True)):
        rows = slice(start, start + width)
        alone = merged.replace(
            weight=merged.weight[rows],
            bias=merged.bias[rows],
            lora_a=merged.lora_a[g],
            lora_b=merged.lora_b[:, rows],
            scaling=merged.scaling[:, g],
        )
        assert torch.equal(y, routed_linear(*alone.args, impl=impl))
        start += width


def test_the_result_is_deterministic(make_problem: Callable, impl: str) -> None:
    problem = make_problem(40, top_k=3, routes="zipf")
    assert torch.equal(routed_linear(*problem.args, impl=impl), routed_linear(*problem.args, impl=impl))


def test_no_unwritten_scratch_is_read(make_problem: Callable, solve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = pytest.importorskip("molora_kernels.grouped")
    empty = torch.empty
    problem = make_problem(33, rank=5, top_k=3)
    filled = []

    def nan_filled(*args: Any, **kwargs: Any) -> Tensor:
        filled.append(empty(*args, **kwargs).fill_(torch.nan))
        return filled[-1]

    arguments = problem.args  # its plan's tables are integers: they have tests of their own
    monkeypatch.setattr(grouped.torch, "empty", nan_filled)
    try:
        y = routed_linear(*arguments, impl="triton")
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.undo()
    assert filled
    assert relative_error(y, solve(problem)) < 1e-5
