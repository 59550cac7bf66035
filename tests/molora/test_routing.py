"""Routes on their way to the linears: gates, several forwards before one backward, and checkpointing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import molora
from molora import MoLoRA, RouterConfig
from molora.injection import gates_tensor, slots_tensor
from molora.routing import RouteRequest, Routes, RoutingLayer

PATH = "model.layers.2.self_attn.v_proj"


def capture(m: MoLoRA, path: str, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """Input and output of a linear in the last forward of `run`, in float64."""
    seen: list[Tensor] = []
    handle = m.decoder.linears[path].register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    run()
    handle.remove()
    return seen[-2].double(), seen[-1].double()


class TestGates:
    @pytest.mark.parametrize(
        "router",
        [
            RouterConfig(hidden_dim=32, key_dim=16),
            RouterConfig(gate="soft", top_k=1, hidden_dim=32, key_dim=16),
            RouterConfig(gate="soft", top_k=2, temperature=0.5, hidden_dim=32, key_dim=16),
            RouterConfig(gate="soft", top_k=3, hidden_dim=32, key_dim=16),
            RouterConfig(gate="soft", top_k=3, min_gate=0.3, hidden_dim=32, key_dim=16),
        ],
        ids=["hard", "soft-1", "soft-2", "soft-3", "sparse"],
    )
    def test_one_layer_against_float64(self, load_model, random_ids, router):
        m, ids, start = load_model(router=router), [random_ids(40)], 12
        results: list = []
        x_BTI, got_BTO = capture(m, PATH, lambda: results.append(m.logits(ids, [start])))
        _, routes = results[0]
        h_TH = m.decoder.router_input(input_ids=torch.tensor(ids))[0]
        logits_TC = m.decoder.router.scores(h_TH).double()
        probs_TC = (logits_TC / router.temperature).softmax(-1)
        weight = m.decoder.linears[PATH].weight.double()
        deltas = []
        for name in ("x", "y"):
            pair = m.bank.load_adapter(name).weights[PATH]
            deltas.append(pair.scaling * (x_BTI[0] @ pair.a_RI.double().T @ pair.b_OR.double().T))
        expected_TO = x_BTI[0] @ weight.T
        columns_used = set()
        for t in range(start, 40):
            chosen = logits_TC[t].argsort(descending=True)[: router.top_k].tolist()
            columns_used.update(chosen)
            chosen = [c for c in chosen if c == chosen[0] or probs_TC[t, c] >= router.min_gate]
            gates = {c: 1.0 if router.gate == "hard" else float(probs_TC[t, c]) for c in chosen}
            for column, gate in gates.items():
                if column > 0:  # base's share adds nothing
                    expected_TO[t] += gate * deltas[column - 1][t]
            acting = {"xy"[column - 1]: gate for column, gate in gates.items() if column > 0}
            assert [name for name, _ in routes[0][t]] == list(acting)
            assert dict(routes[0][t]) == pytest.approx(acting, abs=1e-5)
        assert columns_used == {0, 1, 2}
        assert torch.allclose(got_BTO[0], expected_TO, atol=1e-4)

    def test_one_plan_for_all_linears_of_a_forward(self, m, random_ids, monkeypatch):
        plans = []
        make_plan = molora.routing.make_plan
        monkeypatch.setattr(molora.routing, "make_plan", lambda *args: plans.append(args) or make_plan(*args))
        m.logits([random_ids(9)], [2])
        m.logits([random_ids(9)], [2], route="x")
        assert len(plans) == 2


class TestRequests:
    def test_a_request_needs_somebody(self):
        with pytest.raises(ValueError, match="needs the router or explicit slots; to run the base, make no request"):
            RouteRequest(torch.zeros(1, 1))
        with pytest.raises(ValueError, match="explicit slots and their gates come together"):
            RouteRequest(torch.zeros(1, 1), slots=torch.zeros(1, 1, 1, dtype=torch.int32))

    def test_starts_and_routes_may_differ_from_token_to_token(self):
        """Rows that hold several examples have a start and a route for each token."""
        layer = RoutingLayer(torch.nn.Identity(), Routes(3), None, None)
        request = RouteRequest(
            start=torch.tensor([[2, 2, 2, 1, 1, 1]]),
            slots=torch.tensor([[[0], [0], [0], [2], [2], [-1]]], dtype=torch.int32),
            gates=torch.ones(1, 6, 1),
            valid=torch.tensor([[True] * 4 + [False, True]]),
        )
        record = layer.decide(request, torch.zeros(1, 6, 8), torch.tensor([[0, 1, 2, 0, 1, 2]]))
        assert record.active.tolist() == [[False, False, True, False, False, True]]
        assert record.slots[0, :, 0].tolist() == [-1, -1, 0, -1, -1, -1]

    def test_rows_of_unequal_length_are_padded(self):
        slots = slots_tensor([[1], [], [0, 2]], torch.device("cpu"))
        assert slots.tolist() == [[[1, -1]], [[-1, -1]], [[0, 2]]]
        assert slots.dtype == torch.int32
        assert gates_tensor([[0.5], [], [1.0, 2.0]], torch.device("cpu")).tolist() == [[[0.5, 0]], [[0, 0]], [[1, 2]]]
        assert slots_tensor([[]], torch.device("cpu")).tolist() == [[[-1]]]

    def test_requests_end_with_their_block_and_may_nest(self, m, random_ids):
        ids = torch.tensor([random_ids(8)])
        with torch.inference_mode():
            base = m.model(ids).logits
            with m.routing([0], "x"):
                x = m.model(ids).logits
                with m.routing([0], "y"):
                    y = m.model(ids).logits
                assert torch.equal(m.model(ids).logits, x)
            with pytest.raises(KeyError), m.routing([0], "x"):
                raise KeyError
            assert torch.equal(m.model(ids).logits, base)
        assert not torch.allclose(x, y, atol=0.1)
        assert not torch.allclose(x, base, atol=0.1)

    def test_an_architecture_without_positions_is_refused(self):
        layer = RoutingLayer(torch.nn.Identity(), Routes(1), None, None)
        layer.routes.request = RouteRequest(torch.zeros(1, 1), auto=torch.tensor([[True]]))
        with pytest.raises(ValueError, match="does not pass position_ids to its decoder layers"):
            layer(torch.zeros(1, 2, 8))


class TestGradients:
    @pytest.fixture
    def model(self, make_bank, make_adapter, key_router, tmp_path) -> MoLoRA:
        """Adapters "x" and "y", "low" below the router layer, all trainable, straight-through routes."""
        adapters = {"x": {"seed": 1}, "y": {"seed": 2}, "low": {"seed": 3, "first_layer": 0}}
        bank = make_bank(
            tmp_path, adapters={name: make_adapter(alpha=8, **options) for name, options in adapters.items()}
        )
        bank.set_router(key_router(RouterConfig(hidden_dim=32, key_dim=16)))
        m = molora.load(bank, device="cpu", dtype="float32")
        m.model.requires_grad_(False).train()
        for linear in m.decoder.linears.values():
            linear.lora_a_ERI.requires_grad_()
            linear.lora_b_EOR.requires_grad_()
        m.decoder.router.requires_grad_()
        return m

    @staticmethod
    def parts(random_ids) -> list:
        """(ids, starts, routes) of two forwards that share no route at any token."""
        return [
            (torch.tensor([random_ids(12), random_ids(12, seed=1)]), [0, 5], ["auto", "x"]),
            (torch.tensor([random_ids(12, seed=2), random_ids(12, seed=3)]), [3, 0], ["low", "auto"]),
        ]

    @staticmethod
    def loss(m: MoLoRA, part: tuple) -> Tensor:
        ids, starts, routes = part
        with m.routing(starts, routes):
            logits = m.model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    @staticmethod
    def gradients(m: MoLoRA) -> dict[str, Tensor]:
        out = {name: p.grad.clone() for name, p in m.model.named_parameters() if p.grad is not None}
        m.model.zero_grad(set_to_none=True)
        return out

    def separately(self, m: MoLoRA, parts: list) -> dict[str, Tensor]:
        """Each forward with its own backward, without checkpointing: the gradients add up."""
        for part in parts:
            self.loss(m, part).backward()
        return self.gradients(m)

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_two_forwards_before_one_backward(self, model, random_ids, checkpointing, order):
        parts = self.parts(random_ids)
        expected = self.separately(model, parts)
        if checkpointing:
            model.decoder.enable_gradient_checkpointing()
        losses = [self.loss(model, part) for part in parts]
        for index in order:
            losses[index].backward(retain_graph=False)
        got = self.gradients(model)
        assert set(got) == set(expected)
        for name in expected:
            assert torch.allclose(got[name], expected[name], atol=1e-6, rtol=1e-4), name
        moved = {name.split(".")[2] for name, gradient in got.items() if "lora_a" in name and gradient.abs().sum() > 0}
        assert moved == {"0", "1", "2", "3"}
        assert any("keys_CD" in name for name in got), "the router learns through its gates"

    def test_a_sum_of_two_forwards_under_checkpointing(self, model, random_ids):
        parts = self.parts(random_ids)
        expected = self.separately(model, parts)
        model.decoder.enable_gradient_checkpointing()
        sum(self.loss(model, part) for part in parts).backward()
        got = self.gradients(model)
        assert all(torch.allclose(got[name], expected[name], atol=1e-6, rtol=1e-4) for name in expected)

    def test_layers_are_computed_again_under_checkpointing(self, model, random_ids):
        calls = []
        linear = model.decoder.linears["model.layers.3.mlp.up_proj"]
        linear.register_forward_pre_hook(lambda *_: calls.append(linear.routes.plan is not None))
        self.loss(model, self.parts(random_ids)[0]).backward()
        assert calls == [True]
        model.decoder.enable_gradient_checkpointing()
        self.loss(model, self.parts(random_ids)[0]).backward()
        assert calls == [True] * 3
