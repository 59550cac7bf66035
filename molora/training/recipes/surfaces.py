"""How several tasks share a message, and what may stand before and after a question. Plain data."""

from dataclasses import dataclass

from molora.training.recipes.choices import Choices
from molora.training.recipes.composed_marks import composed_marks


@dataclass(frozen=True)
class SurfaceForm:
    """How several tasks share one message, and their answers the reply.

    Attributes:
        marks: what opens the first, second and third task.
        reply_marks: what opens their answers.
        intro: text before the first task, maybe with alternatives `[a|b]`; `{count}` becomes "two" or "three".
        gap: what stands between two tasks; in the reply it is a line break where this is a space.
        lower: tasks continue the mark's sentence, in lower case.
    """

    marks: tuple[str, str, str]
    reply_marks: tuple[str, str, str]
    intro: str = ""
    gap: str = "\n"
    lower: bool = False


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
    more=(
        SurfaceForm(_PARENTHESES, _PARENTHESES),
        SurfaceForm(_BULLETS, _NONE, intro="Here is what I need:\n"),
        SurfaceForm(_STARS, _STARS),
        SurfaceForm(_NUMBERS, _NUMBERS, intro="My list for today:\n\n", gap="\n\n"),
        SurfaceForm(("1: ", "2: ", "3: "), ("1: ", "2: ", "3: ")),
        SurfaceForm(("#1 ", "#2 ", "#3 "), ("#1 ", "#2 ", "#3 "), intro="Please do all {count} of these.\n"),
        SurfaceForm(("a) ", "b) ", "c) "), ("a) ", "b) ", "c) "), intro="Answer each part.\n"),
        SurfaceForm(("a. ", "b. ", "c. "), ("a. ", "b. ", "c. "), gap="\n\n"),
        SurfaceForm(("(1) ", "(2) ", "(3) "), ("(1) ", "(2) ", "(3) "), gap=" "),
        SurfaceForm(("Task 1: ", "Task 2: ", "Task 3: "), ("Task 1: ", "Task 2: ", "Task 3: ")),
        SurfaceForm(("Part A: ", "Part B: ", "Part C: "), ("Part A: ", "Part B: ", "Part C: "), gap="\n\n"),
        SurfaceForm(("Problem 1. ", "Problem 2. ", "Problem 3. "), _NUMBERS, gap="\n\n"),
        SurfaceForm(("One: ", "Two: ", "Three: "), ("One: ", "Two: ", "Three: ")),
        SurfaceForm(("• ", "• ", "• "), ("• ", "• ", "• "), intro="Could you look at these?\n"),
        SurfaceForm(("+ ", "+ ", "+ "), _NONE),
        SurfaceForm(("> ", "> ", "> "), _NONE, intro="Reply to these {count}, please:\n"),
        SurfaceForm(("", "Next, ", "Last, "), _NONE, gap=" ", lower=True),
        SurfaceForm(("", "Another thing: ", "One more: "), _NONE, gap="\n"),
        SurfaceForm(("", "And ", "And "), _NONE, gap=" ", lower=True),
        SurfaceForm(("", "PS: ", "PPS: "), _NONE, gap="\n\n"),
        SurfaceForm(("", "When that is done: ", "Then this: "), _NONE, gap=" "),
        SurfaceForm(("Firstly, ", "Secondly, ", "Thirdly, "), _NONE, gap=" ", lower=True),
        SurfaceForm(
            ("First of all, ", "Second, ", "Third, "), ("First: ", "Second: ", "Third: "), gap="\n", lower=True
        ),
        SurfaceForm(_NONE, _NONE, intro="I have {count} unrelated questions.\n\n", gap="\n\n"),
        SurfaceForm(_NONE, _NUMBERS, intro="Help me with {count} things, and number your answers.\n"),
        SurfaceForm(_NUMBERS, _NONE, intro="No need to number the answers.\n"),
        SurfaceForm(("Step 1: ", "Step 2: ", "Step 3: "), ("Step 1: ", "Step 2: ", "Step 3: "), gap="\n"),
        SurfaceForm(("i. ", "ii. ", "iii. "), ("i. ", "ii. ", "iii. ")),
        SurfaceForm(
            ("I) ", "II) ", "III) "),
            ("I) ", "II) ", "III) "),
            "[Please answer|Kindly answer|Answer] all [parts|of these].\n",
            "\n\n",
        ),
        SurfaceForm(("Q) ", "Q) ", "Q) "), ("A) ", "A) ", "A) ")),
        SurfaceForm(("### 1\n", "### 2\n", "### 3\n"), ("### 1\n", "### 2\n", "### 3\n"), gap="\n\n"),
        SurfaceForm(
            ("## First\n", "## Second\n", "## Third\n"),
            _NONE,
            "[Some|A few] headings, each with a [question|task] [below|under it].\n\n",
            "\n\n",
        ),
        SurfaceForm(("**1.** ", "**2.** ", "**3.** "), _NUMBERS, "[Here goes|Please do these|My worksheet]:\n\n"),
        SurfaceForm(("-> ", "-> ", "-> "), _NONE),
        SurfaceForm(("", "---\n", "---\n"), _NONE),
        SurfaceForm(
            _NONE,
            _NONE,
            "[These are|Here come|Below are] {count} [separate|different] requests, [one a line|line by line].\n",
        ),
        SurfaceForm(("", "and then ", "and then "), _NONE, gap=" ", lower=True),
        SurfaceForm(("", "After that, ", "And after that, "), _NONE, gap=" ", lower=True),
        SurfaceForm(("To begin with, ", "In addition, ", "To finish, "), _NONE, gap=" ", lower=True),
        SurfaceForm(("first, ", "then, ", "and finally, "), _NONE, lower=True),
        SurfaceForm(("", "Oh, and ", "Oh, and "), _NONE, gap=" ", lower=True),
        SurfaceForm(("", "By the way, ", "And by the way, "), _NONE, gap="\n\n", lower=True),
        SurfaceForm(("", "While you are at it, ", "And as I have you here, "), _NONE, gap=" ", lower=True),
        SurfaceForm(("Start with this: ", "Go on with this: ", "End with this: "), _NONE, gap=" "),
        SurfaceForm(("Item 1: ", "Item 2: ", "Item 3: "), ("Item 1: ", "Item 2: ", "Item 3: ")),
        SurfaceForm(
            ("1st: ", "2nd: ", "3rd: "), ("1st: ", "2nd: ", "3rd: "), "[hey|ok|so], {count} [things|questions]\n"
        ),
        SurfaceForm(
            ("No. 1: ", "No. 2: ", "No. 3: "),
            _NUMBERS,
            "You are [an assistant|a helpful clerk|a tutor]. [Your tasks|To do]:\n",
        ),
        SurfaceForm(("A: ", "B: ", "C: "), ("A: ", "B: ", "C: "), gap=" "),
        SurfaceForm(
            ("~ ", "~ ", "~ "),
            _NONE,
            "[My teacher|My boss|A friend] [left me|gave me|sent] {count} [things to do|questions].\n",
        ),
    ),
    more_held_out=(
        SurfaceForm(
            ("First question: ", "Second question: ", "Third question: "),
            ("First answer: ", "Second answer: ", "Third answer: "),
        ),
        SurfaceForm(
            ("(i) ", "(ii) ", "(iii) "),
            ("(i) ", "(ii) ", "(iii) "),
            "I've got {count} things to ask you today:\n",
            " ",
        ),
        SurfaceForm(
            _NONE, _NONE, "Here are {count} questions, one per paragraph. Answer each on its own line.\n\n", "\n\n"
        ),
        SurfaceForm(("Task A: ", "Task B: ", "Task C: "), ("A: ", "B: ", "C: ")),
    ),
    later_held_out=(
        SurfaceForm(
            ("Quick one first: ", "Next up: ", "And then: "),
            _NONE,
        ),
        SurfaceForm(
            ("To begin with, ", "While you're at it, ", "And before I forget, "),
            _NONE,
            gap=" ",
            lower=True,
        ),
        SurfaceForm(
            _NONE,
            _NONE,
            intro="I've got {count} unrelated things here, just the answers please.\n\n",
            gap="\n\n",
        ),
        SurfaceForm(
            ("[a] ", "[b] ", "[c] "),
            ("[a] ", "[b] ", "[c] "),
        ),
        SurfaceForm(
            ("Task one\n", "Task two\n", "Task three\n"),
            ("Task one: ", "Task two: ", "Task three: "),
            intro="Please work through these {count} tasks:\n\n",
            gap="\n\n",
        ),
        SurfaceForm(
            ("The first thing I need: ", "The second: ", "The third: "),
            ("For the first: ", "For the second: ", "For the third: "),
            intro="Could you help me with {count} little things? ",
            gap=" ",
        ),
    ),
    various=tuple(SurfaceForm(*each) for each in composed_marks()),
)

