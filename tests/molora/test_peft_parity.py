"""PEFT as the oracle: the same adapter, the same activation, the same logits, in both directions."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import molora
from molora import Adapter, MoLoRA
from molora.checkpoint import load_base
from molora.tiny import make_tiny_base

SHIPPED = Path(__file__).parents[2] / "banks" / "smollm2-demo"
TOLERANCE = 1e-4
INVOCATION = [61, 62, 63]


@contextmanager
def peft_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.inference_mode()
def peft_logits(model: Any, ids_BT: Tensor, **kwargs: Any) -> Tensor:
    with peft_noise():
        return model(input_ids=ids_BT, use_cache=False, **kwargs).logits


def close(got: Tensor, expected: Tensor) -> bool:
    """Within the tolerance, of logits that adapters make as large as tens."""
    return torch.allclose(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture
def small(make_adapter) -> Callable[..., Adapter]:
    """An adapter that changes logits by a few units: as much as a trained one, so that a tolerance means something."""
    return lambda **options: make_adapter(**{"alpha": 8, "std": 0.15, **options})


@pytest.fixture
def load(make_bank, tmp_path) -> Callable[..., MoLoRA]:
    return lambda adapters, **options: molora.load(
        make_bank(tmp_path, adapters=adapters, **options), device="cpu", dtype="float32"
    )


@pytest.fixture
def in_peft(base_model) -> Callable[..., Any]:
    def of(m: MoLoRA, architecture: str = "llama") -> Any:
        """The bank's own folders, loaded by PEFT over a fresh base."""
        base = base_model(architecture)
        with peft_noise():
            first, *rest = [entry.name for entry in m.bank.adapters]
            model = PeftModel.from_pretrained(base, m.bank.adapter_folder(first), adapter_name=first)
            for name in rest:
                model.load_adapter(m.bank.adapter_folder(name), adapter_name=name)
        return model.eval()

    return of


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "granite", "gemma2"])
def test_an_adapter_of_ours_in_peft(load, in_peft, small, random_ids, base_model, architecture):
    m = load({"x": small()}, architecture=architecture)
    ids_BT = torch.tensor([random_ids(20), random_ids(20, seed=1)])
    expected = peft_logits(in_peft(m, architecture), ids_BT)
    got, routes = m.logits(ids_BT, [0, 0], route="x")
    assert close(got, expected)
    assert not torch.allclose(got, m.model(ids_BT).logits, atol=0.1), "the adapter does something"
    assert routes == [[(("x", 1.0),)] * 20] * 2


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.2\..*down_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"self_attn.v_proj": 3, r"model\.layers\.3\.mlp\.up_proj": 40}},
    "both_patterns_rslora": {"use_rslora": True, "rank_pattern": {"o_proj": 7}, "alpha_pattern": {"o_proj": 5}},
    "some_layers": {"layers_to_transform": [1, 3]},
    "one_layer": {"layers_to_transform": 2},
    "all_layers_and_linears": {"target_modules": "all-linear"},
    "regular_expression": {"target_modules": r".*layers\.[23]\.self_attn\.(q|v)_proj"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_of_pefts_in_a_bank(base_model, make_bank, in_peft, tmp_path, random_ids, variant):
    where = {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]} | VARIANTS[variant]
    torch.manual_seed(0)
    with peft_noise():
        theirs = get_peft_model(base_model(), LoraConfig(r=4, lora_alpha=10, init_lora_weights=False, **where)).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.15)
        theirs.save_pretrained(tmp_path / "theirs")
    bank = make_bank(tmp_path, adapters={})
    entry = bank.add(tmp_path / "theirs")
    assert (entry.name, entry.activation) == ("theirs", 0)
    assert entry.routable == (0 not in bank.load_adapter("theirs").layers)
    m = molora.load(bank, device="cpu", dtype="float32")
    ids_BT = torch.tensor([random_ids(18)])
    expected = peft_logits(theirs, ids_BT)
    assert close(m.logits(ids_BT, [0], route="theirs")[0], expected)
    assert not torch.allclose(expected, m.model(ids_BT).logits, atol=0.1)
    assert close(peft_logits(in_peft(m), ids_BT), expected), "and back"


