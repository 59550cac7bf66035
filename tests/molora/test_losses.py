"""What shapes a router, against the same by hand in float64."""

import math

import pytest
import torch

from molora.losses import label_loss, load_balance_loss, newcomer_loss, switch_loss, z_loss

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


def test_newcomers() -> None:
    generator = torch.Generator().manual_seed(0)
    queries_ND, keys_CD = torch.randn(9, 4, generator=generator), torch.randn(3, 4, generator=generator)
    means_GD = torch.randn(7, 4, generator=generator)
    means_GD[[2, 5]] = 0  # nothing is known of them
    groups = [1, 1, 4, 0, 5, -100, 1, 2, -1]  # 0 is base, 1 and 2 have columns, 3 to 6 are tasks of base's
    keys, means = keys_CD.double(), means_GD.double()
    own, others = [], []
    for newcomer in (1, 3, 4, 6):  # of 3 and 6 no token is here
        key = means[newcomer] / means[newcomer].norm() * keys.norm(dim=1).mean()
        losses: dict[bool, list[float]] = {True: [], False: []}
        for query, group in zip(queries_ND.double(), groups, strict=True):
            if group < 0:
                continue
            scores = {c: float(query @ keys[c]) / 2 for c in range(3) if c != newcomer}
            scores[newcomer] = float(query @ key) / 2
            wanted = group if group in (newcomer, 1, 2) else 0
            losses[group == newcomer].append(math.log(sum(map(math.exp, scores.values()))) - scores[wanted])
        own += [sum(losses[True]) / len(losses[True])] if losses[True] else []
        others.append(sum(losses[False]) / len(losses[False]))
    assert (len(own), len(others)) == (2, 4)
    wanted = (sum(own) / 2 + sum(others) / 4) / 2
    assert newcomer_loss(queries_ND, keys_CD, torch.tensor(groups), means_GD).item() == pytest.approx(wanted, rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = newcomer_loss(queries_ND, keys_CD, torch.tensor(groups), means_GD)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_without_newcomers_nothing_is_lost() -> None:
    queries_ND = torch.ones(3, 4, requires_grad=True)
    loss = newcomer_loss(queries_ND, torch.ones(2, 4), torch.tensor([1, 1, 0]), torch.zeros(3, 4))
    loss.backward()
    assert loss.item() == 0
    assert queries_ND.grad is not None
    assert not queries_ND.grad.any()
