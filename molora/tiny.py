"""A tiny base model with random weights and a byte tokenizer: tests and demos without a download.

It knows no language. It has the shapes, files and chat format of a real one, so whatever runs on it runs on a real
base as well.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from molora.files import atomic_directory
from molora.progress import quiet_transformers

_AutoModel: Any = AutoModelForCausalLM  # transformers leaves these untyped
_FastTokenizer: Any = PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen3", "mistral", "granite", "gemma2", "gemma3_text")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1 and 2, as in SmolLM2

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def make_tiny_base(folder: Path, *, seed: int, architecture: str = "llama", **overrides: Any) -> Path:
    """Write a float32 model of 4 layers and about 0.2 M parameters, and its tokenizer, to `folder`.

    The same arguments give the same weights; torch's global generators are left as they were.

    Args:
        folder: made or replaced, in one step.
        seed: of the random weights.
        architecture: one of `ARCHITECTURES`, each a `model_type` of transformers.
        overrides: fields of the model's config, such as `num_hidden_layers=2` or `sliding_window=8`.

    Returns:
        `folder`.

    Raises:
        ValueError: the architecture or a config field is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
    config = AutoConfig.for_model(architecture)
    unknown = [key for key in overrides if not hasattr(config, key)]
    if unknown:
        raise ValueError(f"a {architecture} config has no field {', '.join(map(repr, unknown))}")
    shape = {
        "vocab_size": 512,  # ids past the tokenizer's 259 decode to nothing, like the padding of real vocabularies
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,  # near 1/sqrt(64): attention and MLP change the logits enough for tests to see
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = AutoConfig.for_model(architecture, **shape | overrides)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would reach every GPU too
        model = _AutoModel.from_config(config, dtype=torch.float32)
    with atomic_directory(folder) as temporary, quiet_transformers():
        model.save_pretrained(temporary)
        byte_tokenizer().save_pretrained(temporary)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny bases: one id per byte after the three special tokens, and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    endoftext, start, end = SPECIAL_TOKENS
    fast: PreTrainedTokenizerFast = _FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=endoftext,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    return fast
