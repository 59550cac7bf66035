"""The process in which chat templates run: reads conversations, writes what transformers renders of them.

A template is code of a folder that others wrote. transformers' sandbox keeps it from files and from Python's inside,
but not from computing for ever or from filling the memory: that the kernel does, which ends this process at its limits.
This module is run as a file and imports nothing of MoLoRA, so that it starts without torch.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

MAX_ERROR_CHARS = 500


def main(file_descriptor: int, time_limit_s: float, max_memory_bytes: int, max_chars: int) -> None:
    """Serve a connection until it is closed.

    Args:
        time_limit_s: seconds that one conversation may compute; beyond it SIGPROF ends the process, whatever it does.
        max_memory_bytes: of the process's address space; beyond it there is a MemoryError.
        max_chars: of a rendered conversation.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(ValueError, OSError):  # macOS has the call, and not the limit
        resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    with Connection(file_descriptor) as connection:
        while True:
            try:
                head, body = connection.recv_bytes(), connection.recv_bytes()
            except EOFError:
                return
            signal.setitimer(signal.ITIMER_PROF, time_limit_s)
            common, conversations = json.loads(head)
            messages = read(body)
            for places, options in conversations:
                answer = encode(render(messages, places, common | options, max_chars))
                signal.setitimer(signal.ITIMER_PROF, 0)
                connection.send_bytes(answer)
                signal.setitimer(signal.ITIMER_PROF, time_limit_s)
            signal.setitimer(signal.ITIMER_PROF, 0)


def read(body: bytes) -> list[Any] | None:
    """The messages; None if there is no memory for them."""
    try:
        messages: list[Any] = json.loads(body)
        return messages
    except MemoryError:
        return None


def render(messages: list[Any] | None, places: list[int], options: dict[str, Any], max_chars: int) -> dict[str, str]:
    """Either the `text` of the messages at these places, or the `error` that the template ended in.

    Args:
        options: of transformers' `render_jinja_template`.
    """
    try:
        if messages is None:
            raise MemoryError
        rendered: Any = render_jinja_template([[messages[place] for place in places]], **options)  # two lists
        text: str = rendered[0][0]
        if len(text) > max_chars:
            return {"error": f"it makes {len(text)} characters of them, more than {max_chars}"}
        return {"text": text}
    except MemoryError:
        return {"error": "it takes more memory than a template may"}
    except Exception as error:  # a template can end in any
        name = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        return {"error": f"{name}{error}"[:MAX_ERROR_CHARS]}


def encode(message: dict[str, Any]) -> bytes:
    """As both sides send it; half of a surrogate pair passes."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
