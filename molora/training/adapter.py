"""Training one activated LoRA, written as a PEFT folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from molora.activation import render
from molora.adapter import Adapter, AdapterConfig, layer_index, target_suffixes
from molora.bank import check_name
from molora.injection import RoutedDecoder
from molora.routing import NO_ADAPTER, RouteRequest
from molora.training.data import OTHER, Batch
from molora.training.examples import IGNORE
from molora.training.frozen import FrozenBase, Schedule


class AdapterTraining(FrozenBase):
    """Trains one activated LoRA in layers from the router layer on, and writes it as a PEFT folder.

    The adapter acts on a conversation from an activation point that the data module varies. In a conversation whose
    parts have domains, it learns only its own parts; on those of others, and here and there on its own question, it
    acts or rests at random, as it will when a router shares the conversation among several adapters.

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
        self.prepare_data_module([self.name], labels_needed=False)

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
        text = "molora"
        prompt = render(self.tokenizer, [{"role": "user", "content": text}])
        start = prompt.starts.get("turn", 0)
        header = self.tokenizer.decode(prompt.token_ids[start:]).split(text)[0]
        ids: list[int] = self.tokenizer(header, add_special_tokens=False)["input_ids"]
        return ids

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        slots = torch.where(batch.rest, NO_ADAPTER, 0).to(torch.int32)[..., None]
        request = RouteRequest(batch.start, slots=slots, gates=torch.ones_like(slots, dtype=torch.float32))
        with self.decoder.requested(request):
            hidden = self.forward_hidden(batch)
        return self.lm_loss(hidden, torch.where(batch.domains == OTHER, IGNORE, batch.targets))
