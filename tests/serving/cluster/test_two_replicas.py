"""Two CPU replicas on this machine, by the command that a user types.

To start them takes most of the time, and pytest-xdist may run the tests of a module in several processes; so there is
one test, of two that stay and then of one or two as there is to do, and what it does stands in functions of its own.
"""

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

import molora
from molora.serving.app import create_app
from molora.serving.config import ServeConfig
from molora.serving.engine import Engine, EngineConfig

ROOT = Path(__file__).parents[3]
START_S = 420  # of which a machine with much else to do has needed 180
ENGINE = {"kv_cache_bytes": 1 << 24, "block_size": 16}
KEY = {"Authorization": "Bearer secret"}
CHAT = "/v1/chat/completions"
STATISTICS_PERIOD_S = 2.0  # as of `deploy.py`, which imports Ray
LOADED = {"lora_name": "z", "lora_path": "z", "activation": 0}
ENDLESS = {"max_tokens": 600, "ignore_eos": True}
NUM_TENANTS, NUM_CONVERSATIONS, NUM_TURNS = 3, 4, 4


@dataclass
class Answered:
    status: int
    headers: httpx.Headers
    text: str

    @property
    def replica(self) -> str:
        return self.headers["x-molora-replica"]


class Client:
    def __init__(self, url: str) -> None:
        self.http = httpx.AsyncClient(base_url=url, headers=KEY, timeout=180)

    async def chat(self, *contents: str, **options: Any) -> Answered:
        """Whole or, with `stream`, as its events; what the server broke off is what came of it."""
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
        body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0, **options}
        async with self.http.stream("POST", CHAT, json=body) as response:
            text = "".join([part async for part in response.aiter_text()])
        return Answered(response.status_code, response.headers, text)

    async def of_both(self, path: str) -> list[httpx.Response]:
        """What the replicas answer, asked until both have."""
        answers = []

        async def have_answered() -> bool:
            answers.append(await self.http.get(path))
            return len({each.headers["x-molora-replica"] for each in answers}) == 2

        await self.until(have_answered)
        return answers

    async def metric(self, name: str) -> dict[str, float]:
        """By replica."""
        text = (await self.http.get("/metrics")).text
        found = re.findall(rf'^molora:{name}{{.*replica="(\w+)"}} (\S+)$', text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}

    async def replicas(self) -> set[str]:
        """Of which there are metrics; none while one hangs."""
        return set(await self.metric("num_requests_running"))

    async def num_replicas(self) -> int:
        return len(await self.replicas())

    async def until(self, condition: Any, *, within_s: float = 60) -> None:
        async with asyncio.timeout(within_s):
            while not await condition():
                await asyncio.sleep(0.1)


