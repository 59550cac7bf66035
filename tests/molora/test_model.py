"""`molora.load` and the Python API: what it accepts, what it refuses before any work starts."""

import math
from dataclasses import replace

import pytest
import torch

import molora
from molora import Bank, RouterConfig
from molora.serving.engine import EngineError
from molora.tiny import make_tiny_base

USER = [{"role": "user", "content": "Hello there"}]
CHAT = [{"role": "system", "content": "s"}, *USER, {"role": "assistant", "content": "hm"}, *USER]


@pytest.fixture
def no_forward(m, monkeypatch) -> None:
    """Any forward of the model is a failure."""

    def fail(*_, **__):
        raise AssertionError("a forward ran")

    monkeypatch.setattr(m.model, "forward", fail)


def test_a_batch_needs_a_start_for_each_sequence(m):
    ids = torch.tensor([[5, 6], [7, 8]])
    with (
        m.routing([0], "x"),
        pytest.raises(ValueError, match="2 sequences, but activation starts and routes were given"),
    ):
        m.model(ids)


def test_each_beam_and_returned_sequence_needs_its_start(m):
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with m.routing([0], "x"):
        expected = m.model.generate(ids, **options)
    with m.routing([0] * 2, "x"):
        beams = m.model.generate(ids, num_beams=2, num_return_sequences=2, **options)
        logits = m.model(beams).logits.log_softmax(-1)
    assert beams.shape == (2, 7)

    def score(ids, logits):
        return logits[2:-1].gather(-1, ids[3:, None]).sum()

    with m.routing([0], "x"):
        greedy = m.model(expected).logits.log_softmax(-1)
    assert score(beams[0], logits[0]) >= score(expected[0], greedy[0]) - 1e-4  # as a routed search finds, or better


@pytest.mark.parametrize("seed", [-1, 0, (1 << 64) - 1])
def test_any_seed_of_64_bits_repeats_a_draw(m, seed):
    first, second = (m.generate(USER, temperature=1.0, seed=seed, max_new_tokens=8) for _ in range(2))
    assert first.generated_ids == second.generated_ids


def test_an_answer_without_a_given_length_ends_where_the_context_is_full(m):
    out = m.generate("x" * 1021, activation=0)
    assert (out.num_generated_tokens, out.finish_reason) == (3, "length")


