"""What watches a run of training, and what survives its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from molora.files import replace
from molora.training.data import Batch

CHECK_EVERY = 50  # steps: to look at the loss waits for the device


class Watch(L.Callback):
    """Logs tokens a second and memory, for progress bars and loggers, and ends a run whose loss is not a number."""

    def __init__(self) -> None:
        self._is_bad: Tensor | None = None
        self._since_s, self._num_tokens = time.perf_counter(), 0

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
    """Keeps one checkpoint, which is whole at any moment: a new one takes its place once it is written."""

    def __init__(self, path: Path, every: int, watch: Watch) -> None:
        """
        Args:
            every: so many optimizer steps.
            watch: is asked before, so that nothing bad is kept.
        """
        self.path, self.every, self.watch = path, every, watch
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        took_step, self._step = step != self._step, step  # not so while gradients are accumulated
        if took_step and step % self.every == 0:
            self.watch.check(trainer)
            scratch = self.path.with_suffix(".new")
            trainer.save_checkpoint(scratch)
            if trainer.is_global_zero:
                replace(scratch, self.path)
