"""The words of the demo's data: how questions are put, and which of the ways training never shows.

Plain data. What fills the braces is in `tasks` and `documents`; how wordings become conversations is in `build`.
"""

import codecs
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Choices(Generic[T]):
    """Ways to say one thing. An index counts through `training` first, then `held_out`."""

    training: tuple[T, ...]
    held_out: tuple[T, ...]

    def __len__(self) -> int:
        return len(self.training) + len(self.held_out)

    def __getitem__(self, index: int) -> T:
        return (self.training + self.held_out)[index]

    def indices(self, *, held_out: bool) -> range:
        """The indices of one of the two halves."""
        num_training = len(self.training)
        return range(num_training, num_training + len(self.held_out)) if held_out else range(num_training)


@dataclass(frozen=True)
class SurfaceForm:
    """How several tasks share one message, and their answers the reply.

    Attributes:
        marks: what opens the first, second and third task.
        reply_marks: what opens their answers.
        intro: text before the first task; `{count}` becomes "two" or "three".
        gap: what stands between two tasks; in the reply it is a line break where this is a space.
        lower: tasks continue the mark's sentence, in lower case.
    """

    marks: tuple[str, str, str]
    reply_marks: tuple[str, str, str]
    intro: str = ""
    gap: str = "\n"
    lower: bool = False


WORDINGS: dict[str, Choices[str]] = {
    "arithmetic": Choices(
        training=(
            "What is {expression}?",
            "Calculate {expression}.",
            "Please work out {expression} for me.",
            "{expression} = ?",
            "Could you tell me the result of {expression}?",
            "Compute the value of {expression}.",
            "I need to know what {spoken} comes to.",
            "How much is {spoken}?",
            "Start with {first} and {steps}. What number do you get?",
            "Here is a sum: {expression}. What does it come to?",
            "Evaluate the expression {expression}.",
            "Solve this for me, please:\n{expression}",
            "My calculator is broken. What is {expression}?",
            "Begin at {first} and {steps}. Where does that leave you?",
            "What do you get for {spoken}?",
            "Find the answer to {expression}.",
        ),
        held_out=(
            "Do the maths: {expression}",
            "What number does {expression} equal?",
            "I am thinking of {first}. Now {steps}. Where do I end up?",
            "Quick one: {spoken}?",
            "Give me the number that {expression} makes, if you would.",
            "Sorry to bother you, but what would I get if I typed {expression} into a calculator?",
        ),
    ),
    "words": Choices(
        training=(
            "Spell the word {word} backwards.",
            'What is "{word}" spelled backwards?',
            "Please reverse the letters of the word {word}.",
            'Can you write "{word}" in reverse?',
            "Write the word '{word}' from back to front.",
            "Reverse this word: {word}",
            "The word is {word}. Spell it backwards, please.",
            "How do you spell {word} backwards?",
            "Turn the word {word} around, letter by letter.",
            'Give me the letters of "{word}" in reverse order.',
            "If you read the word {word} from right to left, what do you get?",
            'I would like to see "{word}" written backwards.',
            "Take the word {word} and reverse it.",
            "Word: {word}\nTask: spell it backwards.",
            'Backwards spelling of "{word}"?',
        ),
        held_out=(
            "Start at the last letter of {word} and spell your way to the first.",
            'Flip the word "{word}" for me, last letter first.',
            "Could you spell {word} the other way round?",
            "Here is a word, {word}. How does it read from its end to its beginning?",
            "Show me '{word}' with its letters in the opposite order, thanks.",
        ),
    ),
    "family": Choices(
        training=(
            "{story} What is {a} to {b}?",
            "{story} How is {a} related to {b}?",
            "{story}\n\nWhat relation is {a} to {b}?",
            "Who is {a} to {b}? {story}",
            "Please read this and tell me what {a} is to {b}. {story}",
            "{story} In one word, what is {a} to {b}?",
            "Here is a family. {story} Tell me how {a} is related to {b}.",
            "How is {a} related to {b} in this family? {story}",
            "{story} Complete the sentence: {a} is {b}'s ...",
            "I am drawing a family tree. {story} What should I write for {a}, as seen from {b}?",
            "Work out what {a} is to {b}. {story}",
            "Family facts:\n{story}\n\nQuestion: what is {a} to {b}?",
            "{story} Could you tell me which relative of {b} {a} is?",
            "Given the following, name the relation of {a} to {b}: {story}",
            "{story} So {a} is {b}'s what?",
        ),
        held_out=(
            "{story} From {b}'s point of view, who is {a}?",
            "Let me tell you about some people. {story} What does that make {a} to {b}?",
            "Which member of the family is {a} for {b}? Here is what I know: {story}",
            '{story} When {b} introduces {a}, what is the missing word in "this is my ___"?',
            "Someone asked me what {a} is to {b} and I could not say. {story} Can you?",
        ),
    ),
    "sorting": Choices(
        training=(
            "Sort these numbers in {order} order: {commas}.",
            "Please put {prose} in {order} order.",
            "Arrange the following numbers {direction}: {commas}",
            "What is the list {brackets} sorted {direction}?",
            "Order these numbers with the {first} first: {spaces}",
            "Here are some numbers: {commas}. Sort them {direction}.",
            "Can you list {prose} {direction}?",
            "Rewrite {brackets} in {order} order.",
            "My numbers are {prose}. Could you arrange them {direction}, please?",
            "Sort these numbers, {first} first:\n{lines}",
            "Numbers: {commas}\nOrder: {order}",
            "I need these in {change} order: {commas}.",
            "Rank {prose} {direction}.",
            "Return {brackets} sorted in {order} order.",
            "How do the numbers {commas} look when sorted {direction}?",
        ),
        held_out=(
            "Line up the numbers {prose}, starting with the {first}.",
            "I wrote down {commas} in no particular order. Tidy them up {direction}.",
            "In which order do {prose} go if the {first} comes first?",
            "Put this list straight, {direction} please: {spaces}",
            "These numbers came out of a hat: {commas}. Read them back to me {direction}.",
        ),
    ),
    "legs": Choices(
        training=(
            "How many legs do {prose} have in total?",
            "Count the legs: {commas}.",
            "If I have {prose}, how many legs is that altogether?",
            "There are {prose} in a room. How many legs are there?",
            "At the zoo I saw {prose}. How many legs did I see?",
            "Please work out the total number of legs of {prose}.",
            "Animals: {colons}. Total number of legs?",
            "What is the total leg count for {prose}?",
            "Add up the legs of these animals:\n{lines}",
            "I counted {prose}. How many legs do they have between them?",
            "Find the number of legs in this group of animals: {commas}.",
            "Tell me how many legs {prose} have together.",
            "A picture shows {prose}. How many legs should there be?",
            "Can you count all the legs of {prose}?",
            "Leg count, please: {colons}",
        ),
        held_out=(
            "My daughter drew {prose}. How many legs did she have to draw?",
            "Suppose {prose} turn up at my door. What is the number of legs altogether?",
            "Total up the legs for me: {commas}, thank you.",
            "Given {colons}, what do all the legs add up to?",
            "In my notebook I listed {prose}. What is the combined number of legs?",
        ),
    ),
}

