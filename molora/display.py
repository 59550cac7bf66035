"""Text on a terminal, coloured by the adapter that acted on it.

A console without colours (a pipe, a log file, `NO_COLOR`) gets a mark such as `[sorting]` wherever the adapter
changes. This module knows routes and consoles, but no model.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

MAX_WIDTH = 96
# Of middling lightness, so that they read on a dark and on a light background. Neighbours differ in hue and lightness.
COLOURS = ("#2f81f7", "#d97706", "#0d9f6e", "#d946a8", "#8b6cf6", "#0e9bb5", "#8a8a12", "#e5534b")
# A terminal of 16 colours would show several of those alike. None of these is as dark or as light as a background.
FEW_COLOURS = ("bright_blue", "yellow", "green", "magenta", "cyan", "red", "bright_magenta", "bright_red")
_PARTS = re.compile(r"\n|[^\S\n]+|\S+")
# What jsonargparse says where a value is none of several types, and no other such thing within it.
_NONE_OF_TYPES = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: [^\n]*\s+Errors:\n"
    r"(?P<errors>(?:(?!Does not validate against any).)*?)\n\s*Given value type: [^\n]*\n\s*Given value: [^\n]*",
    re.DOTALL,
)


def make_console(*, stderr: bool = False) -> Console:
    """A console that wraps at a comfortable width and never fails on a character that its file cannot encode."""
    stream = sys.stderr if stderr else sys.stdout
    if reconfigure := getattr(stream, "reconfigure", None):
        reconfigure(errors="replace")
    return Console(stderr=stderr, highlight=False)


class Palette:
    """A colour for each adapter, and the terminal's own for the base model.

    Args:
        color_system: the console's.
    """

    def __init__(self, adapters: Sequence[str], color_system: str | None = None) -> None:
        self._styles = {"base": "none"}
        colours = FEW_COLOURS if color_system in ("standard", "windows") else COLOURS
        for index, name in enumerate(adapters):
            repeat = " underline" * (index // len(colours) % 2)
            self._styles[name] = colours[index % len(colours)] + repeat

    def style(self, route: Sequence[tuple[str, float]]) -> str:
        """The colour of a route: that of its adapter of the largest weight."""
        return self._styles[max(route, key=lambda pair: abs(pair[1]))[0] if route else "base"]

    def legend(self) -> Text:
        swatches = (Text.assemble(("■ ", style), (name, style)) for name, style in self._styles.items())
        return Text("   ").join(swatches)


def label(route: Sequence[tuple[str, float]]) -> str:
    """A route in words: `base`, an adapter's name, or `0.7 sums + 0.3 words`."""
    if len(route) == 1 and route[0][1] == 1.0:
        return route[0][0]
    return " + ".join(f"{gate:.2g} {name}" for name, gate in route) or "base"


def is_coloured(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


class RoutedWriter:
    """Writes tokens as they come, indented and wrapped between words; a word appears once it is whole.

    Args:
        indent: columns left free before each line.
        dim: everything in the terminal's dimmed colour, and no marks.
    """

    def __init__(self, console: Console, palette: Palette, *, indent: int = 0, dim: bool = False) -> None:
        self._console = console
        self._palette = palette
        self._indent = indent
        self._dim = dim
        self._width = min(console.width - 1, MAX_WIDTH)
        self._column = 0
        self._spaces = ""
        self._word: list[tuple[str, str]] = []
        self._marked: str | None = None

    def label(self, text: str, style: str) -> None:
        """Write into the margin of the first line."""
        self._console.print(Text(text.ljust(self._indent), style), end="", soft_wrap=True)
        self._column = self._indent

    def push(self, text: str, route: Sequence[tuple[str, float]] | None) -> None:
        """Write what a route produced; None is text that no model wrote."""
        style = "dim" if self._dim else "none" if route is None else self._palette.style(route)
        for part in _PARTS.findall(text):
            if part == "\n":
                self._flush()
                self._newline()
            elif part.isspace():
                self._flush()
                self._spaces += part
            else:
                self._mark(route)
                self._word.append((part, style))

    def end(self) -> None:
        """Write what was held back, and end the line."""
        self._flush()
        if self._column:
            self._newline()

    def _mark(self, route: Sequence[tuple[str, float]] | None) -> None:
        if route is None or self._dim or is_coloured(self._console) or label(route) == self._marked:
            return
        self._marked = label(route)
        inside_word = bool(self._word)
        self._word.append((f"[{self._marked}]", "none"))
        if not inside_word:
            self._flush()
            self._spaces = " "

    def _flush(self) -> None:
        if not self._word:
            return
        width = sum(cell_len(text) for text, _ in self._word)
        if self._column > self._indent and self._column + len(self._spaces) + width > self._width:
            self._newline()
        if self._column == 0:
            self._write(" " * self._indent, "none")
        elif self._column > self._indent:
            self._write(self._spaces, "none")
        for text, style in self._word:
            self._write(text, style)
        self._spaces = ""
        self._word = []

    def _newline(self) -> None:
        self._console.print()
        self._column = 0
        self._spaces = ""

    def _write(self, text: str, style: str) -> None:
        self._console.print(Text(text, style), end="", soft_wrap=True)
        self._column += cell_len(text)


def write_text(console: Console, margin: str, margin_style: str, text: str, *, indent: int) -> None:
    """Text that nobody generated, with a word in its margin."""
    writer = RoutedWriter(console, Palette([]), indent=indent)
    writer.label(margin, margin_style)
    writer.push(text, None)
    writer.end()


def one_line(error: BaseException | Warning | str) -> str:
    """An error as a line: of a constructor's that jsonargparse reports, what the constructor said."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        error = f"{error.filename}: {error.strerror}"
    text, before = str(error), ""
    while text != before:
        before, text = text, _NONE_OF_TYPES.sub(_what_was_said, text)
    return " ".join(text.split()) or type(error).__name__


def _what_was_said(report: re.Match[str]) -> str:
    """Of the reasons why a value is none of several types, those that are not about the type."""
    reasons = [reason.strip() for reason in re.split(r"(?m)^\s*- ", report["errors"])]
    said = [reason for reason in reasons if reason and not reason.startswith("Expected a ")]
    return "; ".join(said) or report[0]


def joined(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)
