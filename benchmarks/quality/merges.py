"""One adapter of several, as PEFT's `add_weighted_adapter` merges them: A and B each by themselves, or their products.

Legend: N tokens, O out-features, I in-features.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.adapter import Adapter
from molora.model import MoLoRA
from molora.training.examples import Example

MERGES = ("ties", "dare", "dare_ties")
UPDATE_MERGES = tuple(f"{kind}_svd" for kind in MERGES)
DENSITY = 0.5
BATCH = 32  # conversations whose loss is found at once


def merge(adapters: Sequence[Adapter], kind: str, seed: int) -> Adapter:
    """A and B each by themselves, weights 1."""
    combine = _combination(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = {}
        for key, first in adapters[0].tensors().items():
            tensors[key] = combine([adapter.tensors()[key].float() for adapter in adapters]).to(first.dtype)
    return Adapter.from_tensors(adapters[0].config, tensors)


def merge_updates(adapters: Sequence[Adapter], kind: str, seed: int) -> Adapter:
    """The weight updates, scalings included, at weights 1; an SVD cuts what comes of them to the adapters' total rank.

    All of it is linear in a weight that the adapters share, so `weighted` gives every other one.
    """
    combine, rank = _combination(kind.removesuffix("_svd")), sum(adapter.config.r for adapter in adapters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = {}
        for module, first in adapters[0].weights.items():
            own = [adapter.weights[module] for adapter in adapters]
            update_OI = combine([each.scaling * each.b_OR.float() @ each.a_RI.float() for each in own])
            left_OM, values_M, right_MI = torch.linalg.svd(update_OI, full_matrices=False)  # M is min(O, I)
            missing = max(0, rank - len(values_M))
            b_OR = F.pad((left_OM * values_M)[:, :rank], (0, missing))
            a_RI = F.pad(right_MI[:rank], (0, 0, 0, missing))
            tensors[f"base_model.model.{module}.lora_A.weight"] = a_RI.to(first.a_RI.dtype)
            tensors[f"base_model.model.{module}.lora_B.weight"] = b_OR.to(first.b_OR.dtype)
    plain: dict[str, Any] = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return Adapter.from_tensors(replace(adapters[0].config, r=rank, lora_alpha=rank, **plain), tensors)


def weighted(adapter: Adapter, weight: float) -> Adapter:
    """The same update, `weight` times."""
    config = replace(adapter.config, lora_alpha=weight * adapter.config.lora_alpha)
    return Adapter.from_tensors(config, adapter.tensors())


@torch.inference_mode()
def loss_at(m: MoLoRA, name: str, weight: float, examples: Sequence[Example]) -> float:
    """The mean loss of the learned tokens where a loaded adapter acts, at this weight, from the last turn on."""
    total, num_tokens, device = 0.0, 0, m.decoder.device
    ordered = sorted(examples, key=lambda example: len(example.token_ids))
    for first in range(0, len(ordered), BATCH):
        batch = ordered[first : first + BATCH]
        ids_BT = torch.zeros(len(batch), max(len(example.token_ids) for example in batch), dtype=torch.long)
        learned_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, example in enumerate(batch):  # padded behind: nothing sees what follows it
            ids_BT[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
            learned_BT[row, : len(example.learned)] = torch.tensor(example.learned)
        ids_BT, learned_BT = ids_BT.to(device), learned_BT.to(device)
        logits_BTV, _ = m.logits(ids_BT, [example.turn for example in batch], route={name: weight})
        logits_NV, targets_N = logits_BTV[:, :-1][learned_BT[:, 1:]], ids_BT[:, 1:][learned_BT[:, 1:]]
        total += float(F.cross_entropy(logits_NV.float(), targets_N, reduction="sum"))
        num_tokens += len(targets_N)
    return total / num_tokens


def _combination(kind: str) -> Callable[[list[Tensor]], Tensor]:
    """PEFT's function for it, at weights 1 and this density."""
    from peft.utils import merge_utils

    combine = {"ties": merge_utils.ties, "dare": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties}[kind]
    return lambda tensors: combine(tensors, torch.ones(len(tensors)), DENSITY)
