"""What docs/functions.md shows, on a tiny random bank: a call in Python, an agent over HTTP, the best of n drafts."""

import re
from pathlib import Path

import pytest

import molora
from molora.serving.app import create_app
from molora.serving.config import ServeConfig
from molora.serving.engine import Engine, EngineConfig
from molora.training.recipes.verdicts import INVOCATIONS

REWRITE = "Rewrite the question so that it stands alone."
QUESTION = "What is 417 plus 385 minus 96?"


@pytest.fixture(scope="module")
def bank(tmp_path_factory, make_function_bank):
    return make_function_bank(tmp_path_factory.mktemp("functions"), INVOCATIONS | {"rewrite": REWRITE})


def test_the_python_of_the_guide_runs(bank, tmp_path, monkeypatch, capsys):
    guide = (Path(__file__).parents[2] / "docs" / "functions.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    (tmp_path / "banks").mkdir()
    (tmp_path / "banks" / "functions").symlink_to(bank.path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(first, "docs/functions.md", "exec"), names)
    m, function, verdict = names["m"], names["answerability"], names["verdict"]
    assert function.invocation == INVOCATIONS["answerability"]
    printed = f"{verdict.label} {verdict.score}\n{verdict.num_reused_tokens} {verdict.num_computed_tokens}\n"
    assert capsys.readouterr().out == printed
    prompt = m.render(function.behind(names["messages"]))
    assert verdict.num_prompt_tokens == len(prompt.token_ids)
    logits, _ = m.logits([list(prompt.token_ids)], [prompt.starts["turn"]], route="answerability")
    yes, no = logits[0, -1, m.tokenizer("yn")["input_ids"]].double().softmax(-1).tolist()
    assert verdict.probabilities == pytest.approx((yes, no), abs=1e-3)
    exec(compile(second, "docs/functions.md", "exec"), names)
    m.engine.close()
    prompt, out = m.render([*names["messages"], names["question"]]), names["out"]
    assert names["question"]["content"] == REWRITE
    assert out.activation_start == prompt.starts["turn"]


@pytest.fixture(scope="module")
def agent_and_engine(bank, listening, example):
    openai = pytest.importorskip("openai")
    m = molora.load(bank, device="cpu", dtype="float32")
    engine = Engine(m, EngineConfig(kv_cache_bytes=1 << 24))
    with (
        listening(create_app(engine, ServeConfig(bank=str(bank.path)))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield example("agent"), client, m, url
    engine.close()


@pytest.fixture
def agent(agent_and_engine):
    module, client, _, _ = agent_and_engine
    return module.Agent(client, "tiny", max_tokens=8)


def reused(printed, what):
    """(reused, all) prompt tokens of each call of this kind."""
    found = re.findall(rf"^ +{what} +(\d+) of +(\d+) prompt tokens reused", printed, flags=re.MULTILINE)
    return [(int(one), int(of)) for one, of in found]


def test_the_invocations_are_those_that_training_uses(example, agent_and_engine):
    module, *_ = agent_and_engine
    assert module.FUNCTIONS == INVOCATIONS
    assert example("best_of_n").CHECK.invocation == INVOCATIONS["check"]


def test_a_call_over_http_is_that_of_a_full_forward_and_finds_the_conversation(agent, agent_and_engine, capsys):
    *_, m, _ = agent_and_engine
    agent.read("Maria lives in Garrowby.")
    agent.messages.append({"role": "user", "content": "Where does Maria live?"})
    for name, text in INVOCATIONS.items():
        score = agent.call(name)
        (counts,) = reused(capsys.readouterr().out, name)
        prompt = m.render([*agent.messages, {"role": "user", "content": text}])
        start = prompt.starts["turn"]
        assert counts == (0 if name == "answerability" else start, len(prompt.token_ids))  # the first one reads it
        logits, _ = m.logits([list(prompt.token_ids)], [start], route=name)
        logprobs, ids = logits[0, -1].double().log_softmax(-1).topk(20)
        likely = {m.tokenizer.decode([token]): value for token, value in zip(ids.tolist(), logprobs.exp(), strict=True)}
        yes, no = float(likely.get("y", 0)), float(likely.get("n", 0))
        letters = m.tokenizer("yn")["input_ids"]
        is_yes = bool(logits[0, -1, letters[0]] > logits[0, -1, letters[1]])
        assert score == pytest.approx(yes / (yes + no) if yes + no else float(is_yes), abs=1e-4)


def test_the_agent_answers_drafts_again_or_says_that_it_does_not_know(agent, monkeypatch, capsys):
    said = iter([0.1, 0.9, 0.2, 0.3, 0.6, 0.9, 0.1])
    asked = []
    call = agent.call

    def scripted(function, *more):
        asked.append((function, [each["content"] for each in more]))
        call(function, *more)
        return next(said)

    monkeypatch.setattr(agent, "call", scripted)
    agent.read("Maria lives in Garrowby.")
    assert agent.ask_about("What does Maria play?") == "The text does not say."
    answer = agent.ask_about("Where does Maria live?")
    assert answer != "The text does not say."
    assert [name for name, _ in asked] == ["answerability"] * 2
    asked.clear()
    answer = agent.ask(QUESTION)  # 0.2: several drafts, the second of which will do
    assert [name for name, _ in asked] == ["uncertainty", "check", "check"]
    assert asked[-1][1] == [answer]
    answer = agent.ask(QUESTION)  # 0.9: one draft, which will not
    assert answer == f"I am not sure of this: {asked[-1][1][0]}"
    roles = [message["role"] for message in agent.messages]
    assert roles == ["user", "assistant"] * 5
    counts = reused(capsys.readouterr().out, "(?:answerability|check)")
    assert all(found > 0 for found, _ in counts[1:])


def test_the_agents_command_runs(agent_and_engine, capsys):
    module, _, _, url = agent_and_engine
    module.main(["--bank", "tiny", "--url", f"{url}/v1", "--max-tokens", "4"])
    printed = capsys.readouterr().out
    for question in (*module.QUESTIONS, *module.TASKS):
        assert question in printed
    assert len(reused(printed, "answerability")) == 2
    assert len(reused(printed, "uncertainty")) == 2


def test_best_of_n_shows_every_draft_and_its_score(example, bank, capsys):
    options = ["--bank", str(bank.path), "--n", "3", "--max-new-tokens", "6", "--device", "cpu"]
    example("best_of_n").main([*options, "--draft", "x", QUESTION])
    printed = capsys.readouterr().out
    scores = [(mark == "*", float(score)) for mark, score in re.findall(r"^(.) ([01]\.\d{3})  ", printed, re.MULTILINE)]
    assert len(scores) == 3
    assert [score for is_best, score in scores if is_best] == [max(score for _, score in scores)]
    assert re.search(r"in all \d+ tokens reused, \d+ computed", printed)
