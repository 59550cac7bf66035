"""`molora bench`: how fast each route prefills and decodes, next to the base model in the same run.

Ratios are what carries over to another day; the absolute figures belong to the machine and its load. The routes take
turns, token by token where they decode, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import platform
import shlex
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from molora.injection import cache_argument
from molora.model import MoLoRA

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "


@dataclass(frozen=True)
class Speed:
    """Medians of one route; the ratios are to base, and above 1 where the route is faster (prefill) or slower.

    `adapted_share` is the part of the decoded tokens on which an adapter acted: a router may well choose none.
    """

    route: str
    prefill_tokens_per_s: float
    prefill_ratio: float
    decode_ms_per_token: float
    decode_ratio: float
    adapted_share: float


def measure(
    model: MoLoRA, *, repeats: int, num_prompt_tokens: int, num_new_tokens: int, text: str = TEXT
) -> list[Speed]:
    """Time the forwards of base, each adapter and the router (where there is one), active from the first token.

    The tokens, decoded ones included, are those of `text`, over and over. Sampling and the reading of routes are not
    timed.

    Raises:
        ValueError: the prompt and the new tokens exceed the model's context, or the text has no tokens.
    """
    if num_prompt_tokens + num_new_tokens > model.max_context:
        raise ValueError(
            f"{num_prompt_tokens} prompt tokens and {num_new_tokens} new ones exceed the model's context of "
            f"{model.max_context} tokens; ask for fewer."
        )
    text_ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not text_ids:
        raise ValueError("the text has no tokens; give some words.")
    num_tokens = num_prompt_tokens + num_new_tokens
    ids = torch.tensor([(text_ids * (num_tokens // len(text_ids) + 1))[:num_tokens]], device=model.decoder.device)
    routes = ["base", *(entry.name for entry in model.bank.adapters), *(["auto"] if model.bank.has_router else [])]
    prefill_s: dict[str, list[float]] = {route: [] for route in routes}
    token_s: dict[str, list[float]] = {route: [] for route in routes}
    num_adapted = dict.fromkeys(routes, 0)
    for repeat in range(-1, repeats):  # one more, untimed, to warm up
        caches = {route: DynamicCache() for route in routes}
        for route in routes:
            seconds, _ = _forward(model, route, ids[:, :num_prompt_tokens], caches[route])
            if repeat >= 0:
                prefill_s[route].append(seconds)
        for index in range(num_prompt_tokens, num_tokens):
            for route in routes:
                seconds, adapted = _forward(model, route, ids[:, index : index + 1], caches[route])
                if repeat >= 0:
                    token_s[route].append(seconds)
                    num_adapted[route] += adapted
    prefills = {route: statistics.median(times) for route, times in prefill_s.items()}
    decodes = {route: statistics.median(times) for route, times in token_s.items()}
    return [
        Speed(
            route,
            num_prompt_tokens / prefills[route],
            prefills["base"] / prefills[route],
            decodes[route] * 1e3,
            decodes[route] / decodes["base"],
            num_adapted[route] / len(token_s[route]),
        )
        for route in routes
    ]


@torch.inference_mode()
def _forward(model: MoLoRA, route: str, ids: torch.Tensor, cache: DynamicCache) -> tuple[float, bool]:
    """Feed the next tokens: how many seconds they take, and whether an adapter acted on any of them."""
    # A base request takes no part in routing at all, as in `generate`.
    with nullcontext() if route == "base" else model.routing([0], route):
        start_s = _now(ids)
        model.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_argument(model.model): cache})
        end_s = _now(ids)
        record = model.decoder.routes.record
        return end_s - start_s, record is not None and bool((record.slots >= 0).any())


def _now(ids: torch.Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()


def report(model: MoLoRA, rows: list[Speed]) -> dict[str, Any]:
    """The figures and what they were measured on."""
    device = model.decoder.device
    return {
        "command": shlex.join(["molora", *sys.argv[1:]]),
        "bank": model.bank.name,
        "base": model.bank.config.base.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("molora", "torch", "transformers", "triton")},
        },
        "commit": source_commit(),
        "routes": [asdict(row) for row in rows],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """The commit of a source checkout; None where MoLoRA was installed from a wheel."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
