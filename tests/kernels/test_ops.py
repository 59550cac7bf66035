"""What the ops refuse, and how they fit into PyTorch."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from molora_kernels import backend, gradients, make_plan, ops, routed_linear, routed_linears

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight", (33, 25)),
        ("weight", (33,)),
        ("bias", (32,)),
        ("lora_a", (4, 3, 24)),
        ("lora_a", (3, 4, 24)),
        ("lora_b", (3, 32, 3)),
        ("lora_b", (33, 3)),
        ("scaling", (2,)),
        ("gates", (17, 1)),
        ("x", (17, 2, 12)),
        ("x", (16, 24)),
    ],
)
def test_a_wrong_shape_is_named(
    make_problem: Callable, device: torch.device, name: str, shape: tuple[int, ...]
) -> None:
    problem = make_problem().replace(**{name: torch.zeros(shape, device=device)})
    blamed = "plan.ids" if name == "x" and len(shape) == 2 else name
    with pytest.raises(ValueError, match=rf"^{blamed} must be"):
        routed_linear(*problem.tensors, make_problem().plan)


def test_a_plan_for_another_bank_is_refused(make_problem: Callable) -> None:
    problem = make_problem(num_adapters=3)
    with pytest.raises(ValueError, match=r"lora_a must be .* = \[4, 3, 24\]"):
        routed_linear(*problem.tensors, make_plan(problem.ids, 4))


def test_widths_must_add_up(make_problem: Callable) -> None:
    problem = make_problem(out_features=24, num_siblings=2)
    with pytest.raises(ValueError, match=r"weight must be \[O, I\] = \[25, 24\]"):
        routed_linears(*problem.args, out_features=[16, 9])


def test_another_device_is_refused(make_problem: Callable) -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match="lora_b is on meta"):
        routed_linear(*problem.replace(lora_b=problem.lora_b.to("meta")).args)


def test_integer_x_is_refused(make_problem: Callable) -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match="x must be a floating-point tensor"):
        routed_linear(*problem.replace(x=problem.x.int()).args)


def test_an_unknown_impl_is_refused(make_problem: Callable) -> None:
    with pytest.raises(ValueError, match="impl must be"):
        routed_linear(*make_problem().args, impl="cuda")


def test_triton_without_a_place_to_run_is_refused(make_problem: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "triton_runs_on", lambda device: False)
    with pytest.raises(ValueError, match="needs a GPU and Triton"):
        routed_linear(*make_problem().args, impl="triton")


def test_triton_refuses_float64(make_problem: Callable) -> None:
    with pytest.raises(ValueError, match=r"float64|needs a GPU"):
        routed_linear(*make_problem(dtype=torch.float64).args, impl="triton")


def test_the_triton_kernels_are_tested_here(device: torch.device) -> None:
    late = "molora_kernels was imported before tests/conftest.py: set TRITON_INTERPRET=1 for this run"
    assert backend.triton_runs_on(device) or not backend.HAS_TRITON, late


def test_import_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from molora_kernels import make_plan, routed_linear
plan = make_plan(torch.tensor([[0], [-1]], dtype=torch.int32), 1)
one = torch.ones
y = routed_linear(one(2, 3), one(1, 3), None, one(1, 1, 3), one(1, 1, 1), one(1), one(2, 1), plan)
assert y.tolist() == [[6.0], [3.0]]
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_custom_op_passes_opcheck(make_problem: Callable, impl: str, needs_grad: bool) -> None:
    if impl == "torch":
        pytest.skip("plain torch is no custom op")
    problem = make_problem(6, out_features=24, num_siblings=2)
    x, weight, bias, lora_a, lora_b, scaling, gates = problem.tensors
    leaves = [tensor.requires_grad_(needs_grad) for tensor in (x, lora_a, lora_b, gates)]
    x, lora_a, lora_b, gates = leaves
    plan = problem.plan
    tables = vars(plan.tables).values()
    args = (x, weight, bias, lora_a, lora_b, scaling, gates, plan.ids, *tables, [16, 8], False, False)
    torch.library.opcheck(ops._routed_linears_triton, args)


@pytest.mark.skipif(not ON_HOPPER, reason="the fused backward pass needs a Hopper GPU")
@pytest.mark.parametrize("keep_u", [False, True])
def test_the_ops_of_the_fused_backward_pass_opcheck(make_problem: Callable, keep_u: bool) -> None:
    problem = make_problem(130, 72, 136, 3, 20, dtype=torch.float16)
    x, weight, bias, lora_a, lora_b, scaling, gates = problem.tensors
    lora_a, scaling = lora_a.unsqueeze(0), scaling.unsqueeze(1)
    for tensor in (x, lora_a, lora_b, *([gates] if keep_u else [])):
        tensor.requires_grad_()
    plan = problem.plan
    tables = plan.tables
    factors = (weight, bias, lora_a, lora_b, scaling, gates, plan.ids)
    torch.library.opcheck(ops._routed_linears_triton, (x, *factors, *vars(tables).values(), [136], True, keep_u))
    with torch.no_grad():
        y, h, u = ops._routed_linears_triton(x, *factors, *vars(tables).values(), [136], True, keep_u)
    routing = (scaling, gates.detach(), plan.ids, tables.order, tables.spans)
    torch.library.opcheck(gradients._dx_triton, (y, weight, lora_a.detach(), lora_b.detach(), *routing, u))
    assert h.shape == (130, 64)
    assert u.shape == (h.shape if keep_u else (0,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_right_or_refused(make_problem: Callable, impl: str) -> None:
    problem = make_problem(5)
    tangent = torch.randn_like(problem.x)

    def call(x: torch.Tensor) -> torch.Tensor:
        return routed_linear(x, *problem.args[1:], impl=impl)

    if impl == "triton":
        with pytest.raises(ValueError, match="forward-mode"):
            torch.func.jvp(call, (problem.x,), (tangent,))
        return
    _, actual = torch.func.jvp(call, (problem.x,), (tangent,))
    no_bias = problem.replace(bias=None, x=tangent)
    torch.testing.assert_close(actual, routed_linear(*no_bias.args, impl=impl))


def test_plan_and_linear_compile_into_one_graph(make_problem: Callable, impl: str) -> None:
    problem = make_problem(integers=True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(ids: torch.Tensor) -> torch.Tensor:
        return routed_linear(*problem.tensors, make_plan(ids, 3), impl=impl)

    assert torch.equal(call(problem.ids), routed_linear(*problem.args, impl=impl))


def test_the_backward_pass_compiles(make_problem: Callable, impl: str) -> None:
    problem = make_problem(6, integers=True)
    leaves = [getattr(problem, name).requires_grad_() for name in ("x", "lora_a", "lora_b", "gates")]
    plan = problem.plan

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(*leaves: torch.Tensor) -> torch.Tensor:
        x, lora_a, lora_b, gates = leaves
        return routed_linear(x, problem.weight, problem.bias, lora_a, lora_b, problem.scaling, gates, plan, impl=impl)

    compiled = torch.autograd.grad(call(*leaves).sum(), leaves)
    eager = torch.autograd.grad(routed_linear(*problem.args, impl=impl).sum(), leaves)
    assert all(map(torch.equal, compiled, eager))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
def test_a_captured_graph_follows_new_ids(make_problem: Callable, impl: str, dtype: torch.dtype, top_k: int) -> None:
    problem = make_problem(200, 136, 264, 5, 24, top_k, dtype=dtype)
    ids = problem.ids.clone()

    def call() -> torch.Tensor:
        return routed_linear(*problem.tensors, make_plan(ids, 5), impl=impl)

    call()  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for routes in ("none", "zipf", "identical", "uniform"):
        ids.copy_(make_problem(200, 136, 264, 5, 24, top_k, routes=routes, seed=1).ids)
        graph.replay()
        torch.testing.assert_close(y, call(), rtol=0, atol=0)


def test_auto_takes_triton_on_a_gpu(device: torch.device) -> None:
    x = torch.ones(1, device=device, requires_grad=True)
    assert ops._choose("auto", x) == ("triton" if x.is_cuda else "torch")
    assert ops._choose("auto", x.double()) == "torch"


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 512, 1000, 8, 16, 1), (1000, 333, 515, 3, 64, 2), (600, 512, 512, 2, 130, 8)])
def test_large_tiles_are_exact_on_integers(
    make_problem: Callable, dtype: torch.dtype, shape: tuple[int, ...], impl: str
) -> None:
    problem = make_problem(*shape, dtype=torch.float32, integers=True)
    sparse = {"x": problem.x * (torch.rand_like(problem.x) < 0.02), "lora_b": problem.lora_b.sign()}
    problem = problem.replace(**sparse, weight=problem.weight.sign(), lora_a=problem.lora_a.sign(), bias=None)
    problem = problem.replace(gates=problem.gates.fill_(1), scaling=problem.scaling.fill_(1))
    double = {name: getattr(problem, name).double() for name in ("x", "weight", "lora_a", "lora_b")}
    expected = routed_linear(*problem.replace(**double).args, impl="torch")
    low = {name: getattr(problem, name).to(dtype) for name in double}
    y = routed_linear(*problem.replace(**low).args, impl=impl).double()
    exactly = expected.abs() <= 256  # beyond it bfloat16 has no place for every integer
    assert torch.equal(y[exactly], expected[exactly])
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=0)
