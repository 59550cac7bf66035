"""The benchmark that kills the training of a bank, with one kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_a_bank_is_killed_goes_on_and_is_compared(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    options = ["--kills", "1", "--steps", "40", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks/kills.py"), *options],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert (result["num_kills"], result["num_banks"], result["num_equal"]) == (1, 1, 1)
    assert result["kills"][0]["newest_file"]
