"""Measuring a bank: batched answers are those that `generate` gives one by one, and each way's figures are kept."""

import json
from pathlib import Path
from typing import Any

import pytest

import molora
from molora import MoLoRA
from molora.training import evaluate as evaluation
from molora.training.evaluate import Question, answer, evaluate

QUESTIONS = [
    Question([{"role": "user", "content": "abc" * (1 + i)}], (domain,), (reference,))
    for i, (domain, reference) in enumerate((("words", "cba"), ("legs", "4"), ("words", "cba")))
]


@pytest.fixture
def m(make_bank: Any, make_adapter: Any, key_router: Any, tmp_path: Path) -> MoLoRA:
    adapters = {"words": make_adapter(seed=1), "legs": make_adapter(seed=2)}
    bank = make_bank(tmp_path, adapters=adapters, router=key_router())
    return molora.load(bank, device="cpu", dtype="float32")


def test_batched_answers_are_those_of_generate(m: MoLoRA) -> None:
    routes = ["words", "auto", "base"]
    batched = answer(m, QUESTIONS, routes, max_new_tokens=12, batch_size=2)
    alone = [
        m.generate(question.messages, route=route, max_new_tokens=12)
        for question, route in zip(QUESTIONS, routes, strict=True)
    ]
    assert [m.tokenizer.encode(text) for text in batched] == [m.tokenizer.encode(out.text) for out in alone]
    assert len({*batched}) == 3


def test_accuracy_is_the_share_of_verified_answers(m: MoLoRA, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(m: MoLoRA, questions: Any, routes: list[str], **_: Any) -> list[str]:
        asked.append(routes)
        return ["Answer: cba", "Answer: 4", "Answer: no"]

    monkeypatch.setattr(evaluation, "answer", fake)
    figures = dict(evaluate(m, QUESTIONS, ["given", "base"]))
    assert asked == [["words", "legs", "words"], ["base"] * 3]
    assert figures["given"] == {
        "accuracy": pytest.approx(2 / 3),
        "by_domain": {"legs": 1.0, "words": 0.5},
        "by_item": "110",
    }


def test_data_that_nothing_verifies_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [], "domain": null}\n{"messages": []}\n')
    with pytest.raises(SystemExit):
        evaluation.main(["--bank", "none", "--data", str(data), "--out", "out.json"])
    assert "data.jsonl has a domain" in capsys.readouterr().err


def test_the_command_keeps_what_it_has_measured(m: MoLoRA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": "Answer: x"}]

    records = [
        {"messages": exchange("abc"), "domain": "words", "answer": "cba"},
        {"messages": exchange("hi"), "domain": None, "answer": "hello"},  # the base model's: nothing verifies it
        {"messages": exchange("abc, 1 cat"), "domain": ["words", "legs"], "answer": ["cba", "4"]},
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    seen = []

    def stop_at_the_router(m: MoLoRA, questions: Any, routes: list[str], **_: Any) -> list[str]:
        if routes[0] == "auto":
            seen.append(json.loads(out.read_text()))
        return ["Answer: cba"] * len(questions)

    monkeypatch.setattr(evaluation, "answer", stop_at_the_router)
    arguments = ["--bank", str(m.bank.path), "--data", str(data), "--out", str(out), "--device", "cpu"]
    evaluation.main(arguments)
    figures = json.loads(out.read_text())
    assert list(seen[0]["results"]) == ["base", "words", "legs"]
    assert list(figures["results"]) == ["base", "words", "legs", "auto"]  # no route is given to a composite
    assert figures["num_items"] == 2
    assert figures["results"]["base"]["by_domain"] == {"composite": 0.0, "words": 1.0}
    assert figures["command"].endswith("--device cpu")
