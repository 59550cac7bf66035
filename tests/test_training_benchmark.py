"""The benchmark of training: both sides on a tiny model, and what the README says of a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    alike, other = (
        {
            (figure["suite"], figure["name"]): figure
            for figure in json.loads((REPOSITORY / f"benchmarks/results/{file}.json").read_text())["figures"]
        }
        for file in ("training-alike-h100", "training-h100")
    )

    def times(figures: dict[tuple[str, str], dict[str, Any]], shape: str, how: str = "") -> tuple[str, ...]:
        """For one adapter and for eight."""
        name = "{}: PEFT's time over ours"
        return tuple(f"{figures[shape, name.format(count + how)]['value']:.1f}" for count in ("one", "eight"))

    words, small = " ".join((REPOSITORY / "README.md").read_text().split()), "smollm2-135m"
    one, eight = times(alike, small)
    memory = alike[small, "one: memory over one PEFT run's"]["value"]
    assert f"One adapter is trained {one} times faster than by PEFT with transformers' Trainer" in words
    assert f"in {memory:.2f} of its memory; eight side by side, {eight} times faster" in words
    neither, both = (" and ".join(times(alike, small, f", {how} compiled")) for how in ("neither", "both"))
    assert f"With neither side compiled it is {neither} times, with both {both};" in words
    assert f"[{' and '.join(times(other, '1b'))} times]" in words
    default, neither_s, both_s = (
        alike[small, f"one{how}: PEFT's time over ours"]["details"]
        for how in ("", ", neither compiled", ", both compiled")
    )
    most = max(
        default["step_ms"] / both_s["step_ms"],  # ours is compiled in both
        default["peft_step_ms"] / neither_s["peft_step_ms"],  # and PEFT's in neither
    )
    assert f"times of one configuration differ by up to {100 * (most - 1):.0f}% within that run" in words


def test_the_readme_says_what_two_devices_were_measured_to_give() -> None:
    result = json.loads((REPOSITORY / "benchmarks/results/devices-h100.json").read_text())
    figures = {figure["name"]: figure["value"] for figure in result["figures"]}
    ddp, fsdp2 = (figures[f"{strategy}: tokens a second over one device's"] for strategy in ("ddp", "fsdp2"))
    words = " ".join((REPOSITORY / "README.md").read_text().split())
    assert f"Two H100s train an adapter of a 1B shape {ddp:.2f} and {fsdp2:.2f} times as fast as one" in words
