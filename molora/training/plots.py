"""Figures of a router's statistics, for TensorBoard and as PNG, in colours that everyone can tell apart.

Legend: C columns (base and adapters), B bins of confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from molora.training.router_statistics import RouterStatistics, max_entropy

ROUTER, LABELS, MARK = "#0072B2", "#E69F00", "#D55E00"  # Okabe and Ito's blue, orange and vermilion
MAX_INCHES = 16.0
DPI = 120


def draw(statistics: RouterStatistics, names: Sequence[str]) -> dict[str, Figure]:
    """A figure of each kind; without labels, of those that need none.

    Args:
        names: of the columns, base first.
    """
    statistics = statistics.map(lambda tensor: tensor.cpu())
    figures = {"load": load(statistics, names), "entropy": entropy(statistics)}
    if statistics.num_labelled:
        figures |= {"confusion": confusion(statistics, names), "calibration": calibration(statistics)}
    if statistics.switches_34[0, 0]:
        figures["switches"] = switches(statistics)
    return figures


def png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def confusion(statistics: RouterStatistics, names: Sequence[str]) -> Figure:
    """Whose tokens went to whom: the share of each label's tokens, with their number below it where it has room."""
    counts_CC = statistics.confusion_CC.numpy()
    shares_CC = counts_CC / counts_CC.sum(1, keepdims=True).clip(min=1)
    size = min(MAX_INCHES, 2.6 + 0.85 * len(names))
    figure, axes = _figure(size + 0.8, size)
    image = axes.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the label's tokens", format=_percent, shrink=0.8)
    has_room = size < MAX_INCHES
    for row, column in np.ndindex(counts_CC.shape):
        share, count = shares_CC[row, column], counts_CC[row, column]
        if count:
            axes.text(
                column,
                row,
                f"{share:.1%}\n{count:,}" if has_room else f"{share:.0%}",
                ha="center",
                va="center",
                fontsize=9 if has_room else 7,
                color="white" if share > 0.55 else "black",
            )
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(np.arange(0.5, len(names) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(names) - 1), minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="routed to", ylabel="label")
    axes.set_title(f"{statistics.accuracy:.1%} of {statistics.num_labelled:,} tokens as labelled")
    return figure


def load(statistics: RouterStatistics, names: Sequence[str]) -> Figure:
    """What share of the tokens base and each adapter take, beside what the labels would give them."""
    figure, axes = _figure(6.4, min(MAX_INCHES, 1.6 + 0.5 * len(names)))
    _bars(axes, names, statistics.load, statistics.label_load if statistics.num_labelled else None)
    axes.set(xlabel="share of tokens", title=f"Load over {statistics.num_tokens:,} tokens")
    return figure


def calibration(statistics: RouterStatistics) -> Figure:
    """Reliability diagram: how often the router is right where it is so sure, above how often it is so sure."""
    count_B = statistics.count_B.numpy()
    num_bins = len(count_B)
    edges, width = np.arange(num_bins) / num_bins, 1 / num_bins
    filled = count_B > 0
    accuracy_B = statistics.right_B.numpy()[filled] / count_B[filled]
    confidence_B = statistics.confidence_B.numpy()[filled] / count_B[filled]
    figure = Figure(figsize=(5.2, 6.2), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.bar(edges[filled], accuracy_B, width, align="edge", color=ROUTER, alpha=0.35, edgecolor=ROUTER)
    upper.plot([0, 1], [0, 1], "--", color="0.35", label="perfectly calibrated")
    upper.plot(confidence_B, accuracy_B, "o-", color=ROUTER, markersize=4, label="router")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy (share routed as labelled)")
    upper.set_title(f"Calibration: ECE {statistics.ece:.3f} over {statistics.num_labelled:,} tokens")
    upper.legend(loc="upper left", frameon=False)
    lower.bar(edges, count_B / max(1, count_B.sum()), width, align="edge", color="0.6", edgecolor="0.45")
    lower.set(xlabel="confidence (probability of the route)", ylabel="share of tokens")
    upper.yaxis.set_major_formatter(_percent)
    _log_shares(lower, statistics.num_labelled)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def entropy(statistics: RouterStatistics) -> Figure:
    """How undecided the router is, token by token, up to the entropy of one that knows nothing."""
    count_H = statistics.entropy_H.numpy()
    limit, mean = max_entropy(statistics.num_columns), statistics.mean_entropy
    figure, axes = _figure(6.4, 3.6)
    edges = np.arange(len(count_H)) * limit / len(count_H)
    shares_H = count_H / max(1, count_H.sum())
    axes.bar(edges, shares_H, limit / len(count_H), align="edge", color=ROUTER, edgecolor="white", linewidth=0.5)
    axes.axvline(mean, color=MARK, linestyle="--", label=f"mean {mean:.3f} nats")
    axes.axvline(limit, color="0.35", linestyle=":", label=f"all {statistics.num_columns} alike {limit:.2f} nats")
    axes.set(xlim=(0, 1.03 * limit), xlabel="entropy of a token's probabilities (nats)", ylabel="share of tokens")
    axes.set_title(f"Entropy of the router over {statistics.num_tokens:,} tokens")
    _log_shares(axes, statistics.num_tokens)
    axes.legend(loc="upper right", bbox_to_anchor=(0.96, 1), frameon=False)
    return figure


def switches(statistics: RouterStatistics) -> Figure:
    """How often neighbouring tokens have other routes, beside how often they have other labels."""
    kinds = ("all neighbours", "inside a word\nor a number", "inside one that\nis written")
    rows = {f"{kind}\n({row[0]:,})": row for kind, row in zip(kinds, statistics.switches_34.tolist(), strict=True)}
    names = [name for name, (pairs, *_) in rows.items() if pairs]
    router, labels = ([rows[name][column + 1] / max(1, rows[name][column]) for name in names] for column in (0, 2))
    figure, axes = _figure(6.4, 1.7 + 0.7 * len(names))
    _bars(axes, names, router, labels if statistics.num_labelled else None)
    axes.set(xlabel="share of neighbouring tokens that switch", title="Switch rate")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _percent(share: float, _: float) -> str:
    return f"{100 * share:g}%"


def _log_shares(axes: Axes, num_tokens: int) -> None:
    """A logarithmic axis down to a single token's share: most tokens lie in one bin, and the others matter."""
    axes.set_yscale("log")
    axes.set_ylim(0.5 / max(1, num_tokens), 1)
    axes.yaxis.set_major_formatter(_percent)


def _bars(axes: Axes, names: Sequence[str], router: Sequence[float], labels: Sequence[float] | None) -> None:
    """A share for each name, the router's, and below it that of the labels, if there are any."""
    places = np.arange(len(names))
    kinds = [(router, -0.2 if labels else 0.0, ROUTER, "router"), (labels or (), 0.2, LABELS, "labels")]
    for shares, offset, colour, label in kinds if labels else kinds[:1]:
        bars = axes.barh(places + offset, shares, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="{:.1%}", padding=3, fontsize=8)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(_percent)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(0, 1.18 * max([*router, *(labels or ()), 1e-3]))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
