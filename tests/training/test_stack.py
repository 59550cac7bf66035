"""Adapters that act together on the same rows, against their definition in float64."""

import pytest
import torch
from torch import nn

from molora.adapter import LoraWeights
from molora.training.stack import LoraStack

NUM_ADAPTERS, RANK, NUM_IN, NUM_OUT, NUM_TOKENS = 3, 4, 10, 6, 5
ALPHA = 8.0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(NUM_IN, NUM_OUT, dtype=torch.float64).requires_grad_(False)


@pytest.fixture
def stack() -> tuple[Model, LoraStack]:
    torch.manual_seed(0)
    model = Model()
    stack = LoraStack(model, ["proj"], ranks=[RANK] * NUM_ADAPTERS, alphas=[ALPHA] * NUM_ADAPTERS)
    stack.values = nn.Parameter(torch.randn_like(stack.values, dtype=torch.float64))
    return model, stack


def test_a_blend_is_the_gated_sum_of_the_adapters_with_its_gradients(stack: tuple[Model, LoraStack]) -> None:
    model, adapters = stack
    x = torch.randn(1, NUM_TOKENS, NUM_IN, dtype=torch.float64, requires_grad=True)
    gates_NE = torch.rand(NUM_TOKENS, NUM_ADAPTERS, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, NUM_TOKENS, NUM_OUT, dtype=torch.float64)
    adapters.blend(gates_NE)
    y = model.proj(x)
    got = torch.autograd.grad(y, [x, gates_NE, adapters.values], dy)

    ((a_ERI, b_EOR),) = adapters._pairs(adapters.values)
    update_NEO = torch.einsum("ni,eri,eor->neo", x[0], a_ERI, b_EOR) * (ALPHA / RANK)
    base = nn.functional.linear(x, model.proj.weight, model.proj.bias)
    wanted_y = base + torch.einsum("neo,ne->no", update_NEO, gates_NE)
    wanted = torch.autograd.grad(wanted_y, [x, gates_NE, adapters.values], dy)
    assert torch.allclose(y, wanted_y)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs)


def test_what_needs_no_gradient_gets_none(stack: tuple[Model, LoraStack]) -> None:
    model, adapters = stack
    adapters.requires_grad_(False)
    adapters.blend(torch.rand(NUM_TOKENS, NUM_ADAPTERS, dtype=torch.float64))
    x = torch.randn(1, NUM_TOKENS, NUM_IN, dtype=torch.float64, requires_grad=True)
    model.proj(x).sum().backward()
    assert x.grad is not None
    assert adapters.values.grad is None


def test_side_by_side_and_blended_are_the_same_adapters(stack: tuple[Model, LoraStack]) -> None:
    model, adapters = stack
    x = torch.randn(NUM_ADAPTERS, NUM_TOKENS, NUM_IN, dtype=torch.float64)
    active = torch.rand(NUM_ADAPTERS, NUM_TOKENS) > 0.3
    adapters.act(active)
    wanted = model.proj(x)
    adapters.blend(torch.block_diag(*active.double()[..., None]).to(x.dtype))
    assert torch.allclose(model.proj(x.reshape(1, -1, NUM_IN)).view_as(wanted), wanted)


def test_a_strangers_ranks_have_the_signs_of_the_bits(stack: tuple[Model, LoraStack]) -> None:
    model, adapters = stack
    x = torch.randn(NUM_ADAPTERS, NUM_TOKENS, NUM_IN, dtype=torch.float64)
    signs = torch.tensor([0b0000, 0b1010, 0b0001, 0b1111, 0b0110]).repeat(NUM_ADAPTERS, 1)
    adapters.act(torch.ones(NUM_ADAPTERS, NUM_TOKENS, dtype=torch.bool), signs)
    update = model.proj(x) - nn.functional.linear(x, model.proj.weight, model.proj.bias)
    ((a_ERI, b_EOR),) = adapters.pairs()
    signs_NR = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [-1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, -1, 1]])
    wanted = torch.einsum("eni,eri,nr,eor->eno", x, a_ERI, signs_NR.double(), b_EOR) * (ALPHA / RANK)
    assert torch.allclose(update, wanted)


