"""Figures, the targets that they are held against, and the table of both."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        unit: "x" for a ratio, "tokens/s", "ms", "TFLOP/s", "GB/s" or "tokens".
        at_least, at_most: its target; neither where none is stated.
        details: what it was made of.
    """

    suite: str
    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """None without a target."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "-" if self.at_most is None else f"<= {self.at_most:g}"


class Report:
    """The figures so far. They are written after each one, since a long run may be cut short."""

    def __init__(self, head: dict[str, Any], out: Path | None) -> None:
        """head: what describes the run."""
        self.suite = ""
        self.has_targets = True
        self.figures: list[Figure] = []
        self.checks: list[dict[str, Any]] = []
        self._head = head
        self._out = out
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        **details: Any,
    ) -> None:
        if not self.has_targets:
            at_least = at_most = None
        figure = Figure(self.suite, name, value, unit, at_least, at_most, details)
        self.figures.append(figure)
        print(f"{self.suite}: {name}: {_number(value)} {unit}", flush=True)
        self.write()

    def checked(self, what: str, **found: Any) -> None:
        """Answers were compared with a reference, and agreed."""
        self.checks.append({"suite": self.suite, "what": what, **found})
        print(f"{self.suite}: checked: {what}", flush=True)

    def to_json(self) -> dict[str, Any]:
        figures = [asdict(figure) | {"reached": figure.reached} for figure in self.figures]
        return self._head | {"checks": self.checks, "figures": figures}

    def write(self) -> None:
        """The JSON, and beside it the table."""
        if self._out is not None:
            self._out.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
            self._out.with_suffix(".md").write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """What was measured and on what, in Markdown."""
        head, *rows = self._lines()
        versions = ", ".join(f"{name} {version}" for name, version in self._head["versions"].items() if version)
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
        return (
            f"`{self._head['command']}`\n\n{self._head['shape']} in {self._head['dtype']} on {self._head['device']}, "
            f"commit {self._head['commit']}. {versions}.\n\n{table}\n"
        )

    def table(self) -> str:
        """For a terminal."""
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(_pad, cells, widths, range(len(cells)))).rstrip() for cells in lines)

    def _lines(self) -> list[list[str]]:
        words = {True: "yes", False: "NO", None: ""}
        return [
            ["suite", "figure", "value", "unit", "target", "reached"],
            *(
                [each.suite, each.name, _number(each.value), each.unit, each.target, words[each.reached]]
                for each in self.figures
            ),
        ]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q25": low, "q75": high}


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _pad(cell: str, width: int, column: int) -> str:
    """Numbers to the right."""
    return cell.rjust(width) if column == 2 else cell.ljust(width)
