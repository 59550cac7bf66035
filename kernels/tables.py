"""Write the tables of README.md anew from the results beside it: what stands between <!-- suite --> and <!-- end -->.

python kernels/tables.py
"""

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE / "README.md"
RESULTS = HERE / "results"
OTHERS = {
    "k-concat": "K-concat",
    "sglang": "SGLang",
    "granite-switch": "Granite Switch",
    "vllm": "vLLM",
    "peft-loop": "PEFT loop",
}
Row = dict[str, Any]


def render(text: str) -> str:
    """README's text with each table as its results have it."""
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda match: f"<!-- {match[1]} -->\n{_tables(match[1])}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def _tables(suite: str) -> str:
    result = json.loads((RESULTS / f"{suite}.json").read_text())
    if suite == "tests":
        return f"{result['outcomes']['passed']} passed, {result['outcomes'].get('skipped', 0)} skipped."
    kinds = {"forward": _forward, "backward": _backward, "plan": _plan}
    return kinds[result["rows"][0]["kind"]](result["rows"])


def _forward(rows: list[Row]) -> str:
    others = [name for name in OTHERS if any(name in row["methods"] for row in rows)]
    titles = ["tokens", "in x out", "rank", "adapters", "routes", "base", "floor", "ours", "above base"]
    lines = [[*titles, *(OTHERS[name] for name in others)]]
    for row in rows:
        methods, top_k = row["methods"], row["top_k"]
        widths = "+".join(map(str, row["out_features"]))
        routes = row["routes"] if top_k == 1 else f"{row['routes']}, top-{top_k}"
        shape = [str(row["tokens"]), f"{row['in_features']}x{widths}", str(row["rank"]), str(row["adapters"]), routes]
        times = [_median(methods["base"], "time_us"), f"{row['floor_us']:.1f}"]
        times += [f"**{_median(methods['auto'], 'time_us')}**", _median(methods["auto"], "above_base_us", "+")]
        lines.append([*shape, *times, *(_median(methods.get(name, {}), "time_us") for name in others)])
    return _table(lines)


def _backward(rows: list[Row]) -> str:
    titles = ["tokens", "rank", "adapters", "base", "floor", "ours", "above base", "K-concat", "PEFT loop"]
    lines = [[*titles, "MiB above base: ours", "PEFT loop"]]
    for row in rows:
        methods = row["methods"]
        shape = [str(row[name]) for name in ("tokens", "rank", "adapters")]
        times = [_median(methods["base"], "time_us"), f"{row['floor_us']:.1f}"]
        times += [f"**{_median(methods['auto'], 'time_us')}**", _median(methods["auto"], "above_base_us", "+")]
        times += [_median(methods[name], "time_us") for name in ("k-concat", "peft-loop")]
        peaks = [f"{methods[name]['peak_bytes_above_base'] / 2**20:.0f}" for name in ("auto", "peft-loop")]
        lines.append([*shape, *times, *peaks])
    return _table(lines)


def _plan(rows: list[Row]) -> str:
    plans = [(row, row["methods"]["make_plan"]) for row in rows]
    lines = [[str(row["tokens"]), str(row["top_k"]), _median(plan, "time_us")] for row, plan in plans]
    return _table([["tokens", "top-k", "make_plan"], *lines])


def _median(entry: Row, name: str, sign: str = "") -> str:
    return f"{entry[name]['median']:{sign}.1f}" if name in entry else ""


def _table(lines: list[list[str]]) -> str:
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