def test_loaded_adapters_act_with_their_own_ranks_and_scalings(stack: tuple[Model, LoraStack]) -> None:
    model, adapters = stack
    own = LoraWeights(torch.randn(2, NUM_IN), torch.randn(NUM_OUT, 2), scaling=0.7)
    adapters.load(1, {"proj": own})
    adapters.load(2, {})
    x = torch.randn(1, 3, NUM_IN, dtype=torch.float64)
    adapters.blend(torch.eye(3, dtype=torch.float64))
    update = model.proj(x) - nn.functional.linear(x, model.proj.weight, model.proj.bias)
    wanted = own.scaling * (x[0, 1] @ own.a_RI.double().T) @ own.b_OR.double().T
    assert torch.allclose(update[0, 1], wanted, rtol=1e-5)
    assert update[0, 0].abs().max() > 0.1
    assert torch.equal(update[0, 2], torch.zeros(NUM_OUT, dtype=torch.float64))


@pytest.mark.parametrize("trained", [True, False])
def test_a_blend_is_of_what_the_adapters_are_now(stack: tuple[Model, LoraStack], trained: bool) -> None:
    model, adapters = stack
    adapters.requires_grad_(trained)
    x, gates_NE = torch.randn(1, 3, NUM_IN, dtype=torch.float64), torch.eye(3, dtype=torch.float64)

    def updates() -> torch.Tensor:
        adapters.blend(gates_NE)
        return model.proj(x) - nn.functional.linear(x, model.proj.weight, model.proj.bias)

    before = updates()
    assert torch.equal(updates(), before)
    adapters.load(1, {"proj": LoraWeights(torch.randn(2, NUM_IN), torch.randn(NUM_OUT, 2), scaling=0.7)})
    assert not torch.allclose(updates()[0, 1], before[0, 1])
    assert torch.allclose(updates()[0, 0], before[0, 0])
    for _, b_EOR in adapters.pairs():
        b_EOR.mul_(2)
    assert torch.allclose(updates()[0, 0], 2 * before[0, 0])


def test_adapters_of_different_ranks_and_scalings_stand_side_by_side() -> None:
    torch.manual_seed(0)
    ranks, alphas = (2, 4, 1), (6.0, 2.0, 5.0)
    model = Model()
    adapters = LoraStack(model, ["proj"], ranks=ranks, alphas=alphas)
    adapters.reset(seed=7)
    for index, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):  # as each would begin alone
        alone = LoraStack(Model(), ["proj"], ranks=[rank], alphas=[alpha])
        alone.reset(seed=7)
        ours, theirs = adapters.weights(index)["proj"], alone.weights(0)["proj"]
        assert ours.a_RI.shape == (rank, NUM_IN)
        assert torch.equal(ours.a_RI, theirs.a_RI)
        assert torch.equal(ours.b_OR, torch.zeros(NUM_OUT, rank))
        assert ours.scaling == theirs.scaling == alpha / rank
    adapters.values = nn.Parameter(adapters.values.detach().double())
    ((_, b_EOR),) = adapters.pairs()
    for index, rank in enumerate(ranks):
        b_EOR[index, :, :rank].normal_()
    x = torch.randn(3, NUM_TOKENS, NUM_IN, dtype=torch.float64)
    adapters.act(torch.ones(3, NUM_TOKENS, dtype=torch.bool))
    y = model.proj(x)
    for index in range(3):
        own = adapters.weights(index)["proj"]
        wanted = x[index] @ model.proj.weight.T + model.proj.bias + own.scaling * x[index] @ own.a_RI.T @ own.b_OR.T
        assert torch.allclose(y[index], wanted)
    y.square().sum().backward()
    gradients = adapters._pairs(adapters.values.grad)[0]
    for index, rank in enumerate(ranks):  # what is beyond a rank stays 0
        for gradient_RX in (gradients[0][index], gradients[1][index].T):
            assert gradient_RX[:rank].abs().min() > 0
            assert not gradient_RX[rank:].any()
    adapters.blend(torch.eye(3, dtype=torch.float64))
    blended = model.proj(x[:, 0])
    assert torch.allclose(blended, y[:, 0])
