"""What shapes a router, against the same by hand in float64."""

import math

import pytest
import torch

from molora.losses import label_loss, load_balance_loss, switch_loss, z_loss

LOGITS_NC = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0], [0.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
PROBS_NC = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in LOGITS_NC.tolist()]


def test_labels() -> None:
    wanted = -(math.log(PROBS_NC[0][1]) + math.log(PROBS_NC[3][0])) / 2
    assert label_loss(LOGITS_NC, torch.tensor([1, -100, -100, 0])).item() == pytest.approx(wanted, rel=1e-5)
    assert label_loss(LOGITS_NC, torch.full((4,), -100)).item() == 0


def test_balance() -> None:
    shares = [0.5, 0.25, 0.25]  # the likeliest columns are 0, 2, 1 and 0
    means = [sum(row[c] for row in PROBS_NC) / 4 for c in range(3)]
    wanted = 3 * sum(share * mean for share, mean in zip(shares, means, strict=True))
    assert load_balance_loss(LOGITS_NC).item() == pytest.approx(wanted, rel=1e-5)
    assert load_balance_loss(torch.tensor([[9.0, 0.0]]).repeat(4, 1)).item() == pytest.approx(2, rel=1e-3)


def test_squared_partition() -> None:
    wanted = sum(math.log(sum(map(math.exp, row))) ** 2 for row in LOGITS_NC.tolist()) / 4
    assert z_loss(LOGITS_NC).item() == pytest.approx(wanted, rel=1e-5)


def test_switches() -> None:
    differ = [1 - sum(a * b for a, b in zip(PROBS_NC[t - 1], PROBS_NC[t], strict=True)) for t in (1, 3)]
    neighbours = torch.tensor([True, True, False, True])
    assert switch_loss(LOGITS_NC, neighbours).item() == pytest.approx(sum(differ) / 2, rel=1e-5)
    assert switch_loss(LOGITS_NC, torch.zeros(4, dtype=torch.bool)).item() == 0
    assert switch_loss(torch.tensor([[30.0, 0.0]]).repeat(4, 1), neighbours).item() == pytest.approx(0, abs=1e-6)