@pytest.mark.usefixtures("no_forward")
class TestBadInput:
    def test_the_trap_works(self, m):
        with pytest.raises(EngineError, match="a forward ran"):
            m.generate(USER)

    @pytest.mark.parametrize(
        ("prompt", "options", "message"),
        [
            ([], {}, "the message list is empty"),
            ("", {}, "the prompt is empty"),
            ([{"role": "user"}], {}, "message 0"),
            (USER, {"route": "z"}, "has no adapter 'z'; its adapters are: x, y"),
            (USER, {"route": {"x": 0.5, "z": 0.5}}, "has no adapter 'z'; its adapters are: x, y"),
            (USER, {"route": {}}, r"route \{\} is unknown; expected 'auto', 'base', an adapter's name"),
            (USER, {"route": None}, "route None is unknown"),
            (
                USER,
                {"route": {"x": math.nan}},
                r"route \{'x': nan\} has a weight beyond 1e\+06, or one that is no number",
            ),
            (USER, {"route": {"x": math.inf}}, r"has a weight beyond 1e\+06, or one that is no number"),
            (USER, {"route": {"x": "1"}}, r"route \{'x': '1'\} has a weight beyond"),
            (USER, {"route": {"x": None}}, "or one that is no number"),
            (None, {}, "the prompt is None; expected messages such as"),
            (USER[0], {}, "the prompt is .*; expected messages such as"),
            ([{"role": "usr", "content": "a"}], {}, "one of role 'user' among them"),
            (USER, {"temperature": "1"}, "temperature is '1'; expected a number"),
            (USER, {"top_p": None}, "top_p is None; expected a number"),
            (USER, {"activation": "never"}, "activation 'never' is unknown"),
            (USER, {"activation": "never", "route": "base"}, "activation 'never' is unknown"),
            (USER, {"activation": -1}, "activation -1 is unknown"),
            (USER, {"activation": "invocation"}, "the router has no alora_invocation_tokens; pass an explicit"),
            (USER, {"activation": "invocation", "route": "x"}, "adapter 'x' has no alora_invocation_tokens"),
            ("text", {}, "activation 'turn' needs chat messages"),
            ("text", {"activation": "response", "route": "x"}, "activation 'response' needs chat messages"),
            (USER, {"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 or more"),
            (USER, {"temperature": -0.1}, "temperature is -0.1; expected 0"),
            (USER, {"temperature": math.nan}, "temperature is nan"),
            (USER, {"temperature": math.inf}, "temperature is inf"),
            ([5, 259], {"activation": 0}, "token ids outside the model's vocabulary of 0 to 258"),
            ([5, -1], {"activation": 0}, "token ids outside the model's vocabulary"),
            ([5, 2**31], {"activation": 0}, "token ids of more than 32 bits"),
            ([5, None], {"activation": 0}, "holds something else: None"),
            ([5, 2.0], {"activation": 0}, "holds something else: 2.0"),
            (USER, {"max_new_tokens": 2.5}, "max_new_tokens is 2.5; expected a whole number"),
            (USER, {"max_new_tokens": True}, "max_new_tokens is True; expected a whole number"),
            (USER, {"seed": 1 << 64}, "seed is 18446744073709551616; expected a whole number of 64 bits"),
            (USER, {"seed": 1.5, "temperature": 1.0}, "seed is 1.5; expected a whole number"),
            (USER, {"activation": 1 << 70}, "activation 1180591620717411303424 is unknown"),
            ([{"role": "user", "content": [{"type": "image_url", "text": "a"}]}], {}, "only text parts"),
            ([{**USER[0], "tool_calls": [1]}], {}, r"message 0 \(user\) has \['tool_calls'\]"),
            (
                "x" * 1000,
                {"activation": 0, "max_new_tokens": 25},
                "reads at most 1024 tokens; ask for 24 new ones or fewer",
            ),
            ("x" * 1024, {"activation": 0}, "reads at most 1024 tokens, answer included; shorten the conversation"),
        ],
    )
    def test_generate_and_stream(self, m, prompt, options, message):
        for call in (m.generate, m.stream):
            with pytest.raises(ValueError, match=message):
                call(prompt, **options)
        assert m.engine.stats().num_free_blocks == m.engine.stats().num_blocks
        assert m.engine.stats().num_waiting == 0

    @pytest.mark.parametrize(
        ("args", "options", "message"),
        [
            (([5, 6], [0]), {}, r"input_ids has shape \(2,\); expected \[B, T\]"),
            (([[5, 6]], []), {}, r"activation_start is \[\]; expected one index for each of 1 sequences"),
            (([[5, 6]], [0, 0]), {}, r"activation_start is \[0, 0\]"),
            (([[5, 6]], [-1]), {}, r"activation_start is \[-1\]; expected token indices of 0 or more"),
            (([[5, 6]], [0]), {"route": "z"}, "has no adapter 'z'"),
            (([[5, 6]], [0]), {"route": ["x", "y"]}, "2 routes for 1 sequences"),
            (
                ([[5, 6]], [0]),
                {"attention_mask": torch.ones(1, 3)},
                r"attention_mask has shape \(1, 3\); expected \(1, 2\)",
            ),
            (([[5] * 1025], [0]), {}, "the input has 1025 tokens; the model reads at most 1024"),
            (([[5, 6]], [0.5]), {}, "activation_start is 0.5; expected a whole number"),
            (([[5, 6]], [1 << 70]), {}, r"activation_start is \[1180591620717411303424\]"),
            (([[5.0, 6.0]], [0]), {}, "input_ids is torch.float32; expected whole numbers"),
            (([[5, 259]], [0]), {}, "token ids outside the model's vocabulary of 0 to 258"),
            (([[]], [0]), {}, r"input_ids has shape \(1, 0\)"),
        ],
    )
    def test_logits(self, m, args, options, message):
        with pytest.raises(ValueError, match=message):
            m.logits(*args, **options)

    def test_routing(self, m):
        for starts, route, message in (
            ([-1], "x", "0 or more"),
            ([0], "z", "no adapter 'z'"),
            ([0], ["x", "y"], "2 routes"),
        ):
            with pytest.raises(ValueError, match=message), m.routing(starts, route):
                pass

    def test_a_blend_whose_starts_differ(self, make_bank, make_adapter, tmp_path):
        bank = make_bank(tmp_path)
        make_adapter(seed=3).write(tmp_path / "z")
        bank.add(tmp_path / "z", activation="response")
        m = molora.load(bank, device="cpu", dtype="float32")
        with pytest.raises(ValueError, match="the blended adapters would be activated at different tokens"):
            m.generate(USER, route={"x": 0.5, "z": 0.5})
        assert m.generate(USER, route={"x": 0.5, "z": 0.5}, activation=3, max_new_tokens=1).activation_start == 3
        assert m.activation_start(m.render(USER), "z") == m.render(USER).starts["response"]
        with pytest.raises(ValueError, match="has no router, so route='auto' has nobody to ask"):
            m.generate(USER)


def test_an_invocation_that_does_not_occur(make_bank, make_adapter, tmp_path):
    adapter = make_adapter()
    replace(adapter, config=replace(adapter.config, alora_invocation_tokens=[70, 71])).write(tmp_path / "z")
    bank = make_bank(tmp_path, adapters={})
    assert bank.add(tmp_path / "z").activation == "invocation"
    m = molora.load(bank, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match=r"invocation tokens \[70, 71\] of adapter 'z' do not occur in the prompt"):
        m.generate([70, 72, 71], route="z")
    assert m.generate([70, 71, 70, 71, 70], route="z", max_new_tokens=1).activation_start == 2


class TestLoad:
    def test_the_attributes(self, make_bank, base_dir, tmp_path):
        bank = make_bank(tmp_path)
        m = molora.load(str(bank.path), device="cpu", dtype="float32")
        assert m.base_dir == base_dir()
        assert m.bank.config == bank.config
        assert m.max_context == 1024
        assert m.tokenizer.decode(m.tokenizer("hé").input_ids) == "hé"
        assert m.model.dtype == torch.float32
        assert molora.load(bank, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16

    def test_other_weights_than_the_banks_are_a_warning(self, make_bank, tmp_path):
        bank = make_bank(tmp_path)
        other = make_tiny_base(tmp_path / "other", seed=1, vocab_size=259)
        with pytest.warns(UserWarning, match="was trained on .*tiny with weights sha256:.* holds sha256:.* may differ"):
            m = molora.load(bank, base=other, device="cpu", dtype="float32")
        assert m.base_dir == other

    def test_a_base_of_another_shape_is_an_error(self, make_bank, tmp_path):
        bank = make_bank(tmp_path)
        other = make_tiny_base(tmp_path / "other", seed=0, hidden_size=32, head_dim=8)
        with (
            pytest.warns(UserWarning, match="was trained on"),
            pytest.raises(ValueError, match=r"adapter 'x': module .* this adapter is for another base model"),
        ):
            molora.load(bank, base=other, device="cpu", dtype="float32")

    def test_no_bank(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a bank"):
            molora.load(tmp_path / "nowhere")

    def test_an_empty_bank_is_the_base(self, make_bank, base_model, tmp_path, random_ids):
        m = molora.load(make_bank(tmp_path, adapters={}), device="cpu", dtype="float32")
        ids = torch.tensor([random_ids(8)])
        assert torch.equal(m.logits(ids, [0], route="base")[0], base_model()(ids, use_cache=False).logits)

    def test_a_router_layer_that_does_not_exist(self, make_bank, tmp_path):
        bank = make_bank(tmp_path, adapters={})
        info = bank.config.base
        bank = Bank.create(tmp_path / "deep", name="deep", base=info, router_layer=4, max_rank=8)
        with pytest.raises(ValueError, match="router layer 4 does not exist; the model has layers 0 to 3"):
            molora.load(bank, device="cpu", dtype="float32")


class TestGenerate:
    def test_the_banks_policies_are_the_defaults(self, m):
        starts = m.render(CHAT).starts
        assert m.generate(CHAT, max_new_tokens=1).activation_start == starts["turn"]
        assert m.generate(CHAT, max_new_tokens=1, activation="system").activation_start == starts["system"]
        assert m.generate(CHAT, max_new_tokens=1, route="x").activation_start == starts["turn"]
        assert (
            m.generate(CHAT, max_new_tokens=1, route="x", activation="response").activation_start == starts["response"]
        )
        assert m.generate(CHAT, max_new_tokens=1, route="base").activation_start is None

    def test_lengths_and_routes_of_a_result(self, m):
        for route in ("auto", "x", "base", {"x": 0.5, "y": -1.0}):
            out = m.generate(CHAT, route=route, max_new_tokens=6)
            assert len(out.token_ids) == len(out.routes) == out.num_prompt_tokens + out.num_generated_tokens
            assert tuple(out.token_ids[: out.num_prompt_tokens]) == m.render(CHAT).token_ids
            assert out.generated_ids == out.token_ids[-6:]
            assert out.generated_routes == out.routes[-7:-1]
            assert out.routes[-1] == ()
            assert out.finish_reason == "length"
            acting = {"auto": None, "x": (("x", 1.0),), "base": ()}
            expected = acting[route] if isinstance(route, str) else (("x", 0.5), ("y", -1.0))
            if expected is not None:
                assert out.generated_routes == [expected] * 6

    @pytest.mark.parametrize("activation", ["turn", "response", "system"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_policies_in_a_padded_batch(self, m, activation, side):
        conversations = [
            CHAT,
            USER,
            [{"role": "user", "content": "And a rather longer question than that, is it not?"}],
        ]
        prompts = [m.render(each) for each in conversations]
        starts = [m.activation_start(prompt, "auto", activation) for prompt in prompts]
        width = max(len(prompt.token_ids) for prompt in prompts)
        ids, mask = [], []
        for prompt in prompts:
            blank, real = [2] * (width - len(prompt.token_ids)), list(prompt.token_ids)
            ids.append(blank + real if side == "left" else real + blank)
            ones, zeros = [1] * len(real), [0] * len(blank)
            mask.append(zeros + ones if side == "left" else ones + zeros)
        logits, routes = m.logits(ids, starts, attention_mask=torch.tensor(mask))
        for b, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            here = torch.tensor(mask[b]).bool()
            alone, alone_routes = m.logits([prompt.token_ids], [start])
            assert torch.allclose(logits[b][here], alone[0], atol=1e-3)
            assert [route for route, real in zip(routes[b], mask[b], strict=True) if real] == alone_routes[0]
            assert alone_routes[0][:start] == [()] * start
            assert any(alone_routes[0][start:])

    def test_token_ranges(self, load_model, random_ids):
        ranges = ((3, 90, "x"), (90, 170, "y"))
        m = load_model(router=RouterConfig(kind="token_ranges", ranges=ranges))
        ids = random_ids(30)
        out = m.generate(ids, activation=10, max_new_tokens=8)

        def route(token: int) -> tuple[tuple[str, float], ...]:
            return tuple((name, 1.0) for low, high, name in ranges if low <= token < high)

        assert out.routes == [*[()] * 10, *[route(token) for token in out.token_ids[10:-1]], ()]
        assert {name for each in out.routes for name, _ in each} == {"x", "y"}
        logits, routes = m.logits([out.token_ids], [10])
        assert routes[0][:-1] == out.routes[:-1]
        assert logits[0, 29:-1].argmax(-1).tolist() == out.generated_ids
        # Without token ids there is nothing to route by, not even those of an earlier forward.
        embedded = m.model.get_input_embeddings()(torch.tensor([ids]))
        m.decoder.routes.token_ids = None
        m.logits([ids], [0])
        with m.routing([0]), pytest.raises(ValueError, match="needs token ids: call the model with input_ids"):
            m.model(inputs_embeds=embedded)


class TestParity:
    """Nothing active is the unmodified Hugging Face model, to the bit."""

    @pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "granite", "gemma2", "gemma3_text"])
    def test_logits(self, load_model, base_model, random_ids, architecture):
        m, base = load_model(architecture), base_model(architecture)
        ids = torch.tensor([random_ids(20), random_ids(20, seed=1)])
        with torch.inference_mode():
            expected = base(ids, use_cache=False).logits
            assert torch.equal(m.model(ids, use_cache=False).logits, expected)
        assert torch.equal(m.logits(ids, [0, 0], route="base")[0], expected)
        assert torch.equal(m.logits(ids, [20, 20])[0], expected)
        m.logits(ids, [0, 0])  # and nothing of a routed forward stays
        assert torch.equal(m.logits(ids, [0, 0], route="base")[0], expected)

    @pytest.mark.parametrize("architecture", ["llama", "gemma2"])
    def test_generate(self, load_model, base_model, random_ids, architecture):
        m, base = load_model(architecture), base_model(architecture)
        ids = torch.tensor([random_ids(12)])
        options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected = base.generate(ids, **options)
        assert torch.equal(m.model.generate(ids, **options), expected)
        assert m.generate(ids[0].tolist(), route="base", max_new_tokens=10).token_ids == expected[0].tolist()

    @pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
    def test_generate_of_transformers_in_a_left_padded_batch(self, load_model, random_ids, architecture):
        m = load_model(architecture)
        sequences = [random_ids(14), random_ids(9, seed=1), random_ids(11, seed=2), random_ids(6, seed=3)]
        starts, wanted = [4, 0, 13, 2], ["auto", "x", "auto", "base"]
        alone = [
            m.generate(ids, route=route, activation=start, max_new_tokens=8)
            for ids, start, route in zip(sequences, starts, wanted, strict=True)
        ]
        ids = torch.tensor([[2] * (14 - len(each)) + each for each in sequences])
        mask = torch.tensor([[0] * (14 - len(each)) + [1] * len(each) for each in sequences])
        with m.routing(starts, wanted):
            together = m.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        for b, out in enumerate(alone):
            assert together[b, 14 : 14 + out.num_generated_tokens].tolist() == out.generated_ids, wanted[b]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"max_sequence": 3}, r"unknown settings \['max_sequence'\]"), ({"max_sequences": 0}, "is 0")],
)
def test_wrong_settings_of_the_engine_are_errors_at_once(settings, words):
    with pytest.raises(ValueError, match=words):
        molora.load("nowhere", engine=settings)


def test_the_engine_has_the_settings_that_were_given(m):
    model = molora.load(m.bank, base=m.base_dir, device="cpu", engine={"max_sequences": 3})
    assert model.engine.config.max_sequences == 3
