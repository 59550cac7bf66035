"""The command line: what it passes on, one line for what goes wrong, and an orderly end."""

import asyncio
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from molora.serving import cli
from molora.serving.config import ServeConfig
from molora.serving.engine import Engine, EngineConfig
from molora.serving.request import EngineClosedError


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

    def run(server, sockets):
        calls.update(server=server.config, address=sockets[0].getsockname())

    monkeypatch.setattr(cli.Server, "run", run)
    return calls


@pytest.fixture
def port():
    """A free one."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_options_reach_the_model_the_engine_and_the_server(loaded, engine, port):
    options = (
        f"--bank banks/demo --base other --host 0.0.0.0 --port {port} --device cpu --dtype float32 --drain-s 5 "
        "--num-extra-slots 2 --block-size 32 --kv-cache-bytes 1_000_000 --max-step-tokens 99 --max-sequences 9 "
        "--max-waiting 3"
    )
    assert cli.main(options.split()) == 0
    assert loaded.pop("server").timeout_graceful_shutdown == 5 + cli.GRACE_S
    assert loaded.pop("address") == ("0.0.0.0", port)
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
    assert engine.log == ["warm up", "close"]


def test_it_says_what_takes_long(loaded, engine, capsys):
    assert cli.main(["--bank", "banks/demo", "--port", "0"]) == 0
    assert "Compiling for the GPU" in capsys.readouterr().out


def test_the_server_is_local_and_open_by_default(loaded, monkeypatch):
    bound = []
    monkeypatch.setattr(cli, "bind", lambda *address: bound.append(address) or socket.create_server(("127.0.0.1", 0)))
    assert cli.main(["--bank", "banks/demo"]) == 0
    assert bound == [("127.0.0.1", 8000)]
    server = loaded.pop("server")
    assert server.timeout_graceful_shutdown == 30 + cli.GRACE_S
    assert (server.limit_concurrency, server.timeout_keep_alive) == (512, 75)
    assert (loaded["base"], loaded["device"], loaded["dtype"]) == (None, None, "auto")
    assert loaded["engine"] == EngineConfig()


def test_keys_and_a_file_of_settings(loaded, tmp_path, call, port):
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"bank: banks/demo\nport: 81\nadapter_folders: [{tmp_path}]\nlimits: {{max_adapter_rank: 32}}\n"
        "keep_alive_s: 100\nmax_connections: 9\n"
    )
    assert cli.main(["--config", str(file), "--port", str(port), "--api-key", "one", "--api-key", "two"]) == 0
    server = loaded.pop("server")
    assert (loaded["address"][1], loaded["bank"], loaded["max_rank"]) == (port, "banks/demo", 32)
    assert (server.timeout_keep_alive, server.limit_concurrency) == (100, 9)
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
        (["--bank", "b", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:8000"),
    ],
)
def test_a_setting_that_is_wrong_is_one_line(loaded, capsys, options, words):
    assert cli.main(options) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n"), loaded) == ("", 1, {})
    assert output.err.startswith("error: ")
    assert words in output.err


def test_a_port_in_use_is_known_before_anything_is_loaded(loaded, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert cli.main(["--bank", "b", "--port", str(other.getsockname()[1])]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n"), loaded) == ("", 1, {})
    assert output.err.startswith("error: cannot listen on 127.0.0.1:")
    assert "in use" in output.err


def test_a_port_that_another_server_took_while_this_one_was_loading(monkeypatch, engine, capsys, port):
    def load(config):
        others.append(socket.create_server(("127.0.0.1", port)))
        return engine, cli_app(engine, config)

    others = []
    monkeypatch.setattr(cli, "load", load)
    assert cli.main(["--bank", "b", "--port", str(port)]) == 2
    others[0].close()
    assert capsys.readouterr().err == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize("error", [FileNotFoundError("no molora.json\nin banks/demo"), ValueError("no molora.json in")])
def test_a_bank_that_cannot_be_loaded_is_one_line(monkeypatch, capsys, error):
    def load(bank, **options):
        raise error

    monkeypatch.setattr("molora.load", load)
    assert cli.main(["--bank", "banks/demo", "--port", "0"]) == 2
    output = capsys.readouterr()
    assert output.out == "Loading banks/demo ...\n"
    assert output.err.startswith("error: cannot load banks/demo: no molora.json in")
    assert output.err.count("\n") == 1


def test_stopping_it_while_it_loads_is_no_error(monkeypatch, capsys):
    def load(bank, **options):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr("molora.load", load)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        assert cli.main(["--bank", "banks/demo", "--port", "0"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


def test_it_says_where_it_listens_once_it_does(app, engine, capsys):
    async def scenario():
        sock = cli.bind("127.0.0.1", 0)
        server = cli.Server(engine, app, ServeConfig(bank="demo"))
        serving = asyncio.create_task(server.serve([sock]))
        while not server.started:
            await asyncio.sleep(0.001)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        await serving
        assert capsys.readouterr().out == f"Serving a page on {url} and the API on {url}/v1\n"

    asyncio.run(scenario())


CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "stream": True}


@contextmanager
def in_another_thread(ask):
    """The server's own is the main one, where signals arrive."""

    def ask_or_stop():
        try:
            ask()
        except BaseException:
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_or_stop)
        yield
        asked.result(timeout=20)