class TestInvocation:
    @pytest.fixture
    def model(self, load, small) -> MoLoRA:
        def invoked(seed: int) -> Adapter:
            adapter = small(seed=seed)
            return replace(adapter, config=replace(adapter.config, alora_invocation_tokens=INVOCATION))

        return load({"x": invoked(1), "y": invoked(2)})

    def test_the_last_occurrence_counts(self, model, in_peft, random_ids):
        head = [i for i in random_ids(12) if i not in INVOCATION]
        ids = [*head, *INVOCATION, 70, 71, *INVOCATION, 72, INVOCATION[0], 73]
        start = model.activation_start(model.render(ids), "x", "invocation")
        assert start == len(head) + 5
        got, routes = model.logits([ids], [start], route="x")
        assert close(got, peft_logits(in_peft(model), torch.tensor([ids])))
        assert routes[0] == [()] * start + [(("x", 1.0),)] * (len(ids) - start)
        first = model.logits([ids], [len(head)], route="x")[0]
        assert not torch.allclose(first, got, atol=0.01), "the first occurrence would be seen"

    def test_generate(self, model, in_peft, random_ids):
        ids = [*random_ids(12), *INVOCATION, 70]
        out = model.generate(ids, route="x", activation="invocation", max_new_tokens=8)
        peft_model = in_peft(model)
        with peft_noise():
            theirs = peft_model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=8,
                do_sample=False,
            )
        assert theirs[0].tolist() == out.token_ids

    def test_a_batch_of_base_and_two_adapters_with_left_padding(self, model, in_peft, random_ids):
        sequences = [
            [*random_ids(10), *INVOCATION, 70],
            [*random_ids(6, seed=1), *INVOCATION, 71, 72],
            [*random_ids(5, seed=2), *INVOCATION],
        ]
        wanted = ["x", "base", "y"]
        width = max(map(len, sequences))
        ids_BT = torch.tensor([[2] * (width - len(ids)) + ids for ids in sequences])
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences])
        got, _ = model.logits(ids_BT, [10, 6, 5], route=wanted, attention_mask=mask_BT)
        expected = peft_logits(
            in_peft(model),
            ids_BT,
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
            adapter_names=["x", "__base__", "y"],
        )
        for b in range(3):
            assert close(got[b][mask_BT[b].bool()], expected[b][mask_BT[b].bool()]), wanted[b]
        swapped = model.logits(ids_BT, [10, 6, 5], route=["y", "base", "x"], attention_mask=mask_BT)[0]
        assert not torch.allclose(swapped[0, -1], got[0, -1], atol=0.1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_base_lora_and_alora(load, in_peft, small, random_ids, side):
    """Each of them longer once than the others, padded on either side."""
    invoked = small(seed=1)
    invoked = replace(invoked, config=replace(invoked.config, alora_invocation_tokens=INVOCATION))
    m = load({"alora": invoked, "lora": small(seed=2, rank=6)})
    peft_model = in_peft(m)
    texts = {
        "alora": [*INVOCATION, 70, 71, *[i for i in random_ids(4) if i not in INVOCATION], *INVOCATION, 72],
        "lora": random_ids(7, seed=1),
        "base": random_ids(5, seed=2),
    }
    starts = {"alora": m.activation_start(m.render(texts["alora"]), "alora", "invocation"), "lora": 0, "base": 0}
    for longest in texts:
        wanted = {name: ([*random_ids(9, seed=3), *ids] if name == longest else ids) for name, ids in texts.items()}
        width = max(map(len, wanted.values()))
        pads = {name: [0] * (width - len(ids)) for name, ids in wanted.items()}
        at_end = side == "right"
        ids_BT = torch.tensor([[*ids, *pads[n]] if at_end else [*pads[n], *ids] for n, ids in wanted.items()])
        mask_BT = torch.tensor(
            [[1] * len(ids) + pads[n] if at_end else pads[n] + [1] * len(ids) for n, ids in wanted.items()]
        )
        own = [starts[name] + 9 * (name == longest == "alora") for name in wanted]
        got, _ = m.logits(ids_BT, own, route=list(wanted), attention_mask=mask_BT)
        expected = peft_logits(
            peft_model,
            ids_BT,
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
            adapter_names=["alora", "lora", "__base__"],
        )
        assert close(got[mask_BT.bool()], expected[mask_BT.bool()]), longest
        without = m.model(ids_BT, attention_mask=mask_BT, position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0)).logits
        for row in (0, 1):
            assert not torch.allclose(got[row][mask_BT[row].bool()], without[row][mask_BT[row].bool()], atol=0.1)


