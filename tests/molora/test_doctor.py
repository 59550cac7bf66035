"""`molora doctor`: what is well is said to be, and each thing that is not is found, with what to do."""

import importlib.metadata
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from molora import doctor
from molora.adapter import random_adapter
from molora.bank import Bank, BaseInfo
from molora.cli import app
from molora.digest import base_digest
from molora.doctor import Finding, examine
from molora.router import KeyRouter
from molora.tiny import make_tiny_base

SUBJECTS = ["Python", "packages", "extras", "GPU", "kernels", "cache", "bank", "base"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("doctor") / "base", seed=0, vocab_size=259)


@pytest.fixture
def bank(tmp_path: Path, base: Path, key_router: Callable[..., KeyRouter], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "no driver")
    made = Bank.create(
        tmp_path / "bank", name="tiny", base=BaseInfo(str(base), base_digest(base)), router_layer=1, max_rank=4
    )
    linears = {"model.layers.1.mlp.up_proj": (64, 128)}
    generator = torch.Generator().manual_seed(0)
    random_adapter(linears, rank=4, alpha=8, generator=generator).write(tmp_path / "sums")
    made.add(tmp_path / "sums", activation="turn")
    made.set_router(key_router(num_columns=2))
    return made.path


def find(bank: Path, subject: str, base: str | None = None) -> Finding:
    (found,) = [finding for finding in examine(bank, base) if finding.subject == subject]
    return found


def test_all_is_well(bank: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--bank", str(bank)])
    assert result.exit_code == 0, result.output
    assert "✗" not in result.stdout
    findings = json.loads(CliRunner().invoke(app, ["doctor", "--bank", str(bank), "--json"]).stdout)
    assert [finding["subject"] for finding in findings] == SUBJECTS
    assert find(bank, "base").text.endswith("the weights that the bank was trained on")
    assert find(bank, "GPU").state == "note"
    assert not (bank.parent / "cache").exists()  # nothing is written


def test_a_changed_byte_is_found(bank: Path) -> None:
    weights = bank / "adapters" / "sums" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    result = CliRunner().invoke(app, ["doctor", "--bank", str(bank)])
    assert result.exit_code == 1
    assert "✗ bank" in result.stdout
    assert "copy it here again" in result.stdout
    assert "base" not in [finding.subject for finding in examine(bank)]


def test_another_base_and_one_that_is_not_here(bank: Path, tmp_path: Path) -> None:
    other = make_tiny_base(tmp_path / "other", seed=1, vocab_size=259)
    assert find(bank, "base", str(other)).state == "note"
    assert "other weights" in find(bank, "base", str(other)).text
    absent = find(bank, "base", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (absent.state, absent.text) == (
        "note",
        "HuggingFaceTB/SmolLM2-135M-Instruct is not on this machine yet",
    )
    (other / "config.json").unlink()
    assert "it lacks config.json" in find(bank, "base", str(other)).text
    assert find(bank, "base", "no/such/name").state == "wrong"


@pytest.mark.parametrize(
    ("requirement", "text"),
    [
        ("nothing-like-this>=1", "nothing-like-this is missing"),
        ("torch<1", f"torch is {torch.__version__}, not <1"),
        ('nothing-like-this; python_version < "3"', ""),
        ('nothing-like-this; extra == "demo"', ""),
    ],
)
def test_packages(bank: Path, monkeypatch: pytest.MonkeyPatch, requirement: str, text: str) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda _: [requirement])
    found = find(bank, "packages")
    assert found.state == ("wrong" if text else "well")
    assert text in found.text
    assert ("not: demo" in find(bank, "extras").text) == ("extra" in requirement)


def test_the_versions_that_kernels_depend_on(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    there = {name: real(name) for name in ("torch", "transformers")} | {"triton": "3.6.0"}
    monkeypatch.setattr("importlib.metadata.requires", lambda _: [])
    monkeypatch.setattr("importlib.metadata.version", lambda name: there.get(name) or real(name))
    text = f"torch {there['torch']}, transformers {there['transformers']}, triton 3.6.0"
    assert find(bank, "packages").text.endswith(text)

    def without_triton(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("importlib.metadata.version", without_triton)
    assert find(bank, "packages").text.endswith(f"transformers {there['transformers']}, no triton")


def test_kernels_that_are_wrong_or_do_not_run(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "routed_linear", lambda x, weight, *_: x @ weight.T)
    assert "off by" in find(bank, "kernels").text

    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(doctor, "routed_linear", fail)
    found = find(bank, "kernels")
    assert found.state == "wrong"
    assert "Failed to find C compiler" in found.text
    assert "install gcc" in found.advice


def test_a_gpu_that_torch_does_not_see(bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no driver").touch()
    for cuda, text in ((None, "for CPUs only"), ("13.0", "for CUDA 13.0 finds none")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        found = find(bank, "GPU")
        assert (found.state, text in found.text) == ("wrong", True)


def test_a_cache_without_room_or_that_cannot_be_written(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
        assert "may not fit" in find(bank, "cache").advice
    monkeypatch.setenv("XDG_CACHE_HOME", str(bank / "molora.json"))
    assert find(bank, "cache").state == "wrong"


def test_what_is_said_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one, an old one, and one that somebody else has to himself."""

    def memory(index: int) -> tuple[int, int]:
        if index == 2:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...")
        return 3 << 30, 80 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("H100", "T4")[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    new, old, taken = doctor._gpus()
    assert (new.subject, new.state, new.text) == ("GPU 0", "well", "H100, 3.0 of 80.0 GiB free")
    assert (old.subject, old.state) == ("GPU 1", "note")
    assert "use --dtype float16" in old.advice
    assert (taken.subject, taken.state) == ("GPU 2", "wrong")
    assert "busy or unavailable" in taken.text
    assert "\n" not in taken.text
    assert "nvidia-smi" in taken.advice
