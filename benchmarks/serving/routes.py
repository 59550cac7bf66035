"""Routes that are forced, so that a batch's tokens are spread over the adapters as a benchmark says.

The router stays a router with random keys, and computes all that one computes. One dimension of its query is made
constant, so that a key's entry there is added to the scores of its column; these entries are then fitted, on tokens
like those that will come, until each adapter is chosen for its share. Since an answer's tokens are as good as random
(see `models.random_model`), so are the routes of the tokens of a step. What share each adapter got is counted by the
engine and reported.

Legend: T tokens, C columns, H hidden size, D key size.
"""

import torch

from molora.model import MoLoRA
from molora.router import KeyRouter
from serving.shapes import NUM_ADAPTERS

SHARES = {
    "uniform": [1.0] * NUM_ADAPTERS,
    "zipf": [1 / rank for rank in range(1, NUM_ADAPTERS + 1)],
}
NUM_SEQUENCES, LENGTH = 16, 256  # to fit on
NUM_STEPS = 400
NOBODYS = -1e6  # the score of base, which is to be chosen for no token


@torch.no_grad()
def fit(m: MoLoRA) -> dict[str, torch.Tensor]:
    """For each of `SHARES`, what `force` puts into the keys. Nothing may run."""
    router = _router(m)
    router.query.weight[0] = 0.0
    router.query.bias[0] = 1.0
    router.keys_CD[:, 0] = 0.0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, m.model.config.vocab_size, (NUM_SEQUENCES, LENGTH), generator=generator)
    with m.lock:
        rows = [m.decoder.router_input(input_ids=row[None].to(m.decoder.device))[0] for row in ids]
        scores_TC = torch.cat([router.scores(row) for row in rows]).cpu()
    scale = router.config.key_dim**0.5
    return {name: scale * _fit(scores_TC, torch.tensor([0.0, *shares])) for name, shares in SHARES.items()}


@torch.no_grad()
def force(m: MoLoRA, entries_C: torch.Tensor) -> None:
    """Change the router's keys in place, which captured graphs see. Nothing may run.

    The cache does not see it: do not let a request find active tokens that were routed before.
    """
    keys_CD = _router(m).keys_CD
    with m.lock:
        keys_CD[:, 0] = entries_C.to(keys_CD)


def _router(m: MoLoRA) -> KeyRouter:
    router = m.decoder.router
    if not isinstance(router, KeyRouter):
        raise ValueError("this model has no router with keys, so its routes cannot be forced.")
    return router


def _fit(scores_TC: torch.Tensor, shares_C: torch.Tensor) -> torch.Tensor:
    """What to add to the scores for the largest one to be each column's with its share."""
    shares_C = shares_C / shares_C.sum()
    offsets_C = torch.where(shares_C > 0, 0.0, NOBODYS)
    for step in range(NUM_STEPS):
        found_C = (scores_TC + offsets_C).argmax(-1).bincount(minlength=len(shares_C)) / len(scores_TC)
        offsets_C += scores_TC.std() * (1 - step / NUM_STEPS) * (shares_C - found_C)
    return offsets_C