@contextmanager
def started(settings: dict[str, Any], folder: Path, **ray: Any):
    """The URL and the process of `serve.py --ray`; whatever happens, nothing of it is left."""
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump({**settings, "ray": settings["ray"] | ray}))
    log = folder / "log"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {
        "OMP_NUM_THREADS": "1",
        "RAY_memory_monitor_refresh_ms": "0",
    }  # or Ray ends them when others fill the memory
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "serve.py"), "--ray", "--config", str(file)],
            stdout=out, stderr=subprocess.STDOUT, env=env,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"Serving a page on (\S+)", log.read_text(errors="replace"))):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.1)
        yield found[1], process
        assert process.wait(60) == 0, log.read_text(errors="replace")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def collector():
    """The URL of a collector of traces, and the spans that it gets."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            spans.extend(span for each in sent.resource_spans for scope in each.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        finally:
            server.shutdown()
            thread.join()


def test_two_replicas(tmp_path, make_bank, make_adapter, key_router, listening):
    bank = make_bank(tmp_path, router=key_router())
    loadable = tmp_path / "loadable"
    for seed, name in enumerate("zvw", 3):
        make_adapter(seed=seed).write(loadable / name)
    common = {"bank": str(bank.path), "device": "cpu", "dtype": "float32", "api_keys": ["secret"]}
    one = hit_rate_of_one(common, listening)
    settings = {
        **common,
        "port": 0,
        "drain_s": 60,  # in which a machine with much else to do ends what runs
        "engine": ENGINE,
        "adapter_folders": [str(loadable)],
        "num_extra_slots": 2,
        "limits": {"max_body_bytes": 100_000},
        "ray": {
            "max_replicas": 2,
            "max_ongoing_requests": 8,
            "max_queued_requests": 16,
            "health_check_period_s": 1,
            "health_check_timeout_s": 3,
        },
    }

    async def stay(url: str, process: subprocess.Popen[bytes]) -> Answered:
        client = Client(url)
        async with client.http:
            answered = await answers(client)
            await refusals(client)
            await prefixes(client)
            rate = await hit_rate(client)
            assert rate >= 0.9 * one > 0.4
            await crowding(client)
            await leaving(client)
            await adapters(client)
            await versions_survive(client, process.pid)
            await a_loss(client, process.pid, signal.SIGKILL)
            await a_loss(client, process.pid, signal.SIGSTOP)
            await affinity(client)
            await draining(client, process)
        return answered

    async def come_and_go(url: str, process: subprocess.Popen[bytes]) -> None:
        client = Client(url)
        async with client.http:
            await growing(client)
            await shrinking(client)
            await refusing(client, process)

    with collector() as (endpoint, spans):
        told = {"log_format": "json", "otlp_endpoint": endpoint}
        with started(settings | told, tmp_path, min_replicas=2) as (url, process):
            answered = asyncio.run(stay(url, process))
        logs((tmp_path / "log").read_text(), answered)
        traces(spans, answered)
    quick = {"target_ongoing_requests": 3, "upscale_delay_s": 1, "downscale_delay_s": 1}
    with started(settings, tmp_path, **quick) as (url, process):
        asyncio.run(come_and_go(url, process))


def hit_rate_of_one(common: dict[str, Any], listening: Any) -> float:
    """Without Ray: an engine of the same size behind the app itself."""
    model = molora.load(common["bank"], device="cpu", dtype="float32")
    engine = Engine(model, EngineConfig(**ENGINE))

    async def run(url: str) -> float:
        client = Client(url)
        async with client.http:
            return await hit_rate(client)

    try:
        with listening(create_app(engine, ServeConfig(**{**common, "api_keys": ("secret",)}))) as url:
            return asyncio.run(run(url))
    finally:
        engine.close()


async def hit_rate(client: Client) -> float:
    """The share of prompt tokens that were found, of conversations of several tenants side by side."""
    counts: Counter[str] = Counter()

    async def converse(tenant: int, conversation: int) -> None:
        said = [f"Tenant {tenant} begins conversation {conversation} about rivers and their sources."]
        for turn in range(NUM_TURNS):
            answered = await client.chat(*said, cache_salt=f"salt {tenant}")
            assert answered.status == 200, answered.text
            body = httpx.Response(200, text=answered.text).json()
            counts["prompt"] += body["usage"]["prompt_tokens"]
            counts["cached"] += body["usage"]["prompt_tokens_details"]["cached_tokens"]
            said += [body["choices"][0]["message"]["content"], f"And what of turn {turn}, which is the next one?"]

    await asyncio.gather(*(converse(t, c) for t in range(NUM_TENANTS) for c in range(NUM_CONVERSATIONS)))
    return counts["cached"] / counts["prompt"]


async def growing(client: Client) -> None:
    """One replica has too much to do, so there are two; the new one has what was loaded before it came."""
    loaded = await client.http.post("/v1/load_lora_adapter", json=LOADED)
    assert loaded.status_code == 200, loaded.text
    is_enough = asyncio.Event()

    async def ask(name: str) -> list[int]:
        statuses = []
        while not is_enough.is_set():
            statuses.append((await client.chat(name, **ENDLESS)).status)
        return statuses

    first = await client.replicas()
    assert len(first) == 1
    asking = [asyncio.create_task(ask(f"{i}")) for i in range(8)]
    await client.until(lambda: equals(client.num_replicas, 2), within_s=START_S)
    everyone = [await client.http.get("/v1/models/tiny:z") for _ in range(12)]
    assert {response.headers["x-molora-replica"] for response in everyone} - first  # which has nothing to do yet
    assert {response.status_code for response in everyone} == {200}
    assert {response.headers["x-molora-adapters-version"] for response in everyone} == {"1"}
    is_enough.set()
    assert set(itertools.chain(*await asyncio.gather(*asking))) == {200}
    assert (await client.http.post("/v1/unload_lora_adapter", json={"lora_name": "z"})).status_code == 200


async def shrinking(client: Client) -> None:
    """One replica would do, so the other one goes, but not before it has answered what it has begun."""
    is_enough = asyncio.Event()

    async def ask(name: str) -> list[Answered]:
        answered = []
        while not is_enough.is_set():
            answered.append(await client.chat(name, stream=True, **ENDLESS))
        return answered

    asking = [asyncio.create_task(ask(f"Shrink {i}!")) for i in range(2)]
    await client.until(lambda: equals(client.num_replicas, 1), within_s=120)
    (left,) = await client.replicas()
    is_enough.set()
    answered = list(itertools.chain(*await asyncio.gather(*asking)))
    assert {each.status for each in answered} == {200}
    assert all(each.text.endswith("data: [DONE]\n\n") for each in answered)
    assert left in {each.replica for each in answered}
    assert (await client.chat("And now?")).replica == left


async def answers(client: Client) -> Answered:
    """What the app of a replica says, it says through the ingress, too; both replicas are asked."""
    models = await client.of_both("/v1/models")
    assert {model["id"] for model in models[0].json()["data"]} > {"tiny", "tiny:x", "tiny:y"}
    assert {response.headers["x-molora-adapters-version"] for response in models} == {"0"}
    assert await client.num_replicas() == 2
    ready = await client.http.head("/ready", headers={"X-Request-Id": "mine"})
    assert (ready.status_code, ready.headers.get_list("x-request-id")) == (200, ["mine"])
    assert "text/html" in (await client.http.get("/")).headers["content-type"]

    whole, streamed = await client.chat("Rivers?"), await client.chat("Rivers?", stream=True)
    assert whole.headers["content-type"] == "application/json"
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert streamed.text.endswith("data: [DONE]\n\n")
    content = httpx.Response(200, text=whole.text).json()["choices"][0]["message"]["content"]
    chunks = [httpx.Response(200, text=line[6:]).json() for line in streamed.text.split("\n\n")[:-2]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == content
    return whole


def logs(text: str, answered: Answered) -> None:
    """An answer is found in the log by its id, and what was lost is; nothing that was said."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def found(request_id: str) -> dict[str, Any]:
        """By whose line it is."""
        of_it = [line for line in lines if line.get("request_id") == request_id]
        by = {name: line for line in of_it for name in ("ingress", "replica") if name in line}
        assert len(of_it) == len(by) == 2
        return by

    assert [line["path"] for line in found("mine").values()] == ["/ready"] * 2
    by = found(answered.headers["x-request-id"])
    assert {(line["path"], line["status"]) for line in by.values()} == {(CHAT, 200)}
    assert by["ingress"]["duration_ms"] > by["replica"]["duration_ms"] > 0
    assert (by["replica"]["replica"], by["replica"]["completion_tokens"]) == (answered.replica, 8)
    assert any("was lost" in line["message"] and "request_id" in line for line in lines if line.get("ingress"))
    assert [word for word in ("ivers", "later", "secret", "salt 1") if word in text] == []
    assert "[repeated" not in text  # as Ray says of lines that it leaves out


