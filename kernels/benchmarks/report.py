"""The table: one line a row, microseconds a call."""

from itertools import groupby
from typing import Any

Row = dict[str, Any]
NOT_OTHERS = ("base", "auto", "torch", "triton", "make_plan")


def tables(rows: list[Row]) -> str:
    """A table for each run of rows of one suite and kind."""
    parts = []
    for (suite, kind), group in groupby(rows, key=lambda row: (row["suite"], row["kind"])):
        parts.append(f"{suite}, {kind}: us a call (above base, ratio to base)\n{_table(list(group))}")
    return "\n\n".join(parts)


def _table(rows: list[Row]) -> str:
    """Rows of one kind have the same methods."""
    names = [name for name in rows[0]["methods"] if name != "base"]
    ours = names[0]
    lines = [["shape", "dtype", "base", "floor", *names, "ours/best other"]]
    for row in rows:
        methods = row["methods"]
        floor = "-" if row.get("floor_us") is None else f"{row['floor_us']:.1f}"
        base = _cell(methods.get("base", {}), False)
        cells = [_cell(methods[name], name in NOT_OTHERS or row["kind"] == "backward") for name in names]
        others = {name: _median(methods[name]) for name in names if name not in NOT_OTHERS}
        timed = {name: median for name, median in others.items() if median is not None}
        best = min(timed, key=lambda name: timed[name], default=None)
        mine = _median(methods[ours])
        verdict = "-" if best is None or mine is None else f"{mine / timed[best]:.2f} {best}"
        lines.append([row["shape"], row["dtype"], base, floor, *cells, verdict])
    columns = [column for column in zip(*lines, strict=True) if any(cell != "-" for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(_pad(cells, widths)).rstrip() for cells in zip(*columns, strict=True))


def _pad(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    """The shape to the left, what follows to the right."""
    shape, *others = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return [shape.lstrip().ljust(widths[0]), *others]


def _median(entry: Row) -> float | None:
    return entry["time_us"]["median"] if "time_us" in entry else None


def _cell(entry: Row, in_detail: bool) -> str:
    if "time_us" not in entry:
        return "failed" if "failed" in entry else "-"
    text = f"{entry['time_us']['median']:.1f}"
    if not in_detail or "above_base_us" not in entry:
        return text
    facts = [f"{entry['above_base_us']['median']:+.1f}", f"{entry['ratio_to_base']['median']:.2f}x"]
    if "peak_bytes_above_base" in entry:
        facts.append(f"{entry['peak_bytes_above_base'] / 2**20:+.0f} MiB")
    return f"{text} ({', '.join(facts)})"
