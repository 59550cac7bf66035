"""What is installed here, whether it works, and what to do where it does not: `molora doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from molora_kernels import make_plan, routed_linear
from packaging.requirements import Requirement

from molora.bank import Bank
from molora.checkpoint import default_cache_dir, find_base
from molora.digest import base_digest
from molora.display import joined, one_line

State = Literal["well", "note", "wrong"]
ROOM_BYTES = 10**9  # for a small base and its download
DRIVER = Path("/proc/driver/nvidia/version")
# Of the kernels from their definition, over the largest value.
MOST_DIFFERENT = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        subject: what was looked at.
        state: "wrong" is what keeps MoLoRA from working here, "note" what a user should know.
        text: what was found.
        advice: what to do; empty where nothing has to be done.
    """

    subject: str
    state: State
    text: str
    advice: str = ""


def examine(bank: Path, base: str | None = None) -> Iterator[Finding]:
    """Look at one thing after the other; nothing is downloaded or written.

    Args:
        bank: its folder.
        base: a folder or a hub name; the bank's own if None.
    """
    yield _python()
    yield from _packages()
    yield from _gpus()
    yield _kernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield _cache(default_cache_dir())
    opened, finding = _bank(bank)
    yield finding
    if opened is not None:
        yield _base(opened, base)


def _python() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("Python", "well", f"{platform.python_version()}, {platform.platform(terse=True)}, {cores} cores")


def _packages() -> Iterator[Finding]:
    """What molora's own metadata asks for, and which of its extras are there."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("molora") or ()]
        version = importlib.metadata.version("molora")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "note", "molora was not installed by pip, so what it needs is not known")
        return
    missing = [text for each in requirements if _wanted(each) and (text := _lacks(each))]
    if missing:
        advice = "pip install --upgrade molora, or in a clone pip install -e ."
        yield Finding("packages", "wrong", f"molora {version}: {joined(missing)}", advice)
    else:
        named = ", ".join(_version(name) for name in ("torch", "transformers", "triton"))
        yield Finding("packages", "well", f"molora {version}, {named}")
    extras = importlib.metadata.metadata("molora").get_all("Provides-Extra") or []
    absent = [extra for extra in extras if _lacks_extra(requirements, extra)]
    there = [extra for extra in extras if extra not in absent]
    text = f"installed: {joined(there) or 'none'}" + (f"; not: {joined(absent)}" if absent else "")
    yield Finding("extras", "well", text)


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # as Triton is beside a torch for CPUs, or on no Linux
        return f"no {name}"


def _wanted(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _lacks_extra(requirements: Sequence[Requirement], extra: str) -> bool:
    """Whether a package of an extra, or of one that it is made of, is missing or of another version."""
    own = [each for each in requirements if _wanted(each, extra) and not _wanted(each)]
    inner = [name for each in own if each.name == "molora" for name in each.extras]
    return any(each.name != "molora" and _lacks(each) for each in own) or any(
        _lacks_extra(requirements, name) for name in inner
    )


def _lacks(requirement: Requirement) -> str:
    """What is wrong with a package that is asked for, in words; empty if nothing is."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} is {version}, not {requirement.specifier}"


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            yield Finding("GPU", "note", "none: CUDA_VISIBLE_DEVICES hides what is here")
        elif not DRIVER.exists():
            yield Finding("GPU", "note", "none; a CPU is enough for the demo, and a bank is trained on a GPU")
        elif torch.version.cuda is None:
            advice = "install a build of torch for CUDA, as pytorch.org says for this machine"
            yield Finding("GPU", "wrong", f"torch {torch.__version__} is a build for CPUs only", advice)
        else:
            advice = "run nvidia-smi; a driver that is older than torch's CUDA has to be renewed"
            yield Finding("GPU", "wrong", f"torch for CUDA {torch.version.cuda} finds none", advice)
        return
    for index in range(torch.cuda.device_count()):
        try:
            free, total = (number / 2**30 for number in torch.cuda.mem_get_info(index))
        except RuntimeError as error:  # as of one that is full, or another process' alone
            advice = "look who uses it by nvidia-smi, or choose another one by CUDA_VISIBLE_DEVICES"
            yield Finding(f"GPU {index}", "wrong", one_line(error), advice)
            continue
        text = f"{torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GiB free"
        if torch.cuda.get_device_capability(index) < (8, 0):
            yield Finding(f"GPU {index}", "note", text, "bfloat16 is slow here: use --dtype float16")
        else:
            yield Finding(f"GPU {index}", "well", text)