@pytest.mark.parametrize(("drain_s", "is_finished"), [(10, True), (0, False)])
def test_sigterm_lets_running_requests_finish(monkeypatch, engine, port, drain_s, is_finished):
    monkeypatch.setattr(cli, "load", lambda config: (engine, cli_app(engine, config)))
    answers = []

    async def slowly(position):
        for _ in range(20 if is_finished else 1000 * position):
            if engine.stopped:
                raise EngineClosedError("the engine was closed.")
            await asyncio.sleep(0.01)

    def ask():
        url = wait_until_served(port)
        with httpx.stream("POST", f"{url}/chat/completions", json=CHAT) as response:
            lines = response.iter_lines()
            answers.append(next(lines))
            os.kill(os.getpid(), signal.SIGTERM)
            answers.extend(lines)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/models")

    engine.before_token = slowly
    before = signal.getsignal(signal.SIGTERM)
    with in_another_thread(ask):
        assert cli.main(["--bank", "demo", "--port", str(port), "--drain-s", str(drain_s)]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert ("data: [DONE]" in answers) == is_finished
    assert ("the server is stopping; ask another one, or again in a while" in answers[-2]) != is_finished
    assert engine.running == []
    assert engine.log[:1] + engine.log[-1:] == ["submit", "close"]
    assert engine.log.index("close") == (2 if is_finished else 1)


def test_what_is_not_done_in_time_is_told_so(m, monkeypatch, port):
    engine = Engine(m, EngineConfig(kv_cache_bytes=1 << 24))
    monkeypatch.setattr(cli, "load", lambda config: (engine, cli_app(engine, config)))
    monkeypatch.setattr(engine._runner, "launch", slowed(engine._runner.launch))
    endless = CHAT | {"model": "tiny", "max_tokens": 700, "ignore_eos": True}
    answers = {}

    def ask():
        url = f"{wait_until_served(port)}/chat/completions"
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(httpx.post, url, json=endless | {"stream": False}, timeout=20)
            streamed = pool.submit(httpx.post, url, json=endless, timeout=20)
            while engine.stats().num_generated_tokens < 4:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            answers["told_s"] = time.monotonic()
            answers["whole"], answers["streamed"] = whole.result(), streamed.result()

    with in_another_thread(ask):
        assert cli.main(["--bank", "tiny", "--port", str(port), "--drain-s", "1"]) == 0
    assert 1 <= time.monotonic() - answers["told_s"] < 1 + cli.GRACE_S
    expected = {
        "message": "the server is stopping; ask another one, or again in a while",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert (answers["whole"].status_code, answers["whole"].json()) == (503, {"error": expected})
    *_, last, _ = answers["streamed"].text.split("\n\n")
    assert json.loads(last.removeprefix("data: ")) == {"error": expected}


def test_a_second_ctrl_c_ends_answers_at_once_and_says_so(m, monkeypatch, port, capfd):
    engine = Engine(m, EngineConfig(kv_cache_bytes=1 << 24))
    monkeypatch.setattr(cli, "load", lambda config: (engine, cli_app(engine, config)))
    monkeypatch.setattr(engine._runner, "launch", slowed(engine._runner.launch))
    answers = []

    def ask():
        url = f"{wait_until_served(port)}/chat/completions"
        with ThreadPoolExecutor(1) as pool:
            endless = CHAT | {"model": "tiny", "max_tokens": 700, "ignore_eos": True}
            streamed = pool.submit(httpx.post, url, json=endless, timeout=20)
            while engine.stats().num_generated_tokens < 4:
                time.sleep(0.01)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            answers.append(streamed.result())

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    began_s = time.monotonic()
    try:
        with in_another_thread(ask):
            assert cli.main(["--bank", "tiny", "--port", str(port), "--drain-s", "60"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began_s < 20
    *_, last, _ = answers[0].text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["message"].startswith("the server is stopping")
    out, err = capfd.readouterr()
    assert "Finishing an answer, for up to 60 s. Ctrl-C again stops now." in out.splitlines()
    assert err == ""


def test_a_body_that_does_not_arrive_does_not_keep_the_server(monkeypatch, engine, port):
    monkeypatch.setattr(cli, "GRACE_S", 0.3)
    monkeypatch.setattr(cli, "load", lambda config: (engine, cli_app(engine, config)))
    answers = []

    def ask():
        url = httpx.URL(wait_until_served(port))
        with socket.create_connection((url.host, url.port), timeout=10) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)
            while data := sock.recv(1 << 16):
                answers.append(data)

    with in_another_thread(ask):
        assert cli.main(["--bank", "demo", "--port", str(port), "--drain-s", "0"]) == 0
    head, _, body = b"".join(answers).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(body)["error"]["type"] == "server_error"


def test_a_step_that_hangs_does_not_keep_the_process(monkeypatch, engine):
    monkeypatch.setattr(cli, "GRACE_S", 0.1)
    monkeypatch.setattr(type(engine), "close", lambda engine: time.sleep(30))
    begun = time.monotonic()
    cli._close(engine)
    assert time.monotonic() - begun < 5


def wait_until_served(port):
    """Returns where."""
    for _ in range(1000):
        try:
            httpx.get(f"http://127.0.0.1:{port}/health")
            return f"http://127.0.0.1:{port}/v1"
        except httpx.TransportError:
            time.sleep(0.01)
    return pytest.fail("it did not begin")


def slowed(step):
    def slow(*arguments):
        time.sleep(0.05)
        return step(*arguments)

    return slow


def cli_app(engine, config):
    from molora.serving.app import create_app

    return create_app(engine, config)
