"""The figures of docs/scaling.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from scaling.grid import ADAPTERS, REQUESTS_PER_S_OF_A_GPU

Rows = Sequence[dict[str, Any]]
STYLES = {"prefix": "-", "affinity": ":", "round-robin": "--"}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """A picture of the grid and one of the check, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure in (("grid", draw_grid(result)), ("check", draw_check(result["points"]))):
        path = folder / f"scaling-{name}.png"
        figure.savefig(path, dpi=90, metadata={"Software": None})
        plt.close(figure)
        made.append(path)
    return made


def draw_grid(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, field, title, scale in (
        (axes[0, 0], "slot_hit_rate", "requests that find their adapter in a slot", 1),
        (axes[0, 1], "load_bytes_per_s", "adapters read by each GPU, MB/s", 1e6),
        (axes[1, 0], "prefix_hit_rate", "prompt tokens found in the KV cache", 1),
    ):
        for index, number in enumerate(ADAPTERS):
            for routing, style in STYLES.items():
                rows = [row for row in result["grid"] if (row["number"], row["routing"]) == (number, routing)]
                values = [row[field] / scale for row in rows]
                label = f"{number:,} adapters" if routing == "prefix" else None
                axis.plot([row["num_gpus"] for row in rows], values, style, color=f"C{index}", label=label)
        axis.set(xscale="log", xlabel="GPUs", title=title)
        if scale == 1:
            axis.set_ylim(0, 1.03)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8, title="solid: prefix; dotted: affinity; dashed: round-robin", title_fontsize=8)
    axis, rows = axes[1, 1], result["slots"]
    slots = [row["num_slots"] for row in rows]
    for field, label in (("slots_bytes", "slots"), ("kv_bytes", "KV cache")):
        axis.plot(slots, [row[field] / 1e9 for row in rows], "o-", label=f"{label}, GB")
    axis.set(
        xscale="log", xlabel="slots", title=f"one GPU, {rows[0]['number']:,} adapters: memory and hits", ylabel="GB"
    )
    right = axis.twinx()
    for field, label, color in (("slot_hit_rate", "adapter found", "C2"), ("prefix_hit_rate", "tokens found", "C3")):
        right.plot(slots, [row[field] for row in rows], "s--", color=color, label=label)
    right.set_ylim(0, 1.03)
    lines = [*axis.get_lines(), *right.get_lines()]
    axis.legend(lines, [str(line.get_label()) for line in lines], fontsize=8, loc="upper left")
    axis.set_ylim(0, 85)
    axis.grid(alpha=0.3)
    figure.suptitle(
        f"8B base on H100s, rank 16, {REQUESTS_PER_S_OF_A_GPU:g} requests a second on each, popularity 1/rank"
    )
    return figure


def draw_check(points: Rows) -> Figure:
    figure, axis = plt.subplots(figsize=(9, 8), layout="constrained")
    names = [point["what"] for point in points]
    for fitted, color, label in ((True, "C7", "fitted"), (False, "C0", "held out")):
        at = [index for index, point in enumerate(points) if point["fitted"] == fitted]
        axis.barh(at, [100 * points[index]["error"] for index in at], color=color, label=label)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="predicted over measured, %", title="The model against one H100")
    axis.grid(axis="x", alpha=0.3)
    axis.legend()
    return figure
