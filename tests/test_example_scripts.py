"""Every script in examples/, on tiny models: what it prints, and what it leaves."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import molora
from molora.adapter import Adapter
from molora.bank import Bank
from molora.serving.app import create_app
from molora.serving.config import ServeConfig

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
MAX_LINES = 140


Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def bank(
    tmp_path_factory: pytest.TempPathFactory, make_bank: Callable[..., Bank], key_router: Callable[..., Any]
) -> Bank:
    return make_bank(tmp_path_factory.mktemp("bank"), router=key_router())


@pytest.fixture(scope="module")
def server(bank: Bank, listening: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    model = molora.load(bank.path, device="cpu", dtype="float32")
    with listening(create_app(model.engine, ServeConfig(bank=str(bank.path)))) as url:
        yield f"{url}/v1"
    model.engine.close()


def test_each_says_what_it_shows_and_how_to_run_it() -> None:
    assert len(EXAMPLES) >= 6
    tests = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("*.py"))
    for path in EXAMPLES:
        text = path.read_text()
        assert f"python examples/{path.name}" in (text.split('"""')[1]), path
        assert len(text.splitlines()) <= MAX_LINES, path
        assert f'example("{path.stem}")' in tests, f"{path} has no test"


def test_generate(example: Load, bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    example("generate").main(["--bank", str(bank.path)])
    *lines, last = capsys.readouterr().out.splitlines()
    assert {line.split()[-2] for line in lines if line.endswith("1.00")} & {"x", "y"}
    reused = int(last.split()[0])
    assert reused > 0


def test_make_bank(example: Load, bank: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, base = tmp_path / "made", bank.config.base.name
    folders = ["--digits", str(bank.adapter_folder("x")), "--rest", str(bank.adapter_folder("y"))]
    example("make_bank").main(["--out", str(out), *folders, "--base", base])
    read = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("'")]
    assert ["'4'", "digits"] in read
    assert ["'W'", "rest"] in read
    made = Bank.open(out)
    made.check()
    assert [entry.name for entry in made.routable] == ["digits", "rest"]


@pytest.mark.filterwarnings("default")  # Lightning and jsonargparse warn of their own deprecations
def test_train_tiny(
    example: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = str(REPOSITORY / "configs/tiny.jsonl")
    example("train_tiny").main(["--out", str(tmp_path / "run"), "--data", data, "--steps", "4"])
    assert "5 times g: " in capsys.readouterr().out
    Bank.open(tmp_path / "run" / "bank").check()
    assert Adapter.read(tmp_path / "run" / "adapters" / "digits").layers == (1, 2, 3)


def test_transformers_generate(example: Load, bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for route in ("auto", "base", "x"):
        example("transformers_generate").main(["--bank", str(bank.path), "--route", route])
        said.append(capsys.readouterr().out)
    assert all(said)
    assert len(set(said)) == 3


def test_openai_client(example: Load, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    example("openai_client").main(["--base-url", server])
    said = capsys.readouterr().out
    assert said.startswith("models: tiny ")
    assert {line.split()[-1] for line in said.splitlines() if line.endswith((" x", " y"))}
    assert '"order"' in said


@pytest.mark.filterwarnings("default")  # litellm's own
def test_litellm_client(
    example: Load, server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network
    pytest.importorskip("litellm")
    example("litellm_client").main(["--base-url", server, "--model", "tiny"])
    said = capsys.readouterr().out
    assert "tokens read, 48 written" in said
