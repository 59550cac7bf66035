"""What the machine and the model allow at best: bytes that a step must read, and the arithmetic of a prompt."""

import time
from typing import Any

import torch

REPEATS = 10


def bandwidth(device: torch.device, num_bytes: int) -> dict[str, float]:
    """Bytes a second of the device's memory: of a copy (reading and writing), and of a sum (reading)."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return {
        "copy": 2 * num_bytes / _shortest(lambda: target.copy_(source), device),
        "read": num_bytes / _shortest(lambda: source.sum(), device),
    }


def _shortest(call: Any, device: torch.device) -> float:
    call()
    samples = []
    for _ in range(REPEATS):
        _wait(device)
        start_s = time.perf_counter()
        call()
        _wait(device)
        samples.append(time.perf_counter() - start_s)
    return min(samples)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: Any) -> int:
    """What a decode step of the base model reads of it: all but the embedding (of which it reads a few rows)."""
    embedding = model.get_input_embeddings().weight
    return sum(p.nbytes for name, p in model.named_parameters() if p is not embedding and _is_base(name))


def cache_bytes(model: Any, num_tokens: int) -> int:
    """What as many tokens take in the cache."""
    config = model.config
    return (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize * num_tokens
    )


def prompt_flops(model: Any, num_tokens: int) -> float:
    """Of reading a prompt: products with the layers' weights, and causal attention; not the adapters' own."""
    config = model.config
    linears = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and _is_base(name))
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2.0 * linears * num_tokens + attention * num_tokens**2


def _is_base(name: str) -> bool:
    return not any(part in name for part in (".lora_a_", ".lora_b_", ".router."))
