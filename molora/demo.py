"""The demo: a conversation with the base model, and questions that branch off it, each answered under the router.

It needs a model and a console and nothing else. The questions are made of the held-out data's items and wordings, which
neither the adapters nor the router were trained on, and bring their reference answers. They were picked among those
that the demo bank gets right; its card says how often it does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from molora.display import MAX_WIDTH, Palette, RoutedWriter, is_coloured, write_text

if TYPE_CHECKING:
    from molora.generation import Generation
    from molora.model import MoLoRA

INDENT = 9
BANK_NAME = "smollm2-demo"

DOCUMENT = """\
The lighthouse on Gull Point has been dark since 1987, but last spring Marta Olsen bought it for the price of a used \
car. She is a retired clockmaker, and what she wanted was the old turning gear under the lamp: forty brass wheels, \
green with salt. All summer she rowed out with a toolbox and a thermos of coffee, and cleaned the wheels one by one. \
The fishermen laughed at her until the first fog of October. That night the lamp swung round again, slow and yellow, \
and two boats that had lost their way followed it home. Nobody laughs now. On Sundays the children of the village \
come to wind the gear, and Marta lets them ring the bell."""

DOCUMENT_QUESTION = "Summarise the story in one short sentence."


@dataclass(frozen=True)
class Question:
    """A message with one task or more, and the answer that each must end in."""

    text: str
    answers: tuple[str, ...]


QUESTIONS = (
    Question(
        "Sorry to bother you, but what would I get if I typed 808 + 599 into a calculator?",
        ("1407",),
    ),
    Question(
        "Let me tell you about some people. Edward is married to Abigail. They have a child called John. John is "
        "married to Lily. They have children called William and Ethan. Finn is married to Nova. They have a child "
        "called Lily. What does that make Nova to Ethan?",
        ("grandmother",),
    ),
    Question(
        "Got two quick ones for you:\n"
        "i. My daughter drew 8 ducks and 8 bees. How many legs did she have to draw?\n"
        'ii. Flip the word "winch" for me, last letter first.',
        ("64", "hcniw"),
    ),
)


@dataclass(frozen=True)
class Turn:
    """One answer; `right` says of each task of its question whether it was solved ((), if it has no references)."""

    route: str
    generation: Generation
    right: tuple[bool, ...]


@dataclass(frozen=True)
class DemoResult:
    """All turns in the order in which they ran. The last line counts the routed ones."""

    turns: tuple[Turn, ...]

    @property
    def routed(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.route == "auto"]

    @property
    def summary(self) -> str:
        """The last line.

        reused: prompt tokens whose keys and values came from the cache, over the routed turns.
        recomputed: live base entries that those turns computed again.
        tokens, adapters: what the routed turns generated, and how many different adapters produced it.
        """
        generations = [turn.generation for turn in self.routed]
        num_reused = sum(out.num_reused_tokens for out in generations)
        num_recomputed = sum(out.num_recomputed_tokens for out in generations)
        num_tokens = sum(out.num_generated_tokens for out in generations)
        adapters = {name for out in generations for route in out.generated_routes for name, _ in route}
        return (
            f"base cache: {num_reused} reused, {num_recomputed} recomputed; "
            f"router: {len(adapters)} adapters over {num_tokens} tokens"
        )


def demo_bank_path() -> Path:
    """The folder of the demo bank: inside an installed package, or beside it in a source checkout.

    Raises:
        FileNotFoundError: it is in neither.
    """
    package = Path(__file__).resolve().parent
    folders = [parent / "banks" / BANK_NAME for parent in (package, package.parent)]
    for folder in folders:
        if (folder / "molora.json").is_file():
            return folder
    raise FileNotFoundError(
        f"the demo bank is neither in {folders[0]} nor in {folders[1]}; name a bank with --bank, or install again."
    )


def check_answers(text: str, references: Sequence[str]) -> tuple[bool, ...]:
    """For each reference, in order, whether the text gives it: exactly what follows its `Answer:` on that line.

    Of more `Answer:` lines than references, the first ones count.
    """
    given = [answer.strip().lower() for answer in re.findall(r"Answer:(.*)", text)]
    given += [""] * (len(references) - len(given))
    return tuple(mine == reference.lower() for mine, reference in zip(given, references, strict=False))


def run(
    model: MoLoRA, console: Console, *, questions: Sequence[Question] = QUESTIONS, max_new_tokens: int = 128
) -> DemoResult:
    """Hold the conversation on `console`; returns all that was generated."""
    demo = _Demo(model, console, max_new_tokens)
    demo.introduce()
    demo.heading("The base model reads a document")
    document = f"{DOCUMENT}\n\n{DOCUMENT_QUESTION}"
    demo.user(document)
    told = [{"role": "user", "content": document}]
    first = demo.answer(told, "base", "base")
    told.append({"role": "assistant", "content": first.generation.text})
    console.print()
    demo.note(
        "Each question below is a branch of that one conversation: it takes over the keys and values that the base "
        "model has computed, whichever adapters the router picks afterwards."
    )
    for index, question in enumerate(questions):
        num = len(question.answers)
        demo.heading("One message, one task" if num == 1 else f"One message, {num} tasks: the adapter changes inside")
        demo.user(question.text)
        asked = [*told, {"role": "user", "content": question.text}]
        if index == len(questions) - 1:
            demo.answer(asked, "base", "base", question, dim=True)
        demo.answer(asked, "auto", "routed", question)
    result = DemoResult(tuple(demo.turns))
    demo.conclude(result)
    return result


class _Demo:
    def __init__(self, model: MoLoRA, console: Console, max_new_tokens: int) -> None:
        self.turns: list[Turn] = []
        self._model = model
        self._console = console
        self._palette = Palette([entry.name for entry in model.bank.adapters], self._console.color_system)
        self._max_new_tokens = max_new_tokens
        self._num_headings = 0

    def introduce(self) -> None:
        bank = self._model.bank
        where = f"{self._model.decoder.device}, {str(self._model.model.dtype).removeprefix('torch.')}"
        self._console.print()
        self._console.print(
            Text.assemble(
                ("MoLoRA", "bold"), f"  {bank.config.base.name.rpartition('/')[2]} with {len(bank)} adapters "
            ),
            Text(f"(bank {bank.name}; {where})", "dim"),
            soft_wrap=True,
        )
        if is_coloured(self._console):
            self._console.print(self._palette.legend(), width=min(self._console.width, MAX_WIDTH))
            self.note("Each token has the colour of the adapter that the router chose to write it.")
        else:
            self.note(
                "[name] marks where the router changes to another adapter; the adapters are "
                + ", ".join(entry.name for entry in bank.adapters)
                + "."
            )

    def heading(self, text: str) -> None:
        self._num_headings += 1
        width = min(self._console.width - 1, MAX_WIDTH)
        rule = "─" * max(0, width - len(text) - 6)
        self._console.print()
        self._console.print(
            Text.assemble(("── ", "dim"), (f"{self._num_headings} {text} ", "bold"), (rule, "dim")), soft_wrap=True
        )

    def note(self, text: str) -> None:
        self._console.print(Text(text, "dim italic"), width=min(self._console.width - 1, MAX_WIDTH))

    def user(self, text: str) -> None:
        write_text(self._console, "you", "bold", text, indent=INDENT)

    def answer(
        self,
        messages: Sequence[dict[str, str]],
        route: str,
        margin: str,
        question: Question | None = None,
        *,
        dim: bool = False,
    ) -> Turn:
        self._console.print()
        writer = RoutedWriter(self._console, self._palette, indent=INDENT, dim=dim)
        writer.label(margin, "dim" if dim else "bold")
        start_s = time.perf_counter()
        with self._model.stream(messages, route=route, max_new_tokens=self._max_new_tokens) as stream:
            for token in stream:
                writer.push(token.text, token.route)
            out = stream.result
        writer.end()
        references = question.answers if question else ()
        turn = Turn(route, out, check_answers(out.text, references))
        self.turns.append(turn)
        self._verdict(turn, references, time.perf_counter() - start_s)
        return turn

    def _verdict(self, turn: Turn, references: Sequence[str], seconds: float) -> None:
        out = turn.generation
        if references:
            verdicts = [
                Text("✓", "green") if right else Text(f"✗ expected {reference}", "red")
                for right, reference in zip(turn.right, references, strict=True)
            ]
            self._console.print(Text(" " * INDENT).append_text(Text("  ").join(verdicts)), soft_wrap=True)
        aside = (
            f"{out.num_reused_tokens} of {out.num_prompt_tokens} prompt tokens reused, "
            f"{out.num_generated_tokens} written, {seconds:.1f} s"
        )
        self._console.print(Text(" " * INDENT + aside, "dim"), soft_wrap=True)

    def conclude(self, result: DemoResult) -> None:
        marks = [right for turn in result.routed for right in turn.right]
        self._console.print()
        self._console.print(Text(f"{sum(marks)} of {len(marks)} tasks right with the router.", "bold"))
        self._console.print(Text(result.summary, "bold"), soft_wrap=True)
