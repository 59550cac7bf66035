"""The command line of `train.py`: LightningCLI over the two training modules and one data module."""

import sys
from pathlib import Path

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from molora.display import one_line
from molora.training.callbacks import Watch
from molora.training.data import ChatData
from molora.training.trainer import Trainer


class _CLI(LightningCLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {"lr_find": {"model", "datamodule"}}

    def _parse_ckpt_path(self) -> None:
        """Nothing: our checkpoints hold no hyperparameters, and the trainer says what is wrong with one."""


class _SaveConfig(SaveConfigCallback):
    """Saves the settings in the logs' folder; where there is none, nowhere: a file of that name may be the user's."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = trainer.log_dir
        if (
            trainer.loggers
            and folder is not None
            and Path(folder).resolve() != Path(trainer.default_root_dir).resolve()
        ):
            super().setup(trainer, pl_module, stage)


def main() -> None:
    """`fit` or `lr_find`, `--config configs/....yaml`, and whatever else LightningCLI offers.

    Raises:
        SystemExit: with status 2, after one line on standard error: a setting or the data are wrong, or a file, the
            base model or room on the disk is not there.
    """
    try:
        _CLI(
            datamodule_class=ChatData,
            trainer_class=Trainer,
            subclass_mode_model=True,
            seed_everything_default=0,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [Watch()]},
        )
    except (ValueError, OSError, MisconfigurationException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
