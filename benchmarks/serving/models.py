"""A base model of random weights, made on the device, and a bank of random adapters for it. Nothing is downloaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from molora.adapter import Adapter, LoraWeights, layer_index, random_adapter
from molora.bank import BANK_FILE, AdapterEntry, Bank, BankConfig, BaseInfo
from molora.digest import json_digest
from molora.injection import linears_of_layers
from molora.model import MoLoRA
from molora.router import KeyRouter, RouterConfig
from molora.tiny import byte_tokenizer
from serving.shapes import NUM_ADAPTERS, Shape

BASE_NAME = "random-llama"
TOP_LOGIT = 14.0  # of a vocabulary's: high enough to be the largest, low enough for the others to count


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A Llama whose greedy answers wander over the whole vocabulary.

    A random model soon repeats one token, and with it one route. Here the head is the embedding, shifted by a number of
    rows, so that each token is followed by another one far away, and an answer's tokens are as good as drawn at random.
    About half of what the head reads is the current token, the other half what attention and adapters made of the
    context: enough for a wrong context to show in the logits.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **shape.config, tie_word_embeddings=False, eos_token_id=2, pad_token_id=2)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.normal_()
        shift = round(len(embedding) * 0.618)
        head.copy_(embedding.roll(shift, 0) * (2 * TOP_LOGIT / config.hidden_size))
        embedding.mul_(shape.embedding_std)
    return model.eval().requires_grad_(False)


def random_bank(
    folder: Path, model: Any, shape: Shape, *, first_layer: int, router_layer: int, has_router: bool, seed: int
) -> Bank:
    """`NUM_ADAPTERS` adapters on all linears from a layer on, and a router with random keys, if there is to be one."""
    linears = {path: model.get_submodule(path) for path in sorted(linears_of_layers(model))}
    modules = {
        path: (linear.out_features, linear.in_features)
        for path, linear in linears.items()
        if layer_index(path) >= first_layer
    }
    entries = []
    for index in range(NUM_ADAPTERS):
        adapter = random_adapter_for(modules, shape, model.dtype, seed + 1 + index)
        name = f"adapter-{index}"
        adapter.write(folder / "adapters" / name)
        entries.append(AdapterEntry(name, adapter.digest, routable=has_router, activation=0))
    base = BaseInfo(BASE_NAME, json_digest([shape.name, seed]))
    config = BankConfig("benchmark", base, router_layer, shape.rank, activation=0, adapters=tuple(entries))
    (folder / BANK_FILE).write_text(json.dumps(config.to_json()), encoding="utf-8")
    bank = Bank.open(folder)
    if has_router:
        bank.set_router(KeyRouter(RouterConfig(), shape.config["hidden_size"], NUM_ADAPTERS + 1))
    return bank


def random_adapter_for(modules: Mapping[str, tuple[int, int]], shape: Shape, dtype: torch.dtype, seed: int) -> Adapter:
    """Strong enough for another adapter to give other logits.

    Args:
        modules: (out, in) features by module path.
    """
    std = 0.25 / shape.config["hidden_size"] ** 0.25  # B(Ax) is about a fifth of Wx
    generator = torch.Generator().manual_seed(seed)
    adapter = random_adapter(modules, rank=shape.rank, alpha=shape.rank, generator=generator, std=std)
    weights = {
        path: LoraWeights(pair.a_RI.to(dtype), pair.b_OR.to(dtype), pair.scaling)
        for path, pair in adapter.weights.items()
    }
    return Adapter(adapter.config, weights)


def load_random(
    folder: Path, shape: Shape, device: torch.device, dtype: torch.dtype, *, has_router: bool, seed: int
) -> MoLoRA:
    """A model and its bank.

    Args:
        has_router: adapters act from the router layer on and the router may pick them; else they act in all layers, as
            plain LoRA does, and only explicitly.
    """
    model = random_model(shape, device, dtype, seed)
    bank = random_bank(
        folder,
        model,
        shape,
        first_layer=shape.router_layer if has_router else 0,
        router_layer=shape.router_layer,
        has_router=has_router,
        seed=seed,
    )
    return MoLoRA(model, byte_tokenizer(), bank, folder, bank.config.base.digest)
