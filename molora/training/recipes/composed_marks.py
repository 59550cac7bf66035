"""Marks of tasks in one message, composed of a name, a count or a label, and a style; each comes seldom. For training.

A router that sees a few marks often takes one that it has not seen, or a word in it, for a sign of a task or of the
base model. Here the names, some of which remind of one task, stand before all of them.
"""

from collections.abc import Iterator
from itertools import product
from random import Random

Marks = tuple[str, str, str]

STRIDE, LABEL_STRIDE = 7, 2  # of the combinations that are taken: all names, counts, labels and styles are among them
GAPS = ("\n", "\n\n", " ")

DIGITS: tuple[Marks, ...] = (("1", "2", "3"), ("01", "02", "03"))
COUNTS: tuple[Marks, ...] = (
    *DIGITS,
    ("A", "B", "C"),
    ("I", "II", "III"),
    ("one", "two", "three"),
    ("a", "b", "c"),
    ("One", "Two", "Three"),
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

# What else tells three tasks apart: names of things and people.
LABELS: tuple[Marks, ...] = (
    ("red", "green", "blue"),
    ("Monday", "Tuesday", "Wednesday"),
    ("Anna", "Ben", "Carla"),
    ("the boss", "the clerk", "the guard"),
    ("kitchen", "garden", "cellar"),
    ("Paris", "Cairo", "Lima"),
    ("cat", "dog", "horse"),
    ("apples", "pears", "plums"),
    ("left", "middle", "right"),
    ("warm-up", "main part", "cool-down"),
    ("starter", "main course", "dessert"),
    ("gold", "silver", "bronze"),
    ("alpha", "beta", "gamma"),
    ("spring", "summer", "autumn"),
    ("team one", "team two", "team three"),
    ("maths", "English", "the rest"),
    ("top shelf", "middle shelf", "bottom shelf"),
)

PHRASES: tuple[Marks, ...] = (
    ("at nine", "at noon", "at six"),
    ("in the bus", "at my desk", "on the sofa"),
    ("for the quiz", "for the club", "for fun"),
    ("now", "later", "tonight"),
    ("urgent", "less urgent", "whenever"),
    ("easy", "harder", "hardest"),
    ("small", "medium", "large"),
)

BARE_STYLES = (
    *("{n} ~ ", "«{n}» ", "<{n}> ", "== {n} ==\n", "__{n}__ ", "{n}/ ", "{n}.) ", "~{n}~ ", "No {n}: "),
    "/{n}/\n",
)
LETTER_STYLES = ("{name}{n}: ", "{name}{n}) ", "{name}{n}. ", "({name}{n}) ", "{name}-{n}: ")
NAMED_STYLES = (
    *("{name} {n}: ", "{name} {n}. ", "{name} {n} => ", "{name} ({n}): ", "{n}. {name}: ", "*{name} {n}* "),
    "{name} {n}\n",
)
ORDINAL_STYLES = (
    *("My {n} {name}: ", "Now the {n} {name}. ", "{n} {name} - ", "The {n} {name} is this: ", "({n} {name}) "),
    "{n} {name}\n",
)


# Before what is asked, and before its answer.
PHRASE_STYLES = (
    ("{n}: ", "{n}: "),
    ("[{n}] ", "[{n}] "),
    ("({n}) ", "({n}) "),
    ("<{n}> ", "</{n}> "),
    ("{n} -- ", "{n} -- "),
    ("# {n}\n", "# {n}\n"),
    ("**{n}**\n", "**{n}**\n"),
    ("{n} (please): ", "{n} (done): "),
    ("{n}\n", ""),
    ("{n}... ", ""),
)
LABEL_STYLES = (
    *PHRASE_STYLES,
    ("{n} asks: ", "to {n}: "),
    ("this is for {n}: ", "for {n}: "),
    ("{n}, here goes. ", "{n}, here it is. "),
    ("what about {n}? ", "about {n}: "),
    ("{n} question: ", "{n} answer: "),
)
INTROS = (
    "",
    "",
    "[I have|There are|Here come] {count} of them.\n",
    "[Hi,|Hello,|Okay,] {count} [things|tasks|items]:\n\n",
)


def composed_marks() -> Iterator[tuple[Marks, Marks, str, str]]:
    """Marks of the tasks and of their answers, what stands before all of it, and what between two tasks.

    By chance, but always the same: half of the answers to what is counted have the names of answers, a quarter those of
    what is asked, and a quarter has no marks.
    """
    rng = Random("composed marks")
    counted = [
        *((style, ("", ""), counts) for style, counts in product(BARE_STYLES, COUNTS)),
        *product(LETTER_STYLES, LETTERS, DIGITS),
        *product(NAMED_STYLES, NAMES, COUNTS),
        *product(ORDINAL_STYLES, [(asked.lower(), answered.lower()) for asked, answered in NAMES], ORDINALS),
    ][::STRIDE]
    labelled = [*product(LABELS, LABEL_STYLES), *product(PHRASES, PHRASE_STYLES)][::LABEL_STRIDE]
    found = []
    for style, (asked, answered), counts in counted:
        marks, answers = _marks(style, counts, asked), _marks(style, counts, answered)
        found.append((marks, rng.choice((answers, answers, marks, ("", "", "")))))
    for labels, (style, answer_style) in labelled:
        found.append((_marks(style, labels), _marks(answer_style, labels)))
    for marks, answers in found:
        gap = "\n" if marks[0].endswith("\n") else rng.choice(GAPS)
        yield marks, answers, rng.choice(INTROS), gap


def _marks(style: str, counts: Marks, name: str = "") -> Marks:
    first, second, third = (style.format(name=name, n=count) for count in counts)
    return _capitalized(first), _capitalized(second), _capitalized(third)


def _capitalized(mark: str) -> str:
    return mark[:1].upper() + mark[1:]
