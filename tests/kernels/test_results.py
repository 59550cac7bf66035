"""The tables of kernels/README.md hold what the JSON files beside it hold."""

import json
import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
README = (KERNELS / "README.md").read_text()


def rows_of(suite: str) -> list[dict[str, object]]:
    rows = json.loads((KERNELS / "results" / f"{suite}.json").read_text())["rows"]
    return [row for row in rows if "auto" in row["methods"]]


@pytest.mark.parametrize("suite", ["peers", "routes-topk-tokens", "plan-siblings"])
def test_each_forward_row_stands_in_the_readme(suite: str) -> None:
    table = {tuple(re.sub(r"[*+]", "", cell) for cell in line.split(" | ")) for line in README.splitlines()}
    for row in rows_of(suite):
        methods = row["methods"]
        layer = f"{row['in_features']}x{'+'.join(map(str, row['out_features']))}".replace("+", "")
        routes = f"{row['routes']}{'' if row['top_k'] == 1 else ', top-2'}"
        base, ours = (f"{methods[name]['time_us']['median']:.1f}" for name in ("base", "auto"))
        above = f"{methods['auto']['above_base_us']['median']:.1f}"
        expected = (f"| {row['tokens']}", layer, str(row["rank"]), str(row["adapters"]), routes, base)
        found = [line for line in table if line[:6] == expected]
        assert found, expected
        assert any(line[7:9] == (ours, above) for line in found), (expected, ours, above)


def test_each_backward_row_stands_in_the_readme() -> None:
    for row in rows_of("backward"):
        base, ours = (f"{row['methods'][name]['time_us']['median']:.1f}" for name in ("base", "auto"))
        above = f"{row['methods']['auto']['above_base_us']['median']:+.1f}"
        assert re.search(rf"\| {row['tokens']} \| {base} \| [\d.]+ \| \*\*{ours}\*\* \| \{above} \|", README)
