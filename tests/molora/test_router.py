import math

import pytest
import torch

from molora import KeyRouter, RouterConfig, TokenRangeRouter
from molora.router import choose

LOGITS_TC = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 5.0], [0.0, 4.0, 4.0], [2.0, 2.0, 2.0]])
RANGES = ((10, 20, "x"), (30, 31, "y"), (20, 25, "y"))


class TestHard:
    def test_the_largest_score_at_gate_one_and_ties_go_to_the_lowest_column(self):
        for straight_through in (False, True):
            decision = choose(LOGITS_TC, RouterConfig(), straight_through=straight_through)
            assert decision.columns_TK.tolist() == [[1], [0], [1], [0]]
            assert torch.equal(decision.gates_TK, torch.ones(4, 1)), "exactly 1"
            assert decision.gates_TK.dtype == torch.float32
            assert decision.logits_TC is LOGITS_TC

    def test_straight_through_gates_are_one_for_any_scores(self):
        logits_TC = torch.randn(4096, 5) * 3
        assert torch.equal(choose(logits_TC, RouterConfig(), straight_through=True).gates_TK, torch.ones(4096, 1))

    def test_straight_through_carries_the_gradient_of_the_probability(self):
        logits_TC = LOGITS_TC.clone().requires_grad_()
        weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
        config = RouterConfig(temperature=2.0)
        (choose(logits_TC, config, straight_through=True).gates_TK[:, 0] * weights).sum().backward()
        got = logits_TC.grad
        logits_TC.grad = None
        probs_TC = (logits_TC / 2.0).softmax(-1)
        (probs_TC[torch.arange(4), [1, 0, 1, 0]] * weights).sum().backward()
        assert torch.allclose(got, logits_TC.grad)
        assert got.abs().sum() > 0

    def test_a_router_in_training_is_straight_through(self, key_router):
        router = key_router()
        h_TH = torch.randn(20, 64)
        quiet = router(h_TH)
        assert not quiet.gates_TK.requires_grad
        trained = router.train()(h_TH)
        assert trained.gates_TK.requires_grad
        assert torch.equal(trained.gates_TK, quiet.gates_TK)
        assert torch.equal(trained.columns_TK, quiet.columns_TK)


class TestSoft:
    def test_gates_are_probabilities_of_all_columns_and_not_renormalized(self):
        decision = choose(LOGITS_TC, RouterConfig(gate="soft", top_k=2))
        assert decision.columns_TK.tolist() == [[1, 2], [0, 2], [1, 2], [0, 1]]
        total = math.exp(1) + math.exp(3) + math.exp(2)
        assert decision.gates_TK[0].tolist() == pytest.approx([math.exp(3) / total, math.exp(2) / total])
        assert decision.gates_TK[3].tolist() == pytest.approx([1 / 3, 1 / 3])

    def test_the_temperature_changes_gates_and_never_the_order(self):
        warm, cold = (choose(LOGITS_TC, RouterConfig(gate="soft", top_k=3, temperature=t)) for t in (10.0, 0.1))
        assert torch.equal(warm.columns_TK, cold.columns_TK)
        assert warm.gates_TK[0].tolist() == pytest.approx((LOGITS_TC[0] / 10).softmax(-1)[[1, 2, 0]].tolist())
        assert cold.gates_TK[0, 0] > 0.99

    def test_small_gates_are_left_out_but_for_the_largest(self):
        plain = choose(LOGITS_TC, RouterConfig(gate="soft", top_k=3))
        for least in (0.1, 0.3, 0.5, 1.0):
            decision = choose(LOGITS_TC, RouterConfig(gate="soft", top_k=3, min_gate=least))
            kept_TK = plain.gates_TK >= least
            kept_TK[:, 0] = True
            assert torch.equal(decision.gates_TK, plain.gates_TK * kept_TK)
            assert torch.equal(decision.columns_TK, plain.columns_TK * kept_TK)
            assert torch.equal(decision.logits_TC, plain.logits_TC)
        assert (decision.gates_TK > 0).sum(-1).tolist() == [1, 1, 1, 1]

    def test_more_than_all_columns_is_all_columns(self):
        decision = choose(LOGITS_TC, RouterConfig(gate="soft", top_k=8))
        assert decision.columns_TK.shape == (4, 3)
        assert torch.allclose(decision.gates_TK.sum(-1), torch.ones(4))


