"""The page of example routes: escaped, on its own, and in the chat page's colours."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import molora
from molora.training.route_page import RoutedExample, RoutedToken, route_page, winner

STYLE = Path(molora.__file__).parent / "serving" / "static" / "style.css"
HOSTILE = "<script>alert('\"&$title')</script>"


class Reader(HTMLParser):
    """The elements of a page with their attributes, and all of its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def token(text: str, *names: str, probability: float = 0.5) -> RoutedToken:
    return RoutedToken(text, tuple((name, 1.0) for name in names), probability)


def example(*answer: RoutedToken, parts_right: tuple[bool, ...] = (True,)) -> RoutedExample:
    parts = tuple(f"part {index}" for index in range(len(parts_right)))
    return RoutedExample(parts, parts, parts_right, [RoutedToken("before"), token("read", "words")], answer)


def test_everything_is_escaped() -> None:
    hostile = RoutedExample(
        (HOSTILE,), (HOSTILE,), (False,), [token(HOSTILE, HOSTILE)], [RoutedToken(HOSTILE, is_special=True)]
    )
    reader = Reader(route_page(HOSTILE, [HOSTILE], {HOSTILE: [hostile]}))
    assert not {"script", "link", "img"} & {tag for tag, _ in reader.elements}
    assert reader.text.count(HOSTILE) >= 8
    assert [attributes["title"] for _, attributes in reader.elements if "title" in attributes] == [f"{HOSTILE}, 50.0%"]


def test_nothing_comes_from_elsewhere() -> None:
    page = route_page("Routes", ["words"], {"One task": [example(token("a", "words"))]})
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|src=|href=|url\(|@import", page)


def test_tokens_say_who_acted_and_how_likely_it_was() -> None:
    tokens = [token("t", "words", probability=0.987), token("h", "words"), token(" 4", "legs"), token("!")]
    reader = Reader(route_page("Routes", ["legs", "words"], {"One task": [example(*tokens)]}))
    titles = [attributes["title"] for _, attributes in reader.elements if "title" in attributes]
    assert titles == ["words, 50.0%", "words, 98.7%", "words, 50.0%", "legs, 50.0%", "base, 50.0%"]
    runs = [each for tag, each in reader.elements if "run" in (each.get("class") or "").split()]
    assert [run["data-mark"] for run in runs] == ["W", "W", "L", ""]
    assert "[words] th [legs] 4[base] !" in reader.text


@pytest.mark.parametrize(("parts_right", "marks"), [((True,), "✓✓"), ((True, False), "✗✓✗"), ((False, False), "✗✗✗")])
def test_answers_are_marked_as_a_whole_and_part_by_part(parts_right: tuple[bool, ...], marks: str) -> None:
    page = route_page("Routes", ["words"], {"One task": [example(token("a"), parts_right=parts_right)]})
    assert re.sub(r"[^✓✗]", "", page) == marks


def test_a_kind_without_examples_has_no_section() -> None:
    page = route_page("Routes", ["words"], {"One task": [], "Several tasks": [example(token("a"))]})
    assert re.findall("<h2>(.*?)</h2>", page) == ["Several tasks"]


def test_many_adapters_look_different() -> None:
    names = [f"a{index}" for index in range(32)]
    swatches = re.findall(r'class="swatch (.*?)" aria-hidden="true">(.*?)<', route_page("Routes", names, {}))
    assert len(swatches) == len({looks for looks, _ in swatches}) == len({mark for _, mark in swatches}) == 33


def test_colours_are_those_of_the_chat_page() -> None:
    chat, page = STYLE.read_text(), route_page("Routes", [], {})
    rules = re.findall(r"(\.(?:hue|line)-\d) \{ (.*?) \}", chat)
    assert len(rules) == 12
    assert re.findall(r"(\.(?:hue|line)-\d) \{ (.*?) \}", page) == rules
    for name in ("page", "ink", "tint", "stroke", "letter"):
        (value,) = re.findall(rf"--{name}: (light-dark.*);", chat)
        assert f"--{name}: {value};" in page


@pytest.mark.parametrize(
    ("route", "name"),
    [((), "base"), ((("a", 1.0),), "a"), ((("a", 0.3), ("b", 0.6)), "b"), ((("a", 0.1),), "base")],
)
def test_the_base_wins_where_its_share_is_the_largest(route: Any, name: str) -> None:
    assert winner(route) == name
