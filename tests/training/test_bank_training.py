"""A whole bank from one file: what is broken off goes on to the same result, and what is done is not done again."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

import molora
from molora.adapter import Adapter
from molora.bank import Bank
from molora.training import AdapterTraining, RouterTraining, callbacks, trainer
from molora.training import bank as stages
from molora.training.bank import BankSettings, train_adapters, train_bank

REPOSITORY = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "base": "tiny-random/llama",
    "output": "bank",
    "work": "work",
    "router_layer": 1,
    "checkpoint_every": 5,
    "adapters": {
        "domains": {name: {"train": "tiny.jsonl", "val": "tiny.jsonl"} for name in ("letters", "digits")},
        "model": {"rank": 4, "alpha": 8, "schedule": {"lr": 0.01, "warmup_steps": 5}},
        "data": {"row_length": 256, "rows": 2, "val_batches": 1},
        "trainer": {"accelerator": "cpu", "max_steps": 12, "enable_progress_bar": False, "gradient_clip_val": 1.0},
    },
    "router": {
        "model": {"router": {"hidden_dim": 16, "key_dim": 8}, "schedule": {"lr": 0.01, "warmup_steps": 5}},
        "data": {"train": "tiny.jsonl", "row_length": 256, "rows": 2},
        "trainer": {"accelerator": "cpu", "max_steps": 12, "enable_progress_bar": False},
    },
}
Changes = dict[tuple[str, ...], Any]
pytestmark = pytest.mark.filterwarnings("default")  # Lightning and jsonargparse warn of their own deprecations


@pytest.fixture(autouse=True)
def _in_an_empty_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    shutil.copy(REPOSITORY / "configs" / "tiny.jsonl", "tiny.jsonl")


def settings(changes: Changes | None = None) -> BankSettings:
    values = yaml.safe_load(yaml.safe_dump(TINY))
    for (*path, last), value in (changes or {}).items():
        inner = values
        for key in path:
            inner = inner[key]
        inner[last] = value
    file = Path("bank.yaml")
    file.write_text(yaml.safe_dump(values))
    return BankSettings.read(file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a bank and of the work for it, trained once for all tests that need no more of it."""
    made: dict[str, Path] = {}

    def by(changes: Changes | None = None) -> Path:
        key = repr(changes)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("trained")
            with pytest.MonkeyPatch.context() as patched:
                patched.chdir(made[key])
                patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
                shutil.copy(REPOSITORY / "configs" / "tiny.jsonl", "tiny.jsonl")
                assert train_bank(settings(changes)) == Path("bank")
        return made[key]

    return by


def take(trained: Path) -> None:
    for name in ("bank", "work"):
        shutil.copytree(trained / name, name)


def digests(folder: str | Path = "bank") -> dict[str, str]:
    bank = Bank.open(folder)
    assert bank.config.router is not None
    return {"router": bank.config.router.digest} | {entry.name: entry.digest for entry in bank.adapters}


def test_a_bank_is_trained_once_and_routes(trained: Callable[..., Path]) -> None:
    take(trained())
    m = molora.load("bank", device="cpu")
    assert m.generate([{"role": "user", "content": "3 times a"}], max_new_tokens=3).num_generated_tokens
    first, checkpoints = digests(), {path: path.stat().st_mtime_ns for path in Path("work").rglob("last.ckpt")}
    assert len(checkpoints) == 2
    train_bank(settings())
    assert digests() == first
    assert {path: path.stat().st_mtime_ns for path in Path("work").rglob("last.ckpt")} == checkpoints


def test_a_bank_that_has_gone_is_written_again_and_other_settings_are_another_stage(
    trained: Callable[..., Path],
) -> None:
    take(trained())
    first = digests()
    shutil.rmtree("bank")
    train_bank(settings())
    assert digests() == first
    train_bank(settings({("router", "trainer", "max_steps"): 6}))
    other = digests()
    assert other["router"] != first["router"]
    assert other["letters"] == first["letters"]
    kinds = sorted(path.name.split("-")[0] for path in Path("work").iterdir())
    assert kinds == ["adapters", "adapters", "router", "router"]  # the adapters themselves, and their training
    Path("tiny.jsonl").write_text("".join(Path("tiny.jsonl").read_text().splitlines(keepends=True)[::-1]))
    train_bank(settings())
    assert digests()["letters"] != first["letters"]


