"""Marks of tasks in one message, composed of a name, a count or a label, and a style; each comes seldom. For training.

A router that sees a few marks often takes one that it has not seen, or a word in it, for a sign of a task or of the
base model. Here the names, some of which remind of one task, stand before all of them.
"""

from collections.abc import Iterator
from itertools import product

Marks = tuple[str, str, str]

STRIDE, LABEL_STRIDE = 7, 2  # of the combinations that are taken: all names, counts, labels and styles are among them
NONE = ("", "", "")
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

# What else tells three tasks apart.
LABELS: tuple[Marks, ...] = (
    ("red", "green", "blue"),
    ("Monday", "Tuesday", "Wednesday"),
    ("Anna", "Ben", "Carla"),
    ("the boss", "the clerk", "the guard"),
    ("kitchen", "garden", "cellar"),
    ("Paris", "Cairo", "Lima"),
    ("easy", "harder", "hardest"),
    ("now", "later", "tonight"),
    ("cat", "dog", "horse"),
    ("apples", "pears", "plums"),
    ("left", "middle", "right"),
    ("warm-up", "main part", "cool-down"),
    ("starter", "main course", "dessert"),
    ("gold", "silver", "bronze"),
    ("alpha", "beta", "gamma"),
    ("at nine", "at noon", "at six"),
    ("small", "medium", "large"),
    ("spring", "summer", "autumn"),
    ("team one", "team two", "team three"),
    ("maths", "English", "the rest"),
    ("urgent", "less urgent", "whenever"),
    ("in the bus", "at my desk", "on the sofa"),
    ("for the quiz", "for the club", "for fun"),
    ("top shelf", "middle shelf", "bottom shelf"),
)

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


# Of what is asked, and of its answer.
LABEL_STYLES = (
    ("{n}: ", "{n}: "),
    ("[{n}] ", "[{n}] "),
    ("({n}) ", "({n}) "),
    ("<{n}> ", "</{n}> "),
    ("{n} - ", "{n} - "),
    ("# {n}\n", "# {n}\n"),
    ("**{n}**\n", "**{n}**\n"),
    ("{n} asks: ", "to {n}: "),
    ("this is for {n}: ", "for {n}: "),
    ("{n} (please): ", "{n} (done): "),
    ("{n}, here goes. ", "{n}, here it is. "),
    ("what about {n}? ", "about {n}: "),
    ("{n} question: ", "{n} answer: "),
    ("{n}\n", ""),
    ("{n}... ", ""),
)
INTROS = (
    "",
    "",
    "[I have|There are|Here come] {count} of them.\n",
    "[Hi,|Hello,|Okay,] {count} [things|tasks|items]:\n\n",
)


def composed_marks() -> Iterator[tuple[Marks, Marks, str, str]]:
    """Marks of the tasks and of their answers, what stands before all of it, and what between two tasks.

    Half of the answers to what is counted have the names of answers, a quarter those of what is asked, and a quarter
    has no marks.
    """
    counted = [
        *((style, ("", ""), counts) for style, counts in product(BARE_STYLES, COUNTS)),
        *product(LETTER_STYLES, LETTERS, COUNTS[::3]),
        *product(NAMED_STYLES, NAMES, COUNTS),
        *product(ORDINAL_STYLES, [(asked.lower(), answered.lower()) for asked, answered in NAMES], ORDINALS),
    ][::STRIDE]
    found = []
    for number, (style, (asked, answered), counts) in enumerate(counted):
        marks, answers = _marks(style, counts, asked), _marks(style, counts, answered)
        found.append((marks, (answers, answers, marks, NONE)[number % 4]))
    for labels, (style, answer_style) in [*product(LABELS, LABEL_STYLES)][::LABEL_STRIDE]:
        found.append((_marks(style, labels), _marks(answer_style, labels)))
    for number, (marks, answers) in enumerate(found):
        gap = "\n" if marks[0].endswith("\n") else GAPS[number % len(GAPS)]
        yield marks, answers, INTROS[number % len(INTROS)], gap


def _marks(style: str, counts: Marks, name: str = "") -> Marks:
    first, second, third = (style.format(name=name, n=count) for count in counts)
    return _capitalized(first), _capitalized(second), _capitalized(third)


def _capitalized(mark: str) -> str:
    return mark[:1].upper() + mark[1:]
