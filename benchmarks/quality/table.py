"""All seeds' rows together: means, paired differences, and what the targets say."""

import json
import math
import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from molora.files import write_atomic
from molora.training.examples import read_records
from molora.training.recipes.surfaces import SURFACE_FORMS
from molora.training.recipes.wordings import WORDINGS
from molora.training.scores import best_single, mean_difference
from quality.merges import MERGES, UPDATE_MERGES
from quality.provenance import check_alike

MEASURES = {
    "accuracy": "routed right",
    "ece": "calibration error",
    "entropy": "entropy (nats)",
    "switch_rate": "switches",
    "label_switch_rate": "the labels'",
    "switches_in_words": "inside words",
    "label_switches_in_words": "the labels'",
    "switches_in_written_words": "inside written words",
}  # of what a router does
REFERENCES = ("auto", "given", "joint", "nine", "not removed", "given behind tasks")
AUTHORS = ("the first author", "the second author", "later authors")
OTHER_KINDS = {
    "histories": "behind an earlier exchange",
    "turns": "behind one or two other tasks",
    "newcomer": "the newcomer's single items",
    "newcomer_composites": "the newcomer's among others'",
    "others": "other tasks' single items, an adapter removed",
}
ORDER = (
    *("base", "best single", "classifier", "sequence", "uniform", *MERGES, *UPDATE_MERGES, "arrow", "xlora", "random"),
    *("lm", "token", "own", "steady", "steadier", "open", "auto", "top-2", "sparse", "soft"),
    *("given", "tuned", "tuned given", "joint", "plain", "key", "nine", "nine given"),
)


def make_table(args: Namespace) -> None:
    files = sorted((args.work / "rows").glob("seed-*/*.json"))
    if not files:
        raise SystemExit(f"{args.work / 'rows'} has no rows yet; run the stage eval first.")
    read = [json.loads(file.read_text()) for file in files]
    check_alike(args, read)
    bits: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))  # kind, label, seed
    by_domain: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    routes: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    weights: dict[str, dict[str, float]] = defaultdict(dict)  # of a merge, by seed
    for each in read:
        if "weight" in each:
            weights[each["label"]][str(each["seed"])] = each["weight"]
        for kind, found in each.get("routes", {}).items():
            routes[kind][each["label"]].append(found)
        for kind, row in each["rows"].items():
            bits[kind][each["label"]][each["seed"]] = row["by_item"]
            by_domain[kind][each["label"]].append(row["by_domain"])
    domains = [label for label in args.domains if label in bits["singles"]]
    for found in bits.values():
        if len(domains) == len(args.domains) and all(domain in found for domain in domains):
            seeds = set.intersection(*(set(found[domain]) for domain in domains))
            found["best single"] = {seed: best_single([found[domain][seed] for domain in domains]) for seed in seeds}
    rows = {
        kind: {
            label: summary(own)
            | {"by_domain": mean_by_domain(by_domain[kind][label])}
            | ({"weights": weights[label]} if label in weights else {})
            | {f"minus {other}": difference(own, found[other]) for other in REFERENCES if other in found}
            for label, own in sorted(found.items(), key=lambda item: _place(item[0]))
        }
        for kind, found in bits.items()
    }
    for kind, (name, groups_of) in GROUPS.items():
        if kind in rows:
            groups = [groups_of(record) for record in read_records(args.work / "data" / f"{kind}.jsonl")]
            for label, row in rows[kind].items():
                row[name] = by_group(groups, bits[kind][label])
    head = {name: read[0][name] for name in ("versions", "steps")}
    for name, value in head.items():
        if any(each[name] != value for each in read):
            raise SystemExit(f"the rows differ in their {name}; measure them again, in another folder.")
    measured = defaultdict(set)
    for each in read:
        measured[each["device"], each["commit"] or "unknown"].add(each["label"])
    head["device"], head["commit"] = (", ".join(sorted({*names})) for names in zip(*measured, strict=True))
    result = {
        "commands": sorted({each["command"] for each in read}),
        **head,
        "measured": [
            {"device": device, "commit": commit, "rows": sorted(labels, key=_place)}
            for (device, commit), labels in sorted(measured.items())
        ],
        "seeds": sorted({each["seed"] for each in read}),
        "num_items": {
            kind: max(len(b) for row in found.values() for b in row.values()) for kind, found in bits.items()
        },
        "rows": rows,
        "routes": {
            kind: {label: _mean_routes(found[label]) for label in sorted(found, key=_place)}
            for kind, found in routes.items()
        },
    }
    text = markdown(result)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
        write_atomic(args.out.with_suffix(".md"), text)


def author_of(record: Mapping[str, Any]) -> list[str]:
    """Who wrote its held-out wording: the others had seen none but their own."""
    return [AUTHORS[WORDINGS[record["domain"]].author(record["wording"])]]


def parts_of(record: Mapping[str, Any]) -> list[str]:
    """How many tasks a composite has and which, and who wrote the form in which they stand."""
    author = AUTHORS[SURFACE_FORMS.author(record["wording"])]
    return [f"{len(record['domain'])} tasks", *record["domain"], f"a form of {author}"]


def by_group(groups: Sequence[Sequence[str]], own: dict[int, str]) -> dict[str, float]:
    """The accuracy of the items of each group; an item may be in several, and all seeds count alike."""
    found: dict[str, list[int]] = defaultdict(list)
    for digits in own.values():
        for each, digit in zip(groups, digits, strict=False):
            for group in each:
                found[group].append(int(digit))
    return {group: statistics.fmean(digits) for group, digits in found.items()}


