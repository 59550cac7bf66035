"""What both training modules share: a frozen base, packed batches, a schedule, and small checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from molora.adapter import check_whole
from molora.checkpoint import load_base, resolve_base
from molora.display import joined
from molora.injection import find_layers, text_config
from molora.routing import RoutingLayer
from molora.training.batches import Batch
from molora.training.data import ChatData
from molora.training.examples import IGNORE
from molora.training.loss import Head, check_head, frozen_cross_entropy
from molora.training.stack import LoraStack, recompute

NUM_GRAPHS = 32  # of a decoder layer, at most


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warmup, then a cosine down to a hundredth.

    Args:
        lr: peak learning rate.
        warmup_steps: optimizer steps until the peak.
        weight_decay: decoupled, on everything trained.
    """

    lr: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"schedule.{name} is {value}; expected a number of 0 or more.")
        check_whole("schedule.warmup_steps", self.warmup_steps, 0)

    def factor(self, step: int, num_steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        return 0.01 + 0.495 * (1 + math.cos(math.pi * min(1.0, done)))


class FrozenBase(L.LightningModule):
    """What both modules share: a frozen base, packed batches, a schedule, and small checkpoints."""

    def __init__(
        self, base: str, dtype: str, schedule: Schedule, compile: bool | None, gradient_checkpointing: bool
    ) -> None:
        super().__init__()
        self.base, self.dtype_name, self.schedule, self.compile_layers = base, dtype, schedule, compile
        self.gradient_checkpointing = gradient_checkpointing
        self.strict_loading = False
        self.model: Any = None
        self.tokenizer: Any = None
        self.base_dir = Path()

    def load_base(self) -> None:
        self.base_dir = resolve_base(self.base)
        # Lightning moves the module only later; a base that is loaded elsewhere would be of that device's dtype.
        device = self.device if self._trainer is None else self._trainer.strategy.root_device
        model, self.tokenizer = load_base(self.base_dir, device=device, dtype=self.dtype_name)
        self.model = model
        check_head(model)

    def on_fit_start(self) -> None:
        compiled = self.device.type == "cuda" if self.compile_layers is None else self.compile_layers
        if compiled:
            # With and without adapters, gradients, and something below that learns: each is a graph of its own.
            from torch._dynamo import config as dynamo

            dynamo.recompile_limit = max(dynamo.recompile_limit, NUM_GRAPHS)
        for layer in find_layers(self.model):
            inner = layer.layer if isinstance(layer, RoutingLayer) else layer
            if self.gradient_checkpointing:
                recompute(inner, compiled=compiled)
            elif compiled:
                inner.compile(dynamic=False)

    def on_fit_end(self) -> None:
        """Also where a run is resumed from its last step, after an end that came before this."""
        for module in self.modules():
            if isinstance(module, LoraStack):
                module.rest()  # what acted in the last batch
        if self.trainer.is_global_zero:
            self.write()

    def write(self) -> None:
        """Write what was learned."""
        raise NotImplementedError

    def prepare_data_module(self, domains: Sequence[str], *, labels_needed: bool = False, apart: bool = False) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ChatData):
            max_context = text_config(self.model).max_position_embeddings
            data.prepare(self.tokenizer, domains, max_context=max_context, labels_needed=labels_needed, apart=apart)

    def trained(self) -> dict[str, nn.Parameter]:
        """By their names in a state dict."""
        values = self.state_dict(keep_vars=True).items()
        return {name: value for name, value in values if isinstance(value, nn.Parameter) and value.requires_grad}

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds: what is trained, and what else a resumed run needs."""
        return dict(self.trained())

    def settings(self) -> dict[str, Any]:
        """What decides what the values in a checkpoint mean."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.trained().values())}]

    def configure_optimizers(self) -> Any:
        schedule = self.schedule
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            lr=schedule.lr,
            weight_decay=schedule.weight_decay,
            betas=(0.9, 0.99),
            fused=self.device.type == "cuda",
        )
        num_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = self.kept()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}
        checkpoint["settings"] = self.settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the checkpoint is of another module or of other settings: what it holds is not trained here.
        """
        settings, there = self.settings(), checkpoint.get("settings", {})  # older ones say nothing of them
        differing = [
            f"{name}, there {there[name]!r} and here {value!r}"
            for name, value in settings.items()
            if name in there and there[name] != value
        ]
        if not differing:
            shapes = {name: tuple(value.shape) for name, value in self.kept().items()}
            shapes_there = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
            names = {*shapes, *shapes_there}
            differing = sorted(name for name in names if shapes.get(name) != shapes_there.get(name))
        if differing:
            raise ValueError(
                f"the checkpoint was made with other settings: it and what is trained here differ in "
                f"{joined(differing)}. Resume with its settings, or begin anew without it."
            )

    def forward_hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, L, H] of packed rows."""
        hidden: Tensor = self.model.get_decoder()(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        return hidden

    def lm_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy over the learned tokens, which alone reach the head, and the share predicted right."""
        loss_1, accuracy_1 = self.lm_losses(hidden, targets, num_groups=1)
        return loss_1[0], accuracy_1[0]

    def lm_losses(self, hidden: Tensor, targets: Tensor, *, num_groups: int) -> tuple[Tensor, Tensor]:
        """Those of each of `num_groups` equal parts of the rows, [num_groups] both."""
        learned = targets != IGNORE
        loss_N, is_right_N = frozen_cross_entropy(hidden[learned], Head.of(self.model), targets[learned])
        counts_G = learned.reshape(num_groups, -1).sum(1)
        group_N = torch.repeat_interleave(counts_G, output_size=len(loss_N))
        sums_2G = torch.zeros(2, num_groups, dtype=torch.float32, device=hidden.device)
        sums_2G = sums_2G.index_add(1, group_N, torch.stack([loss_N, is_right_N]))
        loss_G, accuracy_G = sums_2G / counts_G.clamp(min=1)
        return loss_G, accuracy_G.detach()
