"""All figures in one file, and a table of them."""

import json
import time
from argparse import Namespace
from typing import Any

import torch
from serving.machine import describe_machine

from functions.calls import measure_calls
from functions.selection import METHODS, measure_selection
from functions.training import loaded
from molora.bank import Bank
from molora.files import write_atomic
from molora.training.recipes.verdicts import INVOCATIONS


def measure(args: Namespace) -> None:
    """Measure the functions and best of n, and write `<out>` and `<out>.md`."""
    begin_s = time.perf_counter()
    bank = Bank.open(args.work / "bank")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    result = describe_machine(device) | {
        "dtype": args.dtype,
        "seed": args.seed,
        "settings": {name: getattr(args, name) for name in ("temperature", "rank", "lr", "steps", "rows", "limit")},
        "adapters": {entry.name: entry.digest for entry in bank.adapters},
    }
    with loaded(args, bank.path) as m:
        result["functions"] = {name: measure_calls(m, args, name) for name in INVOCATIONS}
        result["best of n"] = measure_selection(m, args)
    result["took_s"] = round(time.perf_counter() - begin_s)
    write_atomic(args.out, json.dumps(result, indent=2) + "\n")
    text = markdown(result)
    write_atomic(args.out.with_suffix(".md"), text)
    print(text, flush=True)


def markdown(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [
        f"On {result['device']}, commit {result['commit']}, seed {result['seed']}. {versions}.",
        "",
        "| function | asked | items | accuracy | AUROC | calibration error | tokens: prompt | reused | computed |",
        "| --- " * 9 + "|",
    ]
    for name, found in result["functions"].items():
        for way, row in found["rows"].items():
            rates = " | ".join(f"{row[key]:.3f}" for key in ("accuracy", "auroc", "calibration_error"))
            tokens = " | ".join(f"{row[key]:.1f}" for key in ("prompt_tokens", "reused_tokens", "computed_tokens"))
            lines.append(f"| {name} | {way} | {found['num_items']} | {rates} | {tokens} |")
    lines += ["", "| activated less plain | accuracy |", "| --- | --- |"]
    lines += [
        f"| {name} | {_interval(found['activated minus plain'])} |" for name, found in result["functions"].items()
    ]
    best = result["best of n"]
    nums = [*best["rows"]]
    most = nums[-1]
    lines += [
        "",
        f"| best of n, {best['num_questions']} questions | {' | '.join(f'n = {n}' for n in nums)} "
        f"| less random, n = {most} | less majority, n = {most} |",
        "| --- " * (len(nums) + 3) + "|",
    ]
    for method in METHODS:
        rows = [best["rows"][n][method] for n in nums]
        cells = [f"{row['accuracy']:.3f}" for row in rows]
        cells += [_interval(rows[-1][f"minus {other}"]) for other in ("random", "majority")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    domains = [*best["rows"][most]["random"]["by_domain"]]
    lines += ["", f"| n = {most} | {' | '.join(domains)} |", "| --- " * (len(domains) + 1) + "|"]
    for method in METHODS:
        by_domain = best["rows"][most][method]["by_domain"]
        lines.append(f"| {method} | {' | '.join(f'{by_domain[domain]:.3f}' for domain in domains)} |")
    lines += [
        "",
        f"| tokens of a question, n = {most} | drafts: reused | computed | checks | reused | computed |",
        "| --- " * 6 + "|",
    ]
    for way, row in best["tokens"].items():
        keys = ("drafts_reused", "drafts_computed", "checks", "checks_reused", "checks_computed")
        lines.append(f"| {way} | {' | '.join(f'{row[key]:.1f}' for key in keys)} |")
    return "\n".join(lines) + "\n"


def _interval(found: dict[str, float]) -> str:
    return f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
