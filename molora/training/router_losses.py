"""What shapes a router in training: the weights of its losses, which tokens they count, and a memory of newcomers.

Legend: N tokens, D key size, G groups of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molora.losses import newcomer_loss
from molora.router import Float32Module, KeyRouter
from molora.training.batches import Batch
from molora.training.examples import IGNORE

NUM_FIRST = 6  # tokens of an answer's part that count as its first ones
MAX_GROUPS = 256  # of tokens that a router may practise on as newcomers
MEAN_SHARE = 0.1  # of a batch, in the mean of a group's queries


@dataclass(frozen=True)
class RouterLosses:
    """Weights of what shapes the router; a weight of 0 leaves the term out and saves its work.

    Args:
        label: cross entropy against the domains of the data, a column each.
        parts: the same on those tokens alone that write the first six tokens of an answer or of a part of it: a few in
            a conversation, where it is decided whose turn comes next, behind marks that may be new.
        token: the loss to be expected on the next token if base or an adapter were drawn by the router's probabilities,
            each acting from the activation point on; needs no labels, and a forward for each. A token of the question
            has what each loses in the answer.
        lm: the language model loss, through straight-through gates; needs no labels.
        given: the language model loss where the labels' adapters act. It keeps the router's own LoRA from disturbing
            what they read, and needs the whole model where the labels alone stop at the router layer.
        drift: how far the router's own LoRA moves what enters the router layer, as the mean square of the change over
            that of the base's, channel by channel.
        balance: Switch's load-balance loss, 1 when all columns are used alike.
        switch: how likely neighbours would be given different columns, drawn by the router's probabilities; of active
            tokens whose labels, where both have one, are the same.
        newcomer: cross entropy against the domains where one domain, or one task that base has, is an adapter that
            came later: the mean of its queries in the batches before is its key in this one. It trains the query
            network and the keys, and not the router's own LoRA, which would no longer learn whose turn comes next.
        z: squared log-partition, which keeps scores small.
    """

    label: float = 1.0
    parts: float = 0.0
    token: float = 0.0
    lm: float = 0.0
    given: float = 0.0
    drift: float = 0.0
    balance: float = 0.0
    switch: float = 0.0
    newcomer: float = 0.0
    z: float = 1e-4

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0 or self.label + self.token + self.lm == 0:
            raise ValueError(f"router loss weights {self} must be 0 or more, and label, token or lm above 0.")
        if self.lm and self.given:
            raise ValueError(
                "losses.lm lets the router's adapters act, losses.given the labels'; set one of them to 0."
            )

    @property
    def needs_labels(self) -> bool:
        return bool(self.label or self.parts or self.given or self.newcomer)

    @property
    def needs_whole_model(self) -> bool:
        return bool(self.token or self.lm or self.given)


class Newcomers(Float32Module):
    """The means of each group's queries over the batches before, as keys by which a router practises to know newcomers.

    Attributes:
        means_GD: float32, 0 for a group that no batch has had.
    """

    means_GD: Tensor

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        self.register_buffer("means_GD", torch.zeros(MAX_GROUPS, key_dim, dtype=torch.float32))

    def loss(self, router: KeyRouter, entered: Tensor, batch: Batch, active: Tensor) -> Tensor:
        """`newcomer_loss` by the means that are known so far, which have the gradient of the batch's own.

        Args:
            entered: hidden states [B, L, H] at the router layer, which get no gradient.
            active: bool [B, L].
        """
        groups_N = torch.where(active & (batch.groups < MAX_GROUPS), batch.groups, IGNORE).flatten()
        known_N = groups_N >= 0
        groups_N, queries_ND = groups_N[known_N], router.queries(entered.detach()).flatten(0, 1)[known_N]
        count_G1 = torch.bincount(groups_N, minlength=MAX_GROUPS)[:, None]
        here_GD = torch.zeros_like(self.means_GD).index_add(0, groups_N, queries_ND) / count_G1.clamp(min=1)
        is_known_G1 = self.means_GD.any(1, keepdim=True)
        means_GD = self.means_GD + is_known_G1 * (here_GD - here_GD.detach())
        loss = newcomer_loss(queries_ND, router.keys_CD, groups_N, means_GD)
        if self.training:
            share_G1 = torch.where(is_known_G1, here_GD.new_tensor(MEAN_SHARE), 1.0) * (count_G1 > 0)
            self.means_GD = self.means_GD.lerp(here_GD.detach(), share_G1)
        return loss


def begin_parts(batch: Batch) -> Tensor:
    """Whether a token [N] writes one of the first `NUM_FIRST` tokens of an answer, or of one of its parts."""
    writes_N, domains_N = (batch.targets != IGNORE).flatten(), batch.domains.flatten()
    goes_on_N = writes_N & writes_N.roll(1) & (domains_N == domains_N.roll(1)) & (batch.position_ids.flatten() > 0)
    found_N = writes_N & ~goes_on_N
    for _ in range(NUM_FIRST - 1):
        found_N = found_N | (found_N.roll(1) & goes_on_N)
    return found_N


def neighbours(batch: Batch, active: Tensor) -> Tensor:
    """Whether a token [N] and the one before it are active, of one conversation, and not of different domains."""
    active_N, domains_N = active.flatten(), batch.domains.flatten()
    before_N = domains_N.roll(1)
    agree_N = (domains_N == before_N) | (domains_N == IGNORE) | (before_N == IGNORE)
    return active_N & active_N.roll(1) & (batch.position_ids.flatten() > 0) & agree_N
