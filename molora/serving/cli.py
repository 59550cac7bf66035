"""The command line of the server."""

import argparse
import contextlib
import socket
import sys
from collections.abc import Sequence

import uvicorn

import molora
from molora.display import one_line
from molora.serving.app import create_app


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a bank until interrupted. Returns the exit status: 2 when the bank cannot be loaded."""
    arguments = parser().parse_args(argv)
    try:
        model = molora.load(arguments.bank, base=arguments.base, device=arguments.device, dtype=arguments.dtype)
        app = create_app(model)
    except Exception as error:  # whatever is wrong with a bank, its base or the device: one line for the user
        print(f"error: cannot load {arguments.bank}: {one_line(error)}", file=sys.stderr)
        return 2
    config = uvicorn.Config(app, host=arguments.host, port=arguments.port, log_level="warning")
    with contextlib.suppress(KeyboardInterrupt):
        Server(config).run()
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve.py", description="Serve a bank behind an OpenAI-compatible API.")
    parser.add_argument("--bank", required=True, help="the bank's folder")
    parser.add_argument("--base", help="base model to use instead of the one the bank names: a folder or a hub name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--device", help="torch device, such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 or auto (default): bfloat16 on a GPU, else float32"
    )
    return parser


class Server(uvicorn.Server):
    """Says where it listens, once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"Serving on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
