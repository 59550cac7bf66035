"""The sampler against a plain one in Python's own numbers, and what a draw must not depend on."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora import Sampling
from molora.serving.sampling import COLUMNS, Draw, Parts, choose, draw, greedy, uniform

NUM_IDS = 11
ALL = "1" * NUM_IDS


def bitmask(allowed: str) -> torch.Tensor:
    """Bits from the lowest, as a grammar library packs them."""
    return torch.tensor([sum(1 << i for i, bit in enumerate(allowed) if bit == "1")], dtype=torch.int32)


def reference(logits: list[float], each: Draw, allowed: str) -> int:
    """The definition in `Sampling`, word by word."""
    s = each.sampling
    logits = list(logits)
    for i in range(NUM_IDS):
        if i in each.answer_ids or i in each.prompt_ids:
            logits[i] = logits[i] / s.repetition_penalty if logits[i] > 0 else logits[i] * s.repetition_penalty
        count = list(each.answer_ids).count(i)
        logits[i] += s.logit_bias.get(i, 0.0) - s.frequency_penalty * count - s.presence_penalty * (count > 0)
        if allowed[i] == "0":
            logits[i] = -math.inf
    if s.temperature == 0:
        return logits.index(max(logits))
    top = max(logits)
    weights = [math.exp((x - top) / s.temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    order = sorted(range(NUM_IDS), key=lambda i: (-probs[i], i))
    kept, total = [], 0.0
    mass = sum(probs[i] for i in order[: s.top_k or None])
    for rank, i in enumerate(order):
        enough = (s.top_k and rank >= s.top_k) or (s.top_p < 1 and total >= s.top_p * mass)
        if rank and (enough or probs[i] < s.min_p * probs[order[0]]):
            break
        kept.append(i)
        total += probs[i]
    goal, cdf = each.uniform * sum(probs[i] for i in kept), 0.0
    for i in sorted(kept):
        cdf += probs[i]
        if cdf > goal:
            return i
    return max(kept)  # the goal was the sum, but for rounding


IDS = st.lists(st.integers(0, NUM_IDS - 1), max_size=6)
ROWS = st.tuples(
    st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=NUM_IDS, max_size=NUM_IDS),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
            "top_k": st.sampled_from([0, 1, 3, 50]),
            "top_p": st.sampled_from([0.05, 0.4, 0.9, 1.0]),
            "min_p": st.sampled_from([0.0, 0.2, 1.0]),
            "repetition_penalty": st.sampled_from([0.5, 1.0, 1.75]),
            "presence_penalty": st.sampled_from([-0.5, 0.0, 1.25]),
            "frequency_penalty": st.sampled_from([0.0, 0.75]),
            "logit_bias": st.dictionaries(st.integers(0, NUM_IDS - 1), st.sampled_from([-100.0, 2.0, 100.0])),
        },
    ),
    IDS,
    IDS,
    st.sampled_from([ALL, "01" + "1" * 9, "0" * 10 + "1", "10101010101"]),
    st.floats(0, 1, exclude_max=True),
)


@given(rows=st.lists(ROWS, min_size=1, max_size=5))
@settings(max_examples=300, derandomize=True)
def test_it_draws_what_the_definition_draws_beside_any_neighbours(rows: list[Any]) -> None:
    draws = [
        Draw(
            Sampling(**{"temperature": 1.0, **options}), prompt, answer, u, None if allowed == ALL else bitmask(allowed)
        )
        for _, options, prompt, answer, allowed, u in rows
    ]
    logits = torch.tensor([row[0] for row in rows])
    drawn, _ = draw(logits, draws)
    for row, each, token in zip(rows, draws, drawn, strict=True):
        expected = reference(row[0], each, row[4])
        if token != expected:  # sums in another order: then the number lies on the edge of two tokens
            nearby = {reference(row[0], Draw(*_moved(each, by)), row[4]) for by in (-1e-6, 1e-6)}
            assert token in nearby, (token, expected)
    for index in range(len(rows)):
        assert draw(logits[index : index + 1], draws[index : index + 1])[0] == drawn[index : index + 1]
    assert draw(logits.flip(0), draws[::-1])[0] == drawn[::-1]


def _moved(each: Draw, by: float) -> tuple[Any, ...]:
    return each.sampling, each.prompt_ids, each.answer_ids, min(max(each.uniform + by, 0.0), 1 - 1e-9), each.bitmask


@pytest.mark.parametrize(
    "options", [{"temperature": 0.5}, {"temperature": 2.0, "top_p": 0.8}, {"top_k": 3}, {"min_p": 0.3}], ids=str
)
def test_draws_follow_the_distribution(options: dict[str, float]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **options})
    logits_V = torch.randn(NUM_IDS, generator=torch.Generator().manual_seed(0))
    num_draws = 20_000
    draws = [Draw(sampling, (), (), uniform(7, 0, t)) for t in range(num_draws)]
    counts = Counter(draw(logits_V.expand(num_draws, -1), draws)[0])
    probs = (logits_V.double() / sampling.temperature).softmax(-1)
    order = probs.argsort(descending=True)
    kept = order[: sampling.top_k or None]
    before = probs[order].cumsum(0) - probs[order]
    kept = kept[(before < sampling.top_p)[: len(kept)] & (probs[kept] >= sampling.min_p * probs.max())]
    expected = torch.zeros(NUM_IDS, dtype=torch.float64)
    expected[kept] = probs[kept] / probs[kept].sum()
    seen = torch.tensor([counts[i] / num_draws for i in range(NUM_IDS)])
    assert (seen[expected == 0] == 0).all()
    error = (seen - expected).abs() / (expected * (1 - expected) / num_draws + 1e-12).sqrt()
    assert error[expected > 0].max() < 4.5 or len(kept) == 1


def test_numbers_depend_on_seed_answer_and_position_alone() -> None:
    seen = {uniform(seed, index, t) for seed in (0, 1, -1, 2**64 - 2) for index in range(3) for t in range(100)}
    assert len(seen) == 4 * 3 * 100
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    numbers = sorted(uniform(3, 0, t) for t in range(1000))
    assert max(abs(x - rank / 1000) for rank, x in enumerate(numbers)) < 0.06
    assert uniform(3, 0, 5) == uniform(3, 0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-torch.inf, -torch.inf, 0.0]], dtype=dtype)
    assert greedy(logits).tolist() == [1, 0, 2]
    assert draw(logits, [Draw(Sampling(), (), (), 0.5)] * 3)[0] == [1, 0, 2]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(u: float) -> None:
    logits = torch.full((4, 100_000), -torch.inf)
    logits[0, 0] = logits[1, 99_999] = logits[2, 500] = 0.0
    logits[3, 1000:99_000] = torch.randn(98_000, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"top_p": 0.99}, {"temperature": 1e-300}, {"temperature": 1e30}):
        drawn, _ = draw(logits, [Draw(Sampling(**{"temperature": 1.0, **options}), (), (), u)] * 4)
        assert drawn[:3] == [0, 99_999, 500]
        assert 1000 <= drawn[3] < 99_000


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.randn(3, NUM_IDS, generator=torch.Generator().manual_seed(1))
    logits[1, 4] = logits[1, 9] = logits[1].max() + 1
    options = [{"logprobs": 3, "logit_bias": {2: 50.0}}, {"logprobs": 2}, {}]
    drawn, logprobs = draw(logits, [Draw(Sampling(**each), (), (), 0.0) for each in options])
    expected = logits.log_softmax(-1)
    assert drawn[0] == 2
    assert logprobs[2] is None
    for row, num_top in ((0, 3), (1, 2)):
        got = logprobs[row]
        assert got is not None
        assert got.token_id == drawn[row]
        assert got.logprob == pytest.approx(float(expected[row, drawn[row]]), abs=1e-5)
        best = sorted(range(NUM_IDS), key=lambda i: (-float(expected[row, i]), i))[:num_top]
        assert [i for i, _ in got.top] == best


def test_it_can_be_captured() -> None:
    """No number of it is read by the host, and no shape depends on one: it runs on tensors that have none."""
    with torch.device("meta"):
        table_D5, masks_DW = torch.empty(4, COLUMNS, dtype=torch.float64), torch.empty(4, 32, dtype=torch.int32)
        assert choose(torch.empty(4, 1000), table_D5, masks_DW, Parts(True, True, True)).shape == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0; expected more than 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, "top_k is 1.5; expected a whole number"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf"),
        ({"logit_bias": {3: math.nan}}, "logit_bias has a number beyond"),
        ({"stop": ("",)}, "stop has an empty string"),
        ({"stop": "ab"}, "stop is 'ab'; expected a sequence of strings"),
        ({"logit_bias": {1.5: 2.0}}, "logit_bias has token ids that are no whole numbers"),
        ({"logit_bias": {1: 1e300}}, "logit_bias has a number beyond"),
        ({"repetition_penalty": 1e300}, "repetition_penalty is 1e\\+300"),
        ({"n": 0}, "n is 0"),
        ({"logprobs": 21}, "logprobs is 21; expected 0 to 20"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616"),
        ({"max_new_tokens": True}, "max_new_tokens is True; expected a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_the_reference_can_fail() -> None:
    """It notices a filter that is ignored."""
    rng = random.Random(0)
    different = 0
    for _ in range(200):
        logits = [rng.uniform(-3, 3) for _ in range(NUM_IDS)]
        u = rng.random()
        filtered, free = (Draw(Sampling(temperature=1.0, top_k=k), (), (), u) for k in (2, 0))
        different += reference(logits, filtered, ALL) != draw(torch.tensor([logits]), [free])[0][0]
    assert different > 50