def traces(spans: list[Span], answered: Answered) -> None:
    def request_id(span: Span) -> str | None:
        return next((each.value.string_value for each in span.attributes if each.key == "molora.request_id"), None)

    of_it = {span.span_id: span for span in spans if request_id(span) == answered.headers["x-request-id"]}
    assert [span.name for span in of_it.values()] == [f"POST {CHAT}"] * 2
    assert [span.parent_span_id in of_it for span in of_it.values()].count(True) == 1


async def refusals(client: Client) -> None:
    assert (await client.http.post(CHAT, json={}, headers={"Authorization": ""})).status_code == 401
    assert (await client.http.get("/metrics", headers={"Authorization": ""})).status_code == 401
    assert (await client.http.get("/health", headers={"Authorization": ""})).status_code == 200
    assert (await client.chat("x" * 200_000)).status == 413
    assert (await client.chat("x", model="nobody")).status == 404
    refused = await client.http.post(CHAT, content=b"{")
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    assert (await client.http.post("/nothing")).json()["error"]["message"] == "Not Found: POST /nothing"


async def prefixes(client: Client) -> None:
    """A conversation stays where it began, and a tenant finds nothing of another one's."""
    text = "A long question about rivers. " * 10
    for index in range(6):
        first = await client.chat(f"{index} {text}", cache_salt=f"one {index}")
        again = await client.chat(f"{index} {text}", cache_salt=f"one {index}")
        assert first.replica == again.replica
        assert '"cached_tokens":0' not in again.text
        other = await client.chat(f"{index} {text}", cache_salt=f"other {index}")
        assert '"cached_tokens":0' in other.text


