"""Answers where the right adapter is given for every token: the oracle that routers are held against."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from transformers import DynamicCache

from molora.injection import cache_argument
from molora.model import MoLoRA
from molora.routing import NO_ADAPTER, RouteRequest
from molora.training.question import Question

_ENDED = re.compile(r"Answer:.*\n")


@torch.inference_mode()
def answer_as_given(
    m: MoLoRA, questions: Sequence[Question], *, max_new_tokens: int, batch_size: int = 500
) -> list[str]:
    """Greedy answers with the right adapter on every token, as the oracle has it.

    The tokens of the user's turn get the adapters of their labels, template tokens between two parts that of the one
    which follows. An answer begins with its first part's adapter; a line break behind "Answer: ..." already belongs to
    the next part, as in training.
    """
    texts = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].labels))
    with m.lock, ExitStack() as stack:
        for routes in (
            m.decoder.early_routes,
            m.decoder.routes,
        ):  # here the host bounds a step, and launches less by torch
            stack.callback(setattr, routes, "impl", routes.impl)
            routes.impl = "torch"
        holds = {}
        for name in m.slots.current.adapters:
            holds[name] = m.slots.acquire(m.resolve_route(name))
            stack.callback(m.slots.release, holds[name])
        slots = {name: hold.slots[0] for name, hold in holds.items()}
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            for i, text in zip(
                batch, _decode_as_given(m, [questions[i] for i in batch], slots, max_new_tokens), strict=True
            ):
                texts[i] = text
    return texts


def _decode_as_given(
    m: MoLoRA, questions: Sequence[Question], slots: Mapping[str, int], max_new_tokens: int
) -> list[str]:
    device, tokenizer = m.decoder.device, m.tokenizer
    rendered = [m.render(question.messages) for question in questions]
    prompts = [prompt.token_ids for prompt in rendered]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    chosen = torch.full((len(prompts), width, 1), NO_ADAPTER, dtype=torch.int32)
    for row, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
        start = m.activation_start(rendered[row], question.domains[0])
        for index, label in enumerate(question.labels[start:], width - len(prompt) + start):
            chosen[row, index] = slots.get(label or "", NO_ADAPTER)
    place = [0] * len(questions)  # the part that each answer is in
    written: list[list[int]] = [[] for _ in questions]
    since = [0] * len(questions)  # where its text begins
    is_open = [True] * len(questions)
    rows = list(range(len(questions)))  # whose answers are in the batch
    ids, mask, chosen = ids.to(device), mask.to(device), chosen.to(device)
    cache, positions = DynamicCache(config=m.model.config), (mask.cumsum(1) - 1).clamp(min=0)
    can_shrink = all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
    for _ in range(max_new_tokens):
        request = RouteRequest(
            torch.zeros_like(mask[:, :1]), slots=chosen, gates=torch.ones_like(chosen, dtype=torch.float32)
        )
        with m.decoder.requested(request):
            logits = m.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{cache_argument(m.model): cache},
            ).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            if is_open[row]:
                written[row].append(token)
                is_open[row] = token not in m.eos_ids
                part = tokenizer.decode(written[row][since[row] :])
                if place[row] + 1 < len(questions[row].domains) and _ENDED.search(part):
                    place[row] += 1
                    since[row] = len(written[row])
        if not any(is_open):
            break
        if can_shrink and sum(is_open) <= len(rows) / 2:
            kept = torch.tensor([index for index, row in enumerate(rows) if is_open[row]], device=device)
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            rows = [row for row in rows if is_open[row]]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions[:, -1:] + 1
        nexts = [slots.get(questions[row].domains[place[row]], NO_ADAPTER) for row in rows]
        chosen = torch.tensor(nexts, dtype=torch.int32, device=device)[:, None, None]
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
