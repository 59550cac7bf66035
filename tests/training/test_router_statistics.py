"""A router's statistics against loops over its tokens, and by hand."""

import math
from collections import Counter

import pytest
import torch

from molora.training.examples import IGNORE
from molora.training.router_report import go_on, token_texts
from molora.training.router_statistics import NUM_BINS, NUM_ENTROPY_BINS, RouterStatistics

NUM_COLUMNS = 4
LENGTHS = (17, 1, 30, 22)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, labels (some unknown, or of a domain without an adapter), positions and what goes on with a word."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(LENGTHS)
    logits = 3 * torch.randn(num_tokens, NUM_COLUMNS, generator=generator)
    labels = torch.randint(0, NUM_COLUMNS, (num_tokens,), generator=generator).repeat_interleave(2)[:num_tokens]
    labels[torch.rand(num_tokens, generator=generator) < 0.2] = IGNORE
    labels[5], labels[20] = -1, -1
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return logits, labels, positions, torch.rand(num_tokens, generator=generator) < 0.5


def test_the_statistics_are_those_of_a_loop(batch: tuple[torch.Tensor, ...]) -> None:
    logits, labels, positions, inside = batch
    written = torch.arange(len(labels)) % 4 > 0
    got = RouterStatistics.of(logits, labels, positions, inside, written_N=written)
    confusion, counts, right, entropies = Counter[tuple[int, int]](), Counter[int](), Counter[int](), Counter[int]()
    switches, sure, total = [[0] * 4 for _ in range(3)], Counter[int](), 0.0
    for t in range(len(labels)):
        if labels[t] < 0:
            continue
        exps = [math.exp(score) for score in logits[t].tolist()]
        probs = [each / sum(exps) for each in exps]
        route, label = probs.index(max(probs)), int(labels[t])
        bin_, entropy = int(max(probs) * NUM_BINS), -sum(p * math.log(p) for p in probs)
        confusion[label, route] += 1
        counts[bin_] += 1
        right[bin_] += route == label
        sure[bin_] += max(probs)  # type: ignore[assignment]
        entropies[int(entropy / math.log(NUM_COLUMNS) * NUM_ENTROPY_BINS)] += 1
        total += entropy
        if positions[t] > 0 and labels[t - 1] >= 0:
            before = int(logits[t - 1].argmax())
            is_written = bool(written[t] and written[t - 1])
            for row in switches[: 1 + bool(inside[t]) * (1 + is_written)]:
                row[0] += 1
                row[1] += before != route
                row[2] += 1
                row[3] += int(labels[t - 1]) != label
    columns = range(NUM_COLUMNS)
    assert got.confusion_CC.tolist() == [[confusion[label, route] for route in columns] for label in columns]
    assert got.count_B.tolist() == [counts[b] for b in range(NUM_BINS)]
    assert got.right_B.tolist() == [right[b] for b in range(NUM_BINS)]
    assert got.confidence_B.tolist() == pytest.approx([sure[b] for b in range(NUM_BINS)], rel=1e-4)
    assert got.entropy_H.tolist() == [entropies[h] for h in range(NUM_ENTROPY_BINS)]
    assert float(got.entropy) == pytest.approx(total, rel=1e-4)
    assert got.switches_34.tolist() == switches
    assert 0 < switches[2][0] < switches[1][0] < switches[0][0]
    num_tokens, num_neighbours = confusion.total(), switches[0][0]
    assert got.num_tokens == num_tokens == int((labels >= 0).sum())
    assert got.accuracy == pytest.approx(sum(confusion[c, c] for c in columns) / num_tokens)
    assert got.load == pytest.approx([sum(confusion[label, c] for label in columns) / num_tokens for c in columns])
    assert got.label_load == pytest.approx(
        [sum(confusion[c, route] for route in columns) / num_tokens for c in columns]
    )
    assert got.mean_entropy == pytest.approx(total / num_tokens, rel=1e-4)
    assert got.switch_rate == switches[0][1] / num_neighbours
    assert got.label_switch_rate == switches[0][3] / num_neighbours