def test_a_batch_of_base_and_two_plain_adapters_with_left_padding(load, in_peft, small, random_ids):
    m = load({"x": small(seed=1), "y": small(seed=2, rank=6)})
    ids_BT = torch.tensor([random_ids(12), [2] * 5 + random_ids(7, seed=1), [2] * 2 + random_ids(10, seed=2)])
    mask_BT = torch.tensor([[1] * 12, [0] * 5 + [1] * 7, [0] * 2 + [1] * 10])
    got, _ = m.logits(ids_BT, [0, 0, 0], route=["y", "x", "base"], attention_mask=mask_BT)
    expected = peft_logits(
        in_peft(m),
        ids_BT,
        attention_mask=mask_BT,
        position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
        adapter_names=["y", "x", "__base__"],
    )
    assert close(got[mask_BT.bool()], expected[mask_BT.bool()])


def test_an_adapter_below_the_router_layer(load, in_peft, small, random_ids):
    m = load({"low": small(seed=1, first_layer=0), "high": small(seed=2)})
    assert [entry.routable for entry in m.bank.adapters] == [False, True]
    ids_BT = torch.tensor([random_ids(16), random_ids(16, seed=1), random_ids(16, seed=2)])
    got, _ = m.logits(ids_BT, [0, 0, 0], route=["low", "high", "base"])
    expected = peft_logits(in_peft(m), ids_BT, adapter_names=["low", "high", "__base__"])
    assert close(got, expected)
    # Activated later, its tokens before the start are the base's below the router layer as well.
    late, _ = m.logits(ids_BT[:1], [9], route="low")
    assert torch.equal(late[:, :9], m.model(ids_BT[:1]).logits[:, :9])
    assert not torch.allclose(late[:, 9:], got[:1, 9:], atol=0.01)
    out = m.generate(random_ids(16), route="low", activation=9, max_new_tokens=6)
    full, _ = m.logits([out.token_ids], [9], route="low")
    assert full[0, 15:-1].argmax(-1).tolist() == out.generated_ids


def test_an_adapter_below_the_router_layer_cannot_be_routable(make_bank, small, tmp_path):
    bank = make_bank(tmp_path, adapters={})
    folder: Path = tmp_path / "low"
    small(first_layer=0).write(folder)
    with pytest.raises(ValueError, match="acts in layer 0, below the router layer 1"):
        bank.add(folder, routable=True)
    assert bank.add(folder).routable is False


def test_a_blend_is_the_sum_of_both_deltas(load, small):
    m = load({"x": small(seed=1), "y": small(seed=2, rank=6)})
    weights = {"x": 0.75, "y": -0.5}
    path = "model.layers.2.mlp.down_proj"
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_module, args, output):
        inputs.append(args[0].double())
        outputs.append(output.double())

    linear = m.decoder.linears[path]
    handle = linear.register_forward_hook(note)
    m.logits([list(range(3, 20))], [6], route=weights)
    handle.remove()
    (x,), (got,) = inputs, outputs
    expected = x @ linear.weight.double().T
    for name, weight in weights.items():
        pair = m.bank.load_adapter(name).weights[path]
        delta = x @ pair.a_RI.double().T @ pair.b_OR.double().T
        expected[:, 6:] += weight * pair.scaling * delta[:, 6:]
    assert torch.allclose(got, expected, atol=1e-5)
    assert (got - x @ linear.weight.double().T)[:, 6:].abs().mean() > 0.1


@pytest.fixture(scope="module")
def like_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of the shipped bank's shape."""
    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    return make_tiny_base(tmp_path_factory.mktemp("demo") / "base", seed=0, **shape, **heads)


def test_the_shipped_adapters_in_peft(like_the_demo: Path, random_ids: Callable[..., list[int]]) -> None:
    with pytest.warns(UserWarning, match="was trained on"):
        m = molora.load(SHIPPED, base=str(like_the_demo), device="cpu", dtype="float32")
    base, _ = load_base(like_the_demo, device="cpu", dtype="float32")
    first, *rest = [entry.name for entry in m.bank.adapters]
    with peft_noise():
        model = PeftModel.from_pretrained(base, m.bank.adapter_folder(first), adapter_name=first).eval()
        for name in rest:
            model.load_adapter(m.bank.adapter_folder(name), adapter_name=name)
    for entry in m.bank.adapters:
        invocation = m.bank.load_adapter(entry.name).config.alora_invocation_tokens
        assert invocation
        ids = [*random_ids(9), *invocation, *random_ids(12, seed=1)]
        model.set_adapter(entry.name)
        got, _ = m.logits([ids], [9], route=entry.name)
        assert close(got, peft_logits(model, torch.tensor([ids]))), entry.name
        assert not torch.allclose(got, m.logits([ids], [9], route="base")[0], atol=0.1), "it does something"
