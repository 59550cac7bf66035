"""Each regime of the Triton kernels by itself, whatever the shapes for which `ops` would choose it."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from molora_kernels import backend, make_plan, ops, routed_linear, routed_linears
from torch import Tensor

ROUTES = ("uniform", "identical", "distinct", "zipf", "none", "duplicates")
LIMITS = {torch.float16: 5e-4, torch.bfloat16: 3e-3}
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
MANY = settings(
    max_examples=12,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=["decode", "fused", "sorted", "grouped"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> str:
    if not backend.triton_runs_on(device):
        pytest.skip("no Triton")
    if request.param in ("fused", "sorted") and not ON_HOPPER:
        pytest.skip("the fused regime needs a Hopper GPU")
    monkeypatch.setattr(ops, "_choose_regime", lambda *_: request.param)
    return str(request.param)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected).norm() / expected.norm())


def most(regime: str, top_k: int) -> int:
    """Adapters a token: it is sorted by each of them."""
    return min(top_k, 2) if regime == "sorted" else top_k


def sizes_for(regime: str) -> st.SearchStrategy[dict[str, Any]]:
    """The fused regime takes whole 16 bytes; decode takes 64 tokens."""
    anything = {
        "rank": st.sampled_from([1, 3, 8, 24, 65]),
        "num_adapters": st.sampled_from([1, 2, 5, 12]),
        "top_k": st.sampled_from([1, 2] if regime == "sorted" else [1, 2, 8]),
        "routes": st.sampled_from(ROUTES),
        "bias": st.booleans(),
        "seed": st.integers(0, 99),
    }
    if regime in ("fused", "sorted"):
        tokens, widths = [1, 5, 64, 129, 300, 700], [8, 64, 136, 520]
    else:
        tokens, widths = [1, 5, 17, 40] + [64, 200] * (regime == "grouped"), [1, 7, 16, 70, 131]
    sizes = {name: st.sampled_from(widths) for name in ("in_features", "out_features")}
    return st.fixed_dictionaries(anything | sizes | {"num_tokens": st.sampled_from(tokens)})


@given(data=st.data())
@MANY
def test_small_integers_are_exact(make_problem: Callable, solve: Callable, regime: str, data: st.DataObject) -> None:
    shape = data.draw(sizes_for(regime))
    dtype = torch.float16 if regime in ("fused", "sorted") or torch.cuda.is_available() else torch.float32
    problem = make_problem(**shape, dtype=dtype, integers=True)
    sparse = torch.rand_like(problem.x, dtype=torch.float32) < 4 / shape["in_features"]
    problem = problem.replace(
        x=problem.x.sign() * sparse,
        weight=problem.weight.sign(),
        lora_a=problem.lora_a.sign(),
        lora_b=problem.lora_b.sign(),
        gates=problem.gates.fill_(1),
        scaling=problem.scaling.fill_(1),
    )
    expected = solve(problem)
    exactly = expected.abs() <= 2048  # beyond it float16 has no place for every integer
    y = routed_linear(*problem.args, impl="triton").cpu().double()
    assert torch.equal(y[exactly], expected[exactly])


@pytest.mark.parametrize(("dtype", "routes"), list(zip(itertools.cycle(LIMITS), ROUTES, strict=False)))
def test_error_against_float64(
    make_problem: Callable, solve: Callable, regime: str, dtype: torch.dtype, routes: str
) -> None:
    problem = make_problem(48, 80, 96, 3, 24, most(regime, 2), dtype=dtype, routes=routes)
    y = routed_linear(*problem.args, impl="triton")
    assert y.dtype == dtype
    assert relative_error(y, solve(problem)) < LIMITS[dtype]


def test_siblings_have_their_own_adapters(make_problem: Callable, solve: Callable, regime: str) -> None:
    widths = [256, 64, 64] if regime in ("fused", "sorted") else [40, 7, 7]
    dtype = torch.float16 if regime in ("fused", "sorted") else torch.float32
    merged = make_problem(37, 72, sum(widths), 3, 8, most(regime, 2), num_siblings=3, dtype=dtype)
    outputs = routed_linears(*merged.args, out_features=widths, impl="triton")
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
        assert relative_error(y, solve(alone)) < (5e-4 if regime in ("fused", "sorted") else 1e-5)
        start += width


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("rank", [16, 64, 128])
def test_both_layouts_of_b(make_problem: Callable, solve: Callable, regime: str, rank: int, by_rows: bool) -> None:
    num_tokens = 40 if regime == "decode" else 300
    problem = make_problem(num_tokens, 72, 136, 3, rank, 1, dtype=torch.float16, routes="zipf")
    if by_rows:
        problem = problem.replace(lora_b=problem.lora_b.transpose(0, 1).contiguous().transpose(0, 1))
    assert relative_error(routed_linear(*problem.args, impl="triton"), solve(problem)) < 5e-4


def test_nothing_unwritten_is_read(
    make_problem: Callable, solve: Callable, regime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(50, 72, 136, 5, 5, most(regime, 3), dtype=torch.float16)
    arguments, empty, filled = problem.args, torch.empty, []

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        filled.append(tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(99))
        return filled[-1]

    monkeypatch.setattr(torch, "empty", poisoned)
    y = routed_linear(*arguments, impl="triton")
    monkeypatch.undo()
    assert filled
    assert relative_error(y, solve(problem)) < 5e-4


def test_a_token_does_not_depend_on_its_neighbours(make_problem: Callable, regime: str) -> None:
    problem = make_problem(60, 72, 136, 5, 8, most(regime, 2), dtype=torch.float16, routes="zipf")
    other = make_problem(60, 72, 136, 5, 8, most(regime, 2), dtype=torch.float16, routes="uniform", seed=1)
    mixed = problem.replace(x=other.x.clone(), ids=other.ids.clone(), gates=other.gates.clone())
    for name in ("x", "ids", "gates"):
        getattr(mixed, name)[7:31] = getattr(problem, name)[7:31]
    first, second = (routed_linear(*each.args, impl="triton") for each in (problem, mixed))
    if torch.cuda.is_available():
        assert torch.equal(first[7:31], second[7:31])
    else:  # the interpreter's products are NumPy's, whose bits depend on a matrix's shape on some processors
        torch.testing.assert_close(first[7:31], second[7:31], rtol=2e-3, atol=2e-3)
    assert torch.equal(first, routed_linear(*problem.args, impl="triton"))


def test_tokens_without_adapter_get_what_a_plan_without_adapters_gives(make_problem: Callable, regime: str) -> None:
    problem = make_problem(60, 72, 136, 5, 8, most(regime, 2), dtype=torch.float16)
    problem.ids[::2] = -1
    problem.gates[::2] = torch.nan  # ignored there
    base = routed_linear(*problem.replace(ids=torch.full_like(problem.ids, -1)).args, impl="triton")
    y = routed_linear(*problem.args, impl="triton")
    assert torch.equal(y[::2], base[::2])
    assert y.isfinite().all()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, under the interpreter
def test_an_overflowing_adapter_does_not_touch_other_tokens(
    make_problem: Callable, solve: Callable, regime: str
) -> None:
    problem = make_problem(6, 72, 136, 3, 8, 1, dtype=torch.float16, routes="distinct")
    problem.lora_a[0] = 6e4  # its hidden ranks are infinite in float16
    problem.x[:] = problem.x.abs() + 1
    y = routed_linear(*problem.args, impl="triton")
    others = problem.ids[:, 0].cpu() != 0
    assert not y[0].isfinite().any()
    assert relative_error(y.cpu()[others], solve(problem)[others]) < 5e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_captured_graph_follows_new_ids(make_problem: Callable, regime: str, top_k: int) -> None:
    num_tokens = 40 if regime == "decode" else 600
    problem = make_problem(num_tokens, 136, 264, 5, 24, top_k, dtype=torch.bfloat16)
    ids = problem.ids.clone()

    def call() -> Tensor:
        return routed_linear(*problem.tensors, make_plan(ids, 5), impl="triton")

    call()  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for routes in ("none", "zipf", "identical", "uniform"):
        ids.copy_(make_problem(num_tokens, 136, 264, 5, 24, top_k, routes=routes, seed=1).ids)
        graph.replay()
        assert torch.equal(y, call())


@pytest.mark.skipif(not ON_HOPPER, reason="tiles of the fused regime")
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("regime", ["fused", "sorted"], indirect=True)
def test_every_tile_of_the_fused_regime(
    make_problem: Callable, solve: Callable, monkeypatch: pytest.MonkeyPatch, regime: str, index: int
) -> None:
    from molora_kernels import tiles

    monkeypatch.setattr(tiles, "_TILES", tiles._TILES[index : index + 1])
    problem = make_problem(513, 136, 520, 5, 24, 1, dtype=torch.float16, routes="zipf")
    problem.ids[128:300] = -1
    y = routed_linear(*problem.args, impl="triton")
    assert relative_error(y, solve(problem)) < 5e-4
    assert torch.equal(y, routed_linear(*problem.args, impl="triton"))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("regime", ["fused", "sorted"], indirect=True)
def test_many_tokens_and_columns(make_problem: Callable, regime: str, top_k: int) -> None:
    """Sizes at which loops are pipelined and tiles are full; the torch implementation has the answer in float64."""
    problem = make_problem(3000, 1024, 1536, 24, 64, top_k, dtype=torch.bfloat16, routes="zipf")
    problem.ids[1000:1700] = -1
    exact = problem.replace(
        **{name: getattr(problem, name).double() for name in ("x", "weight", "bias", "lora_a", "lora_b")}
    )
    expected = routed_linear(*exact.args, impl="torch").cpu()
    y = routed_linear(*problem.args, impl="triton")
    assert relative_error(y, expected) < 3e-3
    each_token = (y.cpu().double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert each_token.max() < 6e-3
    assert torch.equal(y, routed_linear(*problem.args, impl="triton"))


@pytest.mark.skipif(not ON_HOPPER, reason="the choice is for a Hopper GPU")
@pytest.mark.parametrize(
    ("tokens", "adapters", "rank", "dtype", "expected"),
    [
        (1, 8, 16, torch.bfloat16, "decode"),
        (64, 32, 64, torch.float16, "decode"),
        (65, 8, 16, torch.bfloat16, "fused"),
        (2000, 3, 24, torch.bfloat16, "fused"),
        (200, 32, 64, torch.bfloat16, "fused"),
        (2000, 32, 64, torch.bfloat16, "sorted"),
        (4096, 8, 16, torch.float32, "grouped"),
    ],
)
def test_the_choice_by_shape(
    make_problem: Callable, tokens: int, adapters: int, rank: int, dtype: torch.dtype, expected: str
) -> None:
    problem = make_problem(tokens, 256, 512, adapters, rank, 1, dtype=dtype)
    x, rest = problem.x, (problem.weight, problem.lora_a.unsqueeze(0), problem.lora_b, problem.ids, (512,))
    assert ops._choose_regime(x, *rest) == expected
    if expected == "sorted":
        for top_k, regime in ((2, "sorted"), (3, "fused")):
            assert ops._choose_regime(x, *rest[:3], problem.ids.expand(-1, top_k), (512,)) == regime
    shifted = torch.empty(x.numel() + 1, dtype=dtype, device=x.device)[1:].view_as(x)  # no copy engine takes it
    if expected == "fused":
        assert ops._choose_regime(shifted, *rest) == "grouped"
