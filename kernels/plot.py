"""Draw what adapters cost above the base, against tokens, from results that hold one layer at several of them.

python kernels/bench.py --suite tokens --out tokens.json
python kernels/plot.py tokens.json tokens.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

OURS = ("auto", "torch", "triton")


LAYER = ("in_features", "out_features", "rank", "adapters", "routes", "top_k", "dtype")


def load(files: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first result, and the rows of the layer that was timed at most numbers of tokens, by tokens.

    Raises:
        ValueError: no layer was timed at several.
    """
    results = [json.loads(file.read_text()) for file in files]
    layers: dict[str, dict[int, dict[str, Any]]] = {}
    for row in (row for result in results for row in result["rows"] if row["kind"] == "forward"):
        layers.setdefault(str([row[key] for key in LAYER]), {}).setdefault(row["tokens"], row)
    rows_of = max(layers.values(), key=len, default={})
    if len(rows_of) < 2:
        raise ValueError("no layer was timed at several numbers of tokens; bench.py --suite tokens makes such a result")
    return results[0], [rows_of[tokens] for tokens in sorted(rows_of)]


def draw(result: dict[str, Any], rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "molora", "font.size": 10})
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    costs = {}
    for name in rows[0]["methods"]:
        timed = [(row["tokens"], row["methods"][name]["above_base_us"]) for row in rows if _is_timed(row, name)]
        if timed:
            costs[name] = timed
    others = sorted(name for name in costs if name not in OURS)
    for name, timed in sorted(costs.items(), key=lambda item: -item[1][-1][1]["median"]):  # the legend's order
        tokens = [tokens for tokens, _ in timed]
        low, median, high = ([cost[key] for _, cost in timed] for key in ("q25", "median", "q75"))
        label, width = (f"MoLoRA ({name})", 2.5) if name in OURS else (name, 1.3)
        color = f"C{others.index(name)}" if name in others else ("black", "0.35", "0.6")[OURS.index(name)]
        axes.plot(tokens, median, marker="o", markersize=width + 1, linewidth=width, color=color, label=label)
        axes.fill_between(tokens, low, high, color=color, alpha=0.2, linewidth=0)

    axes.set_xscale("log", base=2)
    axes.set_xticks([row["tokens"] for row in rows], [f"{row['tokens']}" for row in rows], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    least = min(cost["q25"] for timed in costs.values() for _, cost in timed)
    if least > 0:
        axes.set_yscale("log")
    else:  # a method is faster than the base somewhere
        axes.set_yscale("symlog", linthresh=2, linscale=0.5)
        axes.set_ylim(bottom=1.3 * least - 1)
        axes.axhline(0, color="0.3", linewidth=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds above the base linear")
    shape = rows[0]
    linear = f"{shape['in_features']}x{'+'.join(map(str, shape['out_features']))}"
    bank = f"{shape['adapters']} adapters of rank {shape['rank']}, {shape['routes']} routes"
    axes.set_title(f"{linear}, {bank}, {shape['dtype']}, {result['device']}", fontsize=10, loc="left")
    axes.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _is_timed(row: dict[str, Any], name: str) -> bool:
    return "above_base_us" in row["methods"].get(name, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that bench.py wrote")
    parser.add_argument("plot", type=Path, help="the file to draw, .svg or .png")
    args = parser.parse_args()
    try:
        draw(*load(args.results), args.plot)
    except ImportError:
        raise SystemExit("plot.py needs matplotlib: pip install matplotlib") from None
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