@pytest.mark.parametrize("kind", ["adapters", "router"])
def test_a_run_that_is_killed_goes_on_to_the_same_result(kind: str, trained: Callable[..., Path]) -> None:
    long = {(stage, "trainer", "max_steps"): 40 for stage in ("adapters", "router")}
    whole = digests(trained(long) / "bank")
    settings(long)
    code = "from molora.cli import app; app()"
    command = [sys.executable, "-c", code, "train", "bank", "--config", "bank.yaml"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(Path("work").glob(f"{kind}-*/last.ckpt")):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert not Path("bank").exists()
    train_bank(settings(long))
    assert digests() == whole


def test_a_full_disk_leaves_the_checkpoint_before(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, written = trainer.replace, []

    def until_full(source: Path, target: Path) -> None:
        written.append(target)
        if len(written) == 2:
            os.truncate(source, source.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "replace", until_full)
        with pytest.raises(
            OSError, match=r"No space left on device; this checkpoint was not written, and those before"
        ):
            train_bank(settings())
    assert torch.load(written[0], weights_only=False)["global_step"] == 5
    assert [path.name for path in written[0].parent.glob("*.ckpt*")] == ["last.ckpt"]
    train_bank(settings())
    assert digests() == digests(trained() / "bank")


@pytest.mark.parametrize("kind", ["adapters", "router"])
def test_a_full_disk_when_all_is_learned_loses_nothing(
    kind: str, trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    take(trained())
    first = digests()
    new = settings({(kind, "model", "schedule", "lr"): 0.02})
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    is_full = False
    write = RouterTraining.write if kind == "router" else AdapterTraining.write

    def write_when_full(self: Any) -> None:
        nonlocal is_full
        is_full = True
        write(self)

    with monkeypatch.context() as patched:
        patched.setattr("molora.files.os.fsync", full)
        patched.setattr(RouterTraining if kind == "router" else AdapterTraining, "write", write_when_full)
        with pytest.raises(OSError, match="No space left on device"):
            train_bank(new)
    assert digests() == first
    train_bank(new)
    assert digests() != first


@pytest.mark.parametrize("module", [AdapterTraining, RouterTraining])
def test_a_run_that_is_killed_behind_its_last_checkpoint_is_written_from_it(
    module: type[Any], trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    even = {(stage, "trainer", "max_steps"): 10 for stage in ("adapters", "router")}

    def killed(_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_bank(settings(even))
    train_bank(settings(even))
    assert digests() == digests(trained(even) / "bank")


def test_a_bank_of_averages_is_another_one_and_goes_on_after_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    ema = {"class_path": "molora.training.EMA", "init_args": {"decay": 0.8}}
    averaged = {(stage, "trainer", "callbacks"): [ema] for stage in ("adapters", "router")}
    averaged |= {(stage, "trainer", "max_steps"): 10 for stage in ("adapters", "router")}
    train_bank(settings(averaged | {("output",): "whole", ("work",): "elsewhere"}))
    end, write = callbacks.LastCheckpoint.on_train_batch_end, RouterTraining.write

    def killed_at(step: int) -> Any:
        def ends(self: Any, trainer: L.Trainer, *arguments: Any) -> None:
            end(self, trainer, *arguments)
            if trainer.global_step == step:
                raise RuntimeError("killed")

        return ends

    for step in (7, 10):  # between two checkpoints, and behind the last one
        with monkeypatch.context() as patched:
            patched.setattr(callbacks.LastCheckpoint, "on_train_batch_end", killed_at(step))
            with pytest.raises(RuntimeError, match="killed"):
                train_bank(settings(averaged))
    with monkeypatch.context() as patched:
        patched.setattr(RouterTraining, "write", lambda _: patched.setattr(RouterTraining, "write", write) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_bank(settings(averaged))
    train_bank(settings(averaged))
    assert digests() == digests("whole")
    assert [len(list(Path("work").glob(f"{stage}-*"))) for stage in ("adapters", "router")] == [1, 1]
    train_bank(settings({(stage, "trainer", "max_steps"): 10 for stage in ("adapters", "router")}))
    assert set(digests().values()).isdisjoint(digests("whole").values())


STOPPING = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 1.0}}


def test_each_adapter_stops_by_its_own_loss() -> None:
    """The same one after the other, in either order: no callback knows of another stage."""
    found = []
    for names in (("letters", "digits"), ("digits", "letters")):
        domains = {name: {"train": "tiny.jsonl", "val": "tiny.jsonl"} for name in names}
        made = settings(
            {
                ("work",): "-".join(names),
                ("adapters", "domains"): domains,
                ("adapters", "side_by_side"): 1,
                ("adapters", "trainer", "callbacks"): [STOPPING],
                ("adapters", "trainer", "val_check_interval"): 2,
                ("adapters", "trainer", "check_val_every_n_epoch"): None,
            }
        )
        folders = train_adapters(made)
        found.append({name: Adapter.read(folder).digest for name, folder in folders.items()})
        assert folders == train_adapters(made)  # and is not trained again
    assert found[0] == found[1]
    assert len({*found[0].values()}) == 2


def test_a_domain_may_have_a_rank_and_an_alpha_of_its_own() -> None:
    work = stages._Work(settings())
    usual = {name: work.adapter(name) for name in ("letters", "digits")}
    made = settings({("adapters", "domains", "digits", "rank"): 6, ("adapters", "domains", "digits", "alpha"): 3})
    folders = train_adapters(made)
    configs = {name: Adapter.read(folder).config for name, folder in folders.items()}
    assert {name: (config.r, config.lora_alpha) for name, config in configs.items()} == {
        "letters": (4, 8),
        "digits": (6, 3),
    }
    assert folders["letters"] == usual["letters"]
    assert folders["digits"] != usual["digits"]
    train_bank(made)
    assert Bank.open("bank").config.max_rank == 6


def test_what_may_stop_an_adapter_is_part_of_its_name() -> None:
    shutil.copy("tiny.jsonl", "other.jsonl")
    with open("other.jsonl", "a") as file:
        file.write(Path("tiny.jsonl").read_text().splitlines()[0] + "\n")
    stops = {("adapters", "trainer", "callbacks"): [STOPPING], ("adapters", "side_by_side"): 1}
    for changes, is_same in (({}, True), (stops, False)):
        one, other = (
            stages._Work(settings(changes | {("adapters", "domains", "letters", "val"): val})).adapter("letters").name
            for val in ("tiny.jsonl", "other.jsonl")
        )
        assert (one == other) == is_same
        assert one == stages._Work(settings(changes)).adapter("letters").name


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_checkpoint_for_which_memory_is_short_is_not_put_aside(
    by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path("last.ckpt")
    checkpoint.write_bytes(b"whole")

    def short(*_: Any, **__: Any) -> None:
        if by_torch:
            torch.empty(1 << 60, dtype=torch.uint8)
        raise MemoryError

    monkeypatch.setattr(torch, "load", short)
    with pytest.raises(RuntimeError if by_torch else MemoryError):
        stages._is_whole(checkpoint)
    assert checkpoint.read_bytes() == b"whole"


def test_adapters_that_a_kill_left_with_their_stage_are_found(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    take(trained())
    first = digests()
    (done,) = Path("work").glob("adapters-*/done.json")
    (letters,) = Path("work/adapters").glob("letters-*")
    letters.rename(done.parent / "adapters" / "letters")
    monkeypatch.setattr(stages._Stage, "run", lambda *_: pytest.fail("trained again"))
    train_bank(settings())
    assert digests() == first
    assert letters.is_dir()


def test_settings_that_come_back_find_their_own_adapters(trained: Callable[..., Path]) -> None:
    take(trained())
    first = digests()
    other = {("adapters", "model", "rank"): 2, ("adapters", "model", "alpha"): 4}
    train_bank(settings(other))
    assert digests()["letters"] != first["letters"]
    train_bank(settings())
    assert digests() == first


def test_what_decides_nothing_trains_nothing_again(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    take(trained())
    names: list[str] = []
    run = stages._Stage.run
    monkeypatch.setattr(
        stages._Stage, "run", lambda stage, every: (names.append(stage.folder.name.split("-")[0]), run(stage, every))
    )
    train_bank(settings({("adapters", "trainer", "log_every_n_steps"): 3, ("adapters", "side_by_side"): 8}))
    assert names == []
    train_bank(settings({("output",): "another"}))
    assert names == ["router"]  # written there from its checkpoint
    assert digests("another") == digests()
    more = {"letters": {"train": "tiny.jsonl"}, "digits": {"train": "tiny.jsonl"}}
    train_bank(settings({("adapters", "domains"): more}))
    assert names == ["router"]


def test_a_bank_that_somebody_has_changed_is_not_replaced(trained: Callable[..., Path]) -> None:
    take(trained())
    Bank.open("bank").remove("digits")
    with pytest.raises(ValueError, match="bank holds a bank that this command has not written, or that was changed"):
        train_bank(settings())
    assert [entry.name for entry in Bank.open("bank").adapters] == ["letters"]


def test_resuming_while_gradients_are_accumulated(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {(stage, "trainer", "accumulate_grad_batches"): 3 for stage in ("adapters", "router")}
    train_bank(settings(slow | {("output",): "whole", ("work",): "elsewhere"}))
    end = callbacks.LastCheckpoint.on_train_batch_end

    def killed_later(self: Any, trainer: L.Trainer, *arguments: Any) -> None:
        end(self, trainer, *arguments)
        if arguments[-1] == 19:  # behind the checkpoint of step 5, in the middle of a step
            raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.LastCheckpoint, "on_train_batch_end", killed_later)
        with pytest.raises(RuntimeError, match="killed"):
            train_bank(settings(slow))
    (kept,) = Path("work").glob("adapters-*/last.ckpt")
    assert torch.load(kept, weights_only=False)["global_step"] == 5
    train_bank(settings(slow))
    assert digests() == digests("whole")


def test_a_broken_checkpoint_is_put_aside(trained: Callable[..., Path]) -> None:
    stage = stages._Work(settings()).group(list(settings().adapters.domains))
    stage.folder.mkdir(parents=True)
    (stage.folder / "last.ckpt").write_bytes(b"half of it")
    train_bank(settings())
    assert digests() == digests(trained() / "bank")
    assert (stage.folder / "last.broken").read_bytes() == b"half of it"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({("router", "model", "keep_rowz"): True}, "keep_rowz"),
        ({("router", "trainer", "max_step"): 3}, "max_step"),
        ({("router", "data", "train"): "nope.jsonl"}, "nope.jsonl"),
        ({("output",): "my bank!"}, "my bank!"),
        ({("adapters", "model", "rankk"): 3}, "rankk"),
        ({("adapters", "trainer", "devices"): 2}, "trained on one device"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    changes: dict[tuple[str, ...], Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages._Stage, "run", lambda *_: pytest.fail("something was trained"))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        train_bank(settings(changes))


def test_told_to_stop_it_ends_with_the_signals_status() -> None:
    settings({(stage, "trainer", "max_steps"): 4000 for stage in ("adapters", "router")})
    command = [sys.executable, "-c", "from molora.cli import app; app()", "train", "bank", "--config", "bank.yaml"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(Path("work").glob("adapters-*/last.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 143
    finally:
        running.kill()


def test_memory_that_does_not_hold_all_side_by_side_is_enough_for_fewer(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sizes = stages._Stage.run, []

    def limited(stage: Any, checkpoint_every: int) -> None:
        if stage.results:
            sizes.append(len(stage.results))
            if len(stage.results) > 1:
                raise torch.cuda.OutOfMemoryError("out of memory")
        run(stage, checkpoint_every)

    whole = trained() / "bank"
    monkeypatch.setattr(stages._Stage, "run", limited)
    train_bank(settings())
    assert sizes == [2, 1, 1]
    for name in ("letters", "digits"):
        ours, theirs = (Adapter.read(Path(bank) / "adapters" / name).tensors() for bank in ("bank", whole))
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-2, atol=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_and_writes_nothing() -> None:
    with pytest.raises(ValueError, match="is infinite or not a number"):
        train_bank(settings({("adapters", "model", "schedule", "lr"): 1e30}))
    assert not list(Path("work").rglob("last.ckpt"))
    assert not list(Path("work").rglob("adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({("adapters", "domains"): {}}, "adapters.domains names none"),
        ({("adapters", "domains", "letters"): {"train": "tiny.jsonl"}}, "give val for every domain, or for none"),
        ({("adapters", "side_by_side"): 0}, "side_by_side is 0"),
        ({("checkpoint_every",): 0}, "checkpoint_every is 0"),
        ({("router", "trainer"): None}, "trainer"),
        ({("outputs",): "x"}, "outputs"),
        ({("router_layer",): "one"}, "router_layer"),
        ({("adapters", "domains", "letters"): {"val": "tiny.jsonl"}}, "train"),
        ({("adapters", "domains", "letters", "rank"): 0}, "adapters.domains.letters.rank is 0"),
        ({("adapters", "domains", "letters", "alpha"): -1}, "adapters.domains.letters.alpha is -1"),
        ({("adapters", "trainers"): {"max_steps": 3}}, "trainers"),
        ({("router",): None}, "router"),
    ],
)
def test_settings_that_are_wrong_are_named(changes: dict[tuple[str, ...], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        settings(changes)
    assert "bank.yaml" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"just words", b"- a list", b"\xff\xfe", b"a: [", b"a: 1"])
def test_a_file_of_something_else_is_named(content: bytes) -> None:
    Path("bank.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"^bank.yaml: "):
        BankSettings.read(Path("bank.yaml"))


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml does not exist"):
        BankSettings.read(Path("nowhere.yaml"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl does not exist"):
        train_bank(settings({("router", "data", "train"): "nowhere.jsonl"}))


def test_the_shipped_settings_are_right() -> None:
    shipped = BankSettings.read(REPOSITORY / "configs" / "bank.yaml")
    assert list(shipped.adapters.domains) == ["arithmetic", "words", "family", "sorting", "legs"]
