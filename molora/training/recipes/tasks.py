"""The tasks: what a reasoning-gym entry says, how its answer is worked out, and when a reply is right.

This module knows nothing of wordings or conversations. reasoning-gym is needed to make items, not to verify replies.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from itertools import accumulate

from molora.training.recipes.items import Entry, Item, list_forms, listed, sums
from molora.training.recipes.more_tasks import read_angles, read_clock, read_equations, read_filtering, read_tastes
from molora.training.recipes.wordings import UNSUITABLE_WORDS

_MAX_DRAWS = 20  # a generator repeats itself: draws allowed for each distinct item wanted
_SEED_STRIDE = 10_000_000  # reasoning-gym seeds entry i with seed + i: this keeps two seeds' entries apart


@dataclass(frozen=True)
class Task:
    """One domain.

    Attributes:
        dataset: the name of its reasoning-gym generator.
        read: makes an item of an entry; None where the entry does not suit.
        value: what an answer's text stands for; raises ValueError or ArithmeticError where it stands for nothing.
        config: the generator's settings.
    """

    dataset: str
    read: Callable[[Entry], Item | None]
    value: Callable[[str], object]
    config: Mapping[str, object] = field(default_factory=dict)

    def entries(self, seed: int, num_entries: int) -> Iterator[Entry]:
        """Entries as the generator makes them, the same for the same seed."""
        from reasoning_gym import create_dataset

        yield from create_dataset(self.dataset, seed=seed * _SEED_STRIDE, size=num_entries, **self.config)

    def items(self, seed: int, num_items: int, num_common: int = 0) -> list[Item]:
        """Up to `num_items` items with distinct keys; fewer where the generator has no more to offer.

        Args:
            num_common: so many common ones come first.
        """
        items: dict[str, Item] = {}
        missing = num_common
        for entry in self.entries(seed, num_items * _MAX_DRAWS):
            if len(items) >= num_items and missing <= 0:
                break
            if (item := self.read(entry)) and item.key not in items:
                items[item.key] = item
                missing -= item.is_common
        first = [item for item in items.values() if item.is_common][:num_common]
        chosen = {item.key for item in first}
        return [*first, *(item for item in items.values() if item.key not in chosen)][:num_items]


def verify(domain: str, item: Item | str, text: str) -> bool:
    """Whether what follows the last "Answer:" of `text` is the answer of `item` (an item, or its answer)."""
    answer = item if isinstance(item, str) else item.answer
    found = answers_in(text)
    return bool(found) and _same(domain, answer, found[-1])


def verify_composite(domains: Sequence[str], answers: Sequence[str], text: str) -> list[bool]:
    """For each task of a composite, whether the "Answer:" at its place in `text` is right; a missing one is wrong."""
    found = answers_in(text) + [""] * len(domains)
    return [_same(*case) for case in zip(domains, answers, found[: len(domains)], strict=True)]


def answers_in(text: str) -> list[str]:
    """What follows each "Answer:" on its line."""
    return [line.strip().removesuffix(".") for line in re.findall(r"Answer:(.*)", text)]


def _same(domain: str, answer: str, found: str) -> bool:
    value = TASKS[domain].value
    try:
        return value(found) == value(answer)
    except (ValueError, ArithmeticError):
        return False


def _number(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(number) for number in text.split(",")]


def _minutes(text: str) -> int:
    hours, minutes = text.split(":")
    return 60 * int(hours) + int(minutes)


def _read_arithmetic(entry: Entry) -> Item | None:
    expression: str = entry["metadata"]["expression"]
    first, *rest = expression.replace("+ ", "+").replace("- ", "-").split()
    if min(accumulate(map(int, (first, *rest)))) < 0:  # sums below zero are too hard for a model this small
        return None
    steps = [f"{'take away' if term[0] == '-' else 'add'} {term[1:]}" for term in rest]
    return Item(
        key=expression,
        facts={
            "expression": expression,
            "spoken": expression.replace("+", "plus").replace("-", "minus"),
            "first": first,
            "steps": ", then ".join(steps),
        },
        working=sums(first, rest),
        answer=entry["answer"],
    )


@cache
def _common_words() -> frozenset[str]:
    """Words that people know, of the many in the generator's dictionary: its word ladders' and its book's."""
    from reasoning_gym.data import read_data_file

    ladder = {word.lower() for row in csv.reader(read_data_file("words.csv").splitlines()) for word in row}
    book = re.findall(r"\b[a-z]+\b", read_data_file("in_the_year_2889.txt"))
    return frozenset(ladder.union(book))


def _read_words(entry: Entry) -> Item | None:
    word, answer = entry["metadata"]["word"], entry["answer"]
    if not word.islower() or {word, answer} & UNSUITABLE_WORDS:
        return None
    return Item(
        key=min(word, answer),  # "was" gives "saw" away
        facts={"word": word},
        working=f"{' '.join(word)} -> {' '.join(answer)}",
        answer=answer,
        is_common=word in _common_words(),  # how the others are spelled helps with these
    )


def _read_family(entry: Entry) -> Item:
    story, _ = entry["question"].split("\n\n")
    a, b, relation = entry["metadata"]["person1"], entry["metadata"]["person2"], entry["answer"]
    if relation.endswith("in-law"):  # here reasoning-gym 0.1.25 names what the second is to the first
        a, b = b, a
    return Item(
        key=story,
        facts={"story": story, "lines": story.replace(". ", ".\n"), "a": a, "b": b},
        working=_kinship(story, a, b, relation),
        answer=relation,
    )


