"""From an item, a document, a passage or an everyday question, and a wording, to one conversation.

All is chosen from one random stream, so equal streams give equal conversations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from random import Random
from typing import Literal, TypedDict

from molora.training.recipes.choices import Split, settle
from molora.training.recipes.documents import Document
from molora.training.recipes.everyday import EVERYDAY
from molora.training.recipes.items import Item
from molora.training.recipes.passages import Passage
from molora.training.recipes.readings import DOCUMENT_WORDINGS, PASSAGE_WORDINGS
from molora.training.recipes.surfaces import CLOSERS, OPENERS, SURFACE_FORMS
from molora.training.recipes.wordings import WORDINGS

THREE_TASKS_SHARE = {"train": 0.5, "val": 0.2, "held out": 0.2}  # of composites
OWN_AGAIN_SHARE = 0.35  # of the other tasks in an adapter's own composites: another one of its domain
FRAMED_SHARE = 0.4  # of questions in training: an opener before them, a closer after them, or both
PASSAGE_SHARE = 0.5  # of what is read in training: passages of the story; the others are documents
MAX_HISTORY_WORDS = 50  # of a document in a history, so that conversations stay short

Earlier = Literal["reading", "task"]
"""An exchange before the question: about a text, which is the base model's business, or a task of any domain."""

_MULTILINE_FACTS = ("{lines}", "{bullets}")

