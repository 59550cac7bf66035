"""What Lightning is given: averages of weights, a range test, two processes, and checkpoints that survive anything."""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from molora.adapter import Adapter, random_adapter
from molora.bank import Bank
from molora.checkpoint import load_base, resolve_base
from molora.injection import linears_of_layers
from molora.training import EMA, AdapterTraining, RouterTraining, trainer
from molora.training.cli import main
from molora.training.trainer import Trainer, WholeCheckpoints

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("default")  # Lightning and jsonargparse warn of their own deprecations


@pytest.fixture(autouse=True)
def _in_an_empty_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")


def fit_arguments(*extra: str, config: str = "configs/tiny.yaml", command: str = "fit") -> list[str]:
    """With half the rows of the file, which is half the time, unless they are given."""
    return [command, "--config", config, "--trainer.enable_progress_bar", "false", "--data.rows", "2", *extra]


def train(*extra: str, config: str = "configs/tiny.yaml", command: str = "fit") -> None:
    with patch.object(sys, "argv", ["train.py", *fit_arguments(*extra, config=config, command=command)]):
        main()


def run_in_a_process(script: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Write and run a script, which finds what lies beside it."""
    script.write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path])}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def weights(folder: str) -> dict[str, Tensor]:
    return Adapter.read(folder).tensors()


def router_config(**changes: Any) -> str:
    """Trains a router with a LoRA of its own over two random adapters."""
    model, _ = load_base(resolve_base("tiny-random/llama"), device="cpu")
    shapes = {
        path: tuple(model.get_submodule(path).weight.shape)
        for path in linears_of_layers(model)
        if ".layers.0." not in path
    }
    generator = torch.Generator().manual_seed(0)
    for name in ("letters", "digits"):
        random_adapter(shapes, rank=4, alpha=8, generator=generator).write(f"adapters/{name}")
    config = yaml.safe_load(Path("configs/tiny.yaml").read_text())
    init_args = {
        "adapters": ["adapters/letters", "adapters/digits"],
        "output": "bank",
        "base": "tiny-random/llama",
        "router": {"hidden_dim": 32, "key_dim": 16, "lora_rank": 2},
        "losses": {"given": 1.0},
        "router_layer": 1,
        "schedule": {"lr": 0.01, "warmup_steps": 5},
    }
    config["model"] = {"class_path": "molora.training.RouterTraining", "init_args": init_args | changes}
    Path("router.yaml").write_text(yaml.safe_dump(config))
    return "router.yaml"


def router_values(bank: str) -> dict[str, Tensor]:
    router: Any = Bank.open(bank).load_router()
    lora = {f"{path} {name}": value for path, pair in router.lora.items() for name, value in vars(pair).items()}
    return router.state_dict() | {name: value for name, value in lora.items() if isinstance(value, Tensor)}


def checkpoint_of(step: int) -> dict[str, Any]:
    (path,) = Path("runs/tiny/checkpoints").glob(f"*step={step}.ckpt")
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


# Averages of weights

EVERY_STEP = ("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.callbacks.every_n_train_steps=1")
AVERAGED = ("--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.5")


def test_an_average_that_never_began_replaces_nothing() -> None:
    train(*EVERY_STEP, config="configs/tiny.yaml")
    (plain,) = Path("runs").rglob("adapter_model.safetensors")
    wanted = plain.read_bytes()
    shutil.rmtree("runs")
    with pytest.warns(UserWarning, match="ended before its first update"):
        train(*EVERY_STEP, *AVERAGED, "--trainer.callbacks.update_starting_at_step=100", config="configs/tiny.yaml")
    (written,) = Path("runs").rglob("adapter_model.safetensors")
    assert written.read_bytes() == wanted


@pytest.mark.parametrize("kind", ["adapter", "router"])
def test_what_is_written_is_the_average_of_what_is_trained(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = "configs/tiny.yaml" if kind == "adapter" else router_config()
    train(*EVERY_STEP, config=config)
    steps = [checkpoint_of(step)["state_dict"] for step in (1, 2, 3, 4)]
    plain = checkpoint_of(4)
    shutil.rmtree("runs")
    average = steps[0]
    for state in steps[1:]:
        average = {name: 0.5 * average[name] + 0.5 * value for name, value in state.items()}

    written: list[dict[str, Tensor]] = []
    module: Any = AdapterTraining if kind == "adapter" else RouterTraining
    write = module.write

    def note(self: Any) -> None:
        written.append({name: value.detach().clone() for name, value in self.trained().items()})
        write(self)

    monkeypatch.setattr(module, "write", note)
    train(*EVERY_STEP, *AVERAGED, config=config)
    (values,) = written
    assert values.keys() == average.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, average[name])
        assert not torch.equal(value, steps[-1][name])
    averaged = checkpoint_of(4)
    assert averaged["current_model_state"].keys() == averaged["state_dict"].keys() == plain["state_dict"].keys()
    for name, value in averaged["current_model_state"].items():  # what it is an average of went on as without it
        assert torch.equal(value, plain["state_dict"][name])


def test_the_frozen_base_is_neither_copied_nor_changed() -> None:
    training = AdapterTraining("letters", base="tiny-random/llama", router_layer=1)
    ema, owner = EMA(), Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    ema.setup(owner, training, "fit")
    assert ema._average_model is not None
    held = list(ema._average_model.parameters())
    assert [each.shape for each in held] == [each.shape for each in training.trained().values()]
    assert sum(each.numel() for each in held) < 0.2 * sum(each.numel() for each in training.parameters())


@pytest.mark.parametrize("kind", ["adapter", "router"])
def test_an_average_resumes_exactly(kind: str) -> None:
    config, found = ("configs/tiny.yaml", weights) if kind == "adapter" else (router_config(), router_values)
    folder = "runs/tiny/adapters/letters" if kind == "adapter" else "bank"
    train("--trainer.max_steps=30", *AVERAGED, config=config)
    whole = found(folder)
    (middle,) = Path("runs/tiny/checkpoints").glob("*step=20.ckpt")
    train("--trainer.max_steps=30", *AVERAGED, f"--ckpt_path={middle}", config=config)
    for name, value in found(folder).items():
        assert torch.equal(value, whole[name]), name


def test_an_average_may_begin_at_a_checkpoint_without_one() -> None:
    train("--trainer.max_steps=20")
    (middle,) = Path("runs/tiny/checkpoints").glob("*step=20.ckpt")
    train("--trainer.max_steps=24", *AVERAGED, f"--ckpt_path={middle}")
    assert Adapter.read("runs/tiny/adapters/letters").layers == (1, 2, 3)


# The learning rate


@pytest.mark.parametrize("kind", ["adapter", "adapters", "router"])
def test_a_learning_rate_is_suggested_and_nothing_else_is_left(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = router_config() if kind == "router" else "configs/tiny.yaml"
    extra = ["--model.init_args.name", '["letters", "digits"]'] if kind == "adapters" else []
    drawn: list[Tensor] = []
    draw = trainer._draw
    monkeypatch.setattr(trainer, "_draw", lambda *args: (drawn.extend(args[:2]), draw(*args)))
    before = set(map(str, Path().rglob("*")))
    train("--out", "figures/lr.png", "--num_training", "60", "--data.rows=4", *extra, config=config, command="lr_find")
    assert set(map(str, Path().rglob("*"))) - before == {"figures", "figures/lr.png"}
    assert Path("figures/lr.png").read_bytes().startswith(b"\x89PNG")
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line.startswith("suggested: --model.init_args.schedule.lr ")
    assert 1e-3 < float(line.split()[2]) < 0.5
    rate_S, loss_S = drawn
    assert rate_S[0] < 1e-4
    assert loss_S[0] == pytest.approx(loss_S[:10].mean().item(), rel=0.02)  # nothing is learned there yet
    assert loss_S.min() < 0.95 * loss_S[0]


def test_a_range_test_undoes_lightnings_smoothing_of_the_first_steps() -> None:
    smoothed, average = [], 0.0
    for step in range(1, 40):  # as Lightning does, whose count of steps is one ahead
        average = 0.98 * average + 0.02 * 5.0
        smoothed.append(average / (1 - 0.98 ** (step + 1)))
    _, loss_S = trainer._range_test({"lr": [1e-3] * 39, "loss": smoothed})
    torch.testing.assert_close(loss_S, torch.full_like(loss_S, 5.0))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--num_training", "8"), "of 8 steps, too few"),
        (("--num_training", "0"), "error: num_training is 0; expected a whole number of 1 or more."),
        (("--min_lr", "0"), "error: min_lr is 0.0 and max_lr 1.0; expected rates above 0, the second the larger."),
    ],
)
def test_too_few_steps_suggest_nothing(extra: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(*extra, command="lr_find")
    assert words in capsys.readouterr().err
    assert not list(Path().glob("*.png"))


# Two processes

CHILD = """
import json, os, sys
from pathlib import Path

from molora.training.cli import main

here = Path(__file__).parent
for folder, arguments in json.loads((here / "runs.json").read_text()):
    os.chdir(here / folder)
    sys.argv[1:] = arguments  # the first run starts the other process, which goes through all of them, too
    main()
"""
NOTE = """
import lightning as L
from torch.distributed.tensor import DTensor

class Note(L.Callback):
    def on_train_end(self, trainer, module):
        layers = [(name, each) for name, each in module.named_parameters() if ".layers." in name]
        frozen = [each for _, each in layers if not each.requires_grad]
        assert frozen and all(isinstance(each, DTensor) for each in frozen)
        held = sum(each.to_local().numel() for each in frozen)
        assert held == sum(each.numel() for each in frozen) / 2
        print("a half is held")
"""
LEARN = ("--trainer.max_steps=20", "--trainer.val_check_interval=20")
COUNT = ("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.init_args.schedule.lr=0.0")
SHORT = ("--trainer.max_steps=6", "--trainer.val_check_interval=6", "--trainer.callbacks.every_n_train_steps=3")
DDP = ("--trainer.devices=2", "--trainer.strategy=ddp")
PARTS = ("--trainer.devices=2", "--trainer.strategy=fsdp2", "--trainer.callbacks+=note.Note")
RECOMPUTED = "--model.init_args.gradient_checkpointing=true"
OUTPUTS = {"adapter": "--model.init_args.output_dir", "router": "--model.init_args.output"}
RATES = ("val/entropy", "val/switch_rate", "val/ece")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folders that two processes leave, started once for every run that they are needed for, and what they say."""
    here = tmp_path_factory.mktemp("two")
    configs = {"adapter": "configs/tiny.yaml", "router": "router.yaml"}
    runs = [("learn", "adapter", (*LEARN, *DDP)), ("count", "router", (*COUNT, *DDP))]
    for kind, output in OUTPUTS.items():
        middle = "--ckpt_path=runs/tiny/checkpoints/epoch=0-step=3.ckpt"
        runs.append((kind, kind, (*SHORT, *PARTS, f"{output}=whole")))
        runs.append((kind, kind, (*SHORT, *PARTS, f"{output}=resumed", middle, RECOMPUTED)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        for folder in {folder for folder, *_ in runs}:
            (here / folder).mkdir()
            (here / folder / "configs").symlink_to(REPOSITORY / "configs")
            patched.chdir(here / folder)
            router_config()
        (here / "note.py").write_text(NOTE)
        (here / "runs.json").write_text(
            json.dumps([(folder, fit_arguments(*extra, config=configs[kind])) for folder, kind, extra in runs])
        )
        done = run_in_a_process(here / "child.py", CHILD)
    assert done.returncode == 0, done.stderr
    return here, done.stdout + done.stderr


def column(folder: Path, name: str) -> list[float]:
    (metrics,) = (folder / "runs/tiny").rglob("metrics.csv")
    with metrics.open() as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row.get(name)]


def test_two_processes_learn_what_one_with_all_their_rows_does(two: tuple[Path, str]) -> None:
    train(*LEARN, "--data.rows=4")  # of two rows in each process
    loss = column(Path(), "val/loss")[-1]
    here, said = two
    assert column(here / "learn", "val/loss")[-1] == pytest.approx(loss, rel=0.1)
    assert loss < 0.8 * column(here / "learn", "train/loss")[0]
    assert said.count("wrote the adapter 'letters'") == 3  # and not twice that: once for each run


def test_two_processes_count_together_what_one_with_all_their_rows_does(two: tuple[Path, str]) -> None:
    train(*COUNT, "--data.rows=4", config=router_config())  # that learns nothing, so that both have the same router
    here, _ = two
    for name in RATES:
        (rate,) = column(Path(), name)
        assert rate > 0
        assert column(here / "count", name) == pytest.approx([rate], rel=1e-4), name
    (log,) = (here / "count/runs").rglob("events.out.tfevents*")
    images = EventAccumulator(str(log.parent)).Reload().Tags()["images"]
    assert set(images) == {f"router/{name}" for name in ("confusion", "load", "calibration", "entropy", "switches")}


@pytest.mark.parametrize("kind", ["adapter", "router"])
def test_a_base_in_two_parts_trains_what_one_process_does(
    kind: str, two: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = "configs/tiny.yaml" if kind == "adapter" else router_config()
    train(*SHORT, f"{OUTPUTS[kind]}=one", "--trainer.accumulate_grad_batches=2", config=config)  # on the rows of both

    def found(folder: str | Path) -> dict[str, Tensor]:
        return weights(f"{folder}/letters") if kind == "adapter" else router_values(str(folder))

    one = found("one")
    assert any(value.abs().sum() > 0 for name, value in one.items() if "lora_B" in name or "b_OR" in name)
    here, said = two
    assert said.count("a half is held") == 8  # by each process in each of four runs
    monkeypatch.chdir(here / kind)
    apart, resumed = found("whole"), found("resumed")
    for name, value in apart.items():
        torch.testing.assert_close(value, one[name], rtol=1e-2, atol=1e-3)
        assert torch.equal(resumed[name], value), name
    assert all(type(value) is Tensor for value in checkpoint_of(3)["state_dict"].values())


def test_the_first_version_of_fsdp_is_refused() -> None:
    with pytest.raises(ValueError, match="use fsdp2"):
        Trainer(strategy="fsdp")


# Checkpoints


def test_a_full_disk_leaves_the_checkpoints_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--model.init_args.output_dir=whole")
    write, written = Path.write_bytes, []

    def until_full(path: Path, data: Any) -> int:
        written.append(path)
        if len(written) < 4:  # of two for each step
            return write(path, data)
        write(path, bytes(data)[: len(data) // 2])
        return full()

    folder = Path("few")
    few = (f"--trainer.callbacks.dirpath={folder}", "--trainer.callbacks.save_top_k=1")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", until_full)
        with pytest.raises(SystemExit) as caught:
            train(*few)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "few/last.ckpt: No space left on device; this checkpoint was not written, and those before it" in error
    assert not list(folder.glob(".*"))
    assert torch.load(folder / "last.ckpt", weights_only=False)["global_step"] == 20
    train(*few, "--ckpt_path=last")
    for name, value in weights("runs/tiny/adapters/letters").items():
        assert torch.equal(value, weights("whole/letters")[name]), name


def test_a_full_disk_leaves_the_adapter_before_and_what_was_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--trainer.max_steps=20")
    folder = Path("runs/tiny/adapters/letters")
    (folder / "README.md").write_text("card")
    before = weights(str(folder))
    with monkeypatch.context() as patched:
        patched.setattr("molora.files.os.fsync", lambda _: full())
        patched.setattr(trainer, "replace", os.replace)  # there is room for checkpoints
        with pytest.raises(SystemExit):
            train()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "adapter_model.safetensors: No space left on device" in error
    assert weights(str(folder)).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in weights(str(folder)).items())
    assert {path.name for path in folder.parent.iterdir()} == {"letters"}
    train("--ckpt_path=last")  # which was its last step's: nothing is left but to write
    after = weights(str(folder))
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert (folder / "README.md").read_text() == "card"
    train("--model.init_args.output_dir=whole")
    assert all(torch.equal(value, after[name]) for name, value in weights("whole/letters").items())


def full() -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


KILLS = """
import os, signal
from molora.training import trainer
from molora.training.cli import main

put, counted = trainer.replace, []

def replace(source, target):
    counted.append(target)
    if len(counted) == 5:
        if point == "in the middle":
            os.truncate(source, source.stat().st_size // 3)
        if point == "behind":
            put(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    put(source, target)

trainer.replace = replace
for point in ("in the middle", "before", "behind"):  # each process goes on from the one before
    if not (child := os.fork()):  # and has nothing to import
        main()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
    assert not os.path.exists("runs/tiny/adapters")
"""


def test_a_kill_at_any_point_of_a_checkpoints_writing_loses_nothing() -> None:
    often = ("--trainer.max_steps=16", "--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.save_top_k=1")
    train(*often, "--trainer.callbacks.dirpath=elsewhere", "--model.init_args.output_dir=whole")
    done = run_in_a_process(Path("child.py").absolute(), KILLS, *fit_arguments(*often, "--ckpt_path=last"))
    assert done.returncode == 0, done.stderr
    train(*often, "--ckpt_path=last")
    for name, value in weights("runs/tiny/adapters/letters").items():
        assert torch.equal(value, weights("whole/letters")[name]), name
    assert not list(Path("runs/tiny/checkpoints").glob(".*"))
    assert torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=False)["global_step"] == 16


def test_a_loss_that_is_no_number_takes_no_good_checkpoints_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AdapterTraining.training_step

    def poisoned(self: Any, batch: Any, index: int) -> Tensor:
        return step(self, batch, index) * (float("nan") if index == 11 else 1.0)

    monkeypatch.setattr(AdapterTraining, "training_step", poisoned)
    with pytest.raises(SystemExit) as caught:
        train("--trainer.callbacks.every_n_train_steps=5", "--trainer.callbacks.save_top_k=1")
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is infinite or not a number, by step 15 at the latest. Nothing was written" in error
    assert torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=False)["global_step"] == 10
    assert not Path("runs/tiny/adapters").exists()


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_a_checkpoint_for_which_memory_is_short_is_not_called_damaged(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def short(*_: Any, **__: Any) -> None:
        if error is RuntimeError:
            torch.empty(1 << 60, dtype=torch.uint8)  # which the host does not have
        raise error

    (tmp_path / "last.ckpt").write_bytes(b"whole")
    monkeypatch.setattr(torch, "load", short)
    with pytest.raises(error):
        WholeCheckpoints().load_checkpoint(tmp_path / "last.ckpt")


def test_checkpoints_elsewhere_are_lightnings_own(tmp_path: Path) -> None:
    WholeCheckpoints().save_checkpoint({"global_step": 3}, f"file://{tmp_path}/x.ckpt")
    assert torch.load("x.ckpt", weights_only=False) == {"global_step": 3}
