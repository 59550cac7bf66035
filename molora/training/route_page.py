"""A page of example routes: every token of a question and its answer in the colour of the adapter that acted.

It needs nothing from elsewhere and runs no script. Hues, underlines and letters are the chat page's. It knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from molora.display import joined, label
from molora.generation import TokenRoute

TEMPLATE = Path(__file__).with_name("route_page.html")
NUM_HUES, NUM_LINES = 8, 4
BASE = "base"
ABOUT = (
    "Tokens of a question are coloured by who read them, tokens of an answer by who wrote them. Point at one for the "
    "router's probability of it. Tokens without a colour belong to the base."
)


def winner(route: TokenRoute) -> str:
    """The adapter of the largest gate, or base where its share, which acts nowhere, is larger."""
    name, gate = max(route, key=lambda pair: abs(pair[1]), default=(BASE, 1.0))
    return name if abs(gate) >= 1 - sum(abs(each) for _, each in route) else BASE


@dataclass(frozen=True)
class RoutedToken:
    """One token as it is shown.

    Attributes:
        text: what it adds; empty inside a character.
        route: who acted; None before the activation point, where the router is not asked.
        probability: the router's, of that route.
    """

    text: str
    route: TokenRoute | None = None
    probability: float = 0.0
    is_special: bool = False

    @property
    def name(self) -> str | None:
        return None if self.route is None else winner(self.route)


@dataclass(frozen=True)
class RoutedExample:
    """A question and its answer.

    Attributes:
        domains: of its parts, in order; `expected` are their answers, and `parts_right` says which were given.
        question: from the last user message on.
    """

    domains: tuple[str, ...]
    expected: tuple[str, ...]
    parts_right: tuple[bool, ...]
    question: Sequence[RoutedToken]
    answer: Sequence[RoutedToken]


@dataclass(frozen=True)
class _Look:
    mark: str
    classes: str

    def swatch(self) -> str:
        return f'<span class="swatch {self.classes}" aria-hidden="true">{escape(self.mark)}</span>'


def route_page(title: str, adapters: Sequence[str], examples: Mapping[str, Sequence[RoutedExample]]) -> str:
    """The page as HTML.

    Args:
        adapters: their names, in the bank's order, which gives them their colours.
        examples: by the titles of the page's sections.
    """
    looks = _looks(adapters)
    legend = (f"<li>{look.swatch()} {escape(name)}</li>" for name, look in looks.items())
    sections = (
        f"<section><h2>{escape(kind)}</h2>\n{''.join(_article(each, looks) for each in group)}</section>"
        for kind, group in examples.items()
        if group
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), about=escape(ABOUT), legend="\n".join(legend), sections="\n".join(sections)
    )


def _looks(adapters: Iterable[str]) -> dict[str, _Look]:
    """As `static/palette.js` gives them: 32 pairs of hue and underline, and a letter for each."""
    looks = {BASE: _Look("", BASE)}
    for index, name in enumerate(adapters):
        taken = {look.mark for look in looks.values()}
        free = (letter for letter in name.upper() if letter.isalnum() and letter not in taken)
        line = (index + index // NUM_HUES) % NUM_LINES
        looks[name] = _Look(next(free, str(index + 1)), f"hue-{index % NUM_HUES} line-{line}")
    return looks


def _article(example: RoutedExample, looks: Mapping[str, _Look]) -> str:
    parts = zip(example.expected, example.parts_right, strict=True)
    expected = joined(f"{escape(answer)} {_verdict(is_right)}" for answer, is_right in parts)
    return (
        f"<article><header><h3>{escape(joined(example.domains))}</h3>{_verdict(all(example.parts_right))}</header>\n"
        f'<p class="caption">Question</p><div class="tokens">{_runs(example.question, looks)}</div>\n'
        f'<p class="caption">Answer</p><div class="tokens">{_runs(example.answer, looks)}</div>\n'
        f'<p class="caption">Expected: {expected}</p></article>\n'
    )


def _verdict(is_right: bool) -> str:
    return '<span class="right">✓ right</span>' if is_right else '<span class="wrong">✗ wrong</span>'


def _runs(tokens: Sequence[RoutedToken], looks: Mapping[str, _Look]) -> str:
    """Neighbours of one adapter as one run."""
    out: list[str] = []
    for name, group in groupby(tokens, key=lambda token: token.name):
        run = list(group)
        if name is None:
            out += map(_span, run)
            continue
        text, look = "".join(token.text for token in run), looks[name]
        if text.strip() and run[0].text.startswith(" "):  # no tint before a run's first word
            out.append(" ")
            run[0] = replace(run[0], text=run[0].text[1:])
        narrow = " narrow" if len(text.strip()) <= len(look.mark) else ""
        out.append(
            f'<span class="run {look.classes}{narrow}" data-mark="{escape(look.mark)}">'
            f'<span class="unseen">[{escape(name)}] </span>{"".join(map(_span, run))}</span>'
        )
    return "".join(out)


def _span(token: RoutedToken) -> str:
    text = escape(token.text).replace("\n", '<span class="break" aria-hidden="true">↵</span>\n')
    if token.is_special:
        text = f'<span class="special">{text}</span>'
    if token.route is None:
        return text
    return f'<span title="{escape(label(token.route))}, {token.probability:.1%}">{text}</span>'
