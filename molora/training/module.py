"""Lightning modules: one trains an activated LoRA and writes a PEFT folder, one trains a router and writes a bank.

Both freeze the base model. A checkpoint holds only what is trained.

Legend: B rows, L tokens a row, N = B * L, V vocabulary, C router columns.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from molora.activation import Activation, render
from molora.adapter import Adapter, AdapterConfig, layer_index, target_suffixes
from molora.bank import Bank, BaseInfo, check_name
from molora.checkpoint import load_base, resolve_base
from molora.digest import base_digest
from molora.files import atomic_directory
from molora.injection import RoutedDecoder, check_adapters
from molora.losses import label_loss, load_balance_loss, z_loss
from molora.router import KeyRouter, RouterConfig
from molora.routing import NO_ADAPTER, RouteRequest
from molora.training.data import OTHER, Batch, ChatData
from molora.training.examples import BASE, IGNORE


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warmup, then a cosine down to a tenth.

    Args:
        lr: peak learning rate.
        warmup_steps: optimizer steps until the peak.
        weight_decay: decoupled, on everything trained.
    """

    lr: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.0

    def factor(self, step: int, num_steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


class _FrozenBase(L.LightningModule):
    """What both modules share: a frozen base, packed batches, a schedule, and small checkpoints."""

    decoder: RoutedDecoder

    def __init__(self, base: str, dtype: str, schedule: Schedule) -> None:
        super().__init__()
        self.base, self.dtype_name, self.schedule = base, dtype, schedule
        self.strict_loading = False
        self.model: nn.Module
        self.tokenizer: Any = None
        self.base_dir = Path()

    def load_base(self) -> None:
        self.base_dir = resolve_base(self.base)
        model, self.tokenizer = load_base(self.base_dir, device=self.device, dtype=self.dtype_name)
        self.model = model

    def prepare_data_module(self, domains: Sequence[str]) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ChatData):
            data.prepare(self.tokenizer, domains)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def configure_optimizers(self) -> Any:
        schedule = self.schedule
        optimizer = torch.optim.AdamW(
            self.trained().values(), lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.99)
        )
        num_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = self.trained()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}

    def forward_hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, L, H] of packed rows."""
        decoder: Any = self.decoder.model.get_decoder()
        hidden: Tensor = decoder(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        return hidden

    def lm_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy over the learned tokens, and the share that is predicted right. Only they reach the head."""
        learned = targets != IGNORE
        logits_NV = self.decoder.model.get_output_embeddings()(hidden[learned]).float()
        targets_N = targets[learned]
        loss = F.cross_entropy(logits_NV, targets_N, reduction="sum") / max(1, targets_N.numel())
        accuracy = (logits_NV.argmax(-1) == targets_N).float().mean()
        return loss, accuracy


