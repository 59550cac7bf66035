from collections.abc import Callable
from typing import Any

import pytest
import torch
from molora_kernels import routed_linear, routed_linears

# The first product of a process may be one of the backward thread, which has no CUDA context yet.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
TRAINED = ("x", "lora_a", "lora_b", "gates")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def with_leaves(problem: Any, dtype: torch.dtype | None = None) -> Any:
    leaves = {}
    for name in TRAINED:
        tensor = getattr(problem, name)
        leaves[name] = tensor.to(dtype or tensor.dtype).clone().requires_grad_()
    return problem.replace(**leaves)


def gradients(problem: Any, y: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.arange(y.numel(), device=y.device).reshape(y.shape).sin()
    grads = torch.autograd.grad(y, [getattr(problem, name) for name in TRAINED], weights.to(y.dtype))
    return dict(zip(TRAINED, grads, strict=True))


@pytest.mark.parametrize("routes", ["uniform", "none", "duplicates"])
def test_gradcheck(make_problem: Callable, routes: str) -> None:
    problem = with_leaves(make_problem(4, 3, 5, 2, 2, 2, routes=routes), torch.float64)
    plan = problem.plan

    def call(x, lora_a, lora_b, gates):  # type: ignore[no-untyped-def]
        weight, bias, scaling = problem.weight, problem.bias, problem.scaling
        return routed_linear(x, weight, bias, lora_a, lora_b, scaling, gates, plan, impl="torch")

    assert torch.autograd.gradcheck(call, [getattr(problem, name) for name in TRAINED])


@pytest.mark.parametrize("routes", ["uniform", "zipf", "none", "duplicates"])
@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_gradients_match_the_loop(
    make_problem: Callable, solve: Callable, impl: str, routes: str, num_tokens: int
) -> None:
    problem = with_leaves(make_problem(num_tokens, routes=routes))
    actual = gradients(problem, routed_linear(*problem.args, impl=impl))
    if num_tokens == 0:
        assert all(not grad.any() for grad in actual.values())
        return
    exact = with_leaves(problem.replace(**{name: getattr(problem, name).detach() for name in TRAINED}))
    y = solve(exact)
    weights = torch.arange(y.numel()).reshape(y.shape).sin().double()
    leaves = [getattr(exact, name) for name in TRAINED]
    expected = torch.autograd.grad(y, leaves, weights, allow_unused=True, materialize_grads=True)
    for name, grad in zip(TRAINED, expected, strict=True):
        torch.testing.assert_close(
            actual[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_each_gradient_has_the_dtype_of_its_tensor(make_problem: Callable, impl: str) -> None:
    problem = make_problem()
    problem = with_leaves(problem.replace(x=problem.x.bfloat16(), lora_a=problem.lora_a.half()))
    for name, grad in gradients(problem, routed_linear(*problem.args, impl=impl)).items():
        assert grad.dtype == getattr(problem, name).dtype
        assert grad.isfinite().all()


def test_low_precision_gradients_are_close(make_problem: Callable, impl: str) -> None:
    low = with_leaves(make_problem(48, 80, 96, rank=24, dtype=torch.bfloat16))
    high = with_leaves(low.replace(**{name: getattr(low, name).detach().float() for name in ("x", "lora_a", "lora_b")}))
    actual = gradients(low, routed_linear(*low.args, impl=impl))
    expected = gradients(high, routed_linear(*high.args, impl="torch"))
    for name in TRAINED:
        assert (actual[name].float() - expected[name]).norm() < 6e-3 * expected[name].norm(), name


def test_weight_bias_and_scaling_are_frozen(make_problem: Callable, impl: str) -> None:
    problem = with_leaves(make_problem())
    frozen = {name: getattr(problem, name).clone().requires_grad_() for name in ("weight", "bias", "scaling")}
    problem = problem.replace(**frozen)
    routed_linear(*problem.args, impl=impl).sum().backward()
    assert all(tensor.grad is None for tensor in frozen.values())
    assert all(getattr(problem, name).grad is not None for name in TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_one_tensor_alone_may_need_a_gradient(make_problem: Callable, impl: str, name: str) -> None:
    problem = make_problem(5)
    everything = with_leaves(problem)
    expected = gradients(everything, routed_linear(*everything.args, impl=impl))[name]
    alone = problem.replace(**{name: getattr(problem, name).clone().requires_grad_()})
    y = routed_linear(*alone.args, impl=impl)
    weights = torch.arange(y.numel(), device=y.device).reshape(y.shape).sin()
    torch.testing.assert_close(torch.autograd.grad(y, getattr(alone, name), weights)[0], expected)


def test_a_selected_adapter_at_gate_zero_has_a_gate_gradient(make_problem: Callable, impl: str) -> None:
    problem = make_problem(routes="identical", top_k=1)
    problem.gates.zero_()
    problem = with_leaves(problem)
    assert gradients(problem, routed_linear(*problem.args, impl=impl))["gates"].ne(0).all()


def test_siblings_share_the_gradient_of_their_input(make_problem: Callable, impl: str) -> None:
    problem = with_leaves(make_problem(out_features=24, num_siblings=2))
    actual = gradients(problem, torch.cat(routed_linears(*problem.args, out_features=[16, 8], impl=impl), dim=1))
    exact = with_leaves(problem, torch.float64)
    expected = gradients(exact, torch.cat(routed_linears(*exact.args, out_features=[16, 8], impl="torch"), dim=1))
    for name in TRAINED:
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not ON_HOPPER, reason="the backward kernel needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("routes", ["uniform", "zipf", "none", "duplicates", "runs"])
@pytest.mark.parametrize("shape", [(300, 136, 264, 5, 24, 1), (1000, 520, 512, 3, 16, 2), (129, 64, 72, 12, 8, 1)])
def test_gradients_of_the_backward_kernel(
    make_problem: Callable, dtype: torch.dtype, routes: str, shape: tuple[int, ...]
) -> None:
    problem = with_leaves(make_problem(*shape, dtype=dtype, routes="none" if routes == "runs" else routes))
    if routes == "runs":  # whole blocks of tokens without an adapter, or of one
        problem.ids[130:] = 0
        problem.ids[290:] = shape[3] - 1
    junk = torch.full((2**22,), torch.nan, device="cuda")  # what the allocator hands out next
    del junk
    exact = with_leaves(problem, torch.float64)
    exact = exact.replace(weight=problem.weight.double(), bias=problem.bias.double())
    expected = gradients(exact, routed_linear(*exact.args, impl="torch"))
    y = routed_linear(*problem.args)
    actual = gradients(problem, y)
    again = gradients(problem, routed_linear(*problem.args))
    assert "routed_linears" in type(y.grad_fn).__name__  # not the torch implementation
    for name in TRAINED:
        assert actual[name].dtype == getattr(problem, name).dtype
        assert torch.equal(actual[name], again[name]), name
        error = (actual[name].double() - expected[name]).norm()
        assert error <= (1e-3 if dtype == torch.float16 else 6e-3) * expected[name].norm(), name


def test_a_second_derivative_is_refused(make_problem: Callable, impl: str) -> None:
    if impl == "torch":
        pytest.skip("autograd differentiates plain torch any number of times")
    problem = with_leaves(make_problem(5))
    y = routed_linear(*problem.args, impl=impl)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(y.sum(), problem.x, create_graph=True)


@pytest.mark.skipif(not ON_HOPPER, reason="the fused backward pass needs a Hopper GPU")
@pytest.mark.parametrize("name", TRAINED)
def test_one_tensor_alone_may_need_the_fused_gradient(make_problem: Callable, name: str) -> None:
    problem = make_problem(200, 136, 264, 5, 24, 2, dtype=torch.float16)
    everything = with_leaves(problem)
    expected = gradients(everything, routed_linear(*everything.args))
    with_x = problem.replace(x=problem.x.clone().requires_grad_())
    wanted = [with_x.x] if name == "x" else [with_x.x, getattr(problem, name).clone().requires_grad_()]
    if name != "x":
        with_x = with_x.replace(**{name: wanted[1]})
    y = routed_linear(*with_x.args)
    weights = torch.arange(y.numel(), device=y.device).reshape(y.shape).sin().to(y.dtype)
    for wanted_name, grad in zip(("x", name), torch.autograd.grad(y, wanted, weights), strict=False):
        assert torch.equal(grad, expected[wanted_name]), wanted_name


@pytest.mark.skipif(not ON_HOPPER, reason="the fused backward pass needs a Hopper GPU")
@pytest.mark.parametrize("block_o", [64, 128, 256])
def test_every_tile_of_the_fused_backward(
    make_problem: Callable, monkeypatch: pytest.MonkeyPatch, block_o: int
) -> None:
    from molora_kernels import tiles

    chosen = tuple(tile for tile in tiles._TILES if (tile.block_t, tile.block_o) == (128, block_o))
    assert chosen
    monkeypatch.setattr(tiles, "_TILES", chosen)
    problem = make_problem(700, 520, 776, 5, 40, 2, dtype=torch.float16, routes="zipf")
    problem.ids[128:300] = -1
    problem = with_leaves(problem)
    exact = with_leaves(problem, torch.float64)
    exact = exact.replace(weight=problem.weight.double(), bias=problem.bias.double())
    expected = gradients(exact, routed_linear(*exact.args, impl="torch"))
    actual = gradients(problem, routed_linear(*problem.args))
    for name in TRAINED:
        error = (actual[name].double() - expected[name]).norm()
        assert error <= 1e-3 * expected[name].norm(), name