def test_tokens_without_a_label_count_where_they_are_asked_to(batch: tuple[torch.Tensor, ...]) -> None:
    logits, labels, positions, inside = batch
    counted = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) < 0.7
    assert 0 < int(((labels < 0) & counted).sum()) < int(counted.sum())
    got = RouterStatistics.of(logits, labels, positions, inside, counted)
    routes = logits.argmax(-1)
    assert got.routes_C.tolist() == [int((counted & (routes == column)).sum()) for column in range(NUM_COLUMNS)]
    assert got.num_tokens == int(counted.sum()) == int(got.entropy_H.sum())
    of_labels = RouterStatistics.of(logits, torch.where(counted, labels, IGNORE), positions, inside)
    for name in ("confusion_CC", "count_B", "right_B", "confidence_B"):
        torch.testing.assert_close(vars(got)[name], vars(of_labels)[name])
    assert got.num_labelled == of_labels.num_labelled
    assert (got.ece, got.accuracy, got.label_load) == (of_labels.ece, of_labels.accuracy, of_labels.label_load)
    pairs = [t for t in range(1, len(labels)) if positions[t] > 0 and counted[t] and counted[t - 1]]
    known = [t for t in pairs if labels[t] >= 0 and labels[t - 1] >= 0]
    assert got.switches_34[0].tolist() == [
        len(pairs),
        sum(int(routes[t] != routes[t - 1]) for t in pairs),
        len(known),
        changed := sum(int(labels[t] != labels[t - 1]) for t in known),
    ]
    assert 0 < len(known) < len(pairs)
    assert got.label_switch_rate == changed / len(known)
    nobody = RouterStatistics.of(logits, torch.full_like(labels, IGNORE), positions, inside, counted)
    assert (nobody.num_labelled, nobody.ece, nobody.accuracy) == (0, 0, 0)
    assert nobody.load == got.load


def test_conversations_apart_add_up_to_all_of_them(batch: tuple[torch.Tensor, ...]) -> None:
    whole, parts = RouterStatistics.of(*batch), RouterStatistics.zeros(NUM_COLUMNS)
    for each in zip(*(tensor.split(LENGTHS) for tensor in batch), strict=True):
        parts += RouterStatistics.of(*each)
    for name, value in vars(whole).items():
        torch.testing.assert_close(vars(parts)[name], value)


def test_the_calibration_error_by_hand() -> None:
    """Three tokens at 0.9, two of them right; one at 0.6, which is right."""
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.4, 0.6], [0.5, 0.5]])
    labels = torch.tensor([0, 1, 1, 1, IGNORE])
    statistics = RouterStatistics.of(probs.log(), labels, torch.arange(5))
    assert statistics.ece == pytest.approx(3 / 4 * (0.9 - 2 / 3) + 1 / 4 * (1 - 0.6), abs=1e-6)
    assert statistics.mean_entropy == pytest.approx(
        -(3 * (0.9 * math.log(0.9) + 0.1 * math.log(0.1)) + 0.6 * math.log(0.6) + 0.4 * math.log(0.4)) / 4, abs=1e-6
    )
    assert (statistics.switch_rate, statistics.label_switch_rate) == (1 / 3, 1 / 3)


def test_a_certain_router_and_one_without_a_choice_have_no_entropy() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    certain = torch.tensor([[0.0, -math.inf], [1e4, -1e4]])
    for logits in (certain, torch.zeros(2, 1)):
        statistics = RouterStatistics.of(logits, labels, labels)
        assert statistics.mean_entropy == 0
        assert statistics.ece == 0
        assert statistics.entropy_H.tolist()[0] == 2


def test_words_and_numbers_go_on_without_a_gap() -> None:
    texts = ["9", "67", " +", " 1", "a", "b", "\n", "c", ".", "5", "", "é", "t", " u"]
    assert go_on(texts) == [bool(int(digit)) for digit in "01001100000010"]


def test_the_texts_of_tokens_add_up_and_keep_characters_whole(m) -> None:
    text = "naïve 日本 x12"
    ids = m.tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, m.tokenizer)
    assert len(texts) == len(ids) > len(text)  # this tokenizer knows bytes
    assert [each for each in texts if each] == list(text)
    assert token_texts(ids[:3], m.tokenizer)[-1] == "\ufffd"  # cut inside a character
