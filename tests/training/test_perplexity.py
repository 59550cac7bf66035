"""Perplexity: what plain Hugging Face and PEFT forwards of each text alone give, however texts are batched."""

import json
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from molora import MoLoRA
from molora.cli import app
from molora.training import perplexity as measure
from molora.training.perplexity import Losses, TextLoss, _batches, best_single, measure_texts, perplexity, ratio

TEXTS = [
    "def f(x):\n    return x",
    "ab",
    "Der Zug kommt spät. " * 9,
    "THE SOFTWARE IS PROVIDED " * 3,
    "ok",
    "1 + 1 = 2",
]


@torch.inference_mode()
def nlls(model: Any, m: MoLoRA, texts: list[str] = TEXTS) -> list[float]:
    """By hand: one text at a time, without padding, in float64."""
    found = []
    for text in texts:
        ids = torch.tensor([m.tokenizer(text)["input_ids"]])
        scores = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        found.append(-float(scores.gather(-1, ids[0, 1:, None]).sum()))
    return found


def of(losses: Losses) -> list[float]:
    return [text.nll for text in losses.texts]


def losses(rows: list[tuple[float, int]]) -> Losses:
    return Losses(tuple(TextLoss(nll, num_tokens, {}) for nll, num_tokens in rows))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_base_is_the_plain_model(m: MoLoRA, base_model: Callable[..., Any], batch_size: int) -> None:
    expected = nlls(base_model().double(), m)
    found = perplexity(m, TEXTS, "base", batch_size=batch_size)
    assert of(found) == pytest.approx(expected, rel=1e-5)
    counts = [len(m.tokenizer(text)["input_ids"]) - 1 for text in TEXTS]
    assert [text.num_tokens for text in found.texts] == counts
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / sum(counts)), rel=1e-5)
    assert found.shares == {"base": 1.0}
    assert of(perplexity(m, TEXTS[::-1], "base", batch_size=batch_size)) == pytest.approx(expected[::-1], rel=1e-5)


