"""Where and on what a result was measured."""

import importlib.metadata
import os
import platform
import shlex
import sys
from typing import Any

import torch

from molora.benchmark import source_commit


def describe_machine(device: torch.device) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],  # of a minute: who else is there
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in ("molora", "torch", "transformers", "triton")},
        },
        "commit": source_commit(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