def _kernels(device: torch.device) -> Finding:
    """One routed linear by the kernels that this device gets, beside the definition."""
    subject = "kernels"
    try:
        dtype, difference = _difference(device)
    except Exception as error:  # whatever Triton, a compiler or a driver has to say
        advice = "Triton builds them with a C compiler and Python's headers: install gcc and python3-dev"
        return Finding(subject, "wrong", f"they do not run on {device.type}: {one_line(error)}", advice)
    if not difference <= MOST_DIFFERENT[dtype]:
        advice = "clear Triton's cache (~/.triton) and try again; if that does not help, please report it"
        return Finding(subject, "wrong", f"on {device.type} they are off by {difference:.1e}", advice)
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        return Finding(subject, "note", "they run in Triton's interpreter, which is slow", "unset TRITON_INTERPRET")
    return Finding(subject, "well", f"right on {device.type}, within {difference:.0e}")


def _difference(device: torch.device) -> tuple[torch.dtype, float]:
    """Of a routed linear from its definition in float64, over the largest value."""
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((48, 128), (256, 128), (2, 8, 128), (2, 256, 8))
    )
    ids = torch.arange(48, device=device) % 3 - 1
    taken = ids.clamp(min=0)
    change = torch.einsum("tor,tri,ti->to", b.double()[taken], a.double()[taken], x.double())
    wanted = x.double() @ weight.double().T + change * (ids >= 0)[:, None]
    ones = torch.ones(2, device=device), torch.ones(48, 1, device=device)
    found = routed_linear(x, weight, None, a, b, *ones, make_plan(ids[:, None].int(), 2))
    return dtype, ((found - wanted).abs().max() / wanted.abs().max()).item()


def _cache(folder: Path) -> Finding:
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        advice = "make it writable, or name another place by XDG_CACHE_HOME"
        return Finding("cache", "wrong", f"{folder} cannot be written", advice)
    free = shutil.disk_usage(nearest).free
    text = f"{folder}, {free / 1e9:.1f} GB free"
    if free < ROOM_BYTES:
        return Finding("cache", "note", text, "a base model may not fit: make room, or set XDG_CACHE_HOME")
    return Finding("cache", "well", text)


def _bank(folder: Path) -> tuple[Bank | None, Finding]:
    """The bank, if every file of it is what its description says."""
    try:
        bank = Bank.open(folder)
        bank.check()
    except (OSError, ValueError) as error:
        return None, Finding("bank", "wrong", one_line(error), "copy it here again, or name another by --bank")
    router = "a router" if bank.has_router else "no router"
    return bank, Finding("bank", "well", f"{folder}: {len(bank)} adapters and {router}, as they were written")


def _base(bank: Bank, base: str | None) -> Finding:
    name = base or bank.config.base.name
    try:
        folder = find_base(name)
        if folder is None:
            text = f"{name} is not on this machine yet"
            return Finding("base", "note", text, "it is fetched when it is first needed, as by molora demo")
        digest = base_digest(folder)
    except (OSError, ValueError) as error:
        return Finding("base", "wrong", one_line(error), "name another by --base: a folder, or a model of the hub")
    if digest != bank.config.base.digest:
        text = f"{folder} holds other weights than the bank was trained on"
        return Finding("base", "note", text, "answers may differ from the bank's card; take the base that it names")
    return Finding("base", "well", f"{folder}, the weights that the bank was trained on")
