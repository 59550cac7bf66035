"""Marks of tasks in one message, composed of a name, a count and a style, so that each comes seldom; for training.

A router that sees a few marks often takes one that it has not seen, or a word in it, for a sign of a task or of the
base model. Here the names, some of which remind of one task, stand before all of them.
"""

from collections.abc import Iterator
from itertools import product

Marks = tuple[str, str, str]

STRIDE = 7  # of the combinations that are taken, so that all names, counts and styles are among them
GAPS = ("\n", "\n\n", " ")

COUNTS: tuple[Marks, ...] = (
    ("1", "2", "3"),
    ("A", "B", "C"),
    ("I", "II", "III"),
    ("one", "two", "three"),
    ("a", "b", "c"),
    ("One", "Two", "Three"),
    ("01", "02", "03"),
    ("x", "y", "z"),
)
ORDINALS: tuple[Marks, ...] = (
    ("first", "second", "third"),
    ("first", "next", "last"),
    ("opening", "middle", "closing"),
    ("initial", "following", "final"),
    ("1st", "2nd", "3rd"),
)

# Of what is asked, and of its answer.
NAMES: tuple[tuple[str, str], ...] = (
    ("Query", "Reply"),
    ("Problem", "Solution"),
    ("Request", "Response"),
    ("Puzzle", "Result"),
    ("Riddle", "Outcome"),
    ("Item", "Item"),
    ("Point", "Point"),
    ("Challenge", "Finding"),
    ("Assignment", "Work"),
    ("Message", "Message"),
    ("Line", "Line"),
    ("Ticket", "Ticket"),
    ("Case", "Verdict"),
    ("Number", "Number"),
    ("Sum", "Sum"),
    ("Word", "Word"),
    ("List", "List"),
    ("Story", "Story"),
    ("Reading", "Reading"),
    ("Time", "Time"),
    ("Calculation", "Calculation"),
    ("Drill", "Drill"),
    ("Lesson", "Lesson"),
    ("Page", "Page"),
)
LETTERS = (("P", "S"), ("T", "U"), ("E", "E"), ("K", "R"), ("X", "Y"), ("N", "N"), ("W", "V"))

BARE_STYLES = (
    *("{n} - ", "«{n}» ", "<{n}> ", "= {n} = ", "__{n}__ ", "{n}/ ", "{n}.) ", "~{n}~ ", "No {n}: "),
    "/{n}/\n",
)
LETTER_STYLES = ("{name}{n}: ", "{name}{n}) ", "{name}{n}. ", "({name}{n}) ", "{name}-{n}: ")
NAMED_STYLES = (
    *("{name} {n}: ", "{name} {n}. ", "{name} {n} - ", "{name} ({n}): ", "{n}. {name}: ", "*{name} {n}* "),
    "{name} {n}\n",
)
ORDINAL_STYLES = (
    *("My {n} {name}: ", "Now the {n} {name}. ", "{n} {name} - ", "The {n} {name} is this: ", "({n} {name}) "),
    "{n} {name}\n",
)


def composed_marks() -> Iterator[tuple[Marks, Marks, str]]:
    """Marks of the tasks and of their answers, and what stands between two tasks.

    Half of the answers have the names of answers, a quarter those of what is asked, and a quarter has no marks.
    """
    combinations = [
        *((style, ("", ""), counts) for style, counts in product(BARE_STYLES, COUNTS)),
        *product(LETTER_STYLES, LETTERS, COUNTS[::3]),
        *product(NAMED_STYLES, NAMES, COUNTS),
        *product(ORDINAL_STYLES, [(asked.lower(), answered.lower()) for asked, answered in NAMES], ORDINALS),
    ]
    for number, (style, (asked, answered), counts) in enumerate(combinations[::STRIDE]):
        marks, answers = _marks(style, asked, counts), _marks(style, answered, counts)
        gap = "\n" if style.endswith("\n") else GAPS[number % len(GAPS)]
        yield marks, (answers, answers, marks, ("", "", ""))[number % 4], gap


def _marks(style: str, name: str, counts: Marks) -> Marks:
    first, second, third = (style.format(name=name, n=count) for count in counts)
    return _capitalized(first), _capitalized(second), _capitalized(third)


def _capitalized(mark: str) -> str:
    return mark[0].upper() + mark[1:]
