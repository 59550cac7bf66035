"""The command line of `train.py`: LightningCLI over the two training modules and one data module."""

import sys

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from molora.display import one_line
from molora.training.callbacks import Watch
from molora.training.data import ChatData
from molora.training.trainer import Trainer


class _CLI(LightningCLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {"lr_find": {"model", "datamodule"}}


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
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [Watch()]},
        )
    except (ValueError, OSError, MisconfigurationException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
