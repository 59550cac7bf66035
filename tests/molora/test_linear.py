import copy

import pytest
import torch
from molora_kernels import make_plan
from torch import Tensor, nn

from molora.adapter import LoraWeights
from molora.linear import RoutedLinear
from molora.routing import RouteRecord, Routes


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


def test_the_state_dict_is_that_of_the_linear():
    linear, routed = make()
    assert list(routed.state_dict()) == list(linear.state_dict()) == ["weight", "bias"]
    routed.set_slot(1, weights(4))
    slot = routed.get_slot(1, 4)
    other = nn.Linear(6, 5)
    assert str(routed.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(routed.weight, other.weight)
    assert torch.equal(routed.get_slot(1, 4).a_RI, slot.a_RI)
    assert "slots=3, rank=4" in repr(routed)


class TestOneTokenOnTheCPU:
    """A decode step takes a shorter way, and nothing else about it may be seen."""

    SLOTS, GATES = (2, -1, 0, 2), (1.0, torch.nan, -0.5, 0.25)

    @pytest.fixture
    def routed(self) -> RoutedLinear:
        _, routed = make()
        for slot, pair in enumerate((weights(4), weights(1, 0.5), weights(3, -1.0))):
            routed.set_slot(slot, pair)
        self.route(routed, self.SLOTS, self.GATES)
        return routed

    @torch.no_grad()
    def route(self, routed: RoutedLinear, slots: tuple[int, ...], gates: tuple[float, ...]) -> None:
        shape = 1, 1, len(slots)
        slots_BTK = torch.tensor(slots, dtype=torch.int32).view(shape)
        routed.routes.fill(RouteRecord(slots_BTK, torch.tensor(gates).view(shape), torch.ones(1, 1).bool(), None))

    def expected(self, routed: RoutedLinear, x: Tensor) -> Tensor:
        """What the definition gives, token by token and adapter by adapter."""
        y = nn.functional.linear(x.double(), routed.weight.double(), routed.bias.double())
        for slot, gate in zip(self.SLOTS, self.GATES, strict=True):
            if slot >= 0:
                pair = routed.get_slot(slot, 4)
                y = y + gate * pair.scaling * (x.double() @ pair.a_RI.double().T @ pair.b_OR.double().T)
        return y

    def check(self, routed: RoutedLinear, *, dtype: torch.dtype = torch.float32, atol: float = 1e-5) -> None:
        x = torch.randn(1, 1, 6, dtype=dtype)
        with torch.no_grad():
            y = routed(x)
            assert y.dtype == dtype
            assert torch.allclose(y.double(), self.expected(routed, x), atol=atol)

    @pytest.fixture
    def alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The op that serves all other shapes is not called."""

        def refuse(*_: object, **__: object) -> Tensor:
            raise AssertionError("the shorter way was not taken")

        monkeypatch.setattr("molora.linear.routed_linear", refuse)

    @pytest.mark.usefixtures("alone")
    def test_its_adapters_add_up(self, routed):
        self.check(routed)
        with torch.inference_mode():
            routed(torch.randn(1, 1, 6))
        self.check(routed)

    @pytest.mark.usefixtures("alone")
    def test_without_an_adapter_it_is_the_linear_to_the_bit(self, routed):
        self.route(routed, (-1, -1), (torch.nan, torch.inf))
        x = torch.randn(1, 1, 6)
        with torch.no_grad():
            assert torch.equal(routed(x), nn.functional.linear(x, routed.weight, routed.bias))

    @pytest.mark.usefixtures("alone")
    def test_a_slot_that_is_set_again_is_seen(self, routed):
        self.check(routed)
        routed.set_slot(2, weights(2, 0.25))
        self.check(routed)
        routed.set_slot(2, None)
        self.check(routed)

    @pytest.mark.usefixtures("alone")
    def test_tensors_that_are_replaced_are_seen(self, routed):
        self.check(routed)
        routed.double()
        self.check(routed, dtype=torch.float64)
        routed.bfloat16().float()
        self.check(routed)
        routed.load_state_dict({name: torch.randn(t.shape) for name, t in routed.state_dict().items()}, assign=True)
        self.check(routed)
        routed.lora_b_EOR.data = torch.randn(3, 5, 4)
        self.check(routed)
        routed.scaling_E = torch.rand(3)
        self.check(routed)

    @pytest.mark.usefixtures("alone")
    def test_a_copy_has_its_own_slots(self, routed):
        self.check(routed)
        copied = copy.deepcopy(routed)
        copied.set_slot(2, weights(4))
        self.check(copied)
        self.check(routed)

    def test_slots_of_another_dtype_are_cast(self, routed):
        routed.lora_a_ERI.data = routed.lora_a_ERI.data.bfloat16()
        routed.lora_b_EOR.data = routed.lora_b_EOR.data.bfloat16()
        self.check(routed)
        routed.lora_a_ERI.data = routed.lora_a_ERI.data.float()
        self.check(routed)

    def test_any_number_of_dimensions_is_served(self, routed):
        x = torch.randn(6)
        with torch.no_grad():
            for shape in ((6,), (1, 6), (1, 1, 6), (1, 1, 1, 6)):
                y = routed(x.view(shape))
                assert torch.allclose(y.double(), self.expected(routed, x.view(shape)), atol=1e-5)

    def test_gradients_flow(self, routed):
        routed.lora_a_ERI.requires_grad_(True)
        routed(torch.randn(1, 1, 6)).sum().backward()
        assert routed.lora_a_ERI.grad.abs().sum() > 0

    def test_a_trace_does_not_depend_on_the_route(self, routed):
        traced = torch.compile(routed, backend="eager", fullgraph=True)
        x = torch.randn(1, 1, 6)
        with torch.no_grad(), torch.compiler.set_stance("default"):
            assert torch.allclose(traced(x), routed(x), atol=1e-5)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
            self.route(routed, (1, 1, 1, -1), (1.0, 2.0, 3.0, 0.0))
            assert torch.allclose(traced(x), routed(x), atol=1e-5)

    def test_the_kernels_are_used_where_they_are_asked_for(self, routed):
        routed.routes.impl = "triton"
        self.route(routed, self.SLOTS, self.GATES)
        assert routed.routes.token is None

    def test_routes_that_are_cleared_or_restored_hold_no_token(self, routed):
        routes = routed.routes
        with routes.restored(routes.plan, routes.gates_TK):
            assert routes.token is None
        assert routes.token == [(2, 1.0), (0, -0.5), (2, 0.25)]
        routes.clear()
        assert routes.token is None
