"""Merged siblings compute what they computed one by one."""

import pytest
import torch
from torch import nn

from molora.adapter import LoraWeights
from molora.linear import RoutedLinear
from molora.routing import RouteRecord, Routes
from molora.siblings import Siblings, merge_siblings, with_others

WIDTHS = (24, 8, 10)


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> None:
    """Without a GPU the kernels run in it."""


@pytest.fixture
def routes() -> Routes:
    return Routes(3)


def make_linears(routes: Routes, *, bias: bool, widths=WIDTHS) -> list[RoutedLinear]:
    generator = torch.Generator().manual_seed(0)
    linears = []
    for width in widths:
        linear = nn.Linear(16, width, bias=bias)
        routed = RoutedLinear(linear, routes, num_slots=3, max_rank=4)
        for slot in range(3):
            a, b = torch.randn(2 + slot, 16, generator=generator), torch.randn(width, 2 + slot, generator=generator)
            routed.set_slot(slot, LoraWeights(a, b, 0.5 + slot))
        linears.append(routed)
    return linears


def fill(routes: Routes, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    slots = torch.randint(-1, 3, (1, num_tokens, 2), generator=generator).int()
    gates = torch.rand(1, num_tokens, 2, generator=generator)
    routes.fill(RouteRecord(slots, gates, torch.ones(1, num_tokens, dtype=torch.bool), None))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_they_compute_what_they_did_one_by_one(impl, bias, num_tokens):
    routes = Routes(3, impl)
    linears = make_linears(routes, bias=bias)
    x = torch.randn(1, max(1, num_tokens), 16)
    if num_tokens:
        fill(routes, num_tokens)
    with torch.inference_mode():
        expected, doubled = ([linear(scale * x) for linear in linears] for scale in (1, 2))
        states = [{name: t.clone() for name, t in linear.state_dict().items()} for linear in linears]
        siblings = Siblings(linears)
        for _ in range(2):
            for linear, y in zip(linears, expected, strict=True):
                assert torch.allclose(linear(x), y, atol=1e-5)
        assert siblings._input is None
        assert siblings._outputs == [None] * 3, "nothing is kept from one forward to the next"
        # Out of turn, and on other inputs, each is itself.
        for linear, y in zip(reversed(linears), reversed(expected), strict=True):
            assert torch.allclose(linear(x), y, atol=1e-5)
        linears[0](x)
        assert torch.allclose(linears[1](2 * x), doubled[1], atol=1e-5)
    for linear, state in zip(linears, states, strict=True):
        assert all(torch.equal(linear.state_dict()[name], tensor) for name, tensor in state.items())


def test_slots_that_are_set_later_act_in_all_of_them(routes):
    linears, alone = make_linears(routes, bias=False), make_linears(routes, bias=False)
    Siblings(linears)
    weights = LoraWeights(torch.randn(3, 16), torch.randn(WIDTHS[1], 3), 2.0)
    fill(routes, 6)
    x = torch.randn(1, 6, 16)
    for group in (linears, alone):
        group[1].set_slot(0, weights)
        group[0].set_slot(2, None)
    with torch.inference_mode():
        for linear, other in zip(linears, alone, strict=True):
            other.weight.copy_(linear.weight)
            assert torch.allclose(linear(x), other(x), atol=1e-4)


def test_what_does_not_belong_together_is_refused(routes):
    with pytest.raises(ValueError, match="obey one forward's routes"):
        Siblings([*make_linears(routes, bias=False), *make_linears(Routes(3), bias=False)])
    with pytest.raises(ValueError, match="have a bias"):
        Siblings([*make_linears(routes, bias=False), *make_linears(routes, bias=True)])


class Block(nn.Module):
    def __init__(self, linears: list[RoutedLinear]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = linears

    def forward(self, x):
        y = self.q(x)[..., :16] + self.k(x).sum() + self.v(x).sum()
        return self.o(y)


def test_they_are_found_by_what_is_called_with_one_input(routes):
    block = Block(make_linears(routes, bias=False, widths=(24, 8, 10, 16)))
    linears = {f"block.{name}": module for name, module in block.named_modules() if isinstance(module, RoutedLinear)}
    x = torch.randn(1, 3, 16)
    with torch.inference_mode():
        expected = block(x)
        (siblings,) = merge_siblings(linears, lambda: block(x))
        assert siblings.out_features == [24, 8, 10]
        assert block.o.siblings is None
        assert torch.allclose(block(x), expected, atol=1e-4)
    assert not block.q._forward_pre_hooks


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_a_model(make_bank, key_router, random_ids, tmp_path, architecture):
    import molora

    m = molora.load(make_bank(tmp_path, router=key_router(), architecture=architecture), device="cpu", dtype="float32")
    ids = random_ids(20)
    expected = {route: m.logits([ids], [5], route=route) for route in ("base", "x", "auto")}
    linears = with_others(m.model, m.decoder.linears)
    assert set(linears) > set(m.decoder.linears), "layer 0 has no adapters"
    merged = merge_siblings(linears, lambda: m.logits([ids], [0], route="x"))
    assert [len(each.out_features) for each in merged] == [3, 2] * 4
    assert with_others(m.model, m.decoder.linears) == m.decoder.linears, "nothing is left to be changed"
    for route, (logits, routes) in expected.items():
        got, got_routes = m.logits([ids], [5], route=route)
        assert torch.allclose(got, logits, atol=1e-3)
        assert got_routes == routes
