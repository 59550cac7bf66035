"""What watches a run of training, and what survives its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from molora.training.batches import Batch
from molora.training.frozen import FrozenBase

CHECK_EVERY = 50  # steps: to look at the loss waits for the device


class Watch(L.Callback):
    """Logs tokens a second and memory, for progress bars and loggers, and ends a run whose loss is not a number."""

    def __init__(self) -> None:
        self._is_bad: Tensor | None = None
        self._since_s, self._num_tokens = time.perf_counter(), 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """
        Raises:
            ValueError: some processes go on from a checkpoint, and others find none; they would wait for each other.
        """
        is_found = trainer.ckpt_path is not None
        is_anywhere = trainer.strategy.reduce_boolean_decision(is_found, all=False)
        if is_anywhere and not trainer.strategy.reduce_boolean_decision(is_found):
            raise ValueError(
                "some machines find the last checkpoint and others do not; keep checkpoints in a folder that all of "
                "them share, or copy it to each."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since_s, self._num_tokens = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """
        Raises:
            ValueError: the loss is infinite or not a number.
        """
        is_bad = ~torch.isfinite(outputs["loss"].detach())
        self._is_bad = is_bad if self._is_bad is None else self._is_bad | is_bad
        if (batch_idx + 1) % CHECK_EVERY == 0:
            self.check(trainer)
        self._num_tokens += batch.input_ids.numel() * trainer.world_size
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (batch_idx + 1) % every == 0:
            now_s = time.perf_counter()
            pl_module.log("tokens_per_s", self._num_tokens / (now_s - self._since_s), prog_bar=True)
            if pl_module.device.type == "cuda":
                pl_module.log("memory_gb", torch.cuda.max_memory_allocated() / 1e9, prog_bar=True)
            self._since_s, self._num_tokens = now_s, 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check(trainer)  # before the module writes what it has learned

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check(trainer)  # before it takes the place of a good one

    def check(self, trainer: L.Trainer) -> None:
        """
        Raises:
            ValueError: a loss was infinite or not a number.
        """
        trained = [parameter for parameter in trainer.lightning_module.parameters() if parameter.requires_grad]
        is_finite = all(bool(torch.isfinite(parameter).all()) for parameter in trained)
        if not is_finite or (self._is_bad is not None and self._is_bad.item()):
            raise ValueError(
                f"the loss, or what is trained, is infinite or not a number, by step {trainer.global_step} at the "
                "latest. Nothing was written. Lower schedule.lr, or look for what is odd in the data."
            )


class LastCheckpoint(L.Callback):
    """Keeps one checkpoint."""

    def __init__(self, path: Path, every: int) -> None:
        """
        Args:
            every: so many optimizer steps.
        """
        self.path, self.every = path, every
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        took_step, self._step = step != self._step, step  # not so while gradients are accumulated
        if took_step and step % self.every == 0:
            trainer.save_checkpoint(self.path)


class EMA(EMAWeightAveraging):
    """An exponential moving average of what is trained. Lightning's own would copy and average the frozen base, too.

    Validation sees the average, and it is what is written in the end; a checkpoint holds it beside what it is made of.

    Args:
        decay: of the average, with each update.
        update_every_n_steps: optimizer steps between updates.
        update_starting_at_step: the first step that is averaged; None is the first of all.
    """

    def __init__(
        self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int | None = None
    ) -> None:
        super().__init__(None, False, decay, update_every_n_steps, update_starting_at_step)
        self._trained = L.LightningModule()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            assert isinstance(pl_module, FrozenBase)
            pl_module.configure_model()
            self._trained = _tree(pl_module.trained())
            device = trainer.strategy.root_device
            self._average_model = AveragedModel(self._trained, device, use_buffers=False, **self._kwargs)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, self._trained, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._has_average:
            super().on_validation_epoch_start(trainer, self._trained)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._has_average:
            super().on_validation_epoch_end(trainer, self._trained)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass  # the last checkpoint needs both; and a run that is resumed behind its last step does not come here

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._has_average:
            super().on_train_end(trainer, self._trained)
        else:
            rank_zero_warn("EMA: the run ended before its first update; what was trained is written as it is.")

    @property
    def _has_average(self) -> bool:
        return self._average_model is not None and int(self._average_model.n_averaged) > 0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["current_model_state"] = self._trained.state_dict()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, self._trained, checkpoint)


def _tree(parameters: dict[str, nn.Parameter]) -> L.LightningModule:
    """A module of these parameters, under these names."""
    root = L.LightningModule()
    for name, parameter in parameters.items():
        *path, last = name.split(".")
        module: nn.Module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, parameter)
    return root
