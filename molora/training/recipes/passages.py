"""Ordinary prose that no adapter answers: passages of the public-domain story that comes with reasoning-gym.

What is asked about a passage has an answer that its own text gives, by rule.
"""

import re
from dataclasses import dataclass
from functools import cached_property

STORY = "in_the_year_2889.txt"  # by Jules and Michel Verne, from Project Gutenberg

MIN_WORDS, MAX_WORDS = 40, 120
MAX_ANSWER_WORDS = 30
HELD_OUT_SHARE = 0.2  # of the story: its end
_CUE_WORDS = 4

_SENTENCE_END = r"""(?:(?<=[.!?])|(?<=[.!?]["']))(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)\s+(?=["']?[A-Z])"""


@dataclass(frozen=True)
class Asked:
    """A thing to ask of a passage: its kind in `PASSAGE_WORDINGS`, what fills `{cue}`, and the answer."""

    kind: str
    answer: str
    cue: str = ""


@dataclass(frozen=True)
class Passage:
    """Some sentences of the story that follow one another."""

    sentences: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        return " ".join(self.sentences)

    @cached_property
    def asked(self) -> list[Asked]:
        """What may be asked: each kind whose answer is short and certain."""
        first, last = self.sentences[0], self.sentences[-1]
        asked = [
            Asked(kind, sentence)
            for kind, sentence in (("first sentence", first), ("last sentence", last))
            if _stands_alone(sentence)
        ]
        if _stands_alone(first) and "--" not in first:  # one word or two?
            asked.append(Asked("number of words", f"The first sentence has {len(first.split())} words."))
        for sentence in self.sentences[1:]:
            words = sentence.split()
            cue, rest = " ".join(words[:_CUE_WORDS]), " ".join(words[_CUE_WORDS:])
            if len(words) >= 2 * _CUE_WORDS and '"' not in sentence and self.text.count(cue) == 1:
                asked.append(Asked("continuation", f"... {rest}", cue))
        return [one for one in asked if len(one.answer.split()) <= MAX_ANSWER_WORDS]


def passages(*, held_out: bool) -> list[Passage]:
    """Every passage of `MIN_WORDS` to `MAX_WORDS` words, of the story's end (held out) or of what comes before it."""
    sentences = _sentences()
    border = round((1 - HELD_OUT_SHARE) * len(sentences))
    sentences = sentences[border:] if held_out else sentences[:border]
    lengths = [len(sentence.split()) for sentence in sentences]
    found = [
        Passage(tuple(sentences[start:stop]))
        for start in range(len(sentences))
        for stop in range(start + 2, len(sentences) + 1)
        if MIN_WORDS <= sum(lengths[start:stop]) <= MAX_WORDS
    ]
    return [passage for passage in found if passage.asked]


def _stands_alone(sentence: str) -> bool:
    """Whether it is more than an exclamation, and no piece of a longer speech."""
    return len(sentence.split()) >= _CUE_WORDS and sentence.count('"') % 2 == 0


def _sentences() -> list[str]:
    from reasoning_gym.data import read_data_file

    text = read_data_file(STORY)
    story = text[text.index("Little though they seem") : text.index("Jules Verne.\n\n", text.index("Little though"))]
    return re.split(_SENTENCE_END, " ".join(story.replace("_", "").split()))
