"""Lightning's trainer, with a range test of the learning rate, FSDP 2, and checkpoints that are whole at any moment.

Legend: S optimizer steps.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor

from molora.adapter import check_whole
from molora.checkpoint import is_short_of_memory, resolve_base
from molora.display import one_line
from molora.files import replace
from molora.injection import find_layers
from molora.routing import RoutingLayer

SMOOTHING = 0.98  # of Lightning's range test
NUM_SKIPPED = 10  # steps whose smoothed loss is of too few


class Trainer(L.Trainer):
    """What `train.py` and `molora train bank` train with; takes what Lightning's takes.

    Raises:
        ValueError: the strategy is FSDP 1, or a setting is out of its range or not for this machine.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        strategy = kwargs.get("strategy")
        if isinstance(strategy, FSDPStrategy) or (
            isinstance(strategy, str) and strategy in FSDPStrategy.get_registered_strategies()
        ):
            raise ValueError(
                "strategy fsdp is FSDP 1, which flattens what is trained and what is frozen into one tensor; use fsdp2."
            )
        with _value_errors():
            super().__init__(*args, **kwargs)
        check_whole("trainer.accumulate_grad_batches", self.accumulate_grad_batches)
        if self.gradient_clip_val is not None and not 0 <= self.gradient_clip_val < math.inf:
            raise ValueError(f"trainer.gradient_clip_val is {self.gradient_clip_val}; expected a number of 0 or more.")
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = WholeCheckpoints()

    def fit(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, once the base is on this machine.

        Processes that know of each other cannot make it: transformers saves a model in the first of them alone.

        Raises:
            ValueError: also where Lightning says that a setting is wrong.
        """
        resolve_base(model.base)
        with _value_errors():
            super().fit(model, *args, **kwargs)

    def lr_find(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        out: Path = Path("lr_find.png"),
        min_lr: float = 1e-6,
        max_lr: float = 1.0,
        num_training: int = 100,
    ) -> None:
        """Suggest a learning rate: the one at which the loss falls fastest while the rate rises from step to step.

        Nothing is kept but a picture of the curve. Adapters side by side get one rate, by the sum of their losses; a
        router's `adapter_lr` rises with its own.

        Args:
            model: what is to be trained.
            datamodule: its data.
            out: where the picture is written, as PNG.
            min_lr: the first step's learning rate.
            max_lr: the last step's; the steps end where the loss has grown manifold.
            num_training: optimizer steps.

        Raises:
            ValueError: there are too few steps, or their losses are not numbers; or rates do not rise from above 0.
        """
        check_whole("num_training", num_training)
        if not 0 < min_lr < max_lr < math.inf:
            raise ValueError(f"min_lr is {min_lr} and max_lr {max_lr}; expected rates above 0, the second the larger.")
        self.loggers = []
        self.callbacks = [each for each in self.callbacks if isinstance(each, ProgressBar)]  # type: ignore[has-type]
        self.val_check_interval, self.check_val_every_n_epoch = 1 << 30, None  # nothing is validated
        finder = Tuner(self).lr_find(
            model, datamodule=datamodule, min_lr=min_lr, max_lr=max_lr, num_training=num_training, update_attr=False
        )
        assert finder is not None
        rate_S, loss_S = _range_test(finder.results)
        if len(loss_S) < 2:
            raise ValueError(
                f"no learning rate can be suggested: of {num_training} steps, too few have a loss that is a number."
            )
        best = int(torch.gradient(loss_S, spacing=(rate_S.log(),))[0].argmin())
        if self.is_global_zero:
            _draw(rate_S, loss_S, best, out)
            print(
                f"suggested: --model.init_args.schedule.lr {rate_S[best]:.2g} (where the loss falls fastest in {out})"
            )


@contextmanager
def _value_errors() -> Iterator[None]:
    """What Lightning says of wrong settings, as ValueErrors."""
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if str(error).startswith("Early stopping conditioned on"):  # a metric that nobody logs
            raise ValueError(str(error)) from error
        raise


def _range_test(results: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Learning rates and smoothed losses of a range test's steps, float32 [S], but for the first ones and the last."""
    loss_S = torch.tensor(results["loss"])
    step_S = torch.arange(1, len(loss_S) + 1)
    loss_S *= (1 - SMOOTHING ** (step_S + 1)) / (1 - SMOOTHING**step_S)  # Lightning divides by the next step's sum
    rate_S = torch.tensor(results["lr"])[: len(loss_S)]
    kept = torch.isfinite(loss_S)
    return rate_S[kept][NUM_SKIPPED:-1], loss_S[kept][NUM_SKIPPED:-1]


def _draw(rate_S: Tensor, loss_S: Tensor, best: int, out: Path) -> None:
    from matplotlib.figure import Figure  # which takes a second

    figure = Figure()
    axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.plot(rate_S.tolist(), loss_S.tolist())
    axes.plot(rate_S[best].item(), loss_S[best].item(), "o", color="red")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole at any moment: a new one takes an old one's place once it is on the disk."""

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As Lightning's, but a checkpoint runs no code unless `weights_only` is False.

        Raises:
            OSError: there is no such file.
            MemoryError, RuntimeError: memory does not hold it.
            ValueError: it is no checkpoint, or is damaged.
        """
        what = "it has no weights"
        try:
            checkpoint = super().load_checkpoint(path, map_location, weights_only is not False)
        except OSError:
            raise
        except Exception as error:  # an unpickler of arbitrary bytes raises anything
            if is_short_of_memory(error):
                raise
            what, checkpoint = f"{type(error).__name__}: {one_line(error):.200}", {}
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ValueError(f"{path} is no checkpoint of this training, or is damaged ({what}); name another.")
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """
        Raises:
            OSError: it cannot be written; the one that was at `path` is as it was.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target, buffer = Path(path), io.BytesIO()
        torch.save(checkpoint, buffer)
        scratch = target.with_name(f".{target.name}.new")  # one name: after a kill there is one at most
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_bytes(buffer.getbuffer())
            replace(scratch, target)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            what = f"{error.strerror}; this checkpoint was not written, and those before it are as they were"
            raise OSError(error.errno, what, str(target)) from error


class FSDP2(ModelParallelStrategy):
    """Each device keeps a part of every decoder layer of the frozen base, and gathers a layer when it runs.

    What is trained is small, and whole on each device: its gradients are averaged, and its checkpoints are those of one
    device. Embeddings and head are whole, too.
    """

    def setup(self, trainer: L.Trainer) -> None:
        from torch.distributed.fsdp import fully_shard

        module: Any = self.lightning_module
        for layer in find_layers(module.model):
            fully_shard(layer.layer if isinstance(layer, RoutingLayer) else layer, reshard_after_forward=True)
        super().setup(trainer)

    def post_backward(self, closure_loss: Tensor) -> None:
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.grad = self.reduce(parameter.grad)

    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint


StrategyRegistry.register("fsdp2", FSDP2, description="the frozen base in parts, one on each device")
