"""From items, documents and wordings to the demo's files of conversations.

One seed gives one set of bytes, for one version of Python and of reasoning-gym. `build` makes the records, `write`
puts them on disk; neither knows of tokenizers, models or masks.
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, Literal, TypedDict

from molora.files import write_atomic
from molora.training.recipes.documents import Document, documents
from molora.training.recipes.tasks import DOMAINS, TASKS, Item
from molora.training.recipes.wordings import DOCUMENT_WORDINGS, EVERYDAY, SURFACE_FORMS, WORDINGS

NUM_VAL = 200  # records in each val_<domain>.jsonl
NUM_HELD_OUT = 200  # single items a domain in heldout.jsonl
NUM_HELD_OUT_COMPOSITES = 500
NUM_HELD_OUT_DOCUMENTS = 200

COMPOSITE_SHARE = 0.3  # of an adapter's training records
HISTORY_SHARE = 0.3  # of all task records in training
THREE_TASKS_SHARE = 0.2  # of composites
EVERYDAY_SHARE = 0.25  # of base records in training
MAX_HISTORY_WORDS = 50  # of a document in a history, so that conversations stay short

_RESERVED = 450  # items a domain for each of the validation and the held-out files


class Part(TypedDict):
    """A piece of a message; `domain` None is the base model's."""

    type: Literal["text"]
    text: str
    domain: str | None


class Message(TypedDict):
    """A turn. A plain string's domain is its record's; the parts of a list concatenate to the turn's text."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class Record(TypedDict):
    """A line of a file: a conversation whose last two messages are the question and its answer.

    `wording` counts through the domain's wordings (single), the surface forms (composite), or the documents'
    wordings and then the everyday questions (base). `domain` and `answer` are lists, in order, for a composite.
    """

    messages: list[Message]
    domain: str | list[str] | None
    answer: str | list[str]
    wording: int
    kind: Literal["single", "composite", "base"]


class Summary(TypedDict):
    """What recipe.json says of the files beside it."""

    command: str
    seed: int
    num_train: int
    python: str
    reasoning_gym: str
    note: str
    files: dict[str, dict[str, Any]]


@dataclass
class Material:
    """What one split may use, and the chance by which it picks.

    Attributes:
        held_out: use the wordings and surface forms that training never shows.
    """

    rng: Random
    items: Mapping[str, Iterator[Item]]
    documents: Sequence[Document]
    held_out: bool = False

    @cached_property
    def short_documents(self) -> list[Document]:
        """Those that may stand in a history."""
        return [document for document in self.documents if document.num_words <= MAX_HISTORY_WORDS]

    def single(self, domain: str, *, history: bool) -> Record:
        """One task as one question."""
        item = next(self.items[domain])
        wording = self.rng.choice(WORDINGS[domain].indices(held_out=self.held_out))
        question = WORDINGS[domain][wording].format_map(item.facts)
        return Record(
            messages=[*self._history(history), *_exchange(question, item.reply)],
            domain=domain,
            answer=item.answer,
            wording=wording,
            kind="single",
        )

    def composite(self, domains: Sequence[str], *, history: bool) -> Record:
        """Two or three tasks in one message, answered in order in one reply."""
        wording = self.rng.choice(SURFACE_FORMS.indices(held_out=self.held_out))
        form = SURFACE_FORMS[wording]
        items = [next(self.items[domain]) for domain in domains]
        questions: list[Part] = []
        replies: list[Part] = []
        for place, (domain, item) in enumerate(zip(domains, items, strict=True)):
            mark = form.marks[place]
            template = self._inline_wording(domain)
            if form.lower and mark:
                template = _lower_first(template)
            gap = form.gap if place else form.intro.format(count=("two", "three")[len(domains) - 2])
            reply_gap = form.gap.replace(" ", "\n") if place else ""
            questions.append(_part(gap + mark + template.format_map(item.facts), domain))
            replies.append(_part(reply_gap + form.reply_marks[place] + item.reply, domain))
        return Record(
            messages=[*self._history(history), *_exchange(questions, replies)],
            domain=list(domains),
            answer=[item.answer for item in items],
            wording=wording,
            kind="composite",
        )

    def document(self, document: Document) -> Record:
        """A question about a document, which is the base model's business."""
        wording, question = self._ask(document)
        return Record(
            messages=_exchange(question, document.summary),
            domain=None,
            answer=document.summary,
            wording=wording,
            kind="base",
        )

    def everyday(self) -> Record:
        """A plain question without a document, for the base model too."""
        kind = self.rng.choice(EVERYDAY)
        x, y = self.rng.choice(kind.pairs)
        question = self.rng.choice(kind.questions)
        wording = len(DOCUMENT_WORDINGS) + [one for each in EVERYDAY for one in each.questions].index(question)
        answer = kind.answer.format(x=x, y=y)
        return Record(
            messages=_exchange(question.format(x=x), answer), domain=None, answer=answer, wording=wording, kind="base"
        )

    def domains(self, include: str | None = None) -> list[str]:
        """Two or three different domains in any order, `include` among them."""
        num_domains = 3 if self.rng.random() < THREE_TASKS_SHARE else 2
        chosen = [include] if include else []
        others = [domain for domain in DOMAINS if domain != include]
        chosen += self.rng.sample(others, num_domains - len(chosen))
        self.rng.shuffle(chosen)
        return chosen

    def _history(self, wanted: bool) -> list[Message]:
        if not wanted:
            return []
        document = self.rng.choice(self.short_documents)
        _, question = self._ask(document)
        return _exchange([_part(question, None)], [_part(document.summary, None)])

    def _ask(self, document: Document) -> tuple[int, str]:
        wording = self.rng.choice(DOCUMENT_WORDINGS.indices(held_out=self.held_out))
        return wording, DOCUMENT_WORDINGS[wording].format(module=document.module, body=document.body)

    def _inline_wording(self, domain: str) -> str:
        """A wording that stays on one line, whatever its facts."""
        wordings = [WORDINGS[domain][index] for index in WORDINGS[domain].indices(held_out=self.held_out)]
        return self.rng.choice([wording for wording in wordings if "\n" not in wording and "{lines}" not in wording])


