"""Plots of a router's statistics are pictures of a sensible size that say what was counted."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from molora.training.plots import draw, png
from molora.training.router_statistics import RouterStatistics


def statistics(num_columns: int, num_tokens: int = 500) -> RouterStatistics:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_columns, (num_tokens,), generator=generator)
    logits = 2 * torch.randn(num_tokens, num_columns, generator=generator)
    logits[torch.arange(num_tokens), labels] += 3
    return RouterStatistics.of(logits, labels, torch.arange(num_tokens))


@pytest.mark.parametrize("num_columns", [1, 6, 33])
def test_every_plot_is_a_picture(num_columns: int) -> None:
    names = ["base", *(f"adapter-{index}" for index in range(1, num_columns))]
    plots = draw(statistics(num_columns), names)
    assert set(plots) == {"confusion", "load", "calibration", "entropy", "switches"}
    for name, figure in plots.items():
        image = Image.open(BytesIO(png(figure)))
        assert 240 <= min(image.size) <= max(image.size) <= 2200, (name, image.size)
        assert np.asarray(image.convert("L")).std() > 5, name  # something is drawn


def test_without_labels_what_needs_none_is_drawn() -> None:
    logits, nobody = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.full((50,), -100)
    found = RouterStatistics.of(logits, nobody, torch.arange(50), counted_N=torch.ones(50, dtype=torch.bool))
    plots = draw(found, ["base", "words", "legs"])
    assert set(plots) == {"load", "entropy", "switches"}
    for name, shares in {"load": found.load, "switches": [found.switch_rate]}.items():
        (axes,) = plots[name].axes
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(shares)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["router"]


def test_the_confusion_matrix_prints_counts_and_shares() -> None:
    found = statistics(3)
    (axes, _) = draw(found, ["base", "words", "legs"])["confusion"].axes
    texts = [text.get_text() for text in axes.texts]
    counts = found.confusion_CC.double()
    shares = counts / counts.sum(1, keepdim=True)
    assert texts == [
        f"{share:.1%}\n{count:.0f}"
        for share, count in zip(shares.flatten().tolist(), counts.flatten().tolist(), strict=True)
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "words", "legs"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("routed to", "label")


def test_loads_are_bars_beside_the_labels() -> None:
    found = statistics(3)
    (axes,) = draw(found, ["base", "words", "legs"])["load"].axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([*found.load, *found.label_load])
