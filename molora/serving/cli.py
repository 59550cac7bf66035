"""The command line of the server."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

import molora
from molora.chat_template import start_rendering
from molora.display import one_line
from molora.serving.cluster.config import read_cluster_config
from molora.serving.config import LOG_FORMATS, ServeConfig, read_config
from molora.serving.logs import json_logging

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from molora.serving.engine import Engine

GRACE_S = 5  # beyond drain_s, in which clients are told that the server stops
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
        The exit status: 2 when the settings are wrong, the port is taken or the bank cannot be loaded.
    """
    arguments = vars(parser().parse_args(argv))
    if arguments.pop("ray", False):
        return _on_ray(arguments.pop("config", None), _nested(arguments))
    try:
        try:
            config = read_config(arguments.pop("config", None), _nested(arguments))
            sock = bind(config.host, config.port)
        except (ValueError, OSError) as error:
            return _fail(one_line(error))
        with sock:
            return serve(config, sock)
    except KeyboardInterrupt:
        return 130


def _on_ray(file: str | None, flags: dict[str, Any]) -> int:
    try:
        config = read_cluster_config(file, flags)
        with bind(config.server.host, config.server.port) as sock:
            free = replace(config.server, port=sock.getsockname()[1])
        if free.log_format == "json":
            # Ray, which reads this when it is imported, shows else but one of lines that are alike.
            os.environ["RAY_DEDUP_LOGS"] = "0"
        from molora.serving.cluster.deploy import serve_on_ray

        return serve_on_ray(replace(config, server=free))
    except (ValueError, OSError, RuntimeError) as error:
        return _fail(one_line(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        return _fail("--ray needs Ray Serve, which is not installed; install it by: pip install 'molora[ray]'")
    except KeyboardInterrupt:
        return 130


def bind(host: str, port: int) -> socket.socket:
    """Before the model is loaded, so that a port in use is known at once; clients are refused until it is served.

    Raises:
        OSError: it is in use, or not to be had.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return sock


def serve(config: ServeConfig, sock: socket.socket) -> int:
    print(f"Loading {config.bank} ...", flush=True)
    try:
        engine, app = load(config)
    except Exception as error:  # whatever is wrong with a bank, its base or the device: one line for the user
        return _fail(f"cannot load {config.bank}: {one_line(error)}")
    try:
        sock.listen()
    except OSError as error:  # another server was bound to it as well, and has loaded faster
        return _fail(f"cannot listen on {config.host}:{config.port}: {error.strerror}")
    try:
        with _quiet_stop():
            Server(engine, app, config).run(sockets=[sock])
    finally:
        _close(engine)
    return 0


def load(config: ServeConfig) -> tuple[Engine, FastAPI]:
    """The engine and the app; these imports take seconds, which a wrong flag should not."""
    from molora.serving.app import create_app
    from molora.serving.tracing import Tracer

    tracer = None if config.otlp_endpoint is None else Tracer.to_endpoint(config.otlp_endpoint)
    engine = load_engine(config)
    return engine, create_app(engine, config, tracer=tracer)


def load_engine(config: ServeConfig) -> Engine:
    """An engine that is warm."""
    from molora.serving.engine import Engine

    start_rendering()
    model = molora.load(
        config.bank,
        base=config.base,
        device=config.device,
        dtype=config.dtype,
        num_extra_slots=config.num_extra_slots,
        max_rank=config.limits.max_adapter_rank,
    )
    engine = Engine(model, config.engine)
    if engine.captures:
        print("Compiling for the GPU, which takes a minute or two ...", flush=True)
    engine.warm_up()
    return engine


def print_address(host: str, port: int) -> None:
    """That it serves, and where; for a person, and for scripts that wait for the line."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"Serving a page on {url} and the API on {url}/v1", flush=True)


def parser() -> argparse.ArgumentParser:
    # A flag that was not given is absent, so that the file's value stands.
    parser = argparse.ArgumentParser(
        prog="serve.py",
        description="Serve a bank behind an OpenAI-compatible API. Flags override the configuration file.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", help="a YAML file such as configs/serve.yaml, which lists every setting")
    parser.add_argument(
        "--ray",
        action="store_true",
        help="replicas on Ray Serve, which needs the extra `ray`; configs/serve_ray.yaml lists its settings",
    )
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
        "--drain-s",
        type=int,
        metavar="SECONDS",
        help="time to finish running requests after Ctrl-C or SIGTERM (default: 30)",
    )
    parser.add_argument("--log-format", choices=LOG_FORMATS, help="of standard error; json logs each request, too")
    parser.add_argument("--otlp-endpoint", metavar="URL", help="where OpenTelemetry traces go (needs molora[otel])")
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


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _close(engine: Engine) -> None:
    """A step that hangs does not keep the process: the engine's thread ends with it."""
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(GRACE_S)


class Server(uvicorn.Server):
    """Says where it listens, once it does; when it is told to stop, running requests get `drain_s` to finish."""

    def __init__(self, engine: Engine, app: FastAPI, config: ServeConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                log_config=json_logging() if config.log_format == "json" else LOGGING_CONFIG,
                server_header=False,
                limit_concurrency=config.max_connections,
                timeout_keep_alive=config.keep_alive_s,
                timeout_graceful_shutdown=config.drain_s + GRACE_S,
            )
        )
        self._engine = engine
        self._drain_s = config.drain_s
        self._is_told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print_address(*self.servers[0].sockets[0].getsockname()[:2])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At the second Ctrl-C clients are told that the server stops, at the third one it does."""
        is_impatient, is_told = self.should_exit and sig == signal.SIGINT, self._is_told
        super().handle_exit(sig, frame)
        if is_impatient and not is_told:
            self.force_exit = False
            self._end_requests()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Requests that are not done in time fail in the engine, so that each client is still told."""
        stats = self._engine.stats()
        if num_left := stats.num_running + stats.num_waiting:
            what = "an answer" if num_left == 1 else f"{num_left} answers"
            print(f"Finishing {what}, for up to {self._drain_s} s. Ctrl-C again stops now.", flush=True)
        ending = threading.Timer(self._drain_s, self._end_requests)
        ending.daemon = True
        ending.start()
        await super().shutdown(sockets)
        ending.cancel()

    def _end_requests(self) -> None:
        self._is_told = True
        threading.Thread(target=self._engine.close, daemon=True).start()