def _kinship(story: str, a: str, b: str, relation: str) -> str:
    """The links of the story that lead from `b` to `a`."""
    spouse: dict[str, str] = {}
    parents: dict[str, tuple[str, str]] = {}
    couples = r"(\w+) is married to (\w+)\.(?: They have (?:a child|children) called ([\w, ]+)\.)?"
    for one, other, children in re.findall(couples, story):
        spouse |= {one: other, other: one}
        parents |= dict.fromkeys(filter(None, re.split(r", | and ", children)), (one, other))

    def child(young: str, old: str) -> str:
        return f"{young} is a child of {old}."

    match relation:
        case "wife" | "husband":
            return f"{a} is married to {b}."
        case "mother" | "father":
            return child(b, a)
        case "daughter" | "son":
            return child(a, b)
        case "sister" | "brother":
            return f"{a} and {b} are children of {parents[a][0]}."
        case "grandmother" | "grandfather":
            parent = next(parent for parent in parents[b] if a in parents.get(parent, ()))
            return f"{child(b, parent)} {child(parent, a)}"
        case "mother-in-law" | "father-in-law":
            return f"{b} is married to {spouse[b]}. {child(spouse[b], a)}"
    raise ValueError(f"no working is known for {relation!r}")


_ORDERS = {
    "ascending": {
        "direction": "from smallest to largest",
        "first": "smallest",
        "last": "largest",
        "change": "increasing",
    },
    "descending": {
        "direction": "from largest to smallest",
        "first": "largest",
        "last": "smallest",
        "change": "decreasing",
    },
}


def _read_sorting(entry: Entry) -> Item:
    order: str = entry["metadata"]["direction"]
    numbers, answer = (
        [f"{float(number):.0f}" for number in entry["metadata"][name]]
        for name in ("original_numbers", "sorted_numbers")
    )
    return Item(
        key=", ".join(answer),
        facts={
            **list_forms(numbers),
            "order": order,
            **_ORDERS[order],
        },
        working=f"{'Up' if order == 'ascending' else 'Down'} from {', '.join(numbers)}.",
        answer=", ".join(answer),
    )


_PLURALS = {
    "sheep": "sheep",
    "deer": "deer",
    "jellyfish": "jellyfish",
    "starfish": "starfish",
    "shrimp": "shrimp",
    "leech": "leeches",
    "cockroach": "cockroaches",
    "butterfly": "butterflies",
    "firefly": "fireflies",
    "praying mantis": "praying mantises",
    "woodlouse": "woodlice",
}


def _read_legs(entry: Entry) -> Item:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    counts: dict[str, int] = entry["metadata"]["animals"]
    names = {animal: _PLURALS.get(animal, f"{animal}s") for animal in counts}
    groups = [f"{count} {names[animal]}" for animal, count in counts.items()]
    legs = [str(count * ANIMALS[animal]) for animal, count in counts.items()]
    tally = [f"{group}: {num}." for group, num in zip(groups, legs, strict=True)]
    return Item(
        key=", ".join(sorted(groups)),
        facts={
            "prose": listed(groups),
            "commas": ", ".join(groups),
            "plus": " + ".join(groups),
            "colons": ", ".join(f"{names[animal]}: {count}" for animal, count in counts.items()),
            "lines": "\n".join(f"- {group}" for group in groups),
        },
        working=" ".join([*tally, sums(legs[0], [f"+{num}" for num in legs[1:]])]),
        answer=entry["answer"],
    )


TASKS: dict[str, Task] = {
    "arithmetic": Task(
        "chain_sum", _read_arithmetic, _number, {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 3}
    ),
    "words": Task("spell_backward", _read_words, str.lower, {"min_word_len": 3, "max_word_len": 6}),
    # From nine people on, reasoning-gym 0.1.25 gives a niece or nephew the other person's gender.
    "family": Task("family_relationships", _read_family, str.lower, {"min_family_size": 4, "max_family_size": 8}),
    "sorting": Task(
        "number_sorting",
        _read_sorting,
        _numbers,
        {"min_numbers": 4, "max_numbers": 6, "min_decimals": 0, "max_decimals": 0, "min_value": 1, "max_value": 99},
    ),
    # At least two of each: "there are 1 cat" reads badly.
    "legs": Task(
        "leg_counting",
        _read_legs,
        _number,
        {"min_animals": 2, "max_animals": 4, "min_instances": 2, "max_instances": 8},
    ),
    # Terms are only added and subtracted: a product of two of them would make a factor beyond the times tables.
    "equations": Task(
        "simple_equations",
        read_equations,
        _number,
        {"min_terms": 2, "max_terms": 2, "max_value": 50, "operators_weights": [0.5, 0.5, 0.0]},
    ),
    "clock": Task(
        "time_intervals", read_clock, _minutes, {"task_types": ["time"], "max_time_difference_seconds": 12 * 60 * 60}
    ),
    "filtering": Task(
        "number_filtering",
        read_filtering,
        _numbers,
        {"min_numbers": 4, "max_numbers": 6, "max_decimals": 0, "min_value": 1, "max_value": 99},
    ),
    "tastes": Task("needle_haystack", read_tastes, str.lower, {"min_num_statements": 3, "max_num_statements": 4}),
    "angles": Task(
        "simple_geometry", read_angles, _number, {"min_sides": 3, "max_sides": 4, "min_angle": 20, "max_angle": 150}
    ),
}

DOMAINS: tuple[str, ...] = tuple(TASKS)
DEMO: tuple[str, ...] = ("arithmetic", "words", "family", "sorting", "legs")  # what the demo's bank is trained on
