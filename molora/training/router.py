"""Training a router over frozen adapters, written as a bank.

Legend: N tokens, C router columns.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from molora.activation import Activation
from molora.adapter import Adapter, layer_index
from molora.bank import BANK_FILE, Bank, BaseInfo, check_base_name, check_name, copy_other_files
from molora.digest import base_digest
from molora.files import atomic_directory
from molora.injection import RoutedDecoder, check_adapters, linears_of_layers, text_config
from molora.losses import label_loss, load_balance_loss, z_loss
from molora.router import KeyRouter, RouterConfig
from molora.routing import NO_ADAPTER, RouteRequest, RoutingLayer
from molora.training.data import Batch
from molora.training.examples import BASE, IGNORE
from molora.training.frozen import FrozenBase, Schedule
from molora.training.stack import LoraStack


@dataclass(frozen=True)
class RouterLosses:
    """Weights of what shapes the router; a weight of 0 leaves the term out and saves its work.

    Args:
        label: cross entropy against the domains of the data, a column each.
        lm: the language model loss, through straight-through gates; needs no labels.
        given: the language model loss where the labels' adapters act. It keeps the router's own LoRA from disturbing
            what they read, and needs the whole model where the labels alone stop at the router layer.
        drift: how far the router's own LoRA moves what enters the router layer, as the mean square of the change over
            that of the base's, channel by channel.
        balance: Switch's load-balance loss, 1 when all columns are used alike.
        z: squared log-partition, which keeps scores small.
    """

    label: float = 1.0
    lm: float = 0.0
    given: float = 0.0
    drift: float = 0.0
    balance: float = 0.0
    z: float = 1e-4

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0 or self.label + self.lm == 0:
            raise ValueError(f"router loss weights {self} must be 0 or more, and label or lm above 0.")
        if self.lm and self.given:
            raise ValueError(
                "losses.lm lets the router's adapters act, losses.given the labels'; set one of them to 0."
            )


class RouterTraining(FrozenBase):
    """Trains a router over frozen adapters, and writes a bank with both.

    Args:
        adapters: PEFT folders; each folder's name is the adapter's, and the domain of the data that it answers. Or
            folders by these names.
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
        adapters: list[str] | dict[str, str],
        output: str,
        base: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        bank_name: str | None = None,
        router: RouterConfig = RouterConfig(),
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
        if keep_rows and (losses.lm or losses.given):
            raise ValueError("keep_rows works without a language model loss only; set losses.lm and losses.given to 0.")
        if keep_rows and router.lora_rank:
            raise ValueError("keep_rows needs inputs that never change; with router.lora_rank they do. Set one to 0.")
        if losses.drift and not router.lora_rank:
            raise ValueError("losses.drift is of the router's own LoRA, and router.lora_rank is 0; set one of them.")
        if router.lora_rank and not router_layer:
            raise ValueError("router.lora_rank needs layers below the router layer, which is 0.")
        self.keep_rows = keep_rows
        self._kept: dict[int, Tensor] = {}
        by_name = adapters if isinstance(adapters, dict) else {Path(folder).name: folder for folder in adapters}
        self.folders = {check_name(name): Path(folder) for name, folder in by_name.items()}
        self.output = Path(output)
        if self.output.exists() and any(self.output.iterdir()) and not (self.output / BANK_FILE).is_file():
            raise ValueError(f"output {self.output} exists and is no bank; name another folder, or empty it first.")
        self.bank_name = check_name(bank_name or self.output.name)
        self.router_config, self.router_layer = router, router_layer
        self.max_rank, self.activation, self.losses, self.seed = max_rank, activation, losses, seed

    def configure_model(self) -> None:
        if hasattr(self, "decoder"):
            return
        self.load_base()
        adapters = {name: Adapter.read(folder) for name, folder in self.folders.items()}
        for name, adapter in adapters.items():
            check_base_name(name, adapter, self.base)  # now, and not when the bank is written
        modules = check_adapters(self.model, adapters)
        self.max_rank = self.max_rank or max(adapter.max_rank for adapter in adapters.values())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            hidden_size = text_config(self.model).hidden_size
            self.router = KeyRouter(self.router_config, hidden_size, len(adapters) + 1)
        self.lora = self._own_lora()
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

    def _own_lora(self) -> LoraStack | None:
        config = self.router_config
        if not config.lora_rank:
            return None
        paths = [path for path in linears_of_layers(self.model) if layer_index(path) < self.router_layer]
        lora = LoraStack(self.model, paths, num_adapters=1, rank=config.lora_rank, alpha=config.lora_alpha)
        lora.reset(self.seed)
        return lora

    def setup(self, stage: str) -> None:
        self.configure_model()
        self.prepare_data_module(
            [BASE, *self.folders], labels_needed=self.losses.lm == 0
        )  # a domain's index is its adapter's column

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, metrics = self._loss(batch)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        _, metrics = self._loss(batch)
        values = {f"val/{name}": value for name, value in metrics.items()}
        self.log_dict(values, prog_bar=True, batch_size=1, sync_dist=True)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.write()

    def write(self) -> None:
        """Write the bank."""
        self.has_written = True
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
            bank.set_router(self.trained_router())
            copy_other_files(self.output, folder)
            shutil.copytree(bank.path, folder, dirs_exist_ok=True)
        rank_zero_info(f"wrote the bank {self.bank_name!r} to {self.output}")

    def trained_router(self) -> KeyRouter:
        """The router as it stands, on the CPU; its LoRA in bfloat16, as adapters are written."""
        router = copy.deepcopy(self.router).cpu()
        if self.lora is not None:
            router.lora = {
                path: replace(weights, a_RI=weights.a_RI.bfloat16(), b_OR=weights.b_OR.bfloat16())
                for path, weights in self.lora.weights(0).items()
            }
        return router

    def _router_input(self, batch: Batch) -> Tensor:
        """Hidden states [B, L, H] at the router layer; without a LoRA they never change: training rows may be kept."""
        keep = self.training and self.keep_rows
        rows = batch.rows.tolist()
        if not (keep and all(row in self._kept for row in rows)):
            with torch.set_grad_enabled(self.lora is not None and torch.is_grad_enabled()):
                hidden = self.decoder.router_input(
                    input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
                )
            if keep:
                self._kept.update(zip(rows, hidden.cpu(), strict=True))
            return hidden
        return torch.stack([self._kept[row] for row in rows]).to(self.device)

    def _drift(self, entered: Tensor, batch: Batch, active: Tensor) -> Tensor:
        assert self.lora is not None
        self.lora.rest()
        with torch.no_grad():
            base_NH = self._router_input(batch)[active].float()
        change_NH = entered[active].float() - base_NH
        return (change_NH.square().mean(0) / base_NH.var(0).clamp(min=1e-6)).mean()

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.losses
        metrics: dict[str, Tensor] = {}
        active = batch.position_ids >= batch.start
        if self.lora is not None:
            self.lora.act(active)
        if weights.lm or weights.given:
            # The router is asked either way; where `auto` is False the labels' adapters act.
            request = RouteRequest(
                batch.start,
                auto=torch.full_like(active, bool(weights.lm)),
                slots=(batch.domains - 1).clamp(min=NO_ADAPTER)[..., None].int(),
                gates=torch.ones_like(active, dtype=torch.float32)[..., None],
            )
            with self.decoder.requested(request), _input_of(self.decoder.routing_layer) as entered_1:
                hidden = self.forward_hidden(batch)
                record = self.decoder.routes.record
            assert record is not None
            assert record.logits is not None
            name = "lm" if weights.lm else "given"
            metrics[name], metrics["accuracy"] = self.lm_loss(hidden, batch.targets)
            logits = record.logits
            entered = entered_1[0]
        else:
            entered = self._router_input(batch)
            logits = self.router.scores(entered)
        if weights.drift:
            metrics["drift"] = self._drift(entered, batch, active)
        logits_NC, columns_N = logits.flatten(0, 1), batch.domains.flatten()
        columns_N = torch.where(columns_N < 0, IGNORE, columns_N)
        # Routes that depend on base states alone are taught wherever a label stands, active or not.
        if self.lora is not None:
            columns_N = torch.where(active.flatten(), columns_N, IGNORE)
        labelled = columns_N != IGNORE
        metrics["label"] = label_loss(logits_NC, columns_N)
        metrics["balance"], metrics["z"] = load_balance_loss(logits_NC[active.flatten()]), z_loss(logits_NC)
        metrics["routed_right"] = (logits_NC.argmax(-1) == columns_N)[labelled].float().mean()
        loss = sum(weight * metrics[name] for name, weight in vars(weights).items() if weight)
        metrics["loss"] = loss
        return loss, metrics


@contextmanager
def _input_of(layer: RoutingLayer) -> Iterator[list[Tensor]]:
    """The hidden states that enter the layer in the forwards inside."""
    entered: list[Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield entered
    finally:
        handle.remove()