async def crowding(client: Client) -> None:
    """Two replicas work on eight requests each, and sixteen wait; whoever has no place is told so."""
    options = {"max_tokens": 100, "ignore_eos": True}
    asking = (client.chat(f"{i}", stream=bool(i % 2), **options) for i in range(60))
    answered = await asyncio.gather(*asking)
    assert {each.status for each in answered} == {200, 429}
    refused = [each for each in answered if each.status == 429]
    assert len(refused) <= 60 - 16
    assert {each.headers["retry-after"] for each in refused} == {"1"}
    assert all('"code":"rate_limit_exceeded"' in each.text for each in refused)


async def leaving(client: Client) -> None:
    async def running() -> float:
        return sum((await client.metric("num_requests_running")).values())

    asking = [asyncio.create_task(client.chat(f"{i}", stream=bool(i % 2), **ENDLESS)) for i in range(4)]
    await client.until(lambda: equals(running, 4))
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await client.until(lambda: equals(running, 0), within_s=5)


async def equals(found: Any, expected: object) -> bool:
    return await found() == expected


async def adapters(client: Client) -> None:
    """Once the load is answered, whoever is asked has it."""
    loaded = await client.http.post("/v1/load_lora_adapter", json=LOADED)
    assert loaded.status_code == 200, loaded.text
    everyone = await client.of_both("/v1/models/tiny:z")
    assert {response.status_code for response in everyone} == {200}
    assert {response.headers["x-molora-adapters-version"] for response in everyone} == {"1"}
    assert (await client.http.post("/v1/load_lora_adapter", json=LOADED)).status_code == 400


async def versions_survive(client: Client, server: int) -> None:
    """The actor that keeps the versions dies; the next one learns them from the replicas."""
    (store,) = processes(server, "ray::RolloutStore")
    os.kill(store, signal.SIGKILL)

    async def unloaded() -> bool:
        response = await client.http.post("/v1/unload_lora_adapter", json={"lora_name": "z"})
        assert response.status_code in (200, 503), response.text
        return response.status_code == 200

    await client.until(unloaded)
    loaded = await client.http.post("/v1/load_lora_adapter", json=LOADED)
    assert loaded.status_code == 200, loaded.text
    everyone = await client.of_both("/v1/models/tiny:z")
    assert {response.headers["x-molora-adapters-version"] for response in everyone} == {"3"}
    assert processes(server, "ray::RolloutStore") != [store]


