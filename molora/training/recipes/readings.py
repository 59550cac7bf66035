"""How questions about a document or a passage are put. Plain data.

What fills the braces of the former is in `documents`; the answers to the latter are in `passages`.
"""

from molora.training.recipes.choices import Choices

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
    more=(
        "summarize: {body}",
        "tl;dr of this?\n\n{body}",
        "{body}\n\nWhat does that mean, briefly?",
        "Could you explain the following text from the {module} module?\n\n{body}",
        "{body} Please put that in one short sentence.",
        "What does this part of the {module} documentation say?\n\n{body}",
        "I am reading about {module}. Help me understand this:\n\n{body}",
        "In a single line, what is described here?\n\n{body}",
        "Text:\n{body}\n\nSummary:",
        "Documentation:\n\n{body}\n\nTask: write its title line.",
        "Kindly provide a brief abstract of the paragraph below.\n\n{body}",
        "{body}\n\nWhat is this for?",
        "My boss wants a one-sentence version of this: {body}",
        "Shorten this as much as you can.\n\n{body}",
        "what does this doc say? {body}",
        "Explain to a beginner, in one sentence: {body}",
        "Below is a docstring without its first line. What might that line be?\n\n{body}",
        "{body}\n\nCan you name the purpose of the thing described?",
        "Which tool or function is this text about?\n\n{body}",
        "How would you introduce the following?\n\n{body}",
    ),
)

# By the question's kind; {text} is the passage, {cue} a few of its words.
PASSAGE_WORDINGS: dict[str, Choices[str]] = {
    "first sentence": Choices(
        training=(
            "What is the first sentence of this passage?\n\n{text}",
            "{text}\n\nHow does this passage begin?",
            "Quote the opening sentence: {text}",
            'Here is a page of an old story: "{text}" Which sentence opens it?',
            "Read this and repeat its first sentence.\n\n{text}",
        ),
        held_out=(
            "{text}\n\nCopy out the sentence that this extract starts with.",
            "I am looking at a book. {text} With which words does that begin?",
        ),
    ),
    "last sentence": Choices(
        training=(
            "How does the passage end?\n\n{text}",
            "{text}\n\nWhat is the last sentence of the text above?",
            "Give me the closing sentence of this extract.\n\n{text}",
            "Story time! {text} Say the final sentence again, please.",
            "{text}\nwhat was the last sentence",
        ),
        held_out=(
            "Which sentence closes this paragraph of a tale?\n\n{text}",
            "{text}\n\nI missed the ending. What did it say?",
        ),
    ),
    "continuation": Choices(
        training=(
            '{text}\n\nWhat comes after "{cue}" in this passage?',
            'Find the words "{cue}" below and tell me how that sentence goes on.\n\n{text}',
            'Complete the quotation "{cue} ..." from this text: {text}',
            'How does the sentence that starts with "{cue}" continue?\n\n{text}',
        ),
        held_out=(
            '{text}\n\nOne sentence opens with "{cue}". Finish it.',
            'Search this page for "{cue}" and read me the rest of the sentence. {text}',
        ),
    ),
    "number of words": Choices(
        training=(
            "{text}\n\nHow many words does the first sentence have?",
            "Count the words of the opening sentence.\n\n{text}",
            "In the text that follows, how long is the first sentence, in words? {text}",
        ),
        held_out=("How many words are there before the first full stop or other end of a sentence?\n\n{text}",),
    ),
}
