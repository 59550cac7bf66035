"""Training a router over adapters, written as a bank.

Legend: N tokens, E adapters, C router columns, K adapters a token.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from molora.activation import Activation
from molora.adapter import Adapter, check_whole, layer_index
from molora.bank import BANK_FILE, Bank, BaseInfo, check_base_name, check_name, copy_other_files
from molora.digest import base_digest
from molora.files import atomic_directory
from molora.injection import RoutedDecoder, check_adapters, linears_of_layers, text_config
from molora.losses import label_loss, load_balance_loss, switch_loss, z_loss
from molora.router import KeyRouter, RouterConfig
from molora.routing import NO_ADAPTER, RouteRecord, RouteRequest, Routes, RoutingLayer
from molora.training.batches import Batch
from molora.training.examples import BASE, IGNORE
from molora.training.frozen import FrozenBase, Schedule
from molora.training.loss import Head, frozen_cross_entropy
from molora.training.router_losses import Newcomers, RouterLosses, begin_parts, neighbours
from molora.training.router_statistics import RouterStatistics
from molora.training.stack import LoraStack


class StackRoutes(Routes):
    """Routes that a stack of adapters obeys: products of all ranks at once, which torch.compile understands."""

    def __init__(self, stack: LoraStack) -> None:
        self.stack = stack
        super().__init__(len(stack.values))

    def clear(self) -> None:
        super().clear()
        self.stack.rest()

    def fill(self, record: RouteRecord) -> None:
        slots_NK, gates_NK = record.slots.flatten(0, 1).long(), record.gates.flatten(0, 1)
        gates_NK = torch.where(slots_NK == NO_ADAPTER, 0.0, gates_NK)
        gates_NE = gates_NK.new_zeros(len(gates_NK), self.num_slots)
        self.stack.blend(gates_NE.scatter_add(1, slots_NK.clamp(min=0), gates_NK))
        self.record = record


class RouterTraining(FrozenBase):
    """Trains a router over adapters, which are frozen or go on learning, and writes a bank with both.

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
        adapter_lr: peak learning rate of the adapters, which then go on learning from losses.lm or losses.given; None
            leaves them as they are.
        dtype: of the frozen base; the router itself runs in float32.
        compile: run the decoder layers through torch.compile, which takes a minute at first; None does on a GPU.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
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
        adapter_lr: float | None = None,
        dtype: str = "auto",
        compile: bool | None = None,
        gradient_checkpointing: bool = False,
        keep_rows: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base, dtype, schedule, compile, gradient_checkpointing)
        if router.kind != "keys":
            raise ValueError(f"router.kind is {router.kind!r}, which learns nothing; expected 'keys'.")
        if adapter_lr is not None and not adapter_lr > 0:
            raise ValueError(f"adapter_lr is {adapter_lr}; expected a rate above 0, or null for frozen adapters.")
        if keep_rows and losses.needs_whole_model:
            raise ValueError(
                "keep_rows never runs the whole model, as losses.token, losses.lm and losses.given do; set them to 0."
            )
        if adapter_lr is not None and not (losses.lm or losses.given):
            raise ValueError("with adapter_lr, adapters learn from losses.lm or losses.given, and both are 0; set one.")
        if keep_rows and router.lora_rank:
            raise ValueError("keep_rows needs inputs that never change; with router.lora_rank they do. Set one to 0.")
        if losses.drift and not router.lora_rank:
            raise ValueError("losses.drift is of the router's own LoRA, and router.lora_rank is 0; set one of them.")
        if router.lora_rank and not router_layer:
            raise ValueError("router.lora_rank needs layers below the router layer, which is 0.")
        check_whole("router_layer", router_layer, 0)
        if max_rank is not None:
            check_whole("max_rank", max_rank)
        self.keep_rows = keep_rows
        self._kept: dict[int, Tensor] = {}
        by_name = adapters if isinstance(adapters, dict) else {Path(folder).name: folder for folder in adapters}
        if len(by_name) < len(adapters):
            raise ValueError(f"adapters {adapters} share a name; give them by name instead, as {{name: folder}}.")
        self.folders = {check_name(name): Path(folder) for name, folder in by_name.items()}
        self.output = Path(output)
        if self.output.exists() and any(self.output.iterdir()) and not (self.output / BANK_FILE).is_file():
            raise ValueError(f"output {self.output} exists and is no bank; name another folder, or empty it first.")
        self.bank_name = check_name(bank_name or self.output.name)
        self.router_config, self.router_layer = router, router_layer
        self.max_rank, self.activation, self.losses, self.seed = max_rank, activation, losses, seed
        self.adapter_lr = adapter_lr

    def configure_model(self) -> None:
        if hasattr(self, "decoder"):
            return
        self.load_base()
        adapters = {name: Adapter.read(folder) for name, folder in self.folders.items()}
        for name, adapter in adapters.items():
            check_base_name(name, adapter, self.base)  # now, and not when the bank is written
        if not adapters:
            raise ValueError("adapters names none.")
        modules = check_adapters(self.model, adapters)
        self._check_layers(adapters)
        rank = max(adapter.max_rank for adapter in adapters.values())
        self.max_rank = self.max_rank or rank
        if rank > self.max_rank:
            raise ValueError(f"max_rank is {self.max_rank}, and an adapter has rank {rank}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            hidden_size = text_config(self.model).hidden_size
            self.router = KeyRouter(self.router_config, hidden_size, len(adapters) + 1)
        if self.losses.newcomer:
            self.newcomers = Newcomers(self.router_config.key_dim)
        self.lora = self._own_lora()
        self.stack = LoraStack(self.model, modules, ranks=[rank] * len(adapters), alphas=[rank] * len(adapters))
        for index, adapter in enumerate(adapters.values()):
            self.stack.load(index, adapter.weights)
        self.stack.requires_grad_(self.adapter_lr is not None)
        self.decoder = RoutedDecoder(
            self.model,
            [],
            num_slots=len(adapters),
            max_rank=rank,
            router_layer=self.router_layer,
            router=self.router,
            column_slots=range(len(adapters)),
            routes=StackRoutes(self.stack),
        )

    def _check_layers(self, adapters: Mapping[str, Adapter]) -> None:
        for name, adapter in adapters.items():
            first = min(map(layer_index, adapter.weights))
            if first < self.router_layer:
                raise ValueError(
                    f"adapter {name!r} acts in layer {first}, below the router layer {self.router_layer}, so a router "
                    "cannot pick it; leave it out, or train it from the router layer on."
                )

    def _own_lora(self) -> LoraStack | None:
        config = self.router_config
        if not config.lora_rank:
            return None
        paths = [path for path in linears_of_layers(self.model) if layer_index(path) < self.router_layer]
        lora = LoraStack(self.model, paths, ranks=[config.lora_rank], alphas=[config.lora_alpha])
        lora.reset(self.seed)
        return lora

    def setup(self, stage: str) -> None:
        self.configure_model()
        self.prepare_data_module(
            [BASE, *self.folders], labels_needed=self.losses.needs_labels
        )  # a domain's index is its adapter's column

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, metrics, _ = self._loss(batch)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._statistics = RouterStatistics.zeros(self.router.num_columns, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        _, metrics, logits_NC = self._loss(batch)
        values = {f"val/{name}": value for name, value in metrics.items()}
        self.log_dict(values, prog_bar=True, batch_size=1, sync_dist=True)
        active_N = (batch.position_ids >= batch.start).flatten()
        labels_N = torch.where(active_N, batch.domains.flatten(), IGNORE)
        logits_NC = logits_NC / self.router_config.temperature
        counted_N = None if self.losses.needs_labels else active_N
        self._statistics += RouterStatistics.of(logits_NC, labels_N, batch.position_ids.flatten(), counted_N=counted_N)

    def on_validation_epoch_end(self) -> None:
        statistics = self._statistics.map(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        if self.trainer.sanity_checking or not statistics.num_tokens:
            return
        values = {"entropy": statistics.mean_entropy, "switch_rate": statistics.switch_rate}
        if statistics.num_labelled:
            values["ece"] = statistics.ece
        self.log_dict({f"val/{name}": value for name, value in values.items()}, sync_dist=True)
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not loggers or not self.trainer.is_global_zero:
            return
        from molora.training.plots import draw  # its matplotlib takes a second

        for name, figure in draw(statistics, [BASE, *self.folders]).items():
            for logger in loggers:
                logger.experiment.add_figure(f"router/{name}", figure, self.trainer.global_step)

    def write(self) -> None:
        """Write the bank."""
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
            for name, path in self._trained_adapters(Path(scratch)).items():
                bank.add(path, name=name, activation=self.activation, routable=True)
            bank.set_router(self.trained_router())
            copy_other_files(self.output, folder)
            shutil.copytree(bank.path, folder, dirs_exist_ok=True)
        rank_zero_info(f"wrote the bank {self.bank_name!r} to {self.output}")

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.adapter_lr is None:
            return super().parameter_groups()
        others = [parameter for parameter in self.trained().values() if parameter is not self.stack.values]
        return [{"params": others}, {"params": [self.stack.values], "lr": self.adapter_lr}]

    def _trained_adapters(self, scratch: Path) -> dict[str, Path]:
        """Their folders: where they came from, or new ones, where they have gone on learning."""
        if self.adapter_lr is None:
            return self.folders
        written = {}
        for index, (name, folder) in enumerate(self.folders.items()):
            adapter, learned = Adapter.read(folder), self.stack.weights(index)
            tensors = {}
            for path, old in adapter.weights.items():
                b_OR = learned[path].b_OR[:, : old.rank] * (learned[path].scaling / old.scaling)
                tensors[f"base_model.model.{path}.lora_A.weight"] = learned[path].a_RI[: old.rank].to(old.a_RI.dtype)
                tensors[f"base_model.model.{path}.lora_B.weight"] = b_OR.to(old.b_OR.dtype)
            written[name] = scratch / "adapters" / name
            Adapter.from_tensors(adapter.config, tensors).write(written[name])
        return written

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

    def kept(self) -> dict[str, Tensor]:
        means = {"newcomers.means_GD": self.newcomers.means_GD} if self.losses.newcomer else {}
        return super().kept() | means

    def settings(self) -> dict[str, Any]:
        names = ("hidden_dim", "key_dim", "lora_rank", "lora_alpha")
        router = {f"router.{name}": getattr(self.router_config, name) for name in names}
        return {"adapters": list(self.folders), "router_layer": self.router_layer, **router}

    @torch.no_grad()
    def _losses_of_each(self, batch: Batch, active: Tensor) -> Tensor:
        """What base and each adapter alone lose on the tokens, float32 [B * L, C], less the least of them.

        A token that is learned has the loss of the next one. An active one before it has the mean over what is learned
        in its conversation; all others have 0.
        """
        if self.lora is not None:
            self.lora.rest()
        learned = (batch.targets != IGNORE).flatten()
        conversation_N = (batch.position_ids == 0).flatten().cumsum(0)
        nothing_N = torch.zeros(len(learned) + 1, dtype=torch.float32, device=self.device)
        count_N = nothing_N.index_add(0, conversation_N, learned.float())
        columns = []
        for column in range(1 + len(self.folders)):
            slots = torch.full_like(active, column - 1, dtype=torch.int32)[..., None]
            request = RouteRequest(batch.start, slots=slots, gates=torch.ones_like(slots, dtype=torch.float32))
            with self.decoder.requested(request):
                hidden = self.forward_hidden(batch).flatten(0, 1)
            loss, _ = frozen_cross_entropy(hidden[learned], Head.of(self.model), batch.targets.flatten()[learned])
            loss_N = nothing_N[1:].masked_scatter(learned, loss)
            total_N = nothing_N.index_add(0, conversation_N, loss_N)
            mean_N = (total_N / count_N.clamp(min=1))[conversation_N]
            columns.append(torch.where(learned, loss_N, torch.where(active.flatten(), mean_N, 0.0)))
        losses_NC = torch.stack(columns, -1)
        return losses_NC - losses_NC.amin(-1, keepdim=True)

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss, its parts, and the router's scores [N, C]."""
        weights = self.losses
        metrics: dict[str, Tensor] = {}
        active = batch.position_ids >= batch.start
        losses_NC = self._losses_of_each(batch, active) if weights.token else None
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
        metrics["parts"] = label_loss(logits_NC, torch.where(begin_parts(batch), columns_N, IGNORE))
        if losses_NC is not None:
            counted = losses_NC.amax(-1) > 0  # active, of a conversation of which something is learned
            probs_NC = (logits_NC[counted] / self.router_config.temperature).softmax(-1)
            metrics["token"] = (probs_NC * losses_NC[counted]).sum() / counted.sum().clamp(min=1)
        metrics["balance"], metrics["z"] = load_balance_loss(logits_NC[active.flatten()]), z_loss(logits_NC)
        metrics["switch"] = switch_loss(logits_NC / self.router_config.temperature, neighbours(batch, active))
        if weights.newcomer:
            metrics["newcomer"] = self.newcomers.loss(self.router, entered, batch, active)
        is_right_N = (logits_NC.argmax(-1) == columns_N) & labelled
        metrics["routed_right"] = is_right_N.sum() / labelled.sum().clamp(min=1)
        loss = sum(weight * metrics[name] for name, weight in vars(weights).items() if weight)
        metrics["loss"] = loss
        return loss, metrics, logits_NC


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
