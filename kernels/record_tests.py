"""Run the kernels' tests and write what happened beside the benchmarks.

python kernels/record_tests.py kernels/results/tests.json -m gpu
"""

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import describe_machine

TESTS = Path(__file__).parents[1] / "tests" / "kernels"


def read_report(report: Path) -> dict[str, Any]:
    """How many tests ended how, and the names of those that failed, from pytest's XML."""
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = bool(kinds & {"failure", "error"})
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = (
            "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        )
    failed_tests = sorted(test for test, outcome in outcomes.items() if outcome == "failed")
    return {"outcomes": Counter(outcomes.values()), "failed": failed_tests}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(TESTS), f"--junitxml={report}", *sys.argv[2:]]
        status = subprocess.run(command).returncode
        ended = read_report(report) if report.exists() else {"outcomes": {}, "failed": []}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = describe_machine(device) | ended | {"exit_status": status}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