async def a_loss(client: Client, server: int, number: signal.Signals) -> None:
    """One replica dies or hangs: its requests get an error that says to ask again, no others do, and it is replaced."""
    before = await client.replicas()
    is_lost = False

    async def ask(index: int) -> Answered:
        """What the signal finds on its way; load decides where, since nobody has asked it before."""
        for turn in itertools.count():
            lengths = ENDLESS | {"max_tokens": 200 + 40 * index}  # so that they do not all end at once
            answered = await client.chat(f"{number.name} {turn} {index}!", stream=bool(index % 2), **lengths)
            if is_lost:
                break
        return answered

    async def both_run() -> bool:
        counts = await client.metric("num_requests_running")
        return len(counts) == 2 and min(counts.values()) > 2

    victim = processes(server, "ray::ServeReplica:molora:Replica")[0]
    asking = [asyncio.create_task(ask(index)) for index in range(12)]
    await client.until(both_run)
    os.kill(victim, number)
    is_lost = True
    later = [asyncio.create_task(client.chat(f"{number.name} later {i}")) for i in range(4)]
    results = await asyncio.gather(*asking)
    lost = [each for each in results if "replica_lost" in each.text]
    assert 1 < len(lost) < len(results) - 1
    for each in lost:
        if each.status == 200:
            last = each.text.split("\n\n")[-2]
            assert last.startswith('data: {"error":{"message":"the replica that worked on this request was lost')
        else:
            assert (each.status, each.headers["retry-after"]) == (503, "1")
            assert '"type":"server_error"' in each.text
    whole = [each for each in results if each not in lost]
    assert all(each.status == 200 for each in whole)
    assert all(each.text.endswith("data: [DONE]\n\n") or '"usage"' in each.text for each in whole)
    survivors = {each.replica for each in whole}
    assert len(survivors) == 1
    assert survivors.isdisjoint(each.headers.get("x-molora-replica") for each in lost)

    for each in await asyncio.gather(*later):
        assert each.status == 200 or (each.status == 503 and "replica_lost" in each.text)

    again = await asyncio.gather(*(client.chat(f"{i}", model="tiny:z") for i in range(4)))
    assert {each.status for each in again} == {200}

    async def replaced() -> bool:
        return len(await client.replicas() - (before - survivors)) == 2

    await client.until(replaced, within_s=START_S)
    assert victim not in processes(server, "ray::ServeReplica:molora:Replica")
    everyone = await client.of_both("/v1/models/tiny:z")  # which the new one was never told of
    assert {response.status_code for response in everyone} == {200}


async def affinity(client: Client) -> None:
    """Of three adapters there is room for two, so one has to be read again; whoever has done so is asked for it."""
    for name in "vw":
        body = {"lora_name": name, "lora_path": name, "activation": 0}
        assert (await client.http.post("/v1/load_lora_adapter", json=body)).status_code == 200
    reader = (await client.chat("Who has z?", model="tiny:z")).replica
    await asyncio.sleep(3 * STATISTICS_PERIOD_S)  # until it has said so
    for name, has_it in (("z", True), ("v", False)):
        answered = [await client.chat(f"{name} {index}?", model=f"tiny:{name}") for index in range(8)]
        assert [each.replica == reader for each in answered] == [has_it] * 8


def processes(server: int, title: str) -> list[int]:
    """Those that a server has started, and those that these have started, by a part of their command."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()[1:]]
    parent = {int(pid): int(ppid) for pid, ppid, _ in rows}

    def is_ours(pid: int) -> bool:
        while pid in parent and pid != server:
            pid = parent[pid]
        return pid == server

    return [int(pid) for pid, _, args in rows if title in args and is_ours(int(pid))]


async def draining(client: Client, process: subprocess.Popen[bytes]) -> None:
    """Told to stop, it finishes what runs."""
    asking = [asyncio.create_task(client.chat(f"{i}", stream=True, max_tokens=200, ignore_eos=True)) for i in range(4)]

    async def all_run() -> bool:
        return sum((await client.metric("num_requests_running")).values()) == len(asking)

    await client.until(all_run)
    process.send_signal(signal.SIGTERM)
    for each in await asyncio.gather(*asking):
        assert each.status == 200
        assert each.text.endswith("data: [DONE]\n\n")


async def refusing(client: Client, process: subprocess.Popen[bytes]) -> None:
    """Told to stop, it says so to those that still wait for a place."""
    asking = [asyncio.create_task(client.chat(f"Refuse {i}!", stream=bool(i % 2), **ENDLESS)) for i in range(60)]
    await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)  # one for which there is no room: others wait
    await asyncio.sleep(0.5)  # and all have come: more than two replicas, if there are two again, have places for
    process.send_signal(signal.SIGTERM)
    answered = await asyncio.gather(*asking)
    assert 429 in {each.status for each in answered}
    refused = [each for each in answered if "the server is stopping" in each.text]
    assert refused
    assert {(each.status, each.headers["retry-after"]) for each in refused} == {(503, "1")}
    others = [each for each in answered if each not in refused and each.status != 429]
    assert all(each.status == 200 or "replica_lost" in each.text for each in others)
