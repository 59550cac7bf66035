"""The command line: what it passes on, one line for what goes wrong, and an orderly end."""

import asyncio
import os
import signal
import threading
import time

import httpx
import pytest
import uvicorn

from molora.serving import cli
from molora.serving.engine import EngineConfig


@pytest.fixture
def loaded(monkeypatch, engine):
    """What was loaded and served, instead of doing so."""
    calls = {}

    def load(bank, **options):
        calls.update(bank=bank, **options)
        return engine.m

    def make_engine(m, config):
        calls["engine"] = config
        return engine

    monkeypatch.setattr("molora.load", load)
    monkeypatch.setattr("molora.serving.engine.Engine", make_engine)
    monkeypatch.setattr(type(engine), "close", lambda engine: engine.log.append("close"), raising=False)
    monkeypatch.setattr(cli.Server, "run", lambda server: calls.update(server=server.config))
    return calls


def test_options_reach_the_model_the_engine_and_the_server(loaded, engine):
    options = (
        "--bank banks/demo --base other --host 0.0.0.0 --port 81 --device cpu --dtype float32 --drain-s 5 "
        "--num-extra-slots 2 --block-size 32 --kv-cache-bytes 1_000_000 --max-step-tokens 99 --max-sequences 9 "
        "--max-waiting 3"
    )
    assert cli.main(options.split()) == 0
    server = loaded.pop("server")
    assert (server.host, server.port, server.timeout_graceful_shutdown) == ("0.0.0.0", 81, 5)
    assert loaded == {
        "bank": "banks/demo",
        "base": "other",
        "device": "cpu",
        "dtype": "float32",
        "num_extra_slots": 2,
        "max_rank": None,
        "engine": EngineConfig(
            kv_cache_bytes=1_000_000, block_size=32, max_step_tokens=99, max_sequences=9, max_waiting=3
        ),
    }
    assert engine.log == ["close"]


def test_the_server_is_local_and_open_by_default(loaded):
    assert cli.main(["--bank", "banks/demo"]) == 0
    server = loaded.pop("server")
    assert (server.host, server.port, server.timeout_graceful_shutdown) == ("127.0.0.1", 8000, 30)
    assert (loaded["base"], loaded["device"], loaded["dtype"]) == (None, None, "auto")
    assert loaded["engine"] == EngineConfig()


def test_keys_and_a_file_of_settings(loaded, tmp_path, call):
    file = tmp_path / "serve.yaml"
    file.write_text(f"bank: banks/demo\nport: 81\nadapter_folders: [{tmp_path}]\nlimits: {{max_adapter_rank: 32}}\n")
    assert cli.main(["--config", str(file), "--port", "82", "--api-key", "one", "--api-key", "two"]) == 0
    server = loaded.pop("server")
    assert (server.port, loaded["bank"], loaded["max_rank"]) == (82, "banks/demo", 32)
    for key, status in (("one", 200), ("two", 200), ("three", 401)):
        headers = {"authorization": f"Bearer {key}"}
        assert call(server.app, "GET", "/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "key 'bank' is missing"),
        (["--bank", "b", "--port", "70000"], "port is 70000"),
        (["--bank", "b", "--block-size", "0"], "block_size is 0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--bank", "b", "--api-key-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_a_setting_that_is_wrong_is_one_line(loaded, capsys, options, words):
    assert cli.main(options) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n"), loaded) == ("", 1, {})
    assert output.err.startswith("error: ")
    assert words in output.err


@pytest.mark.parametrize("error", [FileNotFoundError("no molora.json\nin banks/demo"), ValueError("no molora.json in")])
def test_a_bank_that_cannot_be_loaded_is_one_line(monkeypatch, capsys, error):
    def load(bank, **options):
        raise error

    monkeypatch.setattr("molora.load", load)
    assert cli.main(["--bank", "banks/demo"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: cannot load banks/demo: no molora.json in")
    assert output.err.count("\n") == 1


def test_it_says_where_it_listens_once_it_does(app, capsys):
    async def scenario():
        server = cli.Server(uvicorn.Config(app, port=0, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.001)
        port = server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        await serving
        assert capsys.readouterr().out == f"Serving on http://127.0.0.1:{port}/v1\n"

    asyncio.run(scenario())


CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "stream": True}


@pytest.mark.parametrize(("drain_s", "is_finished"), [(10, True), (0, False)])
def test_sigterm_lets_running_requests_finish(loaded, monkeypatch, engine, capfd, drain_s, is_finished):
    monkeypatch.undo()
    monkeypatch.setattr(cli, "load", lambda config: (engine, cli_app(engine, config)))
    monkeypatch.setattr(type(engine), "close", lambda engine: engine.log.append("close"), raising=False)
    answers = []

    async def slowly(position):
        await asyncio.sleep(0.2 if is_finished else 0.5)

    def ask_and_terminate():
        for _ in range(500):
            out = capfd.readouterr().out
            if out:
                break
            time.sleep(0.01)
        url = out.split()[-1]
        with httpx.stream("POST", f"{url}/chat/completions", json=CHAT) as response:
            lines = response.iter_lines()
            answers.append(next(lines))
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                answers.extend(lines)
            except httpx.RemoteProtocolError:
                answers.append("cut")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/models")

    engine.before_token = slowly
    asking = threading.Thread(target=ask_and_terminate)
    asking.start()
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["--bank", "demo", "--port", "0", "--drain-s", str(drain_s)]) == 0
    asking.join(timeout=20)
    assert not asking.is_alive()
    assert signal.getsignal(signal.SIGTERM) is before
    assert ("data: [DONE]" in answers) == is_finished
    assert engine.running == []
    assert engine.log == ["submit", "end" if is_finished else "cancel", "close"]


def cli_app(engine, config):
    from molora.serving.app import create_app

    return create_app(engine, config)
