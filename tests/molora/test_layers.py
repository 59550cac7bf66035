"""kernels -> molora -> training | serving: each part imports only what stands to its left."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS, MOLORA = ROOT / "kernels", ROOT / "molora"


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, functions included; a relative import is an error."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(of: str, folder: Path) -> set[str]:
    """The files under a folder, by their path from the repository, that import a package."""
    return {
        file.relative_to(ROOT).as_posix()
        for file in folder.rglob("*.py")
        for name in imports(file)
        if name == of or name.startswith(f"{of}.")
    }


def outside(files: set[str], *folders: str) -> set[str]:
    return {file for file in files if not file.startswith(tuple(f"{folder}/" for folder in folders))}


def test_the_walk_finds_imports():
    assert "molora/bank.py" in importers("molora.adapter", MOLORA)
    assert "molora/linear.py" in importers("molora_kernels", MOLORA)


def test_kernels_know_no_molora():
    assert importers("molora", KERNELS) == set()
    assert importers("transformers", KERNELS) == set()


# The commands stand to the right of everything; and a model answers by its engine, which it makes when it is asked.
# lm-evaluation-harness asks a model as a command does.
COMMANDS = {"molora/cli.py", "molora/cli_bank.py", "molora/demo.py", "molora/lm_eval.py", "molora/model.py"}


@pytest.mark.parametrize(
    ("package", "folder"),
    [
        ("lightning", "molora/training"),
        ("pytorch_lightning", "molora/training"),
        ("jsonargparse", "molora/training"),
        ("datasets", "molora/training"),
        ("reasoning_gym", "molora/training"),
        ("matplotlib", "molora/training"),
        ("fastapi", "molora/serving"),
        ("starlette", "molora/serving"),
        ("uvicorn", "molora/serving"),
        ("ray", "molora/serving/cluster"),
    ],
)
def test_a_framework_stays_in_its_folder(package, folder):
    files = importers(package, MOLORA)
    assert outside(files, folder) == set()


def test_the_harness_stays_in_its_module():
    assert importers("lm_eval", MOLORA) == {"molora/cli.py", "molora/lm_eval.py"}


@pytest.mark.parametrize("folder", ["training", "serving"])
def test_the_core_knows_neither_training_nor_serving(folder):
    assert outside(importers(f"molora.{folder}", MOLORA), f"molora/{folder}") <= COMMANDS


def test_the_engine_knows_nothing_of_http():
    parts = ("engine", "runner", "scheduler", "block_manager", "stream", "answer", "attention", "packing", "sampling")
    web = {file for package in ("fastapi", "starlette", "pydantic") for file in importers(package, MOLORA / "serving")}
    assert web
    assert not web & {f"molora/serving/{part}.py" for part in parts}
    for part in ("scheduler", "block_manager", "packing", "request", "text"):
        assert f"molora/serving/{part}.py" not in importers("torch", MOLORA)


def test_the_server_needs_no_ray():
    assert outside(importers("molora.serving.cluster", MOLORA), "molora/serving/cluster") == {"molora/serving/cli.py"}
    named = {f"molora/serving/cluster/{part}.py" for part in ("router", "ingress", "replica", "deploy")}
    assert importers("ray", MOLORA) == named


def test_training_and_serving_do_not_know_each_other():
    assert importers("molora.serving", MOLORA / "training") == set()
    assert importers("molora.training", MOLORA / "serving") == set()


def test_nothing_imports_peft_or_the_tests():
    for package in ("peft", "pytest", "tests"):
        assert importers(package, MOLORA) | importers(package, KERNELS) == set()


def test_kernels_hold_no_package():
    """A package of the name would shadow Hugging Face's `kernels`."""
    assert not (KERNELS / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_import_molora_is_light():
    code = "import sys, molora; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(result.stdout.split())
    assert "molora" in loaded
    assert not loaded & {
        "lightning",
        "pytorch_lightning",
        "fastapi",
        "uvicorn",
        "datasets",
        "peft",
        "tensorboard",
        "matplotlib",
        "lm_eval",
        "ray",
    }