DOCUMENT_WORDINGS: Choices[str] = Choices(
    training=(
        "Summarise this documentation in one sentence.\n\n{body}",
        "{body}\n\nSummarise the text above in one sentence.",
        "What is this passage about?\n\n{body}",
        "Please explain in a few words what this describes:\n\n{body}",
        "I found this in the documentation of Python's {module}. What does it describe?\n\n{body}",
        "{body}\n\nIn short, what does this do?",
        "Give me a short summary: {body}",
        'Here is a note from the {module} package: "{body}" What is its purpose?',
        "Can you sum this up for me?\n\n{body}",
        "Read the following and say what it is for.\n\n{body}",
        "{body}\n\nWhat would be a good first line for this docstring?",
        "Write a one-line description of what is documented here.\n\n{body}",
    ),
    held_out=(
        "A colleague sent me this about Python's {module}. What is the gist of it?\n\n{body}",
        "{body}\n\nTell me the main point of this text.",
        "Boil this down to a single sentence, please:\n\n{body}",
        "I am new to Python. What is being documented here?\n\n{body}",
        "Condense the next paragraph.\n\n{body}",
    ),
)

_NUMBERS = ("1. ", "2. ", "3. ")
_PARENTHESES = ("1) ", "2) ", "3) ")
_LETTERS = ("(a) ", "(b) ", "(c) ")
_BULLETS = ("- ", "- ", "- ")
_STARS = ("* ", "* ", "* ")
_NONE = ("", "", "")
_QUESTIONS = ("Question 1: ", "Question 2: ", "Question 3: ")
_EXERCISES = ("The first exercise: ", "The next exercise: ", "The last exercise: ")

SURFACE_FORMS: Choices[SurfaceForm] = Choices(
    training=(
        SurfaceForm(_NUMBERS, _NUMBERS),
        SurfaceForm(_NUMBERS, _NUMBERS, intro="Please answer these {count} questions.\n"),
        SurfaceForm(_PARENTHESES, _PARENTHESES, intro="I have {count} things to ask:\n"),
        SurfaceForm(_BULLETS, _BULLETS),
        SurfaceForm(_STARS, _STARS, intro="Could you help me with the following?\n\n"),
        SurfaceForm(("First, ", "Then, ", "Finally, "), ("First: ", "Then: ", "Finally: "), gap=" ", lower=True),
        SurfaceForm(("", "Also, ", "And lastly, "), _NONE, gap=" ", lower=True),
        SurfaceForm(_NONE, _NONE),
        SurfaceForm(_NONE, _NONE, gap="\n\n"),
        SurfaceForm(_LETTERS, _LETTERS),
        SurfaceForm(_QUESTIONS, _QUESTIONS, gap="\n\n"),
        SurfaceForm(("A. ", "B. ", "C. "), ("A. ", "B. ", "C. "), intro="Here are {count} small tasks.\n"),
    ),
    held_out=(
        SurfaceForm(("i. ", "ii. ", "iii. "), ("i. ", "ii. ", "iii. "), intro="Got {count} quick ones for you:\n"),
        SurfaceForm(("Q1: ", "Q2: ", "Q3: "), ("A1: ", "A2: ", "A3: ")),
        SurfaceForm(("To start with, ", "After that, ", "And to finish, "), _NONE, gap=" ", lower=True),
        SurfaceForm(("[1] ", "[2] ", "[3] "), ("[1] ", "[2] ", "[3] "), gap="\n\n"),
        SurfaceForm(_EXERCISES, _EXERCISES),
    ),
)


