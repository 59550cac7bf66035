"""Cross entropy behind a frozen head, without keeping logits.

Legend: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGITS = 1 << 28  # at a time


@dataclass(frozen=True)
class Head:
    """A model's head, as it is: frozen.

    Attributes:
        weight_VH, bias_V: of its linear.
        scale: what its products are multiplied by.
        softcap: logits end below it, by tanh; None is no limit.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """What stands between a Hugging Face model's last hidden states and its logits."""
        linear, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere's
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite's
        return cls(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None))  # Gemma's

    def logits(self, hidden: Tensor) -> Tensor:
        return _shaped(F.linear(hidden, self.weight_VH, self.bias_V), self.scale, self.softcap)


@torch.no_grad()
def check_head(model: Any) -> None:
    """
    Raises:
        ValueError: the model's logits are not what `Head` makes of its hidden states; training would go wrong.
    """
    device, head = model.device, Head.of(model)
    ids = torch.arange(4, device=device)[None] % len(head.weight_VH)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    logits, theirs = head.logits(hidden).float(), model(input_ids=ids, use_cache=False).logits.float()
    if not (logits - theirs).norm() <= 0.02 * theirs.norm():
        raise ValueError(
            f"the head of {type(model).__name__} does more to its logits than is known here; training is not supported."
        )


def frozen_cross_entropy(hidden_NH: Tensor, head: Head, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss, float32 [N], and whether the likeliest token is the target, as 0 or 1, float32 [N].

    The gradient to the hidden states is made in the forward pass, a part of the tokens at a time: logits are computed
    once, and never kept.
    """
    losses: tuple[Tensor, Tensor] = _FrozenCrossEntropy.apply(hidden_NH, head, targets_N)  # type: ignore[no-untyped-call]
    return losses


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head: Head, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        at_once = max(1, MAX_LOGITS // len(head.weight_VH))
        part: Any = _part if ctx.needs_input_grad[0] else _losses
        parts = [
            part(hidden_NH[begin : begin + at_once], head, targets_N[begin : begin + at_once])
            for begin in range(0, max(1, len(hidden_NH)), at_once)
        ]
        loss_N, is_right_N, *gradient = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(*gradient)
        ctx.mark_non_differentiable(is_right_N)
        return loss_N, is_right_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        return (gradient_NH * gradients[0][:, None]).to(gradient_NH.dtype), None, None


def _losses(hidden_NH: Tensor, head: Head, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden_NH.device.type, enabled=False):
        logits_NV = head.logits(hidden_NH)
        loss_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
        return loss_N, (logits_NV.argmax(-1) == targets_N).float()


def _part(hidden_NH: Tensor, head: Head, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden_NH.device.type, enabled=False):
        logits_NV = F.linear(hidden_NH, head.weight_VH, head.bias_V)
        differentiate = _compiled() if hidden_NH.is_cuda else _differentiate
        loss_N, is_right_N, gradient_NV = differentiate(logits_NV, targets_N, head.scale, head.softcap)
        return loss_N, is_right_N, gradient_NV @ head.weight_VH


def _differentiate(
    products_NV: Tensor, targets_N: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, who is right, and the gradient to the head's products."""
    logits_NV = _shaped(products_NV, scale, softcap)
    log_probs_NV = logits_NV.log_softmax(-1)
    is_target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets_N[:, None]
    gradient_NV = (log_probs_NV.exp() - is_target_NV.float()) * scale
    if softcap is not None:
        gradient_NV = gradient_NV * (1 - (logits_NV / softcap) ** 2)
    loss_N = -log_probs_NV.gather(1, targets_N[:, None])[:, 0]
    return loss_N, (logits_NV.argmax(-1) == targets_N).float(), gradient_NV.to(products_NV.dtype)


def _shaped(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = products.float() * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@cache
def _compiled() -> Any:
    """Three passes over the logits instead of ten."""
    return torch.compile(_differentiate, dynamic=True)
