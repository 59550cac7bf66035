"""Losses that shape a router, of scores `logits_NC` in float32.

Legend: N tokens, C columns (base and adapters), D key size, G groups of tokens.
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


def newcomer_loss(queries_ND: Tensor, keys_CD: Tensor, groups_N: Tensor, is_support_N: Tensor) -> Tensor:
    """Cross entropy where each group of tokens, one at a time, is of an adapter that came later, by a prototype's key.

    The prototype is that of the group's tokens in the support. A group that has a column lacks it then. What is to be
    found is the prototype by the group's tokens outside of the support, and by all others the column that they have
    anyway; both count alike. 0 where no group has tokens on both sides.

    Args:
        queries_ND: float32.
        groups_N: int64, 0 for base, c for the adapter of column c, C and above for what else is known to be alike,
            which base has; below 0 is left out.
        is_support_N: bool.
    """
    num_columns = len(keys_CD)
    known_N = groups_N >= 0
    queries_ND, groups_N, is_support_N = queries_ND[known_N], groups_N[known_N], is_support_N[known_N]
    of_support, of_others = (set(groups_N[side].tolist()) for side in (is_support_N, ~is_support_N))
    found = sorted((of_support & of_others) - {0})
    if not found:
        return queries_ND.sum() * 0
    found_G = torch.tensor(found, device=groups_N.device)
    own_GN = (found_G[:, None] == groups_N[is_support_N]).float()
    mean_GD = own_GN @ queries_ND[is_support_N] / own_GN.sum(1, keepdim=True)
    queries_ND, groups_N = queries_ND[~is_support_N], groups_N[~is_support_N]
    scale = keys_CD.shape[1] ** -0.5
    logits_NC, logits_NG = (queries_ND @ keys.T * scale for keys in (keys_CD, prototype(mean_GD, keys_CD)))
    lacking_GC = found_G[:, None] == torch.arange(num_columns, device=groups_N.device)
    logits_NGC = logits_NC[:, None].masked_fill(lacking_GC, -torch.inf)
    sum_NG = torch.logaddexp(logits_NGC.logsumexp(-1), logits_NG)
    is_own_NG = groups_N[:, None] == found_G
    columns_N1 = torch.where(groups_N < num_columns, groups_N, 0)[:, None]
    losses_NG = sum_NG - torch.where(is_own_NG, logits_NG, logits_NC.gather(1, columns_N1))
    sides = [losses_NG[side].sum() / side.sum().clamp(min=1) for side in (is_own_NG, ~is_own_NG)]
    return (sides[0] + sides[1]) / 2
