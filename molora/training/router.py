"""Training a router over frozen adapters, written as a bank.

Legend: N tokens, C router columns.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from molora.activation import Activation
from molora.adapter import Adapter
from molora.bank import BANK_FILE, Bank, BaseInfo, check_base_name, check_name, copy_other_files
from molora.digest import base_digest
from molora.files import atomic_directory
from molora.injection import RoutedDecoder, check_adapters, text_config
from molora.losses import label_loss, load_balance_loss, z_loss
from molora.router import KeyRouter, RouterConfig
from molora.routing import RouteRequest
from molora.training.data import Batch
from molora.training.examples import BASE, IGNORE
from molora.training.frozen import FrozenBase, Schedule


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
        if keep_rows and losses.lm:
            raise ValueError("keep_rows works without the language model loss only; set losses.lm to 0.")
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
            bank.set_router(copy.deepcopy(self.router).cpu())
            copy_other_files(self.output, folder)
            shutil.copytree(bank.path, folder, dirs_exist_ok=True)
        rank_zero_info(f"wrote the bank {self.bank_name!r} to {self.output}")

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
