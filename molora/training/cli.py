"""The command line of `train.py`: LightningCLI over the two training modules and one data module."""

from lightning.pytorch.cli import LightningCLI

from molora.training.data import ChatData


def main() -> None:
    """`fit --config configs/....yaml`, and whatever else LightningCLI offers."""
    LightningCLI(
        datamodule_class=ChatData,
        subclass_mode_model=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"use_distributed_sampler": False},
    )