# Where the wordings of everyday questions and passages begin in the count of a base record's `wording`.
_FIRST_EVERYDAY = [*accumulate((len(kind.questions) for kind in EVERYDAY), initial=len(DOCUMENT_WORDINGS))]
_FIRST_PASSAGE = dict(
    zip(PASSAGE_WORDINGS, accumulate(map(len, PASSAGE_WORDINGS.values()), initial=_FIRST_EVERYDAY[-1]), strict=False)
)


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
    wordings, then the everyday questions, then the passages' wordings, kind by kind (base). `domain` and `answer`
    are lists, in order, for a composite.
    """

    messages: list[Message]
    domain: str | list[str] | None
    answer: str | list[str]
    wording: int
    kind: Literal["single", "composite", "base"]


@dataclass
class Material:
    """What one file or more may use, and the chance by which they pick.

    Attributes:
        split: whose wordings and surface forms to use.
        items: what to ask, without end, for each domain.
        documents: to read, in histories and for the base model; so are `passages`. One of the two may be empty.
    """

    rng: Random
    split: Split
    items: Mapping[str, Iterator[Item]]
    documents: Sequence[Document] = ()
    passages: Sequence[Passage] = ()

    @cached_property
    def short_documents(self) -> list[Document]:
        """Those that may stand in a history."""
        return [document for document in self.documents if document.num_words <= MAX_HISTORY_WORDS]

    def single(self, domain: str, *, history: Sequence[Earlier] = ()) -> Record:
        """One task as one question."""
        wording, question, item = self._ask_task(domain)
        return Record(
            messages=[*self._history(history), *_exchange(question, item.reply)],
            domain=domain,
            answer=item.answer,
            wording=wording,
            kind="single",
        )

    def composite(self, domains: Sequence[str], *, history: Sequence[Earlier] = ()) -> Record:
        """Two or three tasks in one message, answered in order in one reply."""
        wording = SURFACE_FORMS.draw(self.split, self.rng)
        form = SURFACE_FORMS[wording]
        intro = settle(form.intro, self.rng).format(count=("two", "three")[len(domains) - 2])
        items = [next(self.items[domain]) for domain in domains]
        questions: list[Part] = []
        replies: list[Part] = []
        for place, (domain, item) in enumerate(zip(domains, items, strict=True)):
            mark = form.marks[place]
            wordings = WORDINGS[domain]
            template = settle(wordings[wordings.draw(self.split, self.rng, fits=_is_inline)], self.rng)
            if form.lower and mark:
                template = _lower_first(template)
            gap = form.gap if place else intro
            reply_gap = form.gap.replace(" ", "\n") if place else ""
            questions.append(_part(gap + mark + template.format_map(item.facts), domain))
            replies.append(_part(reply_gap + form.reply_marks[place] + item.reply, domain))
        opener, closer = self._frame(questions[-1]["text"])
        questions[0]["text"] = opener + questions[0]["text"]
        questions[-1]["text"] += closer
        return Record(
            messages=[*self._history(history), *_exchange(questions, replies)],
            domain=list(domains),
            answer=[item.answer for item in items],
            wording=wording,
            kind="composite",
        )

    def document(self, document: Document, *, history: Sequence[Earlier] = ()) -> Record:
        """A question about a document, which is the base model's business."""
        wording, question = self._ask(document)
        return self._base_record(wording, self._framed(question), document.summary, history)

    def passage(self, passage: Passage, *, history: Sequence[Earlier] = ()) -> Record:
        """A question about a passage of a story, for the base model too."""
        wording, question, answer = self._ask_passage(passage)
        return self._base_record(wording, self._framed(question), answer, history)

    def reading(self, *, history: Sequence[Earlier] = ()) -> Record:
        """A question about any document or passage."""
        if self._prefers_passage():
            return self.passage(self.rng.choice(self.passages), history=history)
        return self.document(self.rng.choice(self.documents), history=history)

    def everyday(self, *, history: Sequence[Earlier] = ()) -> Record:
        """A plain question with nothing to read, for the base model too."""
        index = self.rng.randrange(len(EVERYDAY))
        kind = EVERYDAY[index]
        x, y = self.rng.choice(kind.pairs)
        question = self.rng.randrange(len(kind.questions))
        return self._base_record(
            _FIRST_EVERYDAY[index] + question,
            self._framed(kind.questions[question].format(x=x)),
            kind.answer.format(x=x, y=y),
            history,
        )

    def domains(self, include: str | None = None) -> list[str]:
        """Two or three different domains in any order; `include` is among them, and may be more than once."""
        num_domains = 3 if self.rng.random() < THREE_TASKS_SHARE[self.split] else 2
        chosen = [include] if include else []
        others = [domain for domain in self.items if domain != include]
        chosen += self.rng.sample(others, num_domains - len(chosen))
        if include:
            chosen[1:] = [include if self.rng.random() < OWN_AGAIN_SHARE else domain for domain in chosen[1:]]
        self.rng.shuffle(chosen)
        return chosen

    def _base_record(self, wording: int, question: str, answer: str, history: Sequence[Earlier]) -> Record:
        messages = [*self._history(history), *_exchange(question, answer)]
        return Record(messages=messages, domain=None, answer=answer, wording=wording, kind="base")

    def _history(self, kinds: Sequence[Earlier]) -> list[Message]:
        """Earlier exchanges, whose parts are labelled: a plain text's domain would be unknown."""
        return [message for kind in kinds for message in self._earlier(kind)]

    def _earlier(self, kind: Earlier) -> list[Message]:
        domain = None
        if kind == "task":
            domain = self.rng.choice([*self.items])
            _, question, item = self._ask_task(domain)
            answer = item.reply
        elif self._prefers_passage():
            _, question, answer = self._ask_passage(self.rng.choice(self.passages))
        else:
            document = self.rng.choice(self.short_documents)
            (_, question), answer = self._ask(document), document.summary
        return _exchange([_part(question, domain)], [_part(answer, domain)])

    def _ask_task(self, domain: str) -> tuple[int, str, Item]:
        item = next(self.items[domain])
        wording = WORDINGS[domain].draw(self.split, self.rng)
        return wording, self._framed(settle(WORDINGS[domain][wording], self.rng).format_map(item.facts)), item

    def _prefers_passage(self) -> bool:
        if self.documents and self.passages:
            return self.rng.random() < PASSAGE_SHARE
        return not self.documents

    def _ask(self, document: Document) -> tuple[int, str]:
        wording = DOCUMENT_WORDINGS.draw(self.split, self.rng)
        return wording, DOCUMENT_WORDINGS[wording].format(module=document.module, body=document.body)

    def _ask_passage(self, passage: Passage) -> tuple[int, str, str]:
        kinds = sorted({asked.kind for asked in passage.asked})
        kind = self.rng.choice(kinds)
        asked = self.rng.choice([asked for asked in passage.asked if asked.kind == kind])
        index = PASSAGE_WORDINGS[kind].draw(self.split, self.rng)
        question = PASSAGE_WORDINGS[kind][index].format(text=passage.text, cue=asked.cue)
        return _FIRST_PASSAGE[kind] + index, question, asked.answer

    def _framed(self, question: str) -> str:
        opener, closer = self._frame(question)
        return opener + question + closer

    def _frame(self, end: str) -> tuple[str, str]:
        """What to put before a question and after its `end`: often nothing, and never anything but in training."""
        if self.split != "train" or self.rng.random() >= FRAMED_SHARE:
            return "", ""
        opener, closer = self.rng.choice(((True, False), (False, True), (True, True)))
        gaps = (" ", "\n", "\n\n")
        return (
            self.rng.choice(OPENERS) + self.rng.choice(gaps) if opener else "",
            # A list must not run on into the closer.
            self.rng.choice(gaps if end.endswith((".", "?", "!")) else gaps[1:]) + self.rng.choice(CLOSERS)
            if closer
            else "",
        )


def _part(text: str, domain: str | None) -> Part:
    return Part(type="text", text=text, domain=domain)


def _exchange(question: str | list[Part], answer: str | list[Part]) -> list[Message]:
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


def _is_inline(template: str) -> bool:
    """Whether a wording stays on one line, whatever its facts."""
    return not any(part in template for part in ("\n", *_MULTILINE_FACTS))


def _lower_first(template: str) -> str:
    """Lower the first letter, but not that of "I", of a fact, or of what stands in capitals."""
    is_kept = template.startswith(("{", "I ", "I'")) or template[1:2].isupper()
    return template if is_kept else template[0].lower() + template[1:]
