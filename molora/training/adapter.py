"""Training activated LoRAs, one or several side by side, each written as a PEFT folder.

Legend: B rows, L tokens a row, H hidden size, E adapters, R rank, I in-features, O out-features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from molora.activation import render
from molora.adapter import Adapter, AdapterConfig, layer_index, target_suffixes
from molora.bank import check_name
from molora.injection import RoutedDecoder
from molora.routing import NO_ADAPTER, RouteRequest
from molora.training.data import OTHER, Batch
from molora.training.examples import IGNORE
from molora.training.frozen import FrozenBase, Schedule


class AdapterTraining(FrozenBase):
    """Trains activated LoRAs in layers from the router layer on, and writes each as a PEFT folder.

    Several share the passes through the frozen base, and nothing else: each has its own rows, its own mean loss and its
    own gradient norm to be clipped, so that it becomes what it would have become alone.

    The adapter acts on a conversation from an activation point that the data module varies. In a conversation whose
    parts have domains, it learns only its own parts; on those of others, and here and there on its own question, it
    acts or rests at random, as it will when a router shares the conversation among several adapters.

    Args:
        name: the adapter's name, and the domain of the data that it learns; or a list, to train several.
        output_dir: where each PEFT folder `<output_dir>/<name>` is written.
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
        name: str | list[str],
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
        self.names = [check_name(each) for each in ([name] if isinstance(name, str) else name)]
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"name is {name!r}; expected one name, or several different ones.")
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
            num_slots=len(self.names),
            max_rank=self.rank,
            router_layer=self.router_layer,
            dtype=torch.float32,
        )
        generator = torch.Generator().manual_seed(self.seed)
        for linear in self.decoder.linears.values():
            bound = 1 / math.sqrt(linear.in_features)  # PEFT's: Kaiming uniform with a = sqrt(5)
            a_RI = torch.empty(linear.lora_a_ERI.shape[1:]).uniform_(-bound, bound, generator=generator)
            linear.lora_a_ERI.data.copy_(a_RI)  # to all of them
            linear.scaling_E.fill_(self.alpha / self.rank)
            linear.lora_a_ERI.requires_grad_(True)
            linear.lora_b_EOR.requires_grad_(True)
        if self.gradient_checkpointing:
            self.model.train()  # layers recompute only while training; there is no dropout to switch on
            self.decoder.enable_gradient_checkpointing()

    def setup(self, stage: str) -> None:
        self.configure_model()
        self.prepare_data_module(self.names, apart=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss_E, accuracy_E = self._losses(batch)
        self.log_dict({"train/loss": loss_E.mean(), "train/accuracy": accuracy_E.mean()}, prog_bar=True)
        self._log_each("train", loss_E)
        return loss_E.sum()  # each adapter's gradient is that of its own loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss_E, accuracy_E = self._losses(batch)
        self.log_dict({"val/loss": loss_E.mean(), "val/accuracy": accuracy_E.mean()}, prog_bar=True, batch_size=1)
        self._log_each("val", loss_E)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By norm, which is each adapter's own."""
        if not gradient_clip_val or len(self.names) == 1 or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = [parameter.grad for parameter in self.trained().values() if parameter.grad is not None]
        norms_E = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors_E = (gradient_clip_val / (norms_E + 1e-6)).clamp(max=1.0)  # torch's clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factors_E[:, None, None])

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            for name, adapter in self.adapters().items():
                adapter.write(self.output_dir / name)
                rank_zero_info(f"wrote the adapter {name!r} to {self.output_dir / name}")

    def adapters(self) -> dict[str, Adapter]:
        """The adapters as they stand, in PEFT's terms, with weights in bfloat16 to halve the files."""
        paths = self.decoder.linears
        config = AdapterConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=target_suffixes(paths),
            base_model_name_or_path=self.base,
            layers_to_transform=sorted({layer_index(path) for path in paths}),
            alora_invocation_tokens=self._invocation_tokens(),
        )
        adapters = {}
        for slot, name in enumerate(self.names):
            tensors = {}
            for path, linear in paths.items():
                weights = linear.get_slot(slot, self.rank)
                tensors[f"base_model.model.{path}.lora_A.weight"] = weights.a_RI.bfloat16()
                tensors[f"base_model.model.{path}.lora_B.weight"] = weights.b_OR.bfloat16()
            adapters[name] = Adapter.from_tensors(config, tensors)
        return adapters

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

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss [E] and accuracy [E] of each adapter on its own rows."""
        slots = torch.where(batch.rest, NO_ADAPTER, batch.adapter[:, None]).to(torch.int32)[..., None]
        request = RouteRequest(batch.start, slots=slots, gates=torch.ones_like(slots, dtype=torch.float32))
        with self.decoder.requested(request):
            hidden = self.forward_hidden(batch)
        targets = torch.where(batch.domains == OTHER, IGNORE, batch.targets)
        if len(self.names) == 1:
            loss, accuracy = self.lm_loss(hidden, targets)
            return loss[None], accuracy[None]
        # One adapter's logits at a time: they take more memory than all else.
        hidden_EBLH, targets_EBL = (each.reshape(len(self.names), -1, *each.shape[1:]) for each in (hidden, targets))
        found = [
            checkpoint(self.lm_loss, *own, use_reentrant=False) for own in zip(hidden_EBLH, targets_EBL, strict=True)
        ]
        losses, accuracies = zip(*found, strict=True)
        return torch.stack(losses), torch.stack(accuracies)

    def _log_each(self, split: str, loss_E: Tensor) -> None:
        if len(self.names) > 1:
            values = {f"{split}/{name}/loss": loss for name, loss in zip(self.names, loss_E, strict=True)}
            self.log_dict(values, batch_size=1)