class AdapterTraining(_FrozenBase):
    """Trains one activated LoRA in layers from the router layer on, and writes it as a PEFT folder.

    The adapter acts on a conversation from an activation point that the data module varies. In a conversation whose
    parts have domains, it learns only its own parts; on those of others it acts or rests, at random, as it will when
    a router shares the conversation among several adapters.

    Args:
        name: the adapter's name, and the domain of the data that it learns.
        output_dir: where the PEFT folder `<output_dir>/<name>` is written.
        base: local folder or hub name of the base model.
        rank, alpha: of the LoRA; its scaling is alpha / rank.
        target_modules: last components of the linears to adapt.
        router_layer: the first layer that is adapted, and the one whose input a router will read.
        schedule: of the learning rate.
        dtype: of the frozen base; the adapter itself is trained in float32.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
        seed: of the adapter's initial weights.
    """

    def __init__(
        self,
        name: str,
        output_dir: str = "runs/adapters",
        base: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        router_layer: int = 8,
        schedule: Schedule = Schedule(),
        dtype: str = "auto",
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base, dtype, schedule)
        self.name = check_name(name)
        self.output_dir = Path(output_dir)
        self.rank, self.alpha, self.target_modules = rank, alpha, tuple(target_modules)
        self.router_layer = router_layer
        self.gradient_checkpointing, self.seed = gradient_checkpointing, seed

    def configure_model(self) -> None:
        if hasattr(self, "decoder"):
            return
        self.load_base()
        paths = [
            path
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            and path.rsplit(".", 1)[-1] in self.target_modules
            and layer_index(path) >= self.router_layer
        ]
        if not paths:
            raise ValueError(f"no linear from layer {self.router_layer} on is named one of {self.target_modules}.")
        self.decoder = RoutedDecoder(
            self.model,
            paths,
            num_slots=1,
            max_rank=self.rank,
            router_layer=self.router_layer,
            dtype=torch.float32,
            impl="torch",
        )
        generator = torch.Generator().manual_seed(self.seed)
        for linear in self.decoder.linears.values():
            bound = 1 / math.sqrt(linear.in_features)  # PEFT's: Kaiming uniform with a = sqrt(5)
            a_ERI = torch.empty(linear.lora_a_ERI.shape).uniform_(-bound, bound, generator=generator)
            linear.lora_a_ERI.data.copy_(a_ERI)
            linear.scaling_E.fill_(self.alpha / self.rank)
            linear.lora_a_ERI.requires_grad_(True)
            linear.lora_b_EOR.requires_grad_(True)
        if self.gradient_checkpointing:
            self.model.train()  # layers recompute only while training; there is no dropout to switch on
            self.decoder.enable_gradient_checkpointing()

    def setup(self, stage: str) -> None:
        self.configure_model()
        self.prepare_data_module([self.name])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, accuracy = self._loss(batch)
        self.log_dict({"train/loss": loss, "train/accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, accuracy = self._loss(batch)
        self.log_dict({"val/loss": loss, "val/accuracy": accuracy}, prog_bar=True, batch_size=1)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.adapter().write(self.output_dir / self.name)
            rank_zero_info(f"wrote the adapter {self.name!r} to {self.output_dir / self.name}")

    def adapter(self) -> Adapter:
        """The adapter as it stands, in PEFT's terms, with weights in bfloat16 to halve the file."""
        paths = self.decoder.linears
        config = AdapterConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=target_suffixes(paths),
            base_model_name_or_path=self.base,
            layers_to_transform=sorted({layer_index(path) for path in paths}),
            alora_invocation_tokens=self._invocation_tokens(),
        )
        tensors = {}
        for path, linear in paths.items():
            weights = linear.get_slot(0, self.rank)
            tensors[f"base_model.model.{path}.lora_A.weight"] = weights.a_RI.bfloat16()
            tensors[f"base_model.model.{path}.lora_B.weight"] = weights.b_OR.bfloat16()
        return Adapter.from_tensors(config, tensors)

    def _invocation_tokens(self) -> list[int] | None:
        """The header of a user message: its last occurrence is where PEFT, like the policy `turn`, activates."""
        if self.tokenizer.chat_template is None:
            return None
        text = "x"
        prompt = render(self.tokenizer, [{"role": "user", "content": text}])
        start = prompt.starts.get("turn", 0)
        header = self.tokenizer.decode(prompt.token_ids[start:]).split(text)[0]
        ids: list[int] = self.tokenizer(header, add_special_tokens=False)["input_ids"]
        return ids

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        foreign = batch.domains == OTHER
        slots = torch.where(foreign & batch.rest, NO_ADAPTER, 0).to(torch.int32)[..., None]
        request = RouteRequest(batch.start, slots=slots, gates=torch.ones_like(slots, dtype=torch.float32))
        with self.decoder.requested(request):
            hidden = self.forward_hidden(batch)
        return self.lm_loss(hidden, torch.where(foreign, IGNORE, batch.targets))


@dataclass(frozen=True)
class RouterLosses:
    """Weights of what shapes the router; a weight of 0 leaves the term out and saves its work.

    Args:
        label: cross entropy against the domains of the data, a column each.
        lm: the language model loss, through straight-through gates; needs no labels.
        balance: Switch's load-balance loss, 1 when all columns are used alike.
        z: squared log-partition, which keeps scores small.
    """

    label: float = 1.0
    lm: float = 0.0
    balance: float = 0.0
    z: float = 1e-4

    def __post_init__(self) -> None:
        if min(self.label, self.lm, self.balance, self.z) < 0 or self.label + self.lm == 0:
            raise ValueError(f"router loss weights {self} must be 0 or more, and label or lm above 0.")


class RouterTraining(_FrozenBase):
    """Trains a router over frozen adapters, and writes a bank with both.

    Args:
        adapters: PEFT folders; each folder's name is the adapter's, and the domain of the data that it answers.
        output: the bank's folder; an older bank there is replaced when training ends.
        base: local folder or hub name of the base model.
        bank_name: the bank's name; None takes the folder's.
        router: how the router is built and how its scores become gates.
        router_layer: the layer whose input the router reads.
        max_rank: the rank that the bank's slots are padded to; None takes the largest adapter's.
        activation: the policy that the bank and its adapters record as their default.
        losses: weights of the losses.
        schedule: of the learning rate.
        dtype: of the frozen base; the router itself runs in float32.
        keep_rows: keep the router's inputs of the training rows in host memory (H values a token), so that only the
            first epoch runs the base. Only without the language model loss, which needs the whole model each time.
        seed: of the router's initial weights.
    """

    def __init__(
        self,
        adapters: Sequence[str],
        output: str,
        base: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        bank_name: str | None = None,
        router: RouterConfig = RouterConfig(),  # noqa: B008 - frozen
        router_layer: int = 8,
        max_rank: int | None = None,
        activation: Activation = "turn",
        losses: RouterLosses = RouterLosses(),
        schedule: Schedule = Schedule(),
        dtype: str = "auto",
        keep_rows: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base, dtype, schedule)
        if keep_rows and losses.lm:
            raise ValueError("keep_rows works without the language model loss only; set losses.lm to 0.")
        self.keep_rows = keep_rows
        self._kept: dict[int, Tensor] = {}
        self.folders = {check_name(Path(folder).name): Path(folder) for folder in adapters}
        self.output = Path(output)
        self.bank_name = check_name(bank_name or self.output.name)
        self.router_config, self.router_layer = router, router_layer
        self.max_rank, self.activation, self.losses, self.seed = max_rank, activation, losses, seed

    def configure_model(self) -> None:
        if hasattr(self, "decoder"):
            return
        self.load_base()
        adapters = {name: Adapter.read(folder) for name, folder in self.folders.items()}
        modules = check_adapters(self.model, adapters)
        self.max_rank = self.max_rank or max(adapter.max_rank for adapter in adapters.values())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            hidden_size = self.model.config.get_text_config(decoder=True).hidden_size  # type: ignore[union-attr]
            self.router = KeyRouter(self.router_config, hidden_size, len(adapters) + 1)
        self.decoder = RoutedDecoder(
            self.model,
            modules,
            num_slots=len(adapters),
            max_rank=self.max_rank,
            router_layer=self.router_layer,
            router=self.router,
            column_slots=range(len(adapters)),
            impl="torch",
        )
        for slot, adapter in enumerate(adapters.values()):
            self.decoder.set_adapter(slot, adapter)

    def setup(self, stage: str) -> None:
        self.configure_model()
        self.prepare_data_module([BASE, *self.folders])  # a domain's index is its adapter's column

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, metrics = self._loss(batch)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        _, metrics = self._loss(batch)
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, prog_bar=True, batch_size=1)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.write_bank()
            rank_zero_info(f"wrote the bank {self.bank_name!r} to {self.output}")

    def write_bank(self) -> None:
        assert self.max_rank is not None
        with TemporaryDirectory() as scratch, atomic_directory(self.output) as folder:
            bank = Bank.create(
                Path(scratch) / self.bank_name,
                name=self.bank_name,
                base=BaseInfo(self.base, base_digest(self.base_dir)),
                router_layer=self.router_layer,
                max_rank=self.max_rank,
                activation=self.activation,
            )
            for name, path in self.folders.items():
                bank.add(path, name=name, activation=self.activation, routable=True)
            bank.set_router(self.router.cpu())
            shutil.copytree(bank.path, folder, dirs_exist_ok=True)

    def _router_input(self, batch: Batch) -> Tensor:
        """Base hidden states [B, L, H] at the router layer; they never change, so training rows are kept."""
        keep = self.training and self.keep_rows
        rows = batch.rows.tolist()
        if not (keep and all(row in self._kept for row in rows)):
            hidden = self.decoder.router_input(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            )
            if keep:
                self._kept.update(zip(rows, hidden.cpu(), strict=True))
            return hidden
        return torch.stack([self._kept[row] for row in rows]).to(self.device)

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.losses
        metrics: dict[str, Tensor] = {}
        if weights.lm:
            request = RouteRequest(batch.start, auto=torch.ones_like(batch.start, dtype=torch.bool))
            with self.decoder.requested(request):
                hidden = self.forward_hidden(batch)
                record = self.decoder.routes.record
            assert record is not None
            assert record.logits is not None
            metrics["lm"], metrics["accuracy"] = self.lm_loss(hidden, batch.targets)
            logits = record.logits
        else:
            logits = self.router.scores(self._router_input(batch))
        active = batch.position_ids >= batch.start
        # Routes depend on base states alone, so a label teaches wherever it stands, active or not.
        logits_NC, columns_N = logits.flatten(0, 1), batch.domains.flatten()
        columns_N = torch.where(columns_N < 0, IGNORE, columns_N)
        labelled = columns_N != IGNORE
        metrics["label"] = label_loss(logits_NC, columns_N)
        metrics["balance"], metrics["z"] = load_balance_loss(logits_NC[active.flatten()]), z_loss(logits_NC)
        metrics["routed_right"] = (logits_NC.argmax(-1) == columns_N)[labelled].float().mean()
        loss = sum(weight * metrics[name] for name, weight in vars(weights).items() if weight)
        metrics["loss"] = loss
        return loss, metrics