class TestKeyRouter:
    def test_the_formula(self, key_router):
        router, h_TH = key_router(), torch.randn(7, 64)
        normed = h_TH.double() / (h_TH.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        hidden = torch.nn.functional.gelu(normed @ router.hidden.weight.double().T)
        expected = hidden @ router.query.weight.double().T @ router.keys_CD.double().T / 4
        assert torch.allclose(router.scores(h_TH).double(), expected, atol=1e-5)

    def test_scores_are_float32_under_autocast_and_for_bfloat16(self, key_router):
        router, h_TH = key_router(), torch.randn(7, 64).bfloat16()
        scores = router.scores(h_TH)
        assert scores.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router.scores(h_TH), scores)

    def test_a_cast_moves_it_and_leaves_its_bits(self, key_router):
        router = key_router()
        before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
        for cast in (router.bfloat16, router.half, torch.nn.Sequential(router).double):
            cast()
            for name, tensor in router.state_dict().items():
                assert tensor.dtype is torch.float32
                assert torch.equal(tensor, before[name])
        assert router.to("meta", torch.bfloat16).keys_CD.device.type == "meta"

    def test_columns_come_and_go_and_other_scores_stay(self, key_router):
        router, h_TH = key_router(), torch.randn(7, 64)
        scores = router.scores(h_TH)
        router.append_key(torch.ones(16))
        assert torch.allclose(router.scores(h_TH)[:, :3], scores, atol=1e-6)
        router.remove_column(1)
        assert torch.allclose(router.scores(h_TH)[:, :2], scores[:, [0, 2]], atol=1e-6)
        for column in (0, 3, -1):
            with pytest.raises(ValueError, match=f"column {column} is no adapter's; expected 1 to 2"):
                router.remove_column(column)

    def test_the_digest_is_of_weights_and_configuration(self, key_router):
        configs = [RouterConfig(hidden_dim=32, key_dim=16, **change) for change in ({}, {"temperature": 2.0})]
        soft = RouterConfig(gate="soft", top_k=2, hidden_dim=32, key_dim=16)
        sparse = RouterConfig(gate="soft", top_k=2, min_gate=0.1, hidden_dim=32, key_dim=16)
        routers = [*map(key_router, configs), key_router(soft), key_router(sparse), key_router(seed=1)]
        assert len({router.digest for router in routers}) == 5
        assert "min_gate" not in soft.to_json()
        assert RouterConfig.from_json(sparse.to_json()) == sparse
        assert key_router().digest == routers[0].digest


class TestTokenRanges:
    @pytest.fixture
    def router(self) -> TokenRangeRouter:
        return TokenRangeRouter(RouterConfig(kind="token_ranges", ranges=RANGES), ["y", "x"])

    def test_ids_are_routed_by_their_range(self, router):
        ids = torch.tensor([0, 9, 10, 19, 20, 24, 25, 29, 30, 31, 999])
        decision = router(torch.zeros(11, 4), ids)
        assert decision.columns_TK[:, 0].tolist() == [0, 0, 2, 2, 1, 1, 0, 0, 1, 0, 0]
        assert torch.equal(decision.gates_TK, torch.ones(11, 1))
        assert decision.logits_TC is None
        assert router.num_columns == 3

    def test_it_needs_token_ids(self, router):
        with pytest.raises(ValueError, match="needs token ids: call the model with input_ids"):
            router(torch.zeros(1, 4), None)

    def test_a_range_for_an_unknown_adapter(self):
        with pytest.raises(ValueError, match=r"ranges name \['y'\], but the routable adapters are \['x'\]"):
            TokenRangeRouter(RouterConfig(kind="token_ranges", ranges=RANGES), ["x"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dice"}, "kind 'dice' is unknown"),
        ({"gate": "firm"}, "gate 'firm' is unknown"),
        ({"top_k": 2}, "top_k=2 with gate='hard': hard gates are top-1"),
        ({"top_k": 0, "gate": "soft"}, "top_k is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"min_gate": 0.1}, "min_gate=0.1 with gate='hard'"),
        ({"min_gate": 1.5, "gate": "soft"}, "min_gate is 1.5; expected a number from 0 to 1"),
        ({"min_gate": float("nan"), "gate": "soft"}, "min_gate is nan"),
        ({"key_dim": 0}, "key_dim is 0; expected a whole number from 1 on"),
        ({"ranges": RANGES}, "'ranges' belongs to kind='token_ranges'"),
        ({"kind": "token_ranges"}, "needs at least one range"),
        ({"kind": "token_ranges", "ranges": ((5, 5, "x"),)}, r"range \[5, 5\) of 'x' is empty"),
        ({"kind": "token_ranges", "ranges": ((5, 9, "x"), (8, 10, "y"))}, r"range \[8, 10\) of 'y' .* overlaps"),
        ({"kind": "token_ranges", "ranges": ((-1, 9, "x"),)}, r"range \[-1, 9\) of 'x' is not of token ids"),
        ({"kind": "token_ranges", "ranges": RANGES, "gate": "soft"}, "no scores to make soft gates of"),
    ],
)
def test_configurations_that_are_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**fields)


def test_a_configuration_survives_json():
    config = RouterConfig(kind="token_ranges", ranges=RANGES)
    assert RouterConfig.from_json({**config.to_json(), "ranges": [list(each) for each in RANGES]}) == config
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        RouterConfig.from_json({"colour": "red"})
    assert isinstance(KeyRouter(RouterConfig(), 8, 2).digest, str)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_dim": 1 << 60}, "hidden_dim is"),
        ({"hidden_dim": True}, "hidden_dim is True"),
        ({"key_dim": 1.5}, "key_dim is 1.5"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"kind": "token_ranges", "ranges": ((0, float("inf"), "x"),)}, "not of token ids"),
        ({"kind": "token_ranges", "ranges": ((0, 10**30, "x"),)}, "not of token ids"),
    ],
)
def test_sizes_that_no_router_has(fields, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.double(), "expected torch.float32"),
        (lambda tensor: tensor.to(torch.complex64), "expected torch.float32"),
        (lambda tensor: tensor * float("nan"), "infinite or not a number"),
    ],
)
def test_weights_that_no_router_has(change, message):
    config = RouterConfig(hidden_dim=4, key_dim=2)
    tensors = KeyRouter(config, 8, 3).tensors()
    with pytest.raises(RuntimeError, match=message):
        KeyRouter.from_tensors(config, {name: change(tensor) for name, tensor in tensors.items()})
