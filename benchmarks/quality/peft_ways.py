"""What PEFT makes of the same adapters beside merges: Arrow, and X-LoRA with a classifier trained here."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from molora.adapter import Adapter
from molora.training.batches import ActivationMix, PackedLoader
from molora.training.examples import IGNORE, examples, read_records
from molora.training.frozen import Schedule

BATCH = 256  # prompts that are answered at once


def write_plain(adapters: Sequence[Adapter], folder: Path, *, in_all_layers: bool) -> list[str]:
    """The adapters without invocation tokens, so that PEFT takes them for plain LoRAs.

    Args:
        in_all_layers: with zeros in the layers that they leave out: Arrow's router is in all.
    """
    folders = []
    for index, adapter in enumerate(adapters):
        config, tensors = replace(adapter.config, alora_invocation_tokens=None), adapter.tensors()
        if in_all_layers:
            first = min(config.layers_to_transform or [0])
            config = replace(config, layers_to_transform=None)
            for key in [key for key in tensors if f".layers.{first}." in key]:
                for layer in range(first):
                    name = key.replace(f".layers.{first}.", f".layers.{layer}.")
                    tensors[name] = torch.zeros_like(tensors[key])
        Adapter.from_tensors(config, tensors).write(folder / str(index))
        folders.append(str(folder / str(index)))
    return folders


def load(base_dir: Path, device: torch.device) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16 if device.type == "cuda" else "auto")
    model.config.use_cache = False
    return model.to(device).requires_grad_(False).eval()


def arrow(base_dir: Path, folders: list[str], args: Namespace, tokenizer: Any, device: torch.device) -> Any:
    """PEFT's Arrow with its defaults: the three adapters most like the token, by softmax, in every linear."""
    from peft import ArrowConfig, create_arrow_model

    config = ArrowConfig(top_k=min(3, len(folders)), rng_seed=args.seed)
    model = create_arrow_model(load(base_dir, device), task_specific_adapter_paths=folders, arrow_config=config)
    return model.to(device).eval()


def xlora(base_dir: Path, folders: list[str], args: Namespace, tokenizer: Any, device: torch.device) -> Any:
    """PEFT's X-LoRA, a scaling for each token, layer and adapter, its classifier trained on the router's data."""
    from peft import XLoraConfig, get_peft_model

    model = load(base_dir, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            xlora_depth=2,
            xlora_size=256,
            layerwise_scalings=True,
            adapters={str(index): folder for index, folder in enumerate(folders)},
        )
        model = get_peft_model(model, config).to(device)
    loader = PackedLoader(
        examples(read_records(args.work / "data" / "train_router.jsonl"), tokenizer, max_length=512),
        [],
        row_length=512,
        rows=2 * args.rows,
        pad_id=tokenizer.pad_token_id or 0,
        mix=ActivationMix(),
        seed=args.seed,
        num_batches=args.xlora_steps,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    schedule = Schedule(lr=1e-3, warmup_steps=50, weight_decay=0.01)
    optimizer = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.99))
    model.train()
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * schedule.factor(step, args.xlora_steps)
        batch = batch.to(device)
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"xlora step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.inference_mode()
def answers(
    model: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, eos_ids: frozenset[int], max_new_tokens: int
) -> list[str]:
    """Greedy answers by transformers' `generate`, short prompts together."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        out: Tensor = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(eos_ids),
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, text in zip(batch, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts
