"""Many clients of one server for minutes: what they are answered, and what the server keeps of them.

    python benchmarks/clients.py --clients 200 --minutes 10 --out benchmarks/results/clients-cpu.json

A tiny random base on a CPU behind `serve.py`, a process of its own. Each client asks one thing after the other: the
base, the router or an adapter, greedily or by draws of a seed, streamed or whole, by either endpoint. Some leave in the
middle of an answer, and some send prompts or bodies that are too large. There is room for 32 requests, and 64 may wait,
so many are refused by 429. Every answer is held against that to the same request, asked alone before. The server's
memory, threads and open files are read throughout, and at the end, when all clients are gone.
"""

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import httpx
import torch
import yaml
from alternation import make_bank
from serving.machine import describe_machine

from molora.files import write_atomic

REPOSITORY = Path(__file__).parents[1]
ENGINE = {"kv_cache_bytes": 1 << 21, "block_size": 8, "max_sequences": 32, "max_step_tokens": 128, "max_waiting": 64}
MOST_BODY_BYTES = 20_000
NUM_REQUESTS = 200  # different ones
SETTLE_S = 10.0
MOST_GROWTH = 1.05  # of memory, from a quarter of the time on
LONG_MINUTES = 1.0  # until when pools fill and memory settles
WANTED = ("whole", "stream", "left", "refused by 400", "refused by 404", "refused by 413")


