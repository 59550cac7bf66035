"""Rendering a conversation by the chat template of a base model, in a process with limits.

This module knows tokenizers, but no model and no activation.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

TIME_LIMIT_S = 2.0  # of computing, for one conversation: ordinary templates take less than a millisecond
MAX_MEMORY_BYTES = 2 << 30  # of the process's address space, of which it uses a tenth
MAX_CHARS = 16 << 20  # of a rendered conversation
WAIT_LIMIT_S = 60.0  # for an answer, where the machine is so busy that the process hardly runs
WORKER = Path(__file__).with_name("chat_template_worker.py")


logger = logging.getLogger(__name__)


class TemplateLimitError(ValueError):
    """A chat template took more time or memory than it may."""


class Conversation(NamedTuple):
    """What a template is to render; the options are those of transformers' `apply_chat_template`."""

    messages: Sequence[Mapping[str, str]]
    add_generation_prompt: bool = False
    continue_final_message: bool = False


def apply_chat_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """What `tokenizer.apply_chat_template(..., tokenize=False)` returns.

    Raises:
        ValueError: there is no template, or it refuses the messages.
        TemplateLimitError: it computes for more than `TIME_LIMIT_S`, or ends its process.
    """
    asked = Conversation(messages, add_generation_prompt, continue_final_message)
    (text,) = apply_chat_templates(tokenizer, [asked])
    if isinstance(text, ValueError):
        raise text
    return text


def apply_chat_templates(tokenizer: Any, asked: Sequence[Conversation]) -> list[str | ValueError]:
    """Each conversation's text, or what the template refuses it with.

    All are asked for at once: to ask costs more than to render.

    Raises:
        ValueError: there is no template.
        TemplateLimitError: it computes for more than `TIME_LIMIT_S` on one of them, or ends its process.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("this tokenizer has no chat template; pass plain text or token ids instead of messages.")
    common = {**tokenizer.special_tokens_map, "chat_template": tokenizer.get_chat_template()}
    asked = [each._replace(messages=list(each.messages)) for each in asked]
    messages = {id(message): message for each in asked for message in each.messages}  # each is sent once
    places = {key: place for place, key in enumerate(messages)}
    conversations = [
        (
            [places[id(message)] for message in each.messages],
            {
                "add_generation_prompt": each.add_generation_prompt,
                "continue_final_message": each.continue_final_message,
            },
        )
        for each in asked
    ]
    head, body = (json.dumps(each, default=str).encode() for each in ([common, conversations], [*messages.values()]))
    answers = _renderer.ask(head, body, len(asked))
    return [
        ValueError(f"the chat template refuses these messages: {answer['error']}.")
        if "error" in answer
        else answer["text"]
        for answer in answers
    ]


def start_rendering() -> None:
    """Start the process now, without waiting for it, so that the first conversation need not."""
    _renderer.start()


class _Renderer:
    """A process that renders for one caller at a time, started when it is first needed and after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def start(self) -> None:
        with self._lock:
            self._start()

    def ask(self, head: bytes, body: bytes, num_answers: int) -> list[dict[str, str]]:
        with self._lock:
            connection, process = self._start()
            try:
                connection.send_bytes(head)
                connection.send_bytes(body)
                return [_receive(connection) for _ in range(num_answers)]
            except (EOFError, OSError):
                self._end()
                why = _why(process.returncode)
                logger.warning("%s", why)
                raise TemplateLimitError(why) from None
            except BaseException:  # such as Ctrl-C: what comes next would read this answer
                self._end()
                raise

    def _start(self) -> tuple[Connection, subprocess.Popen[bytes]]:
        if self._connection is None or self._process is None:
            ours, theirs = Pipe()
            limits = (TIME_LIMIT_S, MAX_MEMORY_BYTES, MAX_CHARS)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(WORKER), *map(str, (theirs.fileno(), *limits))],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # Threads that nothing here needs would count as its memory.
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C is for us
                )
            self._connection = ours
        return self._connection, self._process

    def end(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.forget()

    def forget(self) -> None:
        """Leave the process to whoever started it."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.close()
        self._process = self._connection = None


def _receive(connection: Connection) -> dict[str, str]:
    if not connection.poll(WAIT_LIMIT_S):  # the kernel ends the process long before
        raise EOFError
    answer: dict[str, str] = json.loads(connection.recv_bytes(6 * MAX_CHARS + 64).decode("utf-8", "surrogatepass"))
    return answer


def _why(status: int | None) -> str:
    if status == -signal.SIGPROF:
        return (
            f"the chat template does not end within {TIME_LIMIT_S:g} s on these messages; send others, or plain text."
        )
    return f"the chat template ended the process that renders it (status {status}) on these messages."


def _after_fork() -> None:
    """A fork has a process of its own: two that ask one would read each other's answers."""
    global _renderer
    inherited, _renderer = _renderer, _Renderer()
    if inherited._process is not None:
        inherited._process.returncode = 0  # it is not this process's child, and not to be waited for
    inherited.forget()


_renderer = _Renderer()
atexit.register(lambda: _renderer.end())
os.register_at_fork(after_in_child=_after_fork)
