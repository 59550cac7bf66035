"""The engine behind its server, on a port of this machine."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import uvicorn

from molora.serving.app import create_app
from molora.serving.config import ServeConfig
from molora.serving.engine import Engine

START_S = 60.0


@contextmanager
def served(engine: Engine) -> Iterator[HTTPConnection]:
    """A connection to the engine's server.

    Raises:
        RuntimeError: the server did not start.
    """
    app = create_app(engine, ServeConfig(bank=str(engine.m.bank.path), port=0))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + START_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the server did not start.")
            time.sleep(0.01)
        connection = HTTPConnection(*server.servers[0].sockets[0].getsockname()[:2])
        yield connection
        connection.close()
    finally:
        server.should_exit = True
        thread.join()


def first_token_s(connection: HTTPConnection, model: str, ids: list[int], start: int) -> float:
    """Seconds from token ids in to an answer of one token.

    Raises:
        RuntimeError: the server refused.
    """
    body = {"model": model, "prompt": ids, "activation": start, "max_tokens": 1, "ignore_eos": True, "temperature": 0}
    connection.close()  # the server has, if the last request is some seconds ago
    connection.connect()
    start_s = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text: Any = answer.read()
    seconds = time.perf_counter() - start_s
    if answer.status != 200:
        raise RuntimeError(f"the server answered {answer.status}: {text.decode()[:500]}")
    return seconds
