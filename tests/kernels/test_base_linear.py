"""The base linear of few tokens, against float64."""

import pytest
import torch
import torch.nn.functional as F
from molora_kernels import backend, base_linear
from torch import Tensor

LIMITS = {torch.float16: 5e-4, torch.bfloat16: 3e-3}


def operands(
    num_tokens: int, num_in: int, num_out: int, dtype: torch.dtype, device: torch.device, *, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    rng = torch.Generator().manual_seed(num_tokens)
    x, w = (torch.randn(rows, num_in, generator=rng).to(device, dtype) for rows in (num_tokens, num_out))
    return x, w, torch.randn(num_out, generator=rng).to(device, dtype) if bias else None


def relative_error(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> float:
    expected = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 64])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 64), (200, 33), (2048, 130), (4104, 7)])
def test_the_kernel_gives_the_product(
    device: torch.device, num_tokens: int, num_in: int, num_out: int, dtype: torch.dtype, bias: bool
) -> None:
    if not backend.triton_runs_on(device):
        pytest.skip("no Triton")
    from molora_kernels import decode

    given = operands(num_tokens, num_in, num_out, dtype, device, bias=bias)
    assert decode.suits(*given[:2])
    y = decode.base(*given)
    assert y.shape == (num_tokens, num_out)
    assert y.dtype == dtype
    assert relative_error(y, *given) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 64, 65])
def test_whatever_the_shape_it_is_a_linear(device: torch.device, num_tokens: int, dtype: torch.dtype) -> None:
    x, w, bias = operands(num_tokens, 72, 40, dtype, device)
    with torch.inference_mode():
        y = base_linear(x.view(1, num_tokens, 72), w, bias)
    assert y.shape == (1, num_tokens, 40)
    assert num_tokens == 0 or relative_error(y[0], x, w, bias) < LIMITS[torch.bfloat16]


def test_strides_that_the_kernel_does_not_take_are_no_matter(device: torch.device) -> None:
    x, w, bias = operands(3, 72, 40, torch.bfloat16, device)
    apart = torch.empty(3, 144, dtype=x.dtype, device=device)[:, ::2].copy_(x)
    with torch.inference_mode():
        assert relative_error(base_linear(apart, w, bias), x, w, bias) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("num_tokens", [0, 1, 65])
@pytest.mark.parametrize("bias", [False, True])
def test_compilers_may_look_at_it(device: torch.device, num_tokens: int, bias: bool) -> None:
    if not backend.HAS_TRITON:
        pytest.skip("no Triton")
    given = operands(num_tokens, 72, 40, torch.bfloat16, device, bias=bias)
    torch.library.opcheck(torch.ops.molora.base_linear.default, given)


def test_with_gradients_it_is_torchs_own(device: torch.device) -> None:
    x, w, bias = operands(3, 72, 40, torch.float32, device)
    x.requires_grad_()
    base_linear(x, w, bias).sum().backward()
    assert torch.allclose(x.grad, w.sum(0).expand(3, -1), atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels overlap on a GPU alone")
def test_in_a_chain_each_waits_for_the_one_before(device: torch.device) -> None:
    """Launches overlap in a graph, and what one writes is there when the next one reads it."""
    x, w, _ = operands(1, 4096, 4096, torch.bfloat16, device)
    w /= 64
    expected, out = x, torch.empty_like(x)
    for _ in range(8):
        expected = F.linear(expected.double(), w.double()).to(x.dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        base_linear(x, w, None)
        with torch.cuda.graph(graph):
            y = x
            for _ in range(8):
                y = base_linear(y, w, None)
            out.copy_(y)
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        assert float((out.double() - expected.double()).norm() / expected.double().norm()) < 0.02
