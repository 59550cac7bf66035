"""The benchmark of functions: all its stages on a tiny model, and what is taken of several drafts."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

from molora.adapter import Adapter
from molora.bank import Bank
from molora.tiny import make_tiny_base
from molora.training.recipes.drafts import MAX_NEW_TOKENS
from molora.training.recipes.functions import NUM_DRAFTS, write_questions
from molora.training.recipes.tasks import DEMO
from molora.training.recipes.verdicts import corrupted
from molora.training.scores import mean_difference

REPOSITORY = Path(__file__).parents[1]
NUM = 10


def run(stage: str, work: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks/functions.py"), stage, "--work", str(work), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(work / "cache")}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


def pretend(data: Path, bank: Bank) -> None:
    """Drafts as `draft` writes them, right and wrong ones: a random model would have none that are right."""
    rng = Random(0)
    for name, num_drafts in NUM_DRAFTS.items():
        records = [json.loads(line) for line in (data / f"questions_{name}.jsonl").read_text().splitlines()]
        head = {
            "questions": sha256(json.dumps(records).encode()).hexdigest(),
            "adapters": {domain: bank[domain].digest for domain in sorted(DEMO)},
            "num_drafts": num_drafts,
            "temperature": 1.0,
            "seed": 0,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        lines = [head]
        for number, record in enumerate(records):
            reply = record["messages"][-1]["content"]
            right = [(number // len(DEMO) + index) % 2 == 0 for index in range(num_drafts)]
            wrong = corrupted(reply, record["answer"], record["domain"], rng)
            texts = [reply if each else wrong for each in right]
            lines.append({"texts": texts, "right": right, "logprobs": [rng.uniform(-2, 0) for _ in right]})
        (data / f"drafts_{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_function_is_measured_in_every_way(tmp_path, make_adapter, make_bank):
    pytest.importorskip("reasoning_gym")
    work, data = tmp_path / "work", tmp_path / "work" / "data"
    data.mkdir(parents=True)
    make_tiny_base(tmp_path / "base", seed=0, vocab_size=259, max_position_embeddings=1024)
    bank = make_bank(tmp_path, adapters={domain: make_adapter(seed=seed) for seed, domain in enumerate(DEMO)})
    write_questions(data, seed=0, num_train=NUM, num_heldout=NUM, num_best=NUM)
    pretend(data, bank)
    out = tmp_path / "functions.json"
    options = ["--bank", str(bank.path), "--base", str(tmp_path / "base"), "--device", "cpu", "--dtype", "float32"]
    options += ["--steps", "2", "--rows", "1", "--rank", "4", "--num-counted", "1", "--out", str(out)]
    done = run("all", work, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result["functions"]) == {"answerability", "uncertainty", "check"}
    for name, found in result["functions"].items():
        assert set(found["rows"]) == {"base", "activated", "plain"}
        for row in found["rows"].values():
            assert len(row["by_item"]) == found["num_items"] > 0
            assert 0 <= row["auroc"] <= 1
            assert 0 <= row["calibration_error"] <= 1
        activated, plain = found["rows"]["activated"], found["rows"]["plain"]
        assert activated["prompt_tokens"] == plain["prompt_tokens"]
        # What stands before the invocation is the base's for the one, and all but the system message new to the other.
        assert activated["reused_tokens"] > plain["reused_tokens"] + 30, name
        assert activated["computed_tokens"] < plain["computed_tokens"] - 30, name
    best = result["best of n"]
    assert best["num_questions"] == NUM
    for n, rows in best["rows"].items():
        assert rows["oracle"]["accuracy"] >= max(row["accuracy"] for row in rows.values())
        assert rows["random"]["accuracy"] == pytest.approx(0.5, abs=0.5 if n == "1" else 0.01)
    assert best["tokens"]["activated"]["checks_reused"] > best["tokens"]["plain"]["checks_reused"]
    table = out.with_suffix(".md").read_text()
    assert "| check | activated |" in table
    assert "| oracle |" in table
    trained = Bank.open(work / "bank")
    assert {trained[name].activation for name in ("check", "uncertainty")} == {"invocation"}
    assert trained["check-plain"].activation == 0
    assert not trained["check"].routable
    assert {*DEMO} <= {entry.name for entry in trained.routable}
    tokens = Adapter.read(work / "bank/adapters/check").config.alora_invocation_tokens
    assert tokens is not None
    assert len(tokens) > 20  # bytes of the invocation, not only of a header


@pytest.fixture
def candidates(benchmark_module):
    return benchmark_module("functions.selection").Candidates(
        right=(False, True, False, True),
        answers=("a", "b", "a", "c"),
        logprobs=(-1.0, -0.5, -0.4, -0.6),
        scores={
            "base": (0.1, 0.1, 0.1, 0.1),
            "activated": (0.3, 0.5, 0.4, 0.6),
            "plain": (0.2, 0.9, 0.1, 0.3),
        },
    )


@pytest.mark.parametrize(
    ("method", "by_n"),
    [
        ("random", {1: 0, 2: 0.5, 4: 0.5}),
        ("oracle", {1: 0, 2: 1, 4: 1}),
        ("majority", {1: 0, 2: 0, 4: 0}),  # "a", the first of two, and then the commonest
        ("log-probability", {1: 0, 2: 1, 4: 0}),
        ("activated", {1: 0, 2: 1, 4: 1}),
        ("plain", {1: 0, 2: 1, 4: 1}),
        ("base", {1: 0, 2: 0, 4: 0}),
        ("activated vote", {1: 0, 2: 1, 4: 0}),  # "a" has 0.7 of four, and 0.3 of two
    ],
)
def test_what_is_taken_of_n_drafts(candidates, method, by_n):
    assert {n: candidates.take(method, n) for n in by_n} == by_n


def test_drafts_agree_where_their_verifier_reads_the_same(benchmark_module):
    answer_of = benchmark_module("functions.selection").answer_of
    assert answer_of("sorting", "Answer: 1, 2") == answer_of("sorting", "So.\nAnswer: 1,2.")
    assert answer_of("arithmetic", "Answer: 1,200") == answer_of("arithmetic", "Answer: 1200")
    assert answer_of("arithmetic", "Answer: ?") != answer_of("arithmetic", "Answer: !")
    assert answer_of("arithmetic", "Answer: 12\nThat is all.") == answer_of("arithmetic", "Answer: 12.0")
    assert answer_of("words", "was") != answer_of("words", "Answer: was")
    assert answer_of("words", "was") == answer_of("words", "was") != answer_of("words", "saw")
    found = mean_difference([1, 1, 0, 1], [0, 1, 0, 0])
    assert found["difference"] == 0.5
    assert found["high"] - found["difference"] == pytest.approx(1.96 * 0.5 / 2)
