"""The benchmark of quality, all its stages on a tiny model: which learns nothing, but every way is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DOMAINS = ["arithmetic", "words", "legs"]


def test_every_way_is_measured_on_the_same_items(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("peft")
    out = tmp_path / "quality.json"
    options = ["--work", str(tmp_path / "work"), "--base", "tiny-random/llama", "--router-layer", "1", "--rows", "1"]
    options += ["--domains", *DOMAINS, "--num-train", "40", "--steps", "2", "--router-steps", "2", "--device", "cpu"]
    options += ["--singles", "1", "--composites", "2", "--dtype", "float32", "--out", str(out)]
    for stage in ("data", "train", "eval"):
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "benchmarks/quality.py"), stage, *options],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
        assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["num_items"] == {"singles": 3, "composites": 2}
    ways = {
        "auto",
        "given",
        "base",
        "sequence",
        "uniform",
        "best single",
        "ties",
        "dare",
        "dare_ties",
        "random",
        "joint",
        "top-2",
        "soft",
    }
    for kind, rows in result["rows"].items():
        assert set(rows) == ways | set(DOMAINS)
        for row in rows.values():
            assert len(row["by_item"]) == result["num_items"][kind]
            assert {"difference", "low", "high"} == set(row["auto_minus_this"])
    data = tmp_path / "work" / "data"
    questions = [
        {str(json.loads(line)["messages"][-2]["content"]) for line in (data / name).read_text().splitlines()}
        for name in ("singles.jsonl", "joint.jsonl")
    ]
    assert all(questions)
    assert not questions[0] & questions[1]
