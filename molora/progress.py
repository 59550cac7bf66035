"""Telling a user what takes long: lines and spinners on a console, and transformers' own bars kept quiet."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging

_bars: Any = transformers_logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars inside the block."""
    shown = _bars.is_progress_bar_enabled()
    _bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            _bars.enable_progress_bar()


@contextmanager
def step(console: Console, text: str) -> Iterator[None]:
    """Tell a step as it begins and how it ended, with a spinner between the two on a terminal."""
    start_s = time.perf_counter()
    if not console.is_terminal:
        say(console, "•", text)
    try:
        with console.status(escape(text)):
            yield
    except BaseException:
        say(console, "[red]✗[/]", text)
        raise
    say(console, "[green]✓[/]", text, f"{time.perf_counter() - start_s:.1f} s")


def say(console: Console, mark: str, text: str, aside: str = "") -> None:
    console.print(f"{mark} {escape(text)}" + (aside and f" [dim]{aside}[/]"), highlight=False, soft_wrap=True)