# In training only, at a question's start and end: a router must not take them for a task's.
OPENERS: tuple[str, ...] = (
    "Hi there!",
    "Hi!",
    "Hello.",
    "Hello there,",
    "Hey,",
    "Hey!",
    "hi",
    "Good morning!",
    "Good evening.",
    "Dear assistant,",
    "Quick question:",
    "A small question.",
    "I have a question.",
    "Question for you:",
    "Can you help me?",
    "I need some help.",
    "Please help me with this.",
    "Help!",
    "One more thing.",
    "Okay, next one.",
    "Right, here goes.",
    "So,",
    "Let's try this.",
    "Here's something different:",
    "Now for something else.",
    "Thanks for that.",
    "Great, thank you!",
    "Excuse me,",
    "I hope you are well.",
    "Just curious:",
    "This one is for my homework.",
    "Something came up at work.",
    "I am stuck.",
    "Could I ask you something?",
    "Yo!",
    "Good afternoon.",
    "Hello again.",
    "Listen,",
    "Look,",
    "Here is one for you.",
    "Next question.",
    "Something else:",
    "I was wondering about this.",
    "My friends and I disagree.",
    "This has been bugging me.",
    "A colleague asked me this.",
    "Need a hand here.",
    "Sorry to bother you.",
    "New task.",
    "Help needed:",
    "I saw this in a magazine.",
    "Got a minute?",
    "My turn to ask.",
    "You seem clever.",
    "The worksheet reads:",
    "The note on my desk says:",
    "It reads as follows:",
    "This is what the letter says:",
    "My brother writes:",
    "Page 12 of the book asks:",
    "The sign at the door reads:",
    "A riddle from the radio:",
    "Here is what the email says.",
    "The card reads:",
    "They wrote this on the board:",
    "The teacher reads out:",
    "In the paper it said:",
    "The form asks:",
    "I was given this to read and to answer.",
)

CLOSERS: tuple[str, ...] = (
    "Thanks in advance.",
    "No rush.",
    "Thanks!",
    "Many thanks!",
    "Thank you very much.",
    "Cheers!",
    "I appreciate it.",
    "Much appreciated.",
    "Take your time.",
    "I am curious.",
    "That would help me a lot.",
    "Just the answer will do.",
    "I'd like to be sure.",
    "It is for school.",
    "Let me know.",
    "Have a nice day!",
    "I forgot how to do this.",
    "Best wishes.",
    "Please be careful.",
    "I can't do it myself.",
    "thx",
    "Thank you!",
    "Ta!",
    "Please keep it short.",
    "Please hurry.",
    "I am waiting.",
    "This is important to me.",
    "Much obliged.",
    "Over to you.",
    "Any help is welcome.",
    "It has been a long day.",
    "My class starts soon.",
    "I owe you one.",
    "Sorry for the trouble.",
    "tia",
    "That is all.",
    "I could not find it anywhere.",
    "You are the best.",
)
