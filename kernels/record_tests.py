"""Run the kernels' tests and write what happened beside the benchmarks.

python kernels/record_tests.py kernels/results/tests.json -m gpu
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from benchmarks.machine import describe_machine

TESTS = Path(__file__).parents[1] / "tests" / "kernels"


class Record:
    """Counts how each test ended; of one that fails in its setup or teardown, that."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.outcomes[report.nodeid] = report.outcome


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    path, arguments = Path(sys.argv[1]), sys.argv[2:]
    record = Record()
    status = pytest.main([str(TESTS), *arguments], plugins=[record])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = describe_machine(device) | {
        "outcomes": Counter(record.outcomes.values()),
        "failed": sorted(test for test, outcome in record.outcomes.items() if outcome == "failed"),
        "exit_status": int(status),
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
