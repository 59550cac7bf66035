import pytest
import torch
from molora_kernels import make_plan
from torch import nn

from molora.adapter import LoraWeights
from molora.linear import RoutedLinear
from molora.routing import Routes


def make(*, bias: bool = True, dtype: torch.dtype | None = None) -> tuple[nn.Linear, RoutedLinear]:
    linear = nn.Linear(6, 5, bias=bias).requires_grad_(False)
    return linear, RoutedLinear(linear, Routes(3), num_slots=3, max_rank=4, dtype=dtype)


def weights(rank: int, scaling: float = 2.0) -> LoraWeights:
    return LoraWeights(torch.randn(rank, 6), torch.randn(5, rank), scaling)


def test_without_a_plan_it_is_the_linear():
    for bias in (True, False):
        linear, routed = make(bias=bias)
        routed.set_slot(0, weights(4))
        x = torch.randn(2, 7, 6)
        assert torch.equal(routed(x), linear(x))
        assert routed.weight is linear.weight
        assert routed.bias is linear.bias


def test_with_a_plan_each_token_gets_its_adapters():
    linear, routed = make()
    pairs = [weights(4), weights(1, 0.5), weights(3, -1.0)]
    for slot, pair in enumerate(pairs):
        routed.set_slot(slot, pair)
    ids = torch.tensor([[-1, -1], [0, -1], [1, 2], [2, 2]], dtype=torch.int32)
    gates = torch.rand(4, 2)
    routed.routes.plan, routed.routes.gates_TK = make_plan(ids, 3), gates
    x = torch.randn(4, 6)
    expected = linear(x).double()
    for t, row in enumerate(ids.tolist()):
        for k, e in enumerate(row):
            if e >= 0:
                pair = pairs[e]
                delta = pair.b_OR.double() @ (pair.a_RI.double() @ x[t].double())
                expected[t] += gates[t, k] * pair.scaling * delta
    got = routed(x.view(2, 2, 6))
    assert got.shape == (2, 2, 5)
    assert torch.allclose(got.view(4, 5).double(), expected, atol=1e-5)
    assert torch.equal(got.view(4, 5)[0], linear(x)[0])


def test_slots_keep_their_addresses_and_forget_what_they_held():
    _, routed = make()
    addresses = [t.data_ptr() for t in (routed.lora_a_ERI, routed.lora_b_EOR, routed.scaling_E)]
    routed.set_slot(1, weights(4))
    small = weights(2)
    routed.set_slot(1, small)
    assert [t.data_ptr() for t in (routed.lora_a_ERI, routed.lora_b_EOR, routed.scaling_E)] == addresses
    assert routed.lora_a_ERI[1, 2:].abs().sum() == routed.lora_b_EOR[1, :, 2:].abs().sum() == 0
    back = routed.get_slot(1, 2)
    assert torch.equal(back.a_RI, small.a_RI)
    assert torch.equal(back.b_OR, small.b_OR)
    assert back.scaling == 2.0
    back.a_RI.zero_()
    assert routed.lora_a_ERI[1].abs().sum() > 0, "a copy"
    routed.set_slot(1, None)
    assert routed.lora_a_ERI.abs().sum() == routed.lora_b_EOR.abs().sum() == routed.scaling_E.abs().sum() == 0


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_slots_may_be_of_another_dtype_than_the_base(dtype):
    linear = nn.Linear(6, 5).bfloat16().requires_grad_(False)
    routed = RoutedLinear(linear, Routes(1), num_slots=1, max_rank=4, dtype=dtype)
    assert routed.lora_a_ERI.dtype == (dtype or torch.bfloat16)
    assert routed.scaling_E.dtype == torch.float32
    routed.set_slot(0, weights(4))
    routed.routes.plan = make_plan(torch.zeros(3, 1, dtype=torch.int32), 1)
    routed.routes.gates_TK = torch.ones(3, 1)
    assert routed(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_state_dict_has_the_names_of_the_linear():
    linear, routed = make()
    assert {"weight", "bias"} <= set(routed.state_dict())
    assert set(routed.state_dict()) - set(linear.state_dict()) == {"lora_a_ERI", "lora_b_EOR"}
    assert "slots=3, rank=4" in repr(routed)