def test_an_adapter_is_the_one_in_peft(m: MoLoRA, base_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        theirs = peft.PeftModel.from_pretrained(base_model(), m.bank.adapter_folder("x")).eval()
        expected = nlls(theirs, m)
    found = perplexity(m, TEXTS, "x", batch_size=3)
    assert of(found) == pytest.approx(expected, rel=1e-4)
    assert found.shares == {"base": 0.0, "x": 1.0}


def test_the_router_acts_from_the_first_token(m: MoLoRA) -> None:
    found = perplexity(m, TEXTS, "auto", batch_size=3)
    routed = Counter[str]()
    for text, loss in zip(TEXTS, found.texts, strict=True):
        ids = m.tokenizer(text)["input_ids"]
        logits, routes = m.logits([ids], [0], "auto")
        scores = logits[0].double().log_softmax(-1)
        assert loss.nll == pytest.approx(-sum(float(scores[t, ids[t + 1]]) for t in range(len(ids) - 1)), rel=1e-5)
        names = Counter(pairs[0][0] if pairs else "base" for pairs in routes[0][:-1])
        assert {name: num for name, num in loss.routed.items() if num} == names
        routed += names
    assert len(routed) == 3
    assert found.shares == {name: num / found.num_tokens for name, num in sorted(routed.items())}


def test_soft_gates_share_a_token(m: MoLoRA) -> None:
    found = perplexity(m, TEXTS, {"x": 0.25, "y": 0.5})
    assert found.shares == pytest.approx({"base": 0.25, "x": 0.25, "y": 0.5})


@pytest.mark.parametrize("num_tokens", [14, 60])
def test_bounds_on_memory_change_nothing(m: MoLoRA, monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    expected = of(perplexity(m, TEXTS, "auto"))
    sizes = []
    logits = m.logits

    def spied(ids: torch.Tensor, *rest: Any) -> Any:
        sizes.append(tuple(ids.shape))
        return logits(ids, *rest)

    monkeypatch.setattr(m, "logits", spied)
    monkeypatch.setattr(measure, "MAX_LOGITS", num_tokens * m.vocab_size)
    monkeypatch.setattr(measure, "NUM_TOKENS_AT_ONCE", 7)
    assert of(perplexity(m, TEXTS, "auto", batch_size=3)) == pytest.approx(expected, rel=1e-5)
    assert sum(rows for rows, _ in sizes) == len(TEXTS)
    assert max(rows for rows, _ in sizes) > 1
    assert all(rows == 1 or rows * width <= num_tokens for rows, width in sizes)
    assert all(rows <= 3 for rows, _ in sizes)


def test_a_batch_keeps_to_both_bounds() -> None:
    assert list(_batches([5, 30, 5, 4, 6], 8, 12)) == [[3, 0], [2, 4], [1]]
    assert list(_batches([5, 5, 5], 2, 100)) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "no texts"),
        (["fine", ""], "text 2 has 0 tokens"),
        (["a"], "text 1 has 1 tokens; expected 2 to 1024"),
        (["fine", "long " * 300], "text 2 has 1500 tokens; expected 2 to 1024"),
    ],
)
def test_texts_that_cannot_be_read(m: MoLoRA, texts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        perplexity(m, texts, "base")


def test_a_ratio_is_of_the_same_texts() -> None:
    ours = losses([(10, 5), (30, 12), (4, 1)])
    assert ratio(ours, ours) == {"ratio": 1, "low": 1, "high": 1}
    worse = losses([(10 + 0.5, 5), (30 + 1.2, 12), (4 + 0.1, 1)])  # by a tenth of a nat on every token
    assert list(ratio(ours, worse).values()) == pytest.approx([math.exp(-0.1)] * 3)
    found = ratio(ours, losses([(11, 5), (30, 12), (4, 1)]))
    half = 1.96 * math.sqrt((1 - 5 / 18) ** 2 + (12 / 18) ** 2 + (1 / 18) ** 2) / 18
    assert list(found.values()) == pytest.approx([math.exp(-1 / 18 + at) for at in (0, -half, half)])


def test_its_interval_is_that_of_a_bootstrap() -> None:
    rng = random.Random(0)
    counts = [rng.randint(100, 400) for _ in range(200)]
    theirs = losses([(num * rng.gauss(3, 0.5), num) for num in counts])
    ours = losses([(text.nll + text.num_tokens * rng.gauss(-0.1, 0.2), text.num_tokens) for text in theirs.texts])
    found = ratio(ours, theirs)
    draws = []
    for _ in range(1000):
        some = rng.choices(range(200), k=200)
        draws.append(ours.among(some).perplexity / theirs.among(some).perplexity)
    draws.sort()
    assert found["low"] == pytest.approx(draws[25], abs=0.004)
    assert found["high"] == pytest.approx(draws[975], abs=0.004)
    assert found["low"] < found["ratio"] < found["high"] < 1


def test_an_oracle_chooses_for_each_text() -> None:
    a, b = losses([(1, 5), (9, 5)]), losses([(2, 5), (3, 5)])
    assert best_single([a, b]) == losses([(1, 5), (3, 5)])


def record(text: str, *domains: str) -> dict[str, Any]:
    return {"text": text, "parts": [{"domain": domain, "text": text} for domain in domains]}


RECORDS = [record(TEXTS[0], "python"), record(TEXTS[2], "a", "b", "c"), record(TEXTS[3], "x", "y"), {"text": TEXTS[5]}]


def test_the_command_measures_texts(m: MoLoRA, tmp_path: Path) -> None:
    data, out = tmp_path / "texts.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    arguments = [str(m.bank.path), "--data", str(data), "--out", str(out), "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(app, ["eval", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    figures = json.loads(out.read_text())
    results = figures["results"]
    assert list(results) == ["base", "x", "y", "best single", "uniform", "auto"]
    assert figures["num_texts"] == 4
    alone = {way: perplexity(m, [each["text"] for each in RECORDS], way) for way in ("base", "x", "y", "auto")}
    assert figures["num_tokens"] == [text.num_tokens for text in alone["x"].texts]
    for way, found in alone.items():
        row = results[way]
        assert row["perplexity"] == pytest.approx(found.perplexity, rel=1e-3)
        assert row["by_text"] == pytest.approx(of(found), abs=0.05)
        assert set(row["by_domain"]) == {"python", "mixed", "text"}
        assert row["by_domain"]["mixed"] == pytest.approx(found.among([1, 2]).perplexity, rel=1e-3)
        expected = ratio(alone["auto"].among([1, 2]), found.among([1, 2]))
        assert row["auto_over_this"]["mixed"] == pytest.approx(expected, rel=1e-3)
    assert results["base"]["shares"]["all"] == {"base": 1.0}
    assert results["best single"]["by_text"] == [*map(min, results["x"]["by_text"], results["y"]["by_text"])]
    assert set(results["auto"]["shares"]["all"]) == {"base", "x", "y"}

    arguments[4] = str(tmp_path / "two.json")
    CliRunner().invoke(app, ["eval", *arguments, "--way", "base", "--limit", "2"], catch_exceptions=False)
    figures = json.loads((tmp_path / "two.json").read_text())
    assert (list(figures["results"]), figures["num_texts"]) == (["base"], 2)


@pytest.mark.parametrize(
    ("records", "ways", "words"),
    [
        ([{"text": "fine"}, {"messages": []}], None, "record 2: expected a `text`"),
        ([{"text": "fine"}, {"text": 3}], None, "record 2: expected a `text`"),
        ([{"text": "fine"}], ["base", "given"], "unknown ways .'given'. to read a text"),
        ([{"text": "fine"}, {"text": "a"}], None, "text 2 has 1 tokens"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(
    m: MoLoRA, tmp_path: Path, records: list[Any], ways: list[str] | None, words: str
) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in records))
    with pytest.raises(ValueError, match=words):
        measure_texts(m, str(data), tmp_path / "out.json", ways=ways)
    assert not (tmp_path / "out.json").exists()