@dataclass(frozen=True)
class Everyday:
    """Plain questions that no adapter answers: every question fits every pair, and so does the answer."""

    questions: tuple[str, ...]
    answer: str
    pairs: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((x, y) for x, y in (pair.split(": ") for pair in text.split("; ")))


# Near the adapters' subjects on purpose (numbers, animals, words): the router must not go by the subject alone.
EVERYDAY: tuple[Everyday, ...] = (
    Everyday(
        ("What is the capital of {x}?", "Which city is the capital of {x}?", "Name the capital of {x}, please."),
        "The capital of {x} is {y}.",
        _pairs(
            "France: Paris; Italy: Rome; Japan: Tokyo; Egypt: Cairo; Peru: Lima; Norway: Oslo; Spain: Madrid; Greece: "
            "Athens; Kenya: Nairobi; Cuba: Havana; Canada: Ottawa; Poland: Warsaw; Chile: Santiago; Ireland: Dublin; "
            "Portugal: Lisbon; Thailand: Bangkok; Austria: Vienna; Hungary: Budapest; Finland: Helsinki; Iceland: "
            "Reykjavik"
        ),
    ),
    Everyday(
        ("What do you call a young {x}?", "What is a baby {x} called?", "Do you know the word for a young {x}?"),
        "A young {x} is called a {y}.",
        _pairs(
            "dog: puppy; cat: kitten; cow: calf; sheep: lamb; duck: duckling; horse: foal; pig: piglet; deer: fawn; "
            "lion: cub; goose: gosling; frog: tadpole; swan: cygnet; goat: kid; chicken: chick; kangaroo: joey"
        ),
    ),
    Everyday(
        ("What is the opposite of {x}?", "Give me a word that means the opposite of {x}.", "Opposite of {x}?"),
        "The opposite of {x} is {y}.",
        _pairs(
            "hot: cold; big: small; early: late; full: empty; open: closed; fast: slow; heavy: light; near: far; "
            "strong: weak; dark: bright; happy: sad; wet: dry; old: young; loud: quiet; rich: poor"
        ),
    ),
    Everyday(
        ("How many {x}?", "Can you remind me how many {x}?", "I keep forgetting: how many {x}?"),
        "There are {y}.",
        _pairs(
            "days are there in a week: seven days in a week; months are there in a year: twelve months in a year; "
            "hours are there in a day: twenty-four hours in a day; minutes are there in an hour: sixty minutes in an "
            "hour; letters are there in the English alphabet: twenty-six letters in the English alphabet; players are "
            "there in a football team: eleven players in a football team; strings are there on a violin: four strings "
            "on a violin; continents are there: seven continents; planets are there in the solar system: eight "
            "planets in the solar system; sides are there in a hexagon: six sides in a hexagon; keys are there on a "
            "full-size piano: eighty-eight keys on a full-size piano; cards are there in a standard deck: fifty-two "
            "cards in a standard deck"
        ),
    ),
    Everyday(
        ("Who wrote {x}?", "Who is the author of {x}?", "Tell me who wrote {x}."),
        "{y} wrote {x}.",
        _pairs(
            "Hamlet: William Shakespeare; Emma: Jane Austen; Dracula: Bram Stoker; Oliver Twist: Charles Dickens; War "
            "and Peace: Leo Tolstoy; Moby-Dick: Herman Melville; Frankenstein: Mary Shelley; Jane Eyre: Charlotte "
            "Brontë; Ulysses: James Joyce; Don Quixote: Miguel de Cervantes; Peter Pan: J. M. Barrie; Walden: Henry "
            "David Thoreau"
        ),
    ),
)

# Dictionary words that a demo should not ask about, in rot13 so that the page can be read.
UNSUITABLE_WORDS: frozenset[str] = frozenset(
    codecs.decode(
        "nff nefr ovgpu juber fyhg cvff pbpx cevpx chffl snt qlxr pbba jbc puvax encr gvg gvggl nahf obbo qvyqb cravf "
        "chovp fcrez fynir ubzb penc gheq qnza uryy tlcfl tlc wrex uhffl znzzl ihyin srprf gjng gneg fynt frkl ahqr "
        "dhrre xenhg ylapu fdhnj frzra ynovn cvzc betl",
        "rot13",
    ).split()
)