GROUPS = {"singles": ("in wordings of", author_of), "composites": ("with", parts_of)}


def summary(own: dict[int, str]) -> dict[str, Any]:
    """A row's accuracy, the mean over seeds, and who is right, item by item."""
    each = {seed: digits.count("1") / len(digits) for seed, digits in sorted(own.items())}
    return {
        "accuracy": statistics.fmean(each.values()),
        "by_seed": each,
        "num_items": min(map(len, own.values())),
        "by_item": {str(seed): digits for seed, digits in sorted(own.items())},
    }


def mean_by_domain(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(each[name] for each in found) for name in (found[0] if found else ())}


def _mean_routes(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean over seeds of what a router does on the items' labelled tokens."""
    wanted = ("num_tokens", "neighbours_in_words", "neighbours_in_written_words", *MEASURES)
    return {"num_seeds": len(found)} | {name: statistics.fmean(each[name] for each in found) for name in wanted}


def difference(ours: dict[int, str], theirs: dict[int, str]) -> dict[str, float] | None:
    """Ours less theirs on the items and seeds that both have: an item's is its mean over the seeds.

    The interval is the normal 95% one, over items: of these seeds' runs, not of all that might be trained; `ratio` is
    of the accuracies.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    num_items = min(len(digits) for side in (ours, theirs) for seed, digits in side.items() if seed in seeds)
    a = [statistics.fmean(int(ours[seed][i]) for seed in seeds) for i in range(num_items)]
    b = [statistics.fmean(int(theirs[seed][i]) for seed in seeds) for i in range(num_items)]
    over = statistics.fmean(b)
    return {
        **mean_difference(a, b),
        "ratio": statistics.fmean(a) / over if over else math.nan,
        "num_items": num_items,
        "num_seeds": len(seeds),
    }


def markdown(result: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    items = ", ".join(f"{number} {kind}" for kind, number in sorted(result["num_items"].items()))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [
        f"On {result['device']}, commit {result['commit']}, seeds {seeds}; {items}. {versions}.",
        "",
        "Intervals are 95% ones over items, of the mean over these seeds' runs: they say nothing of other seeds.",
        "",
        *_measured(result["measured"]),
        "| row | singles | auto less this | composites | auto less this |",
        "| --- | --- | --- | --- | --- |",
    ]
    singles, composites = result["rows"].get("singles", {}), result["rows"].get("composites", {})
    for label in sorted({*singles, *composites}, key=_place):
        cells = [label]
        for rows in (singles, composites):
            row = rows.get(label)
            cells += ["", ""] if row is None else [f"{row['accuracy']:.3f}{_note(row, rows)}", _less(label, row)]
        lines.append(f"| {' | '.join(cells)} |")
    for kind, (name, _) in GROUPS.items():
        found = {label: row[name] for label, row in result["rows"].get(kind, {}).items()}
        groups = sorted({group for each in found.values() for group in each}, key=_group_place)
        lines += ["", f"| {kind} {name} | {' | '.join(groups)} |", "| --- " * (len(groups) + 1) + "|"]
        for label, each in found.items():
            cells = [f"{each[group]:.3f}" if group in each else "" for group in groups]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    for kind, found in result["routes"].items():
        measures = {name: title for name, title in MEASURES.items() if all(name in row for row in found.values())}
        lines += ["", f"| routes of {kind} | {' | '.join(measures.values())} |", "| --- " * (len(measures) + 1) + "|"]
        lines += [
            f"| {label} | {' | '.join(f'{row[name]:.4g}' for name in measures)} |" for label, row in found.items()
        ]
    for kind, title in OTHER_KINDS.items():
        if found := result["rows"].get(kind):
            lines += ["", f"| {title} | accuracy |", "| --- | --- |"]
            lines += [f"| {label} | {row['accuracy']:.3f}{_note(row, found)} |" for label, row in found.items()]
    return "\n".join(lines) + "\n"


def _measured(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where and when each row was measured, if not all were alike."""
    lines = [f"- {run['device']}, commit {run['commit']}: {', '.join(run['rows'])}" for run in runs]
    return [*lines, ""] if len(lines) > 1 else []


def _note(row: dict[str, Any], rows: dict[str, Any]) -> str:
    seeds, items = len(row["by_seed"]), row["num_items"]
    most_seeds = max(len(each["by_seed"]) for each in rows.values())
    most_items = max(each["num_items"] for each in rows.values())
    notes = []
    if seeds < most_seeds:
        notes.append(f"{seeds} seed" + "s" * (seeds > 1))
    if items < most_items:
        notes.append(f"{items} items")
    return f" ({', '.join(notes)})" if notes else ""


def _less(label: str, row: dict[str, Any]) -> str:
    found = row.get("minus auto")
    if not found or label == "auto":
        return ""
    return f"{-found['difference']:+.3f} ({-found['high']:+.3f} to {-found['low']:+.3f})"


def _group_place(group: str) -> tuple[bool, bool, str]:
    return group.startswith("a form"), not group.endswith((" tasks", "the first author")), group


def _place(label: str) -> tuple[int, str]:
    return (ORDER.index(label), "") if label in ORDER else (0, label)  # adapters behind base
