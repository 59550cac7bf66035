"""The benchmarks that try to break training, the engine and the server, each for a moment."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("kills", ["--kills", "1", "--steps", "40"], {"num_kills": 1, "num_banks": 1, "num_equal": 1}),
        ("alternation", ["--requests", "60"], {"num_answers": 60, "num_different": 0, "faults": []}),
        ("clients", ["--clients", "20", "--minutes", "0.05"], {"num_clients": 20, "faults": [], "exit_status": 0}),
        ("fuzz", ["--target", "molora.json", "--minutes", "0.1"], {"minutes": 0.1, "num_found": 0}),
    ],
)
def test_it_ends_well(tmp_path: Path, script: str, options: list[str], expected: dict[str, Any]) -> None:
    if script == "fuzz":
        pytest.importorskip("atheris")
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / f"{script}.py"), *options, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {name: result[name] for name in expected} == expected
    assert result["commit"]
    match script:
        case "kills":
            assert result["kills"][0]["newest_file"]
        case "alternation":
            assert result["counts"]["loads"] > 0
        case "fuzz":
            target = result["targets"]["molora.json"]
            assert 0 < target["accepted"] < target["executions"]
            assert target["coverage"] > target["coverage_of_seeds"] > 0
        case _:
            assert result["counts"]["whole"] > 0


def test_the_readme_says_what_was_measured() -> None:
    text = " ".join((REPOSITORY / "README.md").read_text().split())
    kills, clients, alternation = (
        json.loads((REPOSITORY / f"benchmarks/results/{name}-cpu.json").read_text())
        for name in ("kills", "clients", "alternation")
    )
    assert kills["num_resumed"] > 0
    assert f"({kills['num_equal']} banks of {kills['num_banks']} after {kills['num_kills']} kills" in text
    counts = clients["counts"]
    assert f"{counts['whole'] + counts['stream']:,} whole answers" in text
    assert f"{counts['left']:,} that they leave" in text
    assert f"{counts['refused by 429']:,} requests are refused by 429" in text
    assert f"grows by {100 * (clients['memory_growth'] - 1):.1f} %" in text
    assert (clients["num_clients"], clients["minutes"], clients["faults"]) == (200, 10, [])
    assert not any(clients["kept"].values())
    assert f"Of {alternation['num_answers']:,} answers" in text
    assert alternation["num_different"] == 0
    changes = sum(alternation["counts"][name] for name in ("loads", "replacements", "unloads"))
    assert f"{changes // 100 * 100:,} times" in text


def test_an_hour_of_fuzzing_found_nothing() -> None:
    result = json.loads((REPOSITORY / "benchmarks/results/fuzz-cpu.json").read_text())
    assert (result["minutes"], result["num_found"], len(result["targets"])) == (60, 0, 7)
    for target in result["targets"].values():
        assert target["peak_memory_mb"] <= target["first_memory_mb"] + 512
        assert target["coverage"] >= target["coverage_of_seeds"]
    executions = sum(target["executions"] for target in result["targets"].values())
    text = " ".join((REPOSITORY / "docs/security.md").read_text().split())
    assert f"an hour of it tried {executions:,} inputs" in text