def num_files() -> int:
    """How many files `build` makes."""
    return 2 * len(DOMAINS) + 4


def build(seed: int, num_train: int) -> Iterator[tuple[str, list[Record]]]:
    """Make every file's records, file by file.

    Args:
        seed: equal seeds give equal records.
        num_train: records in each adapter's training file; the router's follows from it.

    Yields:
        A file's name and its records.

    Raises:
        ValueError: `num_train` is too small to hold every kind of record, or Python's sources are not installed.
    """
    if num_train < 20:
        raise ValueError(f"num_train is {num_train}: an adapter's training file needs at least 20 records")
    texts = documents()
    Random(f"documents {seed}").shuffle(texts)
    held_out_texts, texts = texts[:NUM_HELD_OUT_DOCUMENTS], texts[NUM_HELD_OUT_DOCUMENTS:]
    if not texts:
        raise ValueError("too few docstrings found: the sources of Python's standard library must be installed")
    items = {domain: task.items(seed, 2 * _RESERVED + num_train) for domain, task in TASKS.items()}

    def material(name: str, start: int, stop: int | None, texts: Sequence[Document], held_out: bool) -> Material:
        endless = {domain: cycle(items[domain][start:stop]) for domain in DOMAINS}
        return Material(Random(f"{name} {seed}"), endless, texts, held_out)

    held_out = material("held out", 0, _RESERVED, held_out_texts, True)
    val = material("val", _RESERVED, 2 * _RESERVED, texts, False)
    train = material("train", 2 * _RESERVED, None, texts, False)
    yield (
        "heldout.jsonl",
        [held_out.single(domain, history=bool(turn % 2)) for turn in range(NUM_HELD_OUT) for domain in DOMAINS],
    )
    yield (
        "heldout_composite.jsonl",
        [held_out.composite(held_out.domains(), history=False) for _ in range(NUM_HELD_OUT_COMPOSITES)],
    )
    yield "heldout_base.jsonl", [held_out.document(text) for text in held_out_texts]
    for domain in DOMAINS:
        yield f"val_{domain}.jsonl", _singles(val, domain, NUM_VAL)
    for domain in DOMAINS:
        num_composites = round(COMPOSITE_SHARE * num_train)
        singles = _singles(train, domain, num_train - num_composites)
        yield f"train_{domain}.jsonl", _shuffled(train.rng, singles, _composites(train, num_composites, domain))
    yield (
        "train_router.jsonl",
        _shuffled(
            train.rng,
            *(_singles(train, domain, num_train // len(DOMAINS)) for domain in DOMAINS),
            _composites(train, num_train // 2),
            _base(train, num_train // 4),
        ),
    )


def write(out: Path, files: Iterable[tuple[str, list[Record]]], *, seed: int, num_train: int) -> Summary:
    """Write `build`'s files to the folder `out`, and recipe.json last, each in one step."""
    summary = Summary(
        command=f"python -m molora.training.recipes --seed {seed} --num-train {num_train}",
        seed=seed,
        num_train=num_train,
        python=platform.python_version(),
        reasoning_gym=version("reasoning-gym"),
        note="The documents are docstrings of this Python's standard library: another version gives other bytes.",
        files={},
    )
    for name, records in files:
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        write_atomic(out / name, data)
        summary["files"][name] = {"num_records": len(records), "sha256": hashlib.sha256(data).hexdigest()}
    write_atomic(out / "recipe.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _singles(material: Material, domain: str, num_records: int) -> list[Record]:
    return [material.single(domain, history=_by_chance(material)) for _ in range(num_records)]


def _composites(material: Material, num_records: int, include: str | None = None) -> list[Record]:
    return [material.composite(material.domains(include), history=_by_chance(material)) for _ in range(num_records)]


def _base(material: Material, num_records: int) -> list[Record]:
    num_everyday = round(EVERYDAY_SHARE * num_records)
    everyday = [material.everyday() for _ in range(num_everyday)]
    return everyday + [
        material.document(material.rng.choice(material.documents)) for _ in range(num_records - num_everyday)
    ]


def _by_chance(material: Material) -> bool:
    return material.rng.random() < HISTORY_SHARE


def _shuffled(rng: Random, *groups: list[Record]) -> list[Record]:
    records = [record for group in groups for record in group]
    rng.shuffle(records)
    return records


def _part(text: str, domain: str | None) -> Part:
    return Part(type="text", text=text, domain=domain)


def _exchange(question: str | list[Part], answer: str | list[Part]) -> list[Message]:
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


def _lower_first(template: str) -> str:
    """Lower the first letter, but not that of "I" or of a fact."""
    return template if template.startswith(("{", "I ")) else template[0].lower() + template[1:]
