"""Training activated LoRAs, one or several side by side, each written as a PEFT folder.

Legend: B rows, L tokens a row, H hidden size, E adapters, R rank, I in-features, O out-features.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from molora.activation import render
from molora.adapter import Adapter, AdapterConfig, check_above_zero, check_whole, layer_index, target_suffixes
from molora.bank import check_name
from molora.display import joined
from molora.files import atomic_directory
from molora.injection import linears_of_layers
from molora.training.batches import OTHER, Batch
from molora.training.examples import IGNORE
from molora.training.frozen import FrozenBase, Schedule
from molora.training.stack import LoraStack, linears_named

T = TypeVar("T")
RANK, ALPHA = 8, 16.0
USUAL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdapterTraining(FrozenBase):
    """Trains activated LoRAs in layers from the router layer on, and writes each as a PEFT folder.

    Several share the passes through the frozen base, and nothing else: each has its own rows, its own mean loss and its
    own gradient norm to be clipped, so that it becomes what it would have become alone.

    The adapter acts on a conversation from an activation point that the data module varies. In a conversation whose
    parts have domains, it learns only its own parts; on those of others, and here and there on its own question, it
    acts or rests at random, as it will when a router shares the conversation among several adapters; or something is
    written there that is not its own.

    Args:
        name: the adapter's name, and the domain of the data that it learns; or a list, to train several.
        output_dir: where each PEFT folder `<output_dir>/<name>` is written.
        base: local folder or hub name of the base model.
        rank, alpha: of the LoRA, whose scaling is alpha / rank; of several, one for all, or by their names.
        target_modules: last components of the linears to adapt; of the usual seven, those that the base has.
        router_layer: the first layer that is adapted, and the one whose input a router will read.
        invocation: the text of the user message that invokes it, where it is a function that is called behind a
            conversation (see docs/functions.md); of several, by their names. None: any user message does.
        schedule: of the learning rate.
        dtype: of the frozen base; the adapter itself is trained in float32.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
        compile: run the decoder layers through torch.compile, which takes a minute at first; None does on a GPU.
        seed: of the adapter's initial weights.

    Raises:
        ValueError: a setting is out of its range, or names do not fit each other.
    """

    def __init__(
        self,
        name: str | list[str],
        output_dir: str = "runs/adapters",
        base: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        rank: int | dict[str, int] = RANK,
        alpha: float | dict[str, float] = ALPHA,
        target_modules: Sequence[str] = USUAL_LINEARS,
        router_layer: int = 8,
        invocation: str | dict[str, str] | None = None,
        schedule: Schedule = Schedule(),
        dtype: str = "auto",
        gradient_checkpointing: bool = False,
        compile: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(base, dtype, schedule, compile, gradient_checkpointing)
        self.names = [check_name(each) for each in ([name] if isinstance(name, str) else name)]
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"name is {name!r}; expected one name, or several different ones.")
        self.invocations: dict[str, str | None] = _of_each(self.names, "invocation", invocation)
        self.ranks, self.alphas = _of_each(self.names, "rank", rank), _of_each(self.names, "alpha", alpha)
        for own_rank, own_alpha in zip(self.ranks.values(), self.alphas.values(), strict=True):
            check_whole("rank", own_rank)
            check_above_zero("alpha", own_alpha)
        check_whole("router_layer", router_layer, 0)
        if isinstance(target_modules, str) or not target_modules:
            raise ValueError(f"target_modules is {target_modules!r}; expected a list of linears' names.")
        self.output_dir, self.target_modules = Path(output_dir), tuple(target_modules)
        self.rank, self.alpha, self.invocation = rank, alpha, invocation  # as they were given
        self.router_layer, self.seed = router_layer, seed

    def configure_model(self) -> None:
        if hasattr(self, "stack"):
            return
        self.load_base()
        above = [path for path in linears_of_layers(self.model) if layer_index(path) >= self.router_layer]
        known = set(target_suffixes(above))
        strange = sorted(set(self.target_modules) - known)
        is_usual = set(self.target_modules) == set(USUAL_LINEARS) and not known.isdisjoint(USUAL_LINEARS)
        if strange and not is_usual:
            raise ValueError(
                f"target_modules names {joined(strange)}; no linear from layer {self.router_layer} on is so called; "
                f"there are {joined(target_suffixes(above)) or 'none'}."
            )
        paths = linears_named(self.model, self.target_modules)
        paths = [path for path in paths if layer_index(path) >= self.router_layer]
        self.stack = LoraStack(self.model, paths, ranks=[*self.ranks.values()], alphas=[*self.alphas.values()])
        self.stack.reset(self.seed)

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
        metrics = {"val/loss": loss_E.mean(), "val/accuracy": accuracy_E.mean()}
        self.log_dict(metrics, prog_bar=True, batch_size=1, sync_dist=True)
        self._log_each("val", loss_E)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By norm, which is each adapter's own."""
        if gradient_clip_val and gradient_clip_algorithm != "value":
            self.stack.clip_gradients(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def settings(self) -> dict[str, Any]:
        return {
            "name": self.names,
            "rank": self.rank,
            "alpha": self.alpha,
            "target_modules": sorted(self.target_modules),
            "router_layer": self.router_layer,
        }

    def write(self) -> None:
        """Write the adapters."""
        for name, adapter in self.adapters().items():
            target = self.output_dir / name
            with atomic_directory(target) as folder:
                if target.is_dir():  # a card may lie there
                    shutil.copytree(target, folder, dirs_exist_ok=True)
                adapter.write(folder)
            rank_zero_info(f"wrote the adapter {name!r} to {target}")

    def adapters(self) -> dict[str, Adapter]:
        """The adapters as they stand, in PEFT's terms, with weights in bfloat16 to halve the files."""
        paths = self.stack.linears
        adapters = {}
        for index, name in enumerate(self.names):
            config = AdapterConfig(
                r=self.ranks[name],
                lora_alpha=self.alphas[name],
                target_modules=target_suffixes(paths),
                base_model_name_or_path=self.base,
                layers_to_transform=sorted({layer_index(path) for path in paths}),
                alora_invocation_tokens=self._invocation_tokens(self.invocations[name]),
            )
            tensors = {}
            for path, weights in self.stack.weights(index).items():
                tensors[f"base_model.model.{path}.lora_A.weight"] = weights.a_RI.bfloat16()
                tensors[f"base_model.model.{path}.lora_B.weight"] = weights.b_OR.bfloat16()
            adapters[name] = Adapter.from_tensors(config, tensors)
        return adapters

    def _invocation_tokens(self, invocation: str | None) -> list[int] | None:
        """What PEFT activates from the last occurrence of: a whole user message, or the header of any.

        Either way that is where the policy `turn` activates, if the invocation is the last user message.
        """
        if self.tokenizer.chat_template is None:
            return None
        if invocation is not None:
            asked = render(self.tokenizer, [{"role": "user", "content": invocation}])
            return list(asked.token_ids[asked.starts.get("turn", 0) : asked.starts.get("response")])
        text = "molora"
        prompt = render(self.tokenizer, [{"role": "user", "content": text}])
        start = prompt.starts.get("turn", 0)
        header = self.tokenizer.decode(prompt.token_ids[start:]).split(text)[0]
        ids: list[int] = self.tokenizer(header, add_special_tokens=False)["input_ids"]
        return ids

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss [E] and accuracy [E] of each adapter on its own rows."""
        self.stack.act((batch.position_ids >= batch.start) & ~batch.rest, batch.signs)
        hidden = self.forward_hidden(batch)
        targets = torch.where(batch.domains == OTHER, IGNORE, batch.targets)
        return self.lm_losses(hidden, targets, num_groups=len(self.names))

    def _log_each(self, split: str, loss_E: Tensor) -> None:
        if len(self.names) > 1:
            values = {f"{split}/{name}/loss": loss for name, loss in zip(self.names, loss_E, strict=True)}
            self.log_dict(values, batch_size=1, sync_dist=split == "val")


def _of_each(names: Sequence[str], setting: str, value: T | Mapping[str, T]) -> dict[str, T]:
    """
    Raises:
        ValueError: it is given by name, and not for all.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    if missing := sorted(set(names) - set(value)):
        raise ValueError(f"{setting} is given for {joined(map(repr, sorted(value)))}; add one for {missing[0]!r}.")
    return {name: value[name] for name in names}
