"""The readers of the tasks beyond the demo's. Each works its answer out from what it shows, not from the entry's."""

import re
from collections import Counter

from molora.training.recipes.items import Entry, Item, list_forms, listed, sums

_MAX_FACTOR = 12  # products beyond the times tables are too hard for a model this small

_UNKNOWN_FIRST = re.compile(r"(\d+)\*(\w) ([+-]) (\d+) = (\d+)")
_UNKNOWN_LAST = re.compile(r"(\d+) (-) (\d+)\*(\w) = (\d+)")


def read_equations(entry: Entry) -> Item | None:
    """Equations of one multiplication and one sum; none with numbers below zero."""
    starred: str = entry["metadata"]["equation"]
    if found := _UNKNOWN_FIRST.fullmatch(starred):
        factor, variable, sign, term, right = found.groups()
        steps = f"multiply it by {factor} and {'add' if sign == '+' else 'subtract'} {term}"
        working = f"{right} {'-' if sign == '+' else '+'} {term}"
        product = int(right) - int(f"{sign}{term}")
    elif found := _UNKNOWN_LAST.fullmatch(starred):
        term, sign, factor, variable, right = found.groups()
        steps = f"multiply it by {factor} and take that away from {term}"
        working = f"{term} - {right}"
        product = int(term) - int(right)
    else:
        return None
    if int(factor) > _MAX_FACTOR or product % int(factor):
        return None
    answer = str(product // int(factor))
    working = f"{working} = {product}. {product} / {factor} = {answer}."
    spoken = starred.replace("*", " times ").replace("+", "plus").replace("-", "minus").replace("=", "equals")
    return Item(
        key=working,  # the same for "3x + 5 = 20" and "20 - 3x = 5"
        facts={
            "equation": starred.replace("*", ""),
            "starred": starred,
            "spoken": spoken,
            "variable": variable,
            "steps": steps,
            "right": right,
        },
        working=working,
        answer=answer,
    )


def read_clock(entry: Entry) -> Item | None:
    """Two times of one day, the later last."""
    start, end = (entry["metadata"][name].split()[1][:5] for name in ("start_time", "end_time"))
    passed = _minutes_of_day(end) - _minutes_of_day(start)
    if passed <= 0:  # midnight is written 00:00
        return None
    hours, minutes = divmod(passed, 60)
    steps = []
    if hours:
        reached = _minutes_of_day(start) + 60 * hours
        steps.append(f"{_counted(hours, 'hour')} to {reached // 60:02d}:{reached % 60:02d}")
    if minutes:
        steps.append(f"{_counted(minutes, 'minute')} to {end}")
    return Item(
        key=f"{start} {end}",
        facts={"start": start, "end": end},
        working=f"{', then '.join(steps)}.",
        answer=f"{hours:02d}:{minutes:02d}",
    )


def _minutes_of_day(clock: str) -> int:
    hours, minutes = clock.split(":")
    return 60 * int(hours) + int(minutes)


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def read_filtering(entry: Entry) -> Item | None:
    """Lists of which something is left, and whose numbers all differ from the limit."""
    numbers: list[str] = entry["metadata"]["original_numbers"]
    limit: str = entry["metadata"]["filter_value"]
    verb, side = entry["metadata"]["operation"].split("_")
    keeps = verb == "keep"
    above = keeps == (side == "larger")  # whether the numbers above the limit are those that stay
    kept = [number for number in numbers if (int(number) > int(limit)) == above]
    if not kept or limit in numbers:
        return None
    tests = [f"{number} {'yes' if number in kept else 'no'}" for number in numbers]
    which = f"{side} than {limit}"
    return Item(
        key=f"{', '.join(sorted(numbers))} {'>' if above else '<'} {limit}",
        facts={
            **list_forms(numbers),
            "do": "keep only" if keeps else "remove",
            "which": which,
            "kept": which if keeps else f"not {which}",
            "sign": {(True, "larger"): ">", (True, "smaller"): "<", (False, "larger"): "<="}.get((keeps, side), ">="),
            "limit": limit,
        },
        working=f"{'Above' if above else 'Below'} {limit}: {', '.join(tests)}.",
        answer=", ".join(kept),
    )


# These are crude or rare, or their preposition is missing ("pines pizza", where "pines for pizza" is another verb).
_UNSUITABLE_VERBS = "bears|blasts|damns|dotes|execrates|exults|lusts after|pines|spits on|yearns"
_TASTE = re.compile(rf"[A-Z][a-z]+ (?!(?:{_UNSUITABLE_VERBS}) (?!for |in )|.*\breligion).+")


def read_tastes(entry: Entry) -> Item | None:
    """Who likes or dislikes what, of a few people with plain names, one of whom is meant."""
    story = entry["question"].split("\n")[0].strip()
    asked = entry["metadata"]["question"].removeprefix("Who ").split("?")[0]
    sentences = [f"{sentence.removesuffix('.')}." for sentence in story.split(". ")]
    names = Counter(sentence.split()[0] for sentence in sentences)
    meant = [sentence for sentence in sentences if sentence.split(maxsplit=1)[1] == f"{asked}."]
    if len(meant) != 1 or len(names) < len(sentences):
        return None
    if not all(map(_TASTE.match, sentences)):
        return None
    return Item(
        key=" ".join([*sorted(sentences), asked]),
        facts={"story": story, "lines": "\n".join(sentences), "asked": asked},
        working=meant[0],
        answer=meant[0].split()[0],
    )


_SHAPES = {
    3: {"shape": "triangle", "count": "two", "last": "third"},
    4: {"shape": "quadrilateral", "count": "three", "last": "fourth"},
}


def read_angles(entry: Entry) -> Item | None:
    """Triangles and convex quadrilaterals."""
    known = [f"{angle:.0f}" for angle in entry["metadata"]["known_angles"]]
    num_sides = len(known) + 1
    whole, total = 180 * (num_sides - 2), sum(map(int, known))
    if not 0 < whole - total < 180:
        return None
    answer = str(whole - total)
    return Item(
        key=", ".join(sorted(known)),
        facts={
            "commas": ", ".join(known),
            "prose": listed(known),
            "signs": listed([f"{angle}°" for angle in known]),
            "degrees": listed([f"{angle} degrees" for angle in known]),
            "lines": "\n".join(f"- {angle} degrees" for angle in known),
            **_SHAPES[num_sides],
        },
        working=f"{sums(known[0], [f'+{angle}' for angle in known[1:]])} {whole} - {total} = {answer}.",
        answer=answer,
    )
