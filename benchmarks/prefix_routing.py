"""How much of their prompts replicas on Ray Serve find in their caches, by who decides which replica is asked.

    python benchmarks/prefix_routing.py --out benchmarks/results/prefix-routing-cpu.json

A tiny random base on a CPU; each replica's cache has room for everything. Several tenants, each with a system prompt
and a cache salt of its own, hold conversations of several turns, some at a time, in an order that is drawn. The same
ones are held with one replica, with two and the router of prefixes, and with two that are asked in turn; the replicas
are started anew for each. The rate is that of prompt tokens that were found, of all.
"""

import argparse
import asyncio
import json
import random
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
import torch
from alternation import make_bank
from clients import free_port
from ray import serve
from ray.serve.experimental.round_robin_router import RoundRobinRouter
from ray.serve.request_router import RequestRouter
from serving.machine import describe_machine

from molora.files import write_atomic
from molora.serving.cluster.config import ClusterConfig, RayConfig
from molora.serving.cluster.deploy import APP, QUIET, application, http_options, start_ray
from molora.serving.cluster.router import PrefixRouter
from molora.serving.config import ServeConfig
from molora.serving.engine import EngineConfig

SETUPS: dict[str, tuple[int, type[RequestRouter]]] = {
    "one replica": (1, PrefixRouter),
    "two, by prefix": (2, PrefixRouter),
    "two, in turn": (2, RoundRobinRouter),
}
ENGINE = EngineConfig(kv_cache_bytes=1 << 28, block_size=16)
LETTERS = "abcdefghijklmnopqrstuvwxyz     "
NUM_SYSTEM_CHARS, NUM_QUESTION_CHARS, NUM_ANSWER_TOKENS = 160, 60, 12


@dataclass(frozen=True)
class Conversation:
    tenant: str
    system: str
    questions: tuple[str, ...]


def make_conversations(num_tenants: int, num_each: int, num_turns: int, seed: int) -> list[Conversation]:
    """In an order that is drawn."""
    draw = random.Random(seed)

    def text(length: int) -> str:
        return "".join(draw.choices(LETTERS, k=length))

    systems = {f"tenant {index}": text(NUM_SYSTEM_CHARS) for index in range(num_tenants)}
    conversations = [
        Conversation(tenant, system, tuple(text(NUM_QUESTION_CHARS) for _ in range(num_turns)))
        for tenant, system in systems.items()
        for _ in range(num_each)
    ]
    draw.shuffle(conversations)
    return conversations


async def hold(conversations: list[Conversation], url: str, at_once: int) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    num_requests: Counter[str] = Counter()
    room = asyncio.Semaphore(at_once)

    async def one(conversation: Conversation) -> None:
        messages = [{"role": "system", "content": conversation.system}]
        async with room:
            for question in conversation.questions:
                messages.append({"role": "user", "content": question})
                body = {
                    "model": "crowd", "messages": messages, "cache_salt": conversation.tenant, "temperature": 0,
                    "max_tokens": NUM_ANSWER_TOKENS, "ignore_eos": True,
                }  # fmt: skip
                response = await client.post("/v1/chat/completions", json=body)
                answer = response.raise_for_status().json()
                counts["prompt_tokens"] += answer["usage"]["prompt_tokens"]
                counts["found_tokens"] += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                num_requests[response.headers["x-molora-replica"]] += 1
                messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*map(one, conversations))
    rate = counts["found_tokens"] / counts["prompt_tokens"]
    return {**counts, "hit_rate": rate, "num_requests": sorted(num_requests.values(), reverse=True)}


def measure(bank: Path, conversations: list[Conversation], at_once: int) -> dict[str, Any]:
    server = ServeConfig(bank=str(bank), device="cpu", dtype="float32", port=free_port(), drain_s=5, engine=ENGINE)
    results = {}
    start_ray(None)
    try:
        serve.start(http_options=http_options(server), logging_config=QUIET)
        for name, (num_replicas, router) in SETUPS.items():
            config = ClusterConfig(server, RayConfig(min_replicas=num_replicas, max_replicas=num_replicas))
            serve.run(application(config, router=router), name=APP, route_prefix="/")
            results[name] = asyncio.run(hold(conversations, f"http://127.0.0.1:{server.port}", at_once))
            print(f"{name}: {results[name]}", flush=True)
            serve.delete(APP)
    finally:
        serve.shutdown()
        ray.shutdown()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tenants", type=int, default=6)
    parser.add_argument("--conversations", type=int, default=12, help="of each tenant")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--at-once", type=int, default=8, help="conversations that are held at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    machine = describe_machine(torch.device("cpu"))
    conversations = make_conversations(arguments.tenants, arguments.conversations, arguments.turns, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(make_bank(Path(folder)), conversations, arguments.at_once)
    one = results["one replica"]["hit_rate"]
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    of_one = {name: result["hit_rate"] / one for name, result in results.items()}
    record = machine | {"ray": ray.__version__, "settings": settings, "results": results, "of_one_replica": of_one}
    write_atomic(arguments.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
