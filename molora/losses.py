"""Losses that shape a router. All take scores `logits_NC` in float32: N tokens, C columns (base and adapters)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def label_loss(logits_NC: Tensor, columns_N: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross entropy against the columns given; 0 where no token has one."""
    total = F.cross_entropy(logits_NC, columns_N, ignore_index=ignore_index, reduction="sum")
    return total / (columns_N != ignore_index).sum().clamp(min=1)


def load_balance_loss(logits_NC: Tensor) -> Tensor:
    """C * sum_c f_c P_c: f_c is the share of tokens whose top-1 is c, P_c the mean probability of c.

    1 when all columns are used alike, C when one takes everything. Switch Transformers (arXiv 2101.03961), eq. 4.
    """
    num_columns = logits_NC.shape[-1]
    probs_NC = torch.softmax(logits_NC, -1)
    share_C = F.one_hot(logits_NC.argmax(-1), num_columns).float().mean(0)
    return num_columns * (share_C * probs_NC.mean(0)).sum()


def z_loss(logits_NC: Tensor) -> Tensor:
    """Mean squared log-partition of the scores, which keeps them small. ST-MoE (arXiv 2202.08906), eq. 5."""
    return torch.logsumexp(logits_NC, -1).square().mean()


def switch_loss(logits_NC: Tensor, neighbours_N: Tensor) -> Tensor:
    """How likely a token and the one before it would be given different columns, drawn by their probabilities; a mean.

    Args:
        neighbours_N: bool, whether the token's route should be that of the one before it. The first token's is not
            read.
    """
    probs_NC = torch.softmax(logits_NC, -1)
    agree_N = (probs_NC[1:] * probs_NC[:-1]).sum(-1)
    wanted_N = neighbours_N[1:]
    return ((1 - agree_N) * wanted_N).sum() / wanted_N.sum().clamp(min=1)
