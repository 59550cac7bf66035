"""The backward pass of every shape that the fused one does not take; here it takes them all."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from molora_kernels import backend, gradients, ops, routed_linear, routed_linears
from torch import Tensor

# The first product of a process may be one of the backward thread, which has no CUDA context yet.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
TRAINED = ("x", "lora_a", "lora_b", "gates")
ROUTES = ("uniform", "identical", "distinct", "zipf", "none", "duplicates")
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SOME = settings(
    max_examples=12,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SIZES = st.fixed_dictionaries(
    {
        "num_tokens": st.sampled_from([1, 17, 65, 130]),
        "in_features": st.sampled_from([1, 7, 16, 70, 131]),
        "out_features": st.sampled_from([1, 7, 16, 70, 131]),
        "num_adapters": st.sampled_from([1, 2, 5, 12]),
        "rank": st.sampled_from([1, 3, 8, 24, 65]),
        "top_k": st.sampled_from([1, 2, 3]),
        "routes": st.sampled_from(ROUTES),
        "seed": st.integers(0, 99),
    }
)


@pytest.fixture(autouse=True)
def _never_fused(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if not backend.triton_runs_on(device):
        pytest.skip("no Triton")
    monkeypatch.setattr(ops, "_keeps_h", lambda *_: False)


def draw_dy(problem: Any, *, integers: bool = False) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    shape = (len(problem.x), len(problem.weight))
    dy = torch.randint(-2, 3, shape, generator=rng) if integers else torch.randn(shape, generator=rng)
    return dy.to(problem.x)


def differentiate(problem: Any, dy: Tensor, out_features: Sequence[int] = ()) -> dict[str, Tensor]:
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in TRAINED}
    args, widths = problem.replace(**leaves).args, list(out_features)
    if widths:
        outputs = routed_linears(*args, out_features=widths, impl="triton")
        grads = torch.autograd.grad(outputs, list(leaves.values()), dy.split(widths, dim=1))
    else:
        grads = torch.autograd.grad(routed_linear(*args, impl="triton"), list(leaves.values()), dy)
    return dict(zip(TRAINED, grads, strict=True))


@pytest.fixture
def differentiate_exactly(solve: Callable) -> Callable[..., dict[str, Tensor]]:
    """The gradients of the float64 loop."""

    def differentiate(problem: Any, dy: Tensor, out_features: Sequence[int] = ()) -> dict[str, Tensor]:
        leaves = {name: getattr(problem, name).detach().cpu().double().requires_grad_() for name in TRAINED}
        exact = problem.replace(**leaves)
        outputs, start = [], 0
        for g, width in enumerate(out_features):
            rows = slice(start, start + width)
            alone = {"weight": exact.weight[rows], "bias": None, "lora_a": exact.lora_a[g]}
            alone |= {"lora_b": exact.lora_b[:, rows], "scaling": exact.scaling[:, g]}
            outputs.append(solve(exact.replace(**alone)))
            start += width
        y = torch.cat(outputs, dim=1) if outputs else solve(exact)
        grads = torch.autograd.grad(
            y, list(leaves.values()), dy.cpu().double(), allow_unused=True, materialize_grads=True
        )
        return dict(zip(TRAINED, grads, strict=True))

    return differentiate


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    for name in TRAINED:
        error = (actual[name].cpu().double() - expected[name]).norm()
        assert error <= limit * expected[name].norm(), name


@given(shape=SIZES)
@SOME
def test_small_integers_are_exact(make_problem: Callable, differentiate_exactly: Callable, shape: dict) -> None:
    problem = make_problem(**shape, integers=True)
    dy = draw_dy(problem, integers=True)
    expected = differentiate_exactly(problem, dy)
    for name, grad in differentiate(problem, dy).items():
        assert torch.equal(grad.cpu().double(), expected[name]), name


@pytest.mark.parametrize(("dtype", "routes"), list(zip(itertools.cycle(LIMITS), ROUTES, strict=False)))
def test_error_against_float64(
    make_problem: Callable, differentiate_exactly: Callable, dtype: torch.dtype, routes: str
) -> None:
    problem = make_problem(65, 80, 96, 3, 24, 2, dtype=dtype, routes=routes)
    dy = draw_dy(problem)
    assert_close(differentiate(problem, dy), differentiate_exactly(problem, dy), LIMITS[dtype])


@pytest.mark.parametrize("top_k", [1, 2])
def test_long_sums_are_cut_into_parts(make_problem: Callable, differentiate_exactly: Callable, top_k: int) -> None:
    problem = make_problem(9, 1100, 1600, 2, 3, top_k)
    dy = draw_dy(problem)
    assert_close(differentiate(problem, dy), differentiate_exactly(problem, dy), 1e-5)


@pytest.mark.parametrize("widths", [[40, 7, 7], [1, 1100]])
def test_siblings_of_different_widths(
    make_problem: Callable, differentiate_exactly: Callable, widths: list[int]
) -> None:
    problem = make_problem(37, 72, sum(widths), 3, 8, num_siblings=len(widths), bias=False)
    dy = draw_dy(problem)
    assert_close(differentiate(problem, dy, widths), differentiate_exactly(problem, dy, widths), 1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_any_strides(make_problem: Callable, differentiate_exactly: Callable, top_k: int) -> None:
    problem = make_problem(33, 24, 40, 3, 5, top_k)
    dy = draw_dy(problem)
    expected = differentiate_exactly(problem, dy)
    strided = problem.replace(
        x=problem.x.t().contiguous().t(),
        lora_a=problem.lora_a.repeat_interleave(2, dim=2)[..., ::2],
        lora_b=problem.lora_b.transpose(0, 1).contiguous().transpose(0, 1),
        gates=problem.gates.t().contiguous().t(),
    )
    assert_close(differentiate(strided, dy.repeat(1, 2)[:, : dy.shape[1]]), expected, 1e-5)
    assert_close(differentiate(strided, dy.t().contiguous().t()), expected, 1e-5)
    same = dy[:1].expand_as(dy)
    assert_close(differentiate(strided, same), differentiate_exactly(problem, same), 1e-5)


@pytest.mark.parametrize("top_k", [1, 3])
def test_nothing_unwritten_is_read_and_scratch_is_as_wide_as_ranks(
    make_problem: Callable, differentiate_exactly: Callable, monkeypatch: pytest.MonkeyPatch, top_k: int
) -> None:
    problem = make_problem(50, 72, 136, 6, 5, top_k)
    problem.ids[problem.ids == 3] = -1  # an adapter without tokens
    problem.ids[0] = -1  # what a load that is off points at
    dy = draw_dy(problem)
    expected = differentiate_exactly(problem, dy)
    leaves = [getattr(problem, name).requires_grad_() for name in TRAINED]
    y = routed_linear(*problem.args, impl="triton")
    empty, filled = torch.empty, []

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        filled.append(tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(99))
        return filled[-1]

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda tensor: poisoned(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    )
    grads = torch.autograd.grad(y, leaves, dy)
    monkeypatch.undo()
    assert_close(dict(zip(TRAINED, grads, strict=True)), expected, 1e-5)
    scratch = [tensor for tensor in filled if tensor.shape not in {grad.shape for grad in grads}]
    assert scratch
    assert max(tensor.numel() for tensor in scratch) <= 50 * top_k * 5
    assert not grads[1][3].any()
    assert not grads[2][3].any()


def test_a_token_without_adapter_adds_nothing_whatever_it_holds(make_problem: Callable) -> None:
    problem = make_problem(40, 24, 40, 3, 5, 1)
    problem.ids[0] = -1  # what a load that is off points at
    dy = draw_dy(problem)
    expected = differentiate(problem, dy)
    inactive = (problem.ids[:, 0] < 0) | (problem.ids[:, 0] >= 3)
    for tensor in (problem.x, problem.gates, dy):
        tensor[inactive] = torch.nan
    actual = differentiate(problem, dy)
    assert torch.equal(actual["lora_a"], expected["lora_a"])
    assert torch.equal(actual["lora_b"], expected["lora_b"])
    assert torch.equal(actual["gates"], expected["gates"])
    assert not actual["gates"][inactive].any()


@pytest.mark.parametrize("top_k", [1, 2])
def test_two_runs_agree_to_the_bit(make_problem: Callable, top_k: int) -> None:
    problem = make_problem(200, 130, 70, 3, 24, top_k, dtype=torch.float16, routes="zipf")
    first, second = (differentiate(problem, draw_dy(problem)) for _ in range(2))
    for name in TRAINED:
        assert torch.equal(first[name], second[name]), name


def test_autocast_changes_nothing(make_problem: Callable, device: torch.device) -> None:
    problem = make_problem()
    expected = differentiate(problem, draw_dy(problem))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = differentiate(problem, draw_dy(problem))
    for name in TRAINED:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("wanted", [[True] * 4, [True, False, True, False], [False, False, False, True], [False] * 4])
def test_the_custom_op_passes_opcheck(make_problem: Callable, wanted: list[bool]) -> None:
    problem = make_problem(6, out_features=24, num_siblings=2)
    x, weight, _, lora_a, lora_b, scaling, gates = problem.tensors
    by_rows = lora_b.transpose(0, 1).contiguous().transpose(0, 1)
    plan = problem.plan
    args = (x, weight, lora_a, by_rows, scaling, gates, plan.ids, plan.tables.order, plan.tables.offsets, [16, 8])
    torch.library.opcheck(gradients._grads_triton, (draw_dy(problem), *args, wanted))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what the interpreter cannot show: tiles of a GPU")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    "shape", [(4096, 512, 1000, 8, 16, 1), (1000, 333, 515, 32, 64, 2), (600, 1536, 512, 2, 130, 3)]
)
@pytest.mark.parametrize("routes", ["zipf", "identical"])
def test_large_tiles(make_problem: Callable, dtype: torch.dtype, shape: tuple[int, ...], routes: str) -> None:
    problem = make_problem(*shape, dtype=dtype, routes=routes)
    dy = draw_dy(problem)
    exact = {
        name: tensor.detach().double().requires_grad_() for name, tensor in vars(problem).items() if name in TRAINED
    }
    double = problem.replace(**exact, weight=problem.weight.double(), bias=None)
    y = routed_linear(*double.args, impl="torch")
    expected = dict(zip(TRAINED, torch.autograd.grad(y, list(exact.values()), dy.double()), strict=True))
    expected = {name: grad.cpu() for name, grad in expected.items()}
    first, second = (differentiate(problem, dy) for _ in range(2))
    assert_close(first, expected, LIMITS[dtype])
    for name in TRAINED:
        assert torch.equal(first[name], second[name]), name
