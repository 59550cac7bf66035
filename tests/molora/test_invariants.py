"""The five invariants of DESIGN.md, on the whole path."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import molora_kernels
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from molora import MoLoRA, RouterConfig
from molora import linear as linear_module
from molora import routing as routing_module
from molora.injection import cache_argument
from molora.router import KeyRouter
from molora.routing import RouteRequest
from molora.serving.block_manager import BlockManager

ARCHITECTURES = ("llama", "qwen3", "mistral")
SOFT = RouterConfig(gate="soft", top_k=2, hidden_dim=32, key_dim=16)
SPARSE = RouterConfig(gate="soft", top_k=3, min_gate=0.3, hidden_dim=32, key_dim=16)
LORA = RouterConfig(hidden_dim=32, key_dim=16, lora_rank=4, lora_alpha=32.0)
RANGES = RouterConfig(kind="token_ranges", ranges=((3, 90, "x"), (90, 170, "y")))
BLEND = {"x": 0.5, "y": 0.25}


@contextmanager
def counting_rows(m: MoLoRA) -> Iterator[list[int]]:
    """The rows that enter layer 0, one count for each forward."""
    counts: list[int] = []
    layer = m.model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[0] * args[0].shape[1]))
    try:
        yield counts
    finally:
        handle.remove()


def padded(sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Sequences of unequal length as ids [B, T] and their attention mask."""
    width = max(map(len, sequences))
    rows, masks = [], []
    for ids in sequences:
        blank = [2] * (width - len(ids))
        mask = [0] * len(blank), [1] * len(ids)
        rows.append(blank + ids if side == "left" else ids + blank)
        masks.append([*mask[0], *mask[1]] if side == "left" else [*mask[1], *mask[0]])
    return torch.tensor(rows), torch.tensor(masks)


def names(routes: list) -> list[list[str]]:
    return [[name for name, _ in route] for route in routes]


