"""Measuring a bank: batched answers are those that `generate` gives one by one, and each way's figures are kept."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import molora
from molora import Bank, MoLoRA
from molora.cli import app
from molora.routing import RouteRequest
from molora.training import evaluate as evaluation
from molora.training import given as oracle
from molora.training.evaluate import answer, evaluate, measure_bank, routes_by_sequence
from molora.training.examples import encode
from molora.training.given import answer_as_given
from molora.training.question import Question
from molora.training.router_report import routed_tokens
from molora.training.scores import best_single, paired_difference

QUESTIONS = [
    Question([{"role": "user", "content": "abc" * (1 + i)}], (domain,), (reference,))
    for i, (domain, reference) in enumerate((("words", "cba"), ("legs", "4"), ("words", "cba")))
]


@pytest.fixture
def m(make_bank: Any, make_adapter: Any, key_router: Any, tmp_path: Path) -> MoLoRA:
    adapters = {"words": make_adapter(seed=1), "legs": make_adapter(seed=2)}
    bank = make_bank(tmp_path, adapters=adapters, router=key_router())
    return molora.load(bank, device="cpu", dtype="float32")


def test_answers_are_those_of_generate(m: MoLoRA) -> None:
    routes = ["words", "auto", "base"]
    texts = answer(m, QUESTIONS, routes, max_new_tokens=12)
    alone = [
        m.generate(question.messages, route=route, max_new_tokens=12).text
        for question, route in zip(QUESTIONS, routes, strict=True)
    ]
    assert texts == alone
    assert len({*texts}) == 3


def test_more_questions_than_the_engine_takes_at_once(m: MoLoRA, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(m, QUESTIONS, ["words"] * 3, max_new_tokens=5)
    monkeypatch.setattr(evaluation, "AT_ONCE", 2)
    assert answer(m, QUESTIONS, ["words"] * 3, max_new_tokens=5) == whole


def test_one_adapter_given_on_every_token_is_that_adapters_route(m: MoLoRA) -> None:
    questions = [
        replace(question, labels=question.domains * len(m.render(question.messages).token_ids))
        for question in QUESTIONS
    ]
    given = answer_as_given(m, questions, max_new_tokens=12, batch_size=2)
    assert given == answer(m, QUESTIONS, [question.domains[0] for question in QUESTIONS], max_new_tokens=12)


def test_answers_that_have_ended_leave_the_batch(m: MoLoRA, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [
        replace(question, labels=question.domains * len(m.render(question.messages).token_ids))
        for question in QUESTIONS
    ]
    outs = [m.generate(question.messages, route=question.domains[0], max_new_tokens=9) for question in questions]
    first, second = outs[0].generated_ids[1], outs[1].generated_ids[3]
    monkeypatch.setattr(MoLoRA, "eos_ids", {first, second})
    sizes: list[int] = []
    m.model.register_forward_pre_hook(lambda _, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    together = answer_as_given(m, questions, max_new_tokens=9)
    assert min(sizes) < max(sizes) == len(questions)
    assert together == [answer_as_given(m, [question], max_new_tokens=9)[0] for question in questions]
    assert len({len(text) for text in together}) > 1


def test_given_routes_follow_the_labels_and_then_the_answers_parts(m: MoLoRA, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [{"type": "text", "text": text, "domain": domain} for text, domain in (("one,", "words"), (" two", "legs"))]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}],
        "domain": ["words", "legs"],
        "answer": ["a", "b"],
    }
    question = Question.from_record(record, m.tokenizer)
    assert {"words", "legs"} <= set(question.labels)
    assert len(question.labels) == len(m.render(question.messages).token_ids)
    assert Question.from_record({**record, "labels_only": True}, m.tokenizer) == question
    monkeypatch.setattr(oracle, "_ENDED", re.compile(r"(?s)..."))  # a part is three characters
    (given,) = answer_as_given(m, [question], max_new_tokens=8)
    ids, slots = list(m.render(question.messages).token_ids), {"words": 0, "legs": 1}
    start = m.render(question.messages).starts["turn"]
    chosen = [slots.get(label or "", -1) if i >= start else -1 for i, label in enumerate(question.labels)]
    text = ""
    for _ in range(8):  # by full forwards
        request = RouteRequest(
            torch.zeros(1, 1, dtype=torch.long),
            slots=torch.tensor(chosen, dtype=torch.int32)[None, :, None],
            gates=torch.ones(1, len(ids), 1),
        )
        with torch.inference_mode(), m.decoder.requested(request):
            ids.append(int(m.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        text = m.tokenizer.decode(ids[len(question.labels) :])
        chosen.append(0 if len(text) < 3 else 1)
    assert set(chosen[len(question.labels) :]) == {0, 1}
    assert given == m.tokenizer.decode(ids[len(question.labels) :], skip_special_tokens=True)


def test_one_route_a_sequence_is_the_routers_favourite(m: MoLoRA) -> None:
    for question, route in zip(QUESTIONS, routes_by_sequence(m, QUESTIONS, batch_size=2), strict=True):
        prompt = m.render(question.messages)
        with torch.inference_mode():
            hidden = m.decoder.router_input(input_ids=torch.tensor([prompt.token_ids]), use_cache=False)
            shares = m.decoder.router.scores(hidden)[0, prompt.starts["turn"] :].softmax(-1).sum(0)
        assert route == ["base", "words", "legs"][int(shares.argmax())]


HOSTILE = "<script>alert(1)</script>"
PARTS = [("ab12 cd,", "words"), (" 34", "legs")]


def records() -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": text, "domain": domain} for text, domain in PARTS]
    before = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]

    def exchange(content: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": content}, {"role": "assistant", "content": content}]

    return [
        {"messages": exchange(f"spell {HOSTILE}"), "domain": "words", "answer": "x"},
        {"messages": [*before, *exchange("count 12 cats")], "domain": "legs", "answer": "48"},
        {"messages": exchange(parts), "domain": ["words", "legs"], "answer": ["x", "34"]},
    ]


@pytest.mark.parametrize("activation", ["turn", "response"])
def test_the_router_is_measured_and_drawn(m: MoLoRA, activation: Literal["turn", "response"], tmp_path: Path) -> None:
    m.bank = Bank(m.bank.path, replace(m.bank.config, activation=activation))
    data, out = tmp_path / "data.jsonl", tmp_path / "figures.json"
    data.write_text("".join(json.dumps(record) + "\n" for record in records()))
    measure_bank(m, str(data), out, ways=["base", "auto"], max_new_tokens=8)
    columns = ["base", "words", "legs"]
    confusion = [[0] * 3 for _ in columns]
    switches = inside = num_inside = num_neighbours = label_switches = label_inside = num_written = written = 0
    for record in records():
        example = encode(record, m.tokenizer)
        with torch.inference_mode():
            hidden = m.decoder.router_input(input_ids=torch.tensor([example.token_ids]), use_cache=False)
            routes = m.decoder.router.scores(hidden)[0].argmax(-1).tolist()
        texts = [m.tokenizer.decode([token_id]) for token_id in example.token_ids]
        start = vars(example)[activation]
        for t in range(start, len(routes)):
            label, before = example.domains[t], example.domains[t - 1]
            if label is None:
                continue
            confusion[columns.index(label)][routes[t]] += 1
            if t > start and before is not None:
                goes_on = texts[t - 1].isalnum() and texts[t].isalnum()
                num_neighbours += 1
                num_inside += goes_on
                switches += routes[t] != routes[t - 1]
                inside += goes_on and routes[t] != routes[t - 1]
                label_switches += label != before
                label_inside += goes_on and label != before
                is_written = goes_on and example.learned[t - 1] and example.learned[t]
                num_written += is_written
                written += is_written and routes[t] != routes[t - 1]
    num_tokens = sum(map(sum, confusion))
    router = json.loads(out.read_text())["router"]
    assert router["columns"] == columns
    assert router["confusion"] == confusion
    assert router["num_tokens"] == num_tokens
    assert router["accuracy"] == sum(confusion[c][c] for c in range(3)) / num_tokens
    assert router["load"] == {name: sum(row[c] for row in confusion) / num_tokens for c, name in enumerate(columns)}
    assert router["switch_rate"] == switches / num_neighbours
    assert router["label_switch_rate"] == label_switches / num_neighbours
    assert [router[f"{kind}_in_words"] for kind in ("neighbours", "switches", "label_switches")] == [
        *(num_inside, inside, label_inside)
    ]
    assert [router[f"{kind}_in_written_words"] for kind in ("neighbours", "switches")] == [num_written, written]
    assert 0 < written < num_written < num_inside < num_neighbours
    assert inside < num_inside
    assert 0 < router["ece"] < 1
    assert 0 < router["entropy"] < math.log(3)
    folder = tmp_path / "figures.json.plots"
    pictures = {path.stem: Image.open(path) for path in folder.glob("*.png")}
    assert set(pictures) == {"confusion", "load", "calibration", "entropy", "switches"}
    for picture in pictures.values():
        picture.load()
        assert 240 <= min(picture.size) <= max(picture.size) <= 2200
    page = (folder / "routes.html").read_text()
    assert "<script" not in page
    assert "&lt;" in page
    assert page.count("<article>") == 3
    assert [page.count(f"<h2>{kind}</h2>") for kind in ("One task", "Several tasks")] == [1, 1]


@pytest.mark.parametrize(("way", "domain"), [("base", "words"), ("auto", "sorting")])
def test_nothing_is_drawn_without_the_router_or_labels_of_its_columns(
    m: MoLoRA, way: str, domain: str, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    record = {"messages": messages, "domain": domain, "answer": "x"}
    data, out = tmp_path / "data.jsonl", tmp_path / "figures.json"
    data.write_text(json.dumps(record) + "\n")
    assert "router" not in measure_bank(m, str(data), out, ways=[way], max_new_tokens=2)
    assert [path.name for path in tmp_path.glob("figures*")] == ["figures.json"]


def test_tokens_are_shown_with_who_read_and_who_wrote_them(m: MoLoRA) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "say é 12"}]
    stream = m.stream(messages, activation="response", max_new_tokens=12)
    drawn = [*stream]
    out = stream.result
    turn, start = (m.render(messages).starts[each] for each in ("turn", "response"))
    assert 0 < turn < start == out.activation_start
    question, answer_ = routed_tokens(m, out, turn)
    assert [token.route for token in question] == [None] * (start - turn) + out.routes[start : out.num_prompt_tokens]
    assert [token.route for token in answer_] == out.generated_routes
    assert len({token.name for token in answer_}) > 1
    for token, wanted in zip(answer_, drawn, strict=True):
        name, probability = wanted.candidates[0]
        assert (token.name, token.probability) == (name, pytest.approx(probability, rel=1e-3))
    assert "".join(token.text for token in question) == m.tokenizer.decode(
        out.token_ids[turn : out.num_prompt_tokens], clean_up_tokenization_spaces=False
    )
    assert "é" in [token.text for token in question]
    assert {token.text for token in question if token.is_special} <= {*m.tokenizer.all_special_tokens}


def test_paired_differences_and_an_oracles_choice() -> None:
    assert best_single(["0110", "0011"]) == "0111"
    found = paired_difference("1100", "1000")
    assert found["difference"] == 0.25
    assert found["low"] == pytest.approx(0.25 - 1.96 * math.sqrt(0.1875) / 2)
    assert found["high"] == pytest.approx(0.25 + 1.96 * math.sqrt(0.1875) / 2)


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


LONG = [{"role": "user", "content": "a" * 2000}, {"role": "assistant", "content": "b"}]


def test_data_that_nothing_verifies_is_an_error(m: MoLoRA, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [], "domain": null}\n{"messages": []}\n')
    with pytest.raises(ValueError, match=r"data.jsonl has a domain"):
        measure_bank(m, str(data), tmp_path / "out.json")


@pytest.mark.parametrize(
    ("record", "ways", "words"),
    [
        ({"domain": "words"}, None, "verifiable record 1 has no 'answer'"),
        ({"domain": "letters", "answer": "x"}, None, "no verifier for ['letters']"),
        ({"domain": [], "answer": []}, None, "verifiable record 1: a record's domain is the list []"),
        ({"domain": "legs", "answer": 5}, None, "verifiable record 1: answer is 5; expected a text, or a list"),
        ({"domain": 3, "answer": "x"}, None, "verifiable record 1: domain is 3; expected a text, or a list"),
        ({"domain": ["legs", None], "answer": ["1", "2"]}, None, "record 1: domain is ['legs', None]; expected"),
        ({"domain": ["legs", "words"], "answer": ["5"]}, None, "and answer ['5']; expected an answer for each"),
        ({"domain": "legs", "answer": ["5"]}, None, "and answer ['5']; expected an answer for each domain"),
        ({"domain": "legs", "answer": "5", "messages": "hi"}, None, "record 1: messages must be a list, not 'hi'"),
        (
            {"domain": "legs", "answer": "5", "messages": LONG},
            None,
            "verifiable record 1: the prompt has 2097 tokens, but the model reads at most",
        ),
        ({"domain": "words", "answer": "x"}, ["base", "nope"], "unknown ways ['nope']"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(
    m: MoLoRA, record: dict[str, Any], ways: list[str] | None, words: str, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": messages, **record}) + "\n")
    with pytest.raises(ValueError, match=re.escape(words)):
        measure_bank(m, str(data), tmp_path / "out.json", ways=ways)
    assert not (tmp_path / "out.json").exists()


def test_the_command_keeps_what_it_has_measured(m: MoLoRA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": "Answer: x"}]

    records = [
        {"messages": exchange("abc"), "domain": "words", "answer": "cba"},
        {"messages": exchange("hi"), "domain": None, "answer": "hello"},  # the base model's: nothing verifies it
        {"messages": exchange("1 cat"), "domain": "legs", "answer": "4"},
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    seen = []

    def right_by_its_own(m: MoLoRA, questions: Any, routes: list[Any], **_: Any) -> list[str]:
        if routes[0] == "auto":
            seen.append(json.loads(out.read_text()))
        right = {"words": "Answer: cba", "legs": "Answer: 4"}
        return [right.get(route if isinstance(route, str) else "", "") for route in routes]

    monkeypatch.setattr(evaluation, "answer", right_by_its_own)
    arguments = [str(m.bank.path), "--data", str(data), "--out", str(out), "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(app, ["eval", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    figures = json.loads(out.read_text())
    names = ["base", "words", "legs", "best single", "uniform", "given", "sequence", "auto"]
    assert list(seen[0]["results"]) == names[:-1]
    assert list(figures["results"]) == names
    assert figures["num_items"] == 2
    results = figures["results"]
    assert {name: results[name]["by_item"] for name in names} | {"sequence": ""} == {
        **{"base": "00", "words": "10", "legs": "01", "best single": "11", "uniform": "00", "given": "11"},
        **{"sequence": "", "auto": "00"},
    }
    assert results["words"]["by_domain"] == {"legs": 0.0, "words": 1.0}
    assert results["given"]["auto_minus_this"]["difference"] == -1
    assert figures["environment"]["device"] == "cpu"
