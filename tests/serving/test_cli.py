"""The command line: what it passes on, and one line for what goes wrong."""

import asyncio

import pytest
import uvicorn

from molora.serving import cli


def test_options_reach_the_model_and_the_server(monkeypatch, model):
    loaded, served = {}, []
    monkeypatch.setattr("molora.load", lambda bank, **options: loaded.update(bank=bank, **options) or model)
    monkeypatch.setattr(cli.Server, "run", lambda server: served.append(server.config))
    options = "--bank banks/demo --base other --host 0.0.0.0 --port 81 --device cpu --dtype float32"
    assert cli.main(options.split()) == 0
    assert loaded == {"bank": "banks/demo", "base": "other", "device": "cpu", "dtype": "float32"}
    assert [(config.host, config.port) for config in served] == [("0.0.0.0", 81)]


def test_the_server_is_local_by_default():
    arguments = cli.parser().parse_args(["--bank", "banks/demo"])
    assert (arguments.host, arguments.port) == ("127.0.0.1", 8000)
    assert (arguments.base, arguments.device, arguments.dtype) == (None, None, "auto")


@pytest.mark.parametrize("error", [FileNotFoundError("no molora.json\nin banks/demo"), ValueError("no molora.json in")])
def test_a_bank_that_cannot_be_loaded_is_one_line(monkeypatch, capsys, error):
    def load(bank: str, **options: object) -> None:
        raise error

    monkeypatch.setattr("molora.load", load)
    assert cli.main(["--bank", "banks/demo"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: cannot load banks/demo: no molora.json in")
    assert output.err.count("\n") == 1


def test_it_says_where_it_listens_once_it_does(app, capsys):
    async def scenario() -> None:
        server = cli.Server(uvicorn.Config(app, port=0, log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.001)
        port = server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        await serving
        assert capsys.readouterr().out == f"Serving on http://127.0.0.1:{port}/v1\n"

    asyncio.run(scenario())