@torch.inference_mode()
def keys_values(model, ids_BT: Tensor, mask_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    cache = DynamicCache()
    positions = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    model(ids_BT, attention_mask=mask_BT, position_ids=positions, use_cache=True, **{cache_argument(model): cache})
    return [(layer.keys, layer.values) for layer in cache.layers]


class TestBaseBeforeActivation:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_keys_and_values_are_the_bases_to_the_bit(self, load_model, base_model, random_ids, architecture, side):
        m, base = load_model(architecture), base_model(architecture)
        sequences = [random_ids(23, seed=1), random_ids(17, seed=2), random_ids(20, seed=3)]
        starts = [11, 0, 20]
        ids_BT, mask_BT = padded(sequences, side)
        expected = keys_values(base, ids_BT, mask_BT)
        for route in ("auto", "x", BLEND):
            with m.routing(starts, route):
                got = keys_values(m.model, ids_BT, mask_BT)
            for layer, (pair, base_pair) in enumerate(zip(got, expected, strict=True)):
                for tensor, base_tensor in zip(pair, base_pair, strict=True):
                    for b, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
                        first = ids_BT.shape[1] - len(ids) if side == "left" else 0
                        before, after = slice(first, first + start), slice(first + start, first + len(ids))
                        assert torch.equal(tensor[b, :, before], base_tensor[b, :, before]), (route, layer, b)
                        # Layer 0 is the base's, and the keys of the router layer are written by adapters already.
                        if layer >= 1 and start < len(ids):
                            assert not torch.equal(tensor[b, :, after], base_tensor[b, :, after]), (route, layer, b)

    def test_a_router_that_runs_changes_nothing_before_the_start(self, m, base_model, random_ids):
        ids = random_ids(30)
        logits, _ = m.logits([ids], [18])
        base = base_model()(torch.tensor([ids]), use_cache=False).logits
        assert torch.equal(logits[:, :18], base[:, :18])
        assert not torch.allclose(logits[:, 18:], base[:, 18:], atol=0.1)

    def test_a_routers_own_lora_acts_below_its_layer_on_what_it_routes(self, load_model, base_model, random_ids):
        """Beside a base model whose layer 0 has it merged; float32, so the products' order shows."""
        m, base, merged = load_model(router=LORA), base_model(), base_model()
        for path, weights in m.decoder.prepares.items():
            merged.get_submodule(path).weight.data += weights.scaling * weights.b_OR @ weights.a_RI
        assert m.decoder.prepares
        ids, start = torch.tensor([random_ids(30)]), 12
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        for first, expected in ((0, merged), (start, base)):
            request = RouteRequest(torch.tensor([[first]]), auto=everywhere)
            with torch.no_grad():
                wanted = expected.model(ids, use_cache=False, output_hidden_states=True).hidden_states[1]
                got = m.decoder.router_input(request, input_ids=ids, use_cache=False)
            upto = start if first else None
            torch.testing.assert_close(got[:, :upto], wanted[:, :upto], rtol=1e-4, atol=1e-2)
        assert not torch.allclose(got[:, start:], wanted[:, start:], atol=1e-1)
        for route in ("x", "base"):  # it is the router's alone
            assert torch.equal(m.logits(ids, [0], route)[0], load_model().logits(ids, [0], route)[0])


class TestPurity:
    def test_the_routes_are_worth_testing(self, m, random_ids):
        """Purity of a router that always answers the same would show nothing."""
        _, routes = m.logits([random_ids(60)], [10])
        assert names(routes[0])[:10] == [[]] * 10
        assert {tuple(names) for names in names(routes[0])[10:]} == {(), ("x",), ("y",)}

    @pytest.mark.parametrize(
        "router",
        [RouterConfig(hidden_dim=32, key_dim=16), SOFT, SPARSE, RANGES, LORA],
        ids=["hard", "soft", "sparse", "ranges", "lora"],
    )
    def test_batch_neighbours_and_padding_do_not_change_a_route(self, load_model, random_ids, router):
        m = load_model(router=router)
        sequences = [random_ids(31, seed=4), random_ids(24, seed=5), random_ids(12, seed=6)]
        starts = [9, 0, 7]
        alone = [m.logits([ids], [start]) for ids, start in zip(sequences, starts, strict=True)]
        for side in ("left", "right"):
            ids_BT, mask_BT = padded(sequences, side)
            logits, routes = m.logits(ids_BT, starts, attention_mask=mask_BT)
            for b, ids in enumerate(sequences):
                first = ids_BT.shape[1] - len(ids) if side == "left" else 0
                here = slice(first, first + len(ids))
                assert names(routes[b][here]) == names(alone[b][1][0]), (side, b)
                gates = [gate for route in routes[b][here] for _, gate in route]
                assert gates == pytest.approx([gate for route in alone[b][1][0] for _, gate in route], abs=1e-5)
                assert torch.allclose(logits[b, here], alone[b][0][0], atol=1e-3), (side, b)
                blank = [*routes[b][:first], *routes[b][first + len(ids) :]]
                assert blank == [()] * (ids_BT.shape[1] - len(ids)), "padding is never active"

    def test_a_batch_may_mix_the_router_base_an_adapter_and_a_blend(self, m, random_ids):
        wanted = ["auto", "base", "y", BLEND]
        sequences = [random_ids(20, seed=seed) for seed in range(4)]
        logits, routes = m.logits(sequences, [5] * 4, route=wanted)
        for b, route in enumerate(wanted):
            alone, alone_routes = m.logits([sequences[b]], [5], route=route)
            assert routes[b] == alone_routes[0]
            assert torch.allclose(logits[b], alone[0], atol=1e-3)
        assert routes[1] == [()] * 20
        assert routes[3][5:] == [(("x", 0.5), ("y", 0.25))] * 15

    @pytest.mark.parametrize(
        "router", [RouterConfig(hidden_dim=32, key_dim=16), RANGES, LORA], ids=["keys", "ranges", "lora"]
    )
    @pytest.mark.parametrize("cut", [1, 8, 13, 29])
    def test_chunks_do_not_change_a_route(self, load_model, random_ids, router, cut):
        m = load_model(router=router)
        ids, start = torch.tensor([random_ids(30, seed=7)]), 12
        whole, routes = m.logits(ids, [start])
        cache, got, slots = DynamicCache(), [], []
        with torch.inference_mode(), m.routing([start]):
            for chunk in (ids[:, :cut], ids[:, cut:]):
                got.append(m.model(chunk, use_cache=True, **{cache_argument(m.model): cache}).logits)
                slots += m.decoder.routes.record.slots[0, :, 0].tolist()
        assert [["xy"[slot]] if slot >= 0 else [] for slot in slots] == names(routes[0])
        assert torch.allclose(torch.cat(got, 1), whole, atol=1e-3)

    def test_reused_tokens_report_the_routes_they_took(self, m, random_ids):
        first = m.generate(random_ids(30, seed=8), activation=6, max_new_tokens=10)
        again = m.generate([*first.token_ids, *random_ids(9, seed=9)], activation=6, max_new_tokens=10)
        assert again.num_reused_tokens == 39, "all but the last sampled token, which was never an input"
        assert again.routes[:39] == first.routes[:39]
        assert any(first.routes[6:39])
        _, routes = m.logits([again.token_ids], [6])
        assert routes[0][:-1] == again.routes[:-1]


class TestNoRecomputation:
    def check(self, m: MoLoRA, ids: list[int], **options):
        with counting_rows(m) as counts:
            out = m.generate(ids, max_new_tokens=8, **options)
        expected = out.num_prompt_tokens - out.num_reused_tokens + out.num_generated_tokens - 1
        assert sum(counts) == expected == out.num_computed_tokens
        assert counts[1:] == [1] * (out.num_generated_tokens - 1)
        assert out.num_recomputed_tokens == 0
        return out

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_a_conversation(self, load_model, random_ids, architecture):
        """A base turn, and two routed turns that are each active from their own user message."""
        m = load_model(architecture)
        base = self.check(m, random_ids(40), route="base")
        assert (base.num_reused_tokens, base.num_reencoded_tokens) == (0, 0)
        one = [*base.token_ids, *random_ids(20, seed=1)]
        routed = self.check(m, one, activation=len(base.token_ids))
        assert (routed.num_reused_tokens, routed.num_reencoded_tokens) == (len(base.token_ids) - 1, 0)
        two = [*routed.token_ids, *random_ids(15, seed=2)]
        again = self.check(m, two, activation=len(routed.token_ids))
        # The first routed turn stands before the second's start: encoded once as base, and counted.
        assert again.num_reused_tokens == len(base.token_ids)
        assert again.num_reencoded_tokens == len(routed.token_ids) - 1 - len(base.token_ids)
        three = [*again.token_ids, *random_ids(5, seed=3)]
        last = self.check(m, three, activation=len(again.token_ids))
        assert last.num_reused_tokens == len(routed.token_ids)
        assert last.num_reencoded_tokens == len(again.token_ids) - 1 - len(routed.token_ids)

    def test_an_activation_kept_throughout_encodes_nothing_twice(self, m, random_ids):
        ids, before = random_ids(30), 0
        for turn in range(4):
            out = self.check(m, ids, activation=10)
            assert (out.num_reused_tokens, out.num_reencoded_tokens) == (before, 0)
            before = len(out.token_ids) - 1
            ids = [*out.token_ids, *random_ids(6, seed=turn)]

    def test_messages_with_the_system_policy(self, m):
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
        first = self.check(m, m.render(messages).token_ids, route="x", activation=m.render(messages).starts["system"])
        more = [*messages, {"role": "assistant", "content": "hm"}, {"role": "user", "content": "and now"}]
        second = self.check(m, m.render(more).token_ids, route="x", activation=m.render(more).starts["system"])
        assert second.num_reencoded_tokens == 0
        assert second.num_reused_tokens == first.num_prompt_tokens

    def test_adapters_and_routes_share_the_base_prefix(self, m, random_ids):
        prompt = random_ids(40)
        assert self.check(m, prompt, route="x", activation=25).num_reused_tokens == 0
        for route in ("y", BLEND, "auto", "base"):
            out = self.check(m, prompt, route=route, activation=25)
            assert (out.num_reused_tokens, out.num_reencoded_tokens) == (25, 15 if route == "base" else 0), route
        same = self.check(m, prompt, route="x", activation=25)
        assert same.num_reused_tokens == 39
        # From another start only the base tokens in front of both are the same.
        assert self.check(m, [*prompt[:30], *random_ids(9)], route="x", activation=20).num_reused_tokens == 20
        assert self.check(m, prompt, route={"x": 0.5}, activation=25).num_reused_tokens == 25

    def test_a_store_that_forgets_what_it_has_is_found_out(self, m, random_ids, monkeypatch):
        first = m.generate(random_ids(140), route="base", max_new_tokens=4)
        prompt = [*first.token_ids, *random_ids(5, seed=1)]
        opened = BlockManager.open
        monkeypatch.setattr(BlockManager, "open", lambda self, ids, source, keys: opened(self, ids, source, keys[:2]))
        monkeypatch.setattr(BlockManager, "_copy_what_agrees", lambda *_: None)
        assert m.generate(prompt, activation=144, max_new_tokens=1).num_recomputed_tokens == 64, "a whole block"
        assert m.engine.stats().num_recomputed_tokens == 64


class TestCachedEqualsUncached:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("route", ["auto", "y", BLEND, "base"], ids=["auto", "y", "blend", "base"])
    def test_greedy_tokens(self, load_model, random_ids, architecture, route):
        m = load_model(architecture)
        before = m.generate(random_ids(40), route="base", max_new_tokens=4)
        prompt = [*before.token_ids, *random_ids(10, seed=1)]
        start = len(before.token_ids) + 2
        out = m.generate(prompt, route=route, activation=start, max_new_tokens=16)
        assert out.num_reused_tokens == len(before.token_ids) - 1
        logits, routes = m.logits([out.token_ids], [start], route=route)
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == out.generated_ids
        assert routes[0][:-1] == out.routes[:-1]
        if route != "base":
            assert out.generated_ids != m.generate(prompt, route="base", max_new_tokens=16).generated_ids

    def test_a_start_inside_the_answer(self, m, random_ids):
        prompt = random_ids(20)
        out = m.generate(prompt, route="x", activation=25, max_new_tokens=16)
        logits, _ = m.logits([out.token_ids], [25], route="x")
        assert logits[0, 19:-1].argmax(-1).tolist() == out.generated_ids
        assert out.routes == [*[()] * 25, *[(("x", 1.0),)] * 10, ()]

    def test_a_sliding_window(self, load_model, random_ids):
        m = load_model("mistral", sliding_window=8)
        first = m.generate(random_ids(30), route="base", max_new_tokens=4)
        out = m.generate([*first.token_ids, *random_ids(6)], activation=35, max_new_tokens=12)
        assert out.num_reused_tokens == 33
        logits, _ = m.logits([out.token_ids], [35])
        assert logits[0, 39:-1].argmax(-1).tolist() == out.generated_ids


class TestAnUnusedRouterCostsNothing:
    @pytest.fixture
    def nothing_may_run(self, monkeypatch) -> Callable[[], None]:
        def arm() -> None:
            def fail(*_, **__):
                raise AssertionError("the base path asked the router, made a plan or ran an adapter")

            monkeypatch.setattr(KeyRouter, "forward", fail)
            monkeypatch.setattr(routing_module, "make_plan", fail)
            monkeypatch.setattr(linear_module, "routed_linear", fail)

        return arm

    def test_the_trap_works(self, m, nothing_may_run, random_ids):
        nothing_may_run()
        for route in ("auto", "x"):
            with pytest.raises(AssertionError, match="the base path"):
                m.logits([random_ids(5)], [0], route=route)

    def test_base_and_starts_that_are_never_reached(self, m, nothing_may_run, random_ids):
        nothing_may_run()
        ids = random_ids(12)
        m.generate(ids, route="base", max_new_tokens=4)
        m.generate(ids, route="auto", activation=99, max_new_tokens=4)
        m.generate(ids, route="x", activation=99, max_new_tokens=4)
        m.logits([ids], [12])
        m.logits([ids, ids], [12, 0], route=["x", "base"])
        ids_BT, mask_BT = padded([ids, ids[:7]], "left")
        m.logits(ids_BT, [12, 7], attention_mask=mask_BT)
        m.model(torch.tensor([ids]))
        with m.routing([0], "base"):
            m.model(torch.tensor([ids]))

    def test_the_base_prefix_of_a_routed_request_costs_nothing(self, m, monkeypatch, random_ids):
        """A start inside the answer: only the rows from it on meet the router."""
        asked: list[int] = []
        forward = KeyRouter.forward

        def count(self, h_TH, token_ids_T=None):
            asked.append(len(h_TH))
            return forward(self, h_TH, token_ids_T)

        monkeypatch.setattr(KeyRouter, "forward", count)
        m.generate(random_ids(10), activation=12, max_new_tokens=6)
        assert asked == [1] * 3
        assert molora_kernels.make_plan is routing_module.make_plan
