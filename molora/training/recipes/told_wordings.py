"""Questions told in many voices, for training alone: a file of templates for each domain, one on a line.

Their authors had seen no other wording, those held out included. `[a|b]` and the facts in braces are as in
`varied_wordings`; a line break inside a question is written as a backslash and an n. `OTHERS` are requests that no
adapter answers, without facts and with an answer behind " ||| ": half of them in the scenes of the domains' questions.
"""

from functools import cache
from importlib.resources import files

OTHERS = "others"


@cache
def told(domain: str) -> tuple[str, ...]:
    """The templates of a domain, or of `OTHERS`."""
    text = files("molora.training.recipes").joinpath("told", f"{domain}.txt").read_text(encoding="utf-8")
    return tuple(line.replace("\\n", "\n") for line in text.splitlines())
