"""The command line of the server."""

import argparse
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

import molora
from molora.display import one_line
from molora.serving.config import ServeConfig, read_config

ENGINE_FLAGS = {
    "kv_cache_bytes": "bytes of the KV cache",
    "block_size": "tokens of a block of it",
    "max_step_tokens": "tokens that a step computes at most",
    "max_sequences": "sequences that run at once",
    "max_waiting": "requests that may wait; one more is answered by 429",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a bank until it is told to stop, then let running requests finish.

    Returns:
        The exit status: 2 when the settings are wrong or the bank cannot be loaded.
    """
    arguments = vars(parser().parse_args(argv))
    try:
        config = read_config(arguments.pop("config", None), _nested(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    try:
        engine, app = load(config)
    except Exception as error:  # whatever is wrong with a bank, its base or the device: one line for the user
        print(f"error: cannot load {config.bank}: {one_line(error)}", file=sys.stderr)
        return 2
    options = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=config.drain_s,
    )
    server = Server(options)
    try:
        with _quiet_stop():
            server.run()
    finally:
        engine.close()
    return 0


def load(config: ServeConfig) -> tuple[Any, Any]:
    """The engine and the app; these imports take seconds, which a wrong flag should not."""
    from molora.serving.app import create_app
    from molora.serving.engine import Engine

    model = molora.load(
        config.bank,
        base=config.base,
        device=config.device,
        dtype=config.dtype,
        num_extra_slots=config.num_extra_slots,
        max_rank=config.limits.max_adapter_rank,
    )
    engine = Engine(model, config.engine)
    return engine, create_app(engine, config)


def parser() -> argparse.ArgumentParser:
    # A flag that was not given is absent, so that the file's value stands.
    parser = argparse.ArgumentParser(
        prog="serve.py",
        description="Serve a bank behind an OpenAI-compatible API. Flags override the configuration file.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", help="a YAML file such as configs/serve.yaml, which lists every setting")
    parser.add_argument("--bank", help="the bank's folder")
    parser.add_argument("--base", help="base model to use instead of the one the bank names: a folder or a hub name")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="0 takes a free one (default: 8000)")
    parser.add_argument("--device", help="torch device, such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 or auto (default): bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--api-key", dest="api_keys", action="append", metavar="KEY", help="clients must send one of these; repeatable"
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="keys, one a line, which no process list shows")
    parser.add_argument(
        "--adapter-folder",
        dest="adapter_folders",
        action="append",
        metavar="FOLDER",
        help="let clients load adapters that lie in this folder; repeatable",
    )
    parser.add_argument(
        "--num-extra-slots", type=int, metavar="N", help="adapters that fit beside the bank's own (default: 0)"
    )
    parser.add_argument(
        "--drain-s", type=int, metavar="SECONDS", help="time to finish running requests after SIGTERM (default: 30)"
    )
    engine = parser.add_argument_group("engine")
    for name, description in ENGINE_FLAGS.items():
        engine.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=description)
    return parser


def _nested(flags: dict[str, Any]) -> dict[str, Any]:
    engine = {name: flags.pop(name) for name in ENGINE_FLAGS if name in flags}
    return flags | ({"engine": engine} if engine else {})


@contextlib.contextmanager
def _quiet_stop() -> Iterator[None]:
    """uvicorn stops in order at SIGINT and SIGTERM, and then raises them again; here that is no error."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Server(uvicorn.Server):
    """Says where it listens, once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"Serving on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
