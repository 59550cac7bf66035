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
    queries_ND, keys_CD = torch.randn(12, 4, generator=generator), torch.randn(3, 4, generator=generator)
    groups = [1, 1, 4, 4, 2, 0, 1, 4, 0, 5, -100, 1]  # 0 is base, 1 and 2 have columns, 4 and 5 are tasks of base's
    is_support = [True, True, True, True, True, True, False, False, False, False, False, False]
    queries, keys = queries_ND.double(), keys_CD.double()
    length = keys.norm(dim=1).mean()
    own, others = [], []
    for newcomer in (1, 4):  # 2 is only in the support, 5 only outside of it
        mean = sum(q for q, g, s in zip(queries, groups, is_support, strict=True) if s and g == newcomer)
        key = mean / mean.norm() * length
        for query, group, support in zip(queries, groups, is_support, strict=True):
            if support or group < 0:
                continue
            scores = {c: float(query @ keys[c]) / 2 for c in range(3) if c != newcomer}
            scores["newcomer"] = float(query @ key) / 2
            wanted = "newcomer" if group == newcomer else group if group < 3 else 0
            if wanted == newcomer:
                continue
            loss = math.log(sum(map(math.exp, scores.values()))) - scores[wanted]
            (own if group == newcomer else others).append(loss)
    wanted = (sum(own) / len(own) + sum(others) / len(others)) / 2
    found = newcomer_loss(queries_ND, keys_CD, torch.tensor(groups), torch.tensor(is_support))
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_without_newcomers_nothing_is_lost() -> None:
    queries_ND = torch.ones(3, 4, requires_grad=True)
    loss = newcomer_loss(queries_ND, torch.ones(2, 4), torch.tensor([1, 1, 0]), torch.tensor([True, True, False]))
    loss.backward()
    assert loss.item() == 0
    assert queries_ND.grad is not None
    assert not queries_ND.grad.any()
