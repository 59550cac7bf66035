"""Losses that shape a router, of scores `logits_NC` in float32.

Legend: N tokens, C columns (base and adapters), D key size, G groups of tokens, F of which something is known.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.router import prototype


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


def newcomer_loss(queries_ND: Tensor, keys_CD: Tensor, groups_N: Tensor, means_GD: Tensor) -> Tensor:
    """Cross entropy where each group of tokens, one at a time, is of an adapter that came later, by a prototype's key.

    A group that has a column lacks it then. Its own tokens are to find the prototype, and all others the column that
    they have anyway; both count alike, and so does each group. 0 where no group has a prototype.

    Args:
        queries_ND: float32.
        groups_N: int64, 0 for base, c for the adapter of column c, C and above for what else is known to be alike,
            which base has; below 0 is left out.
        means_GD: float32, the mean of each group's queries elsewhere; 0 where nothing is known.
    """
    num_columns, scale = len(keys_CD), keys_CD.shape[1] ** -0.5
    has_mean_G = means_GD.any(1)
    has_mean_G[0] = False
    found_F = has_mean_G.nonzero()[:, 0]
    if not len(found_F):
        return queries_ND.sum() * 0
    with torch.autocast(queries_ND.device.type, enabled=False):
        known_N = groups_N >= 0
        queries_ND, groups_N = queries_ND[known_N], groups_N[known_N]
        logits_NC, logits_NF = (
            queries_ND @ keys.T * scale for keys in (keys_CD, prototype(means_GD[found_F], keys_CD))
        )
        lacking_FC = found_F[:, None] == torch.arange(num_columns, device=groups_N.device)
        sum_NF = torch.logaddexp(logits_NC[:, None].masked_fill(lacking_FC, -torch.inf).logsumexp(-1), logits_NF)
        is_own_NF = groups_N[:, None] == found_F
        columns_N1 = torch.where(groups_N < num_columns, groups_N, 0)[:, None]
        losses_NF = sum_NF - torch.where(is_own_NF, logits_NF, logits_NC.gather(1, columns_N1))
        sides = []
        for side_NF in (is_own_NF, ~is_own_NF):
            count_F = side_NF.sum(0)
            mean_F = (losses_NF * side_NF).sum(0) / count_F.clamp(min=1)
            sides.append(mean_F.sum() / (count_F > 0).sum().clamp(min=1))
        return (sides[0] + sides[1]) / 2
