import pytest
import torch
from torch import nn

from molora import RouterConfig
from molora.injection import RoutedDecoder, find_layers, find_linear
from molora.linear import RoutedLinear
from molora.tiny import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_are_found_in_any_architecture(base_model, architecture):
    model = base_model(architecture)
    assert find_layers(model) is model.get_decoder().layers


def test_layers_are_found_again_after_injection(m):
    layers = find_layers(m.model)
    assert layers is m.model.get_decoder().layers
    assert layers[1] is m.decoder.routing_layer


def test_a_model_without_checkpointable_layers(base_model):
    model = base_model()
    model.model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no list of 4 checkpointable decoder layers"):
        find_layers(model)


def test_linears_by_path(base_model):
    model = base_model()
    assert find_linear(model, "model.layers.0.mlp.up_proj").out_features == 128
    with pytest.raises(ValueError, match=r"has no module 'model\.layers\.0\.nope'; this adapter is for another base"):
        find_linear(model, "model.layers.0.nope")
    with pytest.raises(ValueError, match=r"is a LlamaMLP; only nn\.Linear layers can be adapted"):
        find_linear(model, "model.layers.0.mlp")


class TestDecoder:
    @pytest.fixture
    def decoder(self, base_model, make_adapter) -> RoutedDecoder:
        modules = list(make_adapter().weights)
        decoder = RoutedDecoder(base_model(), modules, num_slots=2, max_rank=8, router_layer=1)
        decoder.set_adapter(0, make_adapter(seed=1))
        return decoder

    def test_only_the_linears_that_adapters_need_are_replaced(self, decoder, make_adapter):
        routed = {name for name, module in decoder.model.named_modules() if isinstance(module, RoutedLinear)}
        assert {name.replace(".layer.", ".") for name in routed} == set(make_adapter().weights)
        assert not decoder.acts_early

    def test_an_adapter_that_does_not_fit_changes_nothing(self, decoder, make_adapter):
        linear = decoder.linears["model.layers.1.self_attn.q_proj"]
        before = linear.lora_a_ERI.clone()
        with pytest.raises(ValueError, match="the adapter has rank 9, over the slots' maximum of 8"):
            decoder.set_adapter(0, make_adapter(rank=9))
        with pytest.raises(ValueError, match=r"acts on 'model\.layers\.0\..*', which has no adapter slots"):
            decoder.set_adapter(0, make_adapter(first_layer=0))
        assert torch.equal(linear.lora_a_ERI, before)
        decoder.set_adapter(0, make_adapter(seed=2, ends=("k_proj",)))
        assert linear.lora_a_ERI.abs().sum() == 0, "a module that the new adapter leaves alone is emptied"
        decoder.set_adapter(0, None)
        assert all(each.lora_b_EOR.abs().sum() == 0 for each in decoder.linears.values())

    def test_a_router_that_does_not_fit(self, base_model, key_router):
        options = {"num_slots": 2, "max_rank": 8, "router_layer": 1, "router": key_router()}
        with pytest.raises(ValueError, match="the router has 3 columns; base and the routable adapters are 2"):
            RoutedDecoder(base_model(), [], column_slots=[0], **options)
        with pytest.raises(ValueError, match="reads hidden states of size 64; the base model's are 32"):
            RoutedDecoder(base_model(hidden_size=32), [], column_slots=[0, 1], **options)

    def test_what_enters_the_router_layer_is_the_bases(self, load_model, base_model, random_ids):
        m, base = load_model(), base_model()
        ids = torch.tensor([random_ids(9)])
        hidden_states = base(ids, output_hidden_states=True).hidden_states
        assert torch.equal(m.decoder.router_input(input_ids=ids), hidden_states[1])
        with m.routing([0], "x"):
            m.decoder.router_input(input_ids=ids)
            assert m.decoder.routes.request is not None, "the request around it is still there"
        assert m.model(ids).logits.shape == (1, 9, 259)

    def test_loading_an_adapter_moves_no_pointer(self, decoder, make_adapter):
        before = [p.data_ptr() for p in decoder.model.parameters()]
        decoder.set_adapter(1, make_adapter(seed=4))
        assert [p.data_ptr() for p in decoder.model.parameters()] == before


def test_attributes_of_a_wrapped_layer_are_its_own(load_model):
    m = load_model("gemma2")
    assert m.decoder.routing_layer.self_attn is m.decoder.routing_layer.layer.self_attn
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = m.decoder.routing_layer.no_such_attribute


def test_a_tapped_embedding_is_still_an_embedding(load_model, base_model):
    m = load_model(router=RouterConfig(kind="token_ranges", ranges=((3, 90, "x"), (90, 170, "y"))))
    assert torch.equal(m.model.get_input_embeddings().weight, base_model().get_input_embeddings().weight)


def test_layers_with_recurrent_state_are_refused_by_kind() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="conv"):
        find_layers(transformers.Lfm2ForCausalLM(config))
