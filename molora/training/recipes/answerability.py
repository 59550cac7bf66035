"""Whether a text answers a question: synthetic contexts, and questions that they answer, or nearly do."""

from dataclasses import dataclass
from random import Random
from typing import Any

from molora.training.recipes.answerability_wordings import FORMS, KINDS, TURNS, Attribute
from molora.training.recipes.choices import Choices, Split
from molora.training.recipes.verdicts import Verdict, verdict

NUM_ENTITIES = (2, 4)  # of a context
NUM_FACTS = (1, 3)  # of an entity
TURNS_SHARE = 0.3  # of the contexts stand in a turn of their own
KNOWN_SHARE = 0.5  # of the questions without an answer are about an entity that the context names


@dataclass(frozen=True)
class Context:
    """A text, and which attribute of which entity it tells."""

    kind: str
    text: str
    told: frozenset[tuple[str, str]]
    names: tuple[str, ...]


def answerability(num_records: int, split: Split, seed: int) -> list[Verdict]:
    """Records of the function "answerability", answerable and not in turn, and shuffled.

    A question that has no answer is about what the context tells of another entity, where it tells that of any.
    """
    rng = Random(f"answerability {split} {seed}")
    records = [_record(rng, split, is_answerable=bool(number % 2)) for number in range(num_records)]
    rng.shuffle(records)
    return records


def context(rng: Random, split: Split) -> Context:
    """A few facts about a few entities of one kind."""
    kind = rng.choice([*KINDS])
    names = rng.sample(
        [KINDS[kind].names[index] for index in KINDS[kind].names.indices(split)], rng.randint(*NUM_ENTITIES)
    )
    facts: list[tuple[str, str]] = []
    for name in names:
        facts += [(name, attribute) for attribute in rng.sample([*KINDS[kind].attributes], rng.randint(*NUM_FACTS))]
    if rng.random() < 0.5:
        rng.shuffle(facts)
    sentences = []
    for name, attribute in facts:
        about = KINDS[kind].attributes[attribute]
        sentence = _pick(about.facts, split, rng).format(name=name, value=rng.choice(about.values))
        sentences.append(sentence[0].upper() + sentence[1:])
    return Context(kind, " ".join(sentences), frozenset(facts), tuple(names))


def _record(rng: Random, split: Split, *, is_answerable: bool) -> Verdict:
    found = context(rng, split)
    while not is_answerable and not _untold(found):  # it tells everything that it tells of one of all
        found = context(rng, split)
    if is_answerable:
        name, attribute = rng.choice(sorted(found.told))
    elif rng.random() < KNOWN_SHARE:
        name, attribute = rng.choice(_untold(found))
    else:
        every = [KINDS[found.kind].names[index] for index in KINDS[found.kind].names.indices(split)]
        strangers = [other for other in every if other not in found.names]
        name, attribute = rng.choice(strangers), rng.choice(sorted({attribute for _, attribute in found.told}))
    question = _question(KINDS[found.kind].attributes[attribute], name, split, rng)
    return verdict(
        "answerability",
        _conversation(found.text, question, split, rng),
        is_true=is_answerable,
        about=found.kind,
        is_known=name in found.names,
    )


def _untold(found: Context) -> list[tuple[str, str]]:
    """What is told of one entity, of another one of which it is not."""
    attributes = sorted({attribute for _, attribute in found.told})
    return [pair for name in found.names for attribute in attributes if (pair := (name, attribute)) not in found.told]


def _question(attribute: Attribute, name: str, split: Split, rng: Random) -> str:
    return str(_pick(attribute.questions, split, rng).format(name=name))


def _conversation(text: str, question: str, split: Split, rng: Random) -> list[dict[str, Any]]:
    if rng.random() < TURNS_SHARE:
        given, reply = _pick(TURNS, split, rng)
        return [
            {"role": "user", "content": given.format(text=text)},
            {"role": "assistant", "content": reply},
            {"role": "user", "content": question},
        ]
    return [{"role": "user", "content": _pick(FORMS, split, rng).format(text=text, question=question)}]


def _pick(choices: Choices[Any], split: Split, rng: Random) -> Any:
    return choices[choices.draw(split, rng)]
