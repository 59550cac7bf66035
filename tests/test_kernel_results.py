"""The tables of kernels/README.md are those of the results beside it."""

import json
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(KERNELS)
    import tables

    yield tables
    del sys.modules["tables"]


def test_the_readme_holds_what_was_measured(tables: object) -> None:
    text = tables.README.read_text()  # type: ignore[attr-defined]
    assert tables.render(text) == text  # type: ignore[attr-defined]
    assert text.count("<!-- end -->") == len(list((KERNELS / "results").glob("*.json")))


def test_a_changed_figure_is_noticed(tables: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in (KERNELS / "results").glob("*.json"):
        result = json.loads(file.read_text())
        if file.name == "peers.json":
            result["rows"][0]["methods"]["auto"]["time_us"]["median"] += 1
        (tmp_path / file.name).write_text(json.dumps(result))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.README.read_text()  # type: ignore[attr-defined]
    assert tables.render(text) != text  # type: ignore[attr-defined]


def test_all_tests_passed_on_a_gpu() -> None:
    record = json.loads((KERNELS / "results" / "tests.json").read_text())
    assert "H200" in record["device"]
    assert record["outcomes"]["passed"] > 300
    assert record["failed"] == []


def test_a_record_counts_how_tests_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(KERNELS)
    from record_tests import read_report

    cases = {"a": "", "b": "<skipped/>", "c": "<failure/>", "d": "<error/>"}
    body = "".join(f'<testcase classname="tests.some" name="{name}">{end}</testcase>' for name, end in cases.items())
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    ended = read_report(tmp_path / "report.xml")
    assert ended["outcomes"] == {"passed": 1, "skipped": 1, "failed": 2}
    assert ended["failed"] == ["tests.some::c", "tests.some::d"]


def test_the_base_linear_is_as_fast_as_the_readme_says() -> None:
    result = json.loads((KERNELS.parent / "benchmarks/results/linear-h100.json").read_text())
    ratios = {row["num_tokens"]: row["ratio"]["median"] for row in result["rows"]}
    words = " ".join((KERNELS / "README.md").read_text().split())
    assert f"took {ratios.pop(1):.2f} of cuBLAS's time at one token on an H100" in words
    assert f"and {min(ratios.values()):.2f} to {max(ratios.values()):.2f} at 2 to 64" in words
