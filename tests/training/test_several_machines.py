"""Two machines, played by two processes of this one: torchrun's environment, SLURM's, and what they leave behind."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from molora.adapter import Adapter
from molora.training.cli import main

REPOSITORY = Path(__file__).parents[2]
TRAIN = str(REPOSITORY / "train.py")
TIMEOUT_S = 300
CHECKPOINTS = "runs/tiny/checkpoints"
pytestmark = pytest.mark.filterwarnings("default")  # Lightning and jsonargparse warn of their own deprecations


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # cold: both make the base there at once
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")


def fit_arguments(output: str, *extra: str) -> list[str]:
    arguments = ["fit", "--config=configs/tiny.yaml", f"--model.init_args.output_dir={output}"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.max_steps=6", "--trainer.val_check_interval=6"]
    return [*arguments, "--trainer.callbacks.every_n_train_steps=3", "--trainer.logger=false", *extra]


def on_two_machines(output: str, strategy: str, *extra: str) -> list[str]:
    two = ("--trainer.num_nodes=2", "--trainer.devices=1", f"--trainer.strategy={strategy}")
    return fit_arguments(output, *two, *extra)


def train(output: str, *extra: str) -> None:
    with patch.object(sys, "argv", ["train.py", *fit_arguments(output, *extra)]):
        main()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_together(commands: Sequence[list[str]], environments: Sequence[dict[str, str]]) -> str:
    """All that they say; all of them have to end well."""
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [
        subprocess.Popen(command, env=common | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        said = [child.communicate(timeout=TIMEOUT_S)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0] * len(children), "\n".join(said)
    return "\n".join(said)


def weights(output: str) -> dict[str, Tensor]:
    return Adapter.read(f"{output}/letters").tensors()


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-2, atol=1e-3)


def test_torchrun_and_slurm_train_on_two_machines_what_one_process_does() -> None:
    place = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    torchrun, arguments = [sys.executable, "-m", "torch.distributed.run", *place], on_two_machines("torchrun", "ddp")
    said = run_together(
        [[*torchrun, f"--node-rank={rank}", TRAIN, *arguments] for rank in range(2)],
        [{}, {}],
    )
    assert said.count("wrote the adapter") == 1
    assert sorted(path.name for path in Path(CHECKPOINTS).iterdir()) == [
        "epoch=0-step=3.ckpt",
        "epoch=0-step=6.ckpt",
        "last.ckpt",
    ]

    # What was begun there goes on elsewhere, by another strategy.
    arguments = on_two_machines("slurm", "fsdp2", f"--ckpt_path={CHECKPOINTS}/epoch=0-step=3.ckpt")
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "2"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    job |= {"MASTER_PORT": str(free_port())}
    said = run_together(
        [[sys.executable, TRAIN, *arguments]] * 2,
        [job | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)],
    )
    assert said.count("wrote the adapter") == 1
    assert "Starting with 2 processes" in said
    assert "step=3.ckpt" in said

    train("one", "--trainer.accumulate_grad_batches=2")  # on the rows of both
    one = weights("one")
    assert any(value.abs().sum() > 0 for name, value in one.items() if "lora_B" in name)
    assert_close(weights("torchrun"), one)
    assert_close(weights("slurm"), one)
    train("half")  # on those of the first alone
    with pytest.raises(AssertionError):
        assert_close(weights("half"), one)


def test_a_machine_that_misses_the_last_checkpoint_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train("whole")
    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", lambda self, decision, all=True: not all)
    with pytest.raises(SystemExit) as caught:  # else one would begin anew, and both would wait for ever
        train("apart", "--ckpt_path=last")
    assert caught.value.code == 2
    assert "some machines find the last checkpoint and others do not" in capsys.readouterr().err
    assert not Path("apart").exists()