def settings(bank: Path, port: int) -> dict[str, Any]:
    limits = {"max_body_bytes": MOST_BODY_BYTES}
    return {"bank": str(bank), "device": "cpu", "dtype": "float32", "port": port, "engine": ENGINE, "limits": limits}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def make_requests(base: str, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies; prompts share beginnings."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz "
    beginnings = ["".join(draw.choice(letters) for _ in range(80)) for _ in range(20)]
    found = []
    for _ in range(NUM_REQUESTS):
        text = draw.choice(beginnings)[: draw.randint(10, 80)] + "".join(draw.choices(letters, k=draw.randint(1, 10)))
        model = draw.choice([base, "crowd", "crowd:left", "crowd:right"])
        body = {"model": model, "max_tokens": draw.randint(1, 12), "ignore_eos": True, "temperature": 0}
        if draw.random() < 0.5:
            body |= {"temperature": 1, "seed": draw.randrange(1000)}
        if draw.random() < 0.5:
            found.append(("/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}))
        else:
            found.append(("/v1/completions", body | {"prompt": text, "activation": draw.randrange(10)}))
    return found


def bad_requests(base: str) -> list[tuple[str, dict[str, Any], int]]:
    """With the status that each is to be answered by."""
    path = "/v1/completions"
    return [
        (path, {"model": base, "prompt": "x" * 2000, "max_tokens": 1}, 400),  # over the context
        (path, {"model": base, "prompt": "x" * (MOST_BODY_BYTES + 1), "max_tokens": 1}, 413),
        (path, {"model": base, "prompt": "x", "max_tokens": 0.5}, 400),
        (path, {"model": "nobody", "prompt": "x"}, 404),
    ]


class Server:
    """The process, and what the system says of it."""

    def __init__(self, folder: Path, bank: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "serve.yaml").write_text(yaml.safe_dump(settings(bank, self.port)))
        self.log = folder / "log"
        with self.log.open("wb") as log:
            command = [sys.executable, str(REPOSITORY / "serve.py"), "--config", str(folder / "serve.yaml")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end_s = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > end_s:
                self.process.kill()
                raise SystemExit(f"the server did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def usage(self) -> dict[str, float]:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return {
            "memory_mb": int(status["VmRSS"].split()[0]) // 1024,
            "threads": int(status["Threads"]),
            "files": len(list(Path(f"/proc/{self.process.pid}/fd").iterdir())),
        }

    def metrics(self) -> dict[str, float]:
        """Sums over labels."""
        found: Counter[str] = Counter()
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith("molora:") and "_bucket" not in line:
                name, value = line.rsplit(" ", 1)
                found[name.partition("{")[0].removeprefix("molora:")] += float(value)
        return dict(found)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class Crowd:
    def __init__(self, server: Server, requests: list[tuple[str, dict[str, Any]]], base: str) -> None:
        self.server, self.requests, self.bad = server, requests, bad_requests(base)
        self.expected: list[str] = []
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    async def learn(self) -> None:
        """What each request is answered alone."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=60) as client:
            for path, body in self.requests:
                answer = await client.post(path, json=body)
                answer.raise_for_status()
                self.expected.append(_text(answer.json()))

    async def run(self, num_clients: int, end_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(num_clients):
                group.create_task(self._client(random.Random(f"client {index}"), end_s))

    async def _client(self, draw: random.Random, end_s: float) -> None:
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120) as client:
            while time.monotonic() < end_s and len(self.faults) < 20:
                kind = draw.choices(["whole", "stream", "leave", "bad"], [5, 3, 1, 1])[0]
                try:
                    if kind == "bad":
                        await self._bad(client, *draw.choice(self.bad))
                    else:
                        await self._ask(client, draw.randrange(len(self.requests)), kind, draw)
                except httpx.TransportError as error:
                    self.faults.append(f"{kind}: {type(error).__name__} {error}")

    async def _ask(self, client: httpx.AsyncClient, index: int, kind: str, draw: random.Random) -> None:
        path, body = self.requests[index]
        async with client.stream("POST", path, json=body | {"stream": kind != "whole"}) as answer:
            if answer.status_code == 429:
                self.counts["refused by 429"] += 1
                if not answer.headers.get("retry-after"):
                    self.faults.append("a 429 does not say when to try again")
                await answer.aread()
                await asyncio.sleep(draw.random())
                return
            if answer.status_code != 200:
                self.faults.append(f"{answer.status_code}: {(await answer.aread()).decode()[:200]}")
                return
            if kind == "whole":
                text = _text(json.loads(await answer.aread()))
            else:
                text, pieces = "", 0
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        piece = json.loads(line.removeprefix("data: "))
                        if "error" in piece:
                            self.faults.append(f"in the middle of an answer: {piece['error']}")
                            return
                        text += _text(piece)
                        pieces += 1
                        if kind == "leave" and pieces > 1:
                            break
        self.counts["left" if kind == "leave" else kind] += 1
        wanted = self.expected[index]
        if not (wanted.startswith(text) if kind == "leave" else text == wanted):
            self.faults.append(f"{path} {body}: {text!r}, alone {wanted!r}")

    async def _bad(self, client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int) -> None:
        answer = await client.post(path, json=body)
        self.counts[f"refused by {answer.status_code}"] += 1
        if answer.status_code not in (status, 429):
            self.faults.append(f"{status} was due, and {answer.status_code} came: {answer.text[:200]}")


def _text(answer: dict[str, Any]) -> str:
    if not answer["choices"]:
        return ""
    (choice,) = answer["choices"]
    message = choice.get("message") or choice.get("delta") or choice
    return message.get("content") or message.get("text") or ""


async def measure(server: Server, crowd: Crowd, num_clients: int, seconds: float) -> list[dict[str, float]]:
    """The server's usage, twenty times over the run."""
    usage: list[dict[str, float]] = []

    async def watch() -> None:
        for _ in range(20):
            await asyncio.sleep(seconds / 20)
            usage.append(server.usage())
            print(f"{sum(crowd.counts.values())} requests, {len(crowd.faults)} faults, {usage[-1]}", flush=True)

    await asyncio.gather(watch(), crowd.run(num_clients, time.monotonic() + seconds))
    return usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    head = describe_machine(torch.device("cpu"))
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bank = make_bank(folder)
        base = str(folder / "base")
        with Server(folder, bank) as server:
            crowd = Crowd(server, make_requests(base, args.seed), base)
            asyncio.run(crowd.learn())
            before = server.usage()
            usage = asyncio.run(measure(server, crowd, args.clients, 60 * args.minutes))
            time.sleep(SETTLE_S)
            after = server.usage()  # before there is a connection for the metrics
            metrics = server.metrics()
            status = server.stop()
    early = usage[len(usage) // 4]  # pools of threads are full then
    kept = {
        "running or waiting": metrics["num_requests_running"] + metrics["num_requests_waiting"],
        "part of the cache": metrics["kv_cache_usage_perc"],
        "threads": max(0, after["threads"] - early["threads"]),
        "files": max(0, after["files"] - before["files"]),
    }
    growth = after["memory_mb"] / early["memory_mb"]
    result = head | {
        "num_clients": args.clients,
        "minutes": args.minutes,
        "counts": dict(sorted(crowd.counts.items())),
        "faults": crowd.faults,
        "kept": kept,
        "memory_growth": round(growth, 4),
        "usage": {"before": before, "during": usage, "after": after},
        "num_recomputed_tokens": metrics["recomputed_tokens_total"],
        "num_failed_steps": metrics["failed_steps_total"],
        "exit_status": status,
    }
    print(json.dumps({name: value for name, value in result.items() if name not in (*head, "usage")}, indent=1))
    if args.out is not None:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    is_bad = crowd.faults or status or metrics["failed_steps_total"] or metrics["recomputed_tokens_total"]
    is_bad = is_bad or kept["running or waiting"] or kept["part of the cache"]
    if args.minutes >= LONG_MINUTES:
        missing = [name for name in WANTED if not crowd.counts[name]]
        is_bad = is_bad or missing or kept["threads"] or kept["files"] or growth > MOST_GROWTH
    if is_bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
