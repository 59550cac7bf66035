"""A key for an adapter that comes to a trained router, from the adapter's own data; nothing else is trained.

Legend: T tokens, H hidden size, D key size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.display import joined
from molora.model import MoLoRA
from molora.router import KeyRouter, prototype
from molora.training.examples import Example, examples, read_records
from molora.training.router_report import router_inputs


@dataclass(frozen=True)
class Key:
    """A key for `Bank.add`.

    Attributes:
        values_D: float32, on the CPU.
        share: of the tokens that it was made of, how many a router with this key gives to it.
        taken: of those that the same conversations have of other domains, likewise; None where there are none.
    """

    values_D: Tensor
    share: float
    taken: float | None


@torch.no_grad()
def key_from_data(
    m: MoLoRA, data: str | Path | Sequence[Mapping[str, Any]], domain: str, *, max_examples: int = 500
) -> Key:
    """The prototype of the tokens that the data has for a domain, from where the bank's policy activates them on.

    It serves where the router has practised that: see `RouterLosses.newcomer`.

    Args:
        m: the bank, with a router of keys.
        data: a `.jsonl` file, what `datasets.load_dataset` takes, or records.
        domain: as the data calls it; where no record names any, all is the domain's.
        max_examples: of the domain, the first so many.

    Raises:
        ValueError: the bank's router has no keys, a record is malformed, or the data has no token of the domain where
            adapters act.
    """
    router = m.decoder.router
    if not isinstance(router, KeyRouter):
        raise ValueError(f"the bank {m.bank.name!r} has no router of keys, so an adapter can have none.")
    source, records = (str(data), read_records(data)) if isinstance(data, (str, Path)) else ("the data", iter(data))
    encoded = examples(records, m.tokenizer, max_length=m.max_context, source=source)
    named = sorted({name for example in encoded for name in example.domains if name is not None})
    wanted = domain if named else None
    started = [(example, _start(m, example)) for example in encoded]
    chosen = [(example, start) for example, start in started if wanted in example.domains[start:]][:max_examples]
    if not chosen:
        raise ValueError(f"{source} has no token of the domain {domain!r} where adapters act, but of {joined(named)}.")
    own: list[Tensor] = []
    others: list[Tensor] = []
    sequences, starts = [example.token_ids for example, _ in chosen], [start for _, start in chosen]
    inputs = router_inputs(m, sequences, starts, batch_size=64)
    for (example, start), hidden_TH in zip(chosen, inputs, strict=True):
        queries_TD = router.queries(hidden_TH[start:])
        names = example.domains[start:]
        own.append(queries_TD[[index for index, name in enumerate(names) if name == wanted]])
        others.append(queries_TD[[index for index, name in enumerate(names) if name not in (wanted, None)]])
    own_TD, others_TD = torch.cat(own), torch.cat(others)
    values_D = prototype(own_TD.mean(0), router.keys_CD)

    def share(queries_TD: Tensor) -> float:
        best_T = (queries_TD @ router.keys_CD.T).amax(-1)
        return float((queries_TD @ values_D > best_T).float().mean())

    return Key(values_D.cpu(), share(own_TD), share(others_TD) if len(others_TD) else None)


def _start(m: MoLoRA, example: Example) -> int:
    """Where the bank's own policy activates a conversation: in the response, or from the last turn on."""
    return example.response if m.bank.config.activation == "response" else example.turn
