"""A key for an adapter that comes to a trained router, from the adapter's own data; nothing else is trained."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.activation import check_message
from molora.model import MoLoRA
from molora.router import KeyRouter, prototype
from molora.training.examples import Example, encode, read_records
from molora.training.router_report import router_inputs


@torch.inference_mode()
def key_from_data(m: MoLoRA, data: str | Path | Sequence[Any], domain: str, *, max_records: int = 500) -> Tensor:
    """The prototype of the tokens that the data has for a domain: a key [D] for `Bank.add`, float32 on the CPU.

    It serves where the router has practised that: see `RouterLosses.newcomer`.

    Args:
        m: the bank, with a router of keys; its adapters need not be on a device.
        data: a `.jsonl` file, what `datasets.load_dataset` takes, or records.
        domain: as the data calls it.
        max_records: only the first so many are read.

    Raises:
        ValueError: the bank's router has no keys, or the data has no token of the domain where adapters act.
    """
    router = m.decoder.router
    if not isinstance(router, KeyRouter):
        raise ValueError(f"the bank {m.bank.name!r} has no router of keys, so an adapter can have none.")
    records = list(islice(read_records(data) if isinstance(data, (str, Path)) else data, max_records))
    encoded = [encode(record, m.tokenizer) for record in records]
    starts = [_start(m, record) for record in records]
    examples, starts = _of_domain(encoded, starts, domain)
    if not examples:
        raise ValueError(f"the data has no token of the domain {domain!r} where adapters act; has it another name?")
    total_D, num_tokens = torch.zeros(router.config.key_dim, device=m.decoder.device), 0
    inputs = router_inputs(m, [example.token_ids for example in examples], starts, batch_size=64)
    for example, start, hidden_TH in zip(examples, starts, inputs, strict=True):
        is_own_T = torch.tensor([name == domain for name in example.domains])
        is_own_T[:start] = False
        total_D += router.queries(hidden_TH[is_own_T.to(hidden_TH.device)]).sum(0)
        num_tokens += int(is_own_T.sum())
    return prototype(total_D / num_tokens, router.keys_CD).cpu().clone()


def _of_domain(examples: Sequence[Example], starts: Sequence[int], domain: str) -> tuple[list[Example], list[int]]:
    own = [pair for pair in zip(examples, starts, strict=True) if domain in pair[0].domains[pair[1] :]]
    return [example for example, _ in own], [start for _, start in own]


def _start(m: MoLoRA, record: Any) -> int:
    """Where the bank's own policy activates a record's conversation; a plain text's, at its beginning."""
    if "messages" not in record:
        return 0
    messages = [check_message(message, index) for index, message in enumerate(record["messages"][:-1])]
    return m.activation_start(m.render(messages))
