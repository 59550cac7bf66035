"""The benchmark of quality, all its stages on a tiny model: which learns nothing, but every way is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DOMAINS = ["arithmetic", "words", "legs"]
SINGLES = {"base", "best single", "sequence", "uniform", "ties", "dare", "dare_ties", "arrow", "xlora", "random"}
SINGLES |= {
    "lm",
    "token",
    "own",
    "auto",
    "top-2",
    "soft",
    "steady",
    "steadier",
    "open",
    "key",
    "given",
    "tuned",
    "tuned given",
    "joint",
    "plain",
    "nine",
    *DOMAINS,
}
STARTS = ("first", "system", "half", "turn", "response")


def test_every_way_is_measured_on_the_same_items(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("peft")
    out, work = tmp_path / "quality.json", tmp_path / "work"
    options = ["--work", str(work), "--base", "tiny-random/llama", "--router-layer", "1", "--rows", "1"]
    options += ["--domains", *DOMAINS, "--newcomer", "sorting", "--num-train", "40", "--device", "cpu"]
    options += ["--steps", "2", "--router-steps", "2", "--xlora-steps", "2", "--dtype", "float32", "--out", str(out)]
    options += ["--singles", "1", "--composites", "2", "--histories", "1", "--limit-peft", "1", "--max-new-tokens", "4"]

    def run(stage: str) -> str:
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "benchmarks/quality.py"), stage, *options],
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for stage in ("data", "train", "eval", "table"):
        run(stage)
    result = json.loads(out.read_text())
    assert result["num_items"]["singles"] == 3
    assert result["num_items"]["composites"] == 2
    rows = result["rows"]
    assert set(rows["singles"]) == SINGLES
    assert set(rows["composites"]) == SINGLES - {"plain"}
    assert set(rows["histories"]) == {f"{bank} from {start}" for bank in ("bank", "plain") for start in STARTS}
    assert set(rows["newcomer"]) == set(rows["newcomer_composites"]) == {"nine", "nine given", "key"}
    assert set(rows["others"]) == {"removed", "not removed"}
    assert len(rows["others"]["removed"]["by_item"]["0"]) == 2
    assert rows["others"]["removed"]["minus not removed"]["num_items"] == 2
    for label, row in rows["singles"].items():
        assert len(row["by_item"]["0"]) == (1 if label in ("arrow", "xlora") else 3)
        assert row["minus auto"]["num_items"] == len(row["by_item"]["0"])
    assert set(result["routes"]["singles"]) == {
        "auto",
        "random",
        "token",
        "lm",
        "own",
        "steady",
        "steadier",
        "open",
        "key",
        "top-2",
        "soft",
        "tuned",
        "nine",
    }
    assert result["routes"]["composites"]["steady"]["neighbours_in_words"] > 0
    assert "| xlora | 0.000 (1 items)" in out.with_suffix(".md").read_text()
    held_out, learned = (
        {str(json.loads(line)["messages"][-2]["content"]) for line in (work / "data" / name).read_text().splitlines()}
        for name in ("singles.jsonl", "joint.jsonl")
    )
    assert held_out
    assert not held_out & learned
    (work / "rows" / "seed-0" / "given.json").unlink()  # what is there is not measured again
    assert [line.split()[0] for line in run("eval").splitlines()] == ["given"]


@pytest.mark.parametrize(
    ("begins", "label"),
    [
        ("base", "base"),
        ("one adapter for the whole sequence", "sequence"),
        ("the router, an adapter", "auto"),
        ("the router, soft gates", "soft"),
        ("the right adapter", "given"),
        ("one LoRA of eight times", "joint"),
    ],
)
def test_the_readme_says_what_was_measured(begins: str, label: str) -> None:
    rows = json.loads((REPOSITORY / "benchmarks/results/quality-h100.json").read_text())["rows"]
    (line,) = [line for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith(f"| {begins}")]
    measured = [f"{rows[kind][label]['accuracy']:.3f}" for kind in ("singles", "composites")]
    assert [cell.strip() for cell in line.split("|")[2:4]] == measured
