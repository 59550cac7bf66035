"""The result file, its page and its pictures."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from serving.machine import describe_machine

from molora.files import write_atomic
from scaling import grid, pages, plots
from scaling.measured import BASE, Measurements, fit, h100
from scaling.model import Fleet
from scaling.parts import Adapters, Traffic


def fleet_of(measurements: Measurements) -> Fleet:
    """What the grid is of: like the H100 and the base that were measured."""
    return Fleet(
        gpu=h100(measurements),
        base=BASE,
        adapters=Adapters(number=1000),
        traffic=Traffic(requests_per_s=1),
        costs=fit(measurements),
    )


def write(out: Path, pictures: Path, seed: int) -> None:
    measurements = Measurements()
    fleet = fleet_of(measurements)
    result = describe_machine(torch.device("cpu")) | {
        "seed": seed,
        "measured": "benchmarks/results/serving-h100.json",
        "measured_commit": measurements.result["commit"],
        "fleet": asdict(fleet),
        "points": grid.points(measurements),
        "slot_checks": grid.slot_checks(seed),
        "prefix_checks": grid.prefix_checks(seed),
        "stays": grid.stays(seed),
        "engine_slots": grid.engine_slots(seed),
        "balance": grid.balance(),
        "slots": grid.slots_against_cache(fleet),
        "needed": grid.needed(fleet),
        "grid": grid.sweep(fleet),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(result, indent=1) + "\n")
    write_atomic(out.with_suffix(".md"), pages.page(result))
    for path in (out, out.with_suffix(".md"), *plots.draw(result, pictures)):
        print(path)
