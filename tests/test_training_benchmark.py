"""The benchmark of training: both sides on a tiny model, and what the README says of a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def test_both_sides_have_the_same_gradients_and_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "training.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks/training.py"), "--shape", "tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--steps", "2", "--turns", "1", "--alike", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},  # compiling takes a minute
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    (check,) = result["checks"]
    assert check["difference"] < 1e-4
    assert {figure["name"] for figure in result["figures"]} == {
        "one: PEFT's time over ours",
        "eight: PEFT's time over ours",
        "one, both compiled: PEFT's time over ours",
        "eight, both compiled: PEFT's time over ours",
        "one, neither compiled: PEFT's time over ours",
        "eight, neither compiled: PEFT's time over ours",
        "router: by the language model loss, over the frozen passes",
    }
    assert all(figure["value"] > 0 and figure["reached"] is None for figure in result["figures"])


def test_the_readme_says_what_was_measured() -> None:
    def times(file: str, shape: str, how: str = "") -> tuple[str, ...]:
        """For one adapter and for eight."""
        name = "{}: PEFT's time over ours"
        result = json.loads((REPOSITORY / f"benchmarks/results/{file}.json").read_text())
        values = {(figure["suite"], figure["name"]): figure["value"] for figure in result["figures"]}
        return tuple(f"{values[shape, name.format(count + how)]:.1f}" for count in ("one", "eight"))

    words = " ".join((REPOSITORY / "README.md").read_text().split())
    alike, small = "training-alike-h100", "smollm2-135m"
    one, eight = times(alike, small)
    assert f"One adapter is trained {one} times faster than by PEFT with transformers' Trainer" in words
    assert f"eight side by side, {eight} times faster than one after the other" in words
    neither, both = (" and ".join(times(alike, small, f", {how} compiled")) for how in ("neither", "both"))
    assert f"With neither side compiled it is {neither} times, with both {both};" in words
    assert f"[{' and '.join(times('training-h100', '1b'))} times]" in words
    figures = json.loads((REPOSITORY / f"benchmarks/results/{alike}.json").read_text())["figures"]
    (memory,) = [each["value"] for each in figures if each["name"] == "one: memory over one PEFT run's"]
    assert f"in {memory:.2f} of its memory" in words


def test_the_readme_says_what_two_devices_were_measured_to_give() -> None:
    result = json.loads((REPOSITORY / "benchmarks/results/devices-h100.json").read_text())
    figures = {figure["name"]: figure["value"] for figure in result["figures"]}
    ddp, fsdp2 = (figures[f"{strategy}: tokens a second over one device's"] for strategy in ("ddp", "fsdp2"))
    words = " ".join((REPOSITORY / "README.md").read_text().split())
    assert f"Two H100s train an adapter of a 1B shape {ddp:.2f} and {fsdp2:.2f} times as fast as one" in words
