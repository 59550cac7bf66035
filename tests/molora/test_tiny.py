import pytest
import torch
from transformers import AutoTokenizer

from molora.checkpoint import load_base
from molora.digest import base_digest
from molora.tiny import ARCHITECTURES, make_tiny_base


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_loads_and_runs(tmp_path, architecture):
    folder = make_tiny_base(tmp_path / "base", seed=0, architecture=architecture)
    model, tokenizer = load_base(folder, device="cpu")
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (4, 64, 512)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    ids = torch.tensor([tokenizer("hello").input_ids])
    logits = model(ids).logits
    assert logits.shape == (1, 5, 512)
    assert logits.isfinite().all()
    assert logits.std() > 0.1


def test_seed_decides_the_weights_and_the_global_generator_is_left_alone(tmp_path):
    before = torch.get_rng_state()
    digests = [base_digest(make_tiny_base(tmp_path / str(i), seed=seed)) for i, seed in enumerate([0, 0, 1])]
    assert torch.equal(torch.get_rng_state(), before)
    assert digests[0] == digests[1] != digests[2]


def test_overrides_reach_the_config_and_unknown_names_are_errors(tmp_path):
    folder = make_tiny_base(tmp_path / "base", seed=0, architecture="mistral", sliding_window=8, num_hidden_layers=2)
    config = load_base(folder, device="cpu")[0].config
    assert (config.sliding_window, config.num_hidden_layers) == (8, 2)
    with pytest.raises(ValueError, match="no field 'num_layers'"):
        make_tiny_base(tmp_path / "other", seed=0, num_layers=2)
    with pytest.raises(ValueError, match="unknown architecture 'gpt5': expected one of llama"):
        make_tiny_base(tmp_path / "other", seed=0, architecture="gpt5")
    assert not (tmp_path / "other").exists()


def test_tokenizer_is_reversible_and_speaks_chatml(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_base(tmp_path / "base", seed=0))
    text = "Héllo  wörld, don't! 你好\n\t"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(rendered).input_ids.count(1) == 3
