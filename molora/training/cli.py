"""The command line of `train.py`: LightningCLI over the two training modules and one data module."""

import sys

from lightning.pytorch.cli import LightningCLI

from molora.display import one_line
from molora.training.callbacks import Watch
from molora.training.data import ChatData


def main() -> None:
    """`fit --config configs/....yaml`, and whatever else LightningCLI offers.

    Raises:
        SystemExit: with status 2, after one line on standard error: a file, or the base model, is not there.
    """
    try:
        LightningCLI(
            datamodule_class=ChatData,
            subclass_mode_model=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [Watch()]},
        )
    except (FileNotFoundError, ConnectionError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
