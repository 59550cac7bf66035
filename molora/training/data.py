"""Data of a training run: its sources, what is left out of them and why, and the loaders of packed batches."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console

from molora.adapter import check_whole
from molora.display import joined
from molora.progress import say
from molora.training.batches import ActivationMix, Batch, PackedLoader, SideBySide
from molora.training.examples import BASE, Encoder, Example, read_records

LABELS_ONLY = "labels only"
Sources = str | list[str]


class ChatData(L.LightningDataModule):
    """Conversations from JSONL files or any `datasets` source, packed.

    Args:
        train, val: a source or a list of them: a `.jsonl` file, or what `datasets.load_dataset` takes. Where several
            adapters are trained side by side, they may also be given by the adapter's name.
        row_length: tokens in a row; conversations longer than this, or than the model's context, are left out.
        rows: rows in a batch (of each device), of each adapter that is trained.
        max_records: of each training source, only the first so many records; None takes all.
        val_batches: batches of a validation run.
        activation: shares of activation points.
        seed: of the order and of the activation points.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        train: Sources | dict[str, Sources],
        val: Sources | dict[str, Sources] | None = None,
        row_length: int = 1024,
        rows: int = 16,
        max_records: int | None = None,
        val_batches: int = 4,
        activation: ActivationMix = ActivationMix(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_whole("data.row_length", row_length)
        check_whole("data.rows", rows)
        check_whole("data.val_batches", val_batches, 0)
        if max_records is not None:
            check_whole("data.max_records", max_records)
        self.sources = {"train": train, "val": val}
        self.row_length, self.rows, self.val_batches = row_length, rows, val_batches
        self.max_records = max_records
        self.activation, self.seed = activation, seed
        self.encoded: dict[tuple[str, ...], list[Example]] = {}
        self.tokenizer: Any = None
        self.max_length = row_length
        self.domains: tuple[str, ...] = ()
        self.labels_needed, self.apart = False, False

    def prepare(
        self,
        tokenizer: Any,
        domains: Sequence[str],
        *,
        max_context: int | None = None,
        labels_needed: bool = False,
        apart: bool = False,
    ) -> None:
        """Called by the training module, which knows the model and what the domains' indices mean.

        Args:
            max_context: the most tokens that the model reads.
            apart: each domain is learned by itself, from rows of its own; else all are, from the same ones.

        Raises:
            ValueError: sources are given by other names than the domains'.
        """
        self.tokenizer, self.domains, self.labels_needed, self.apart = tokenizer, tuple(domains), labels_needed, apart
        self.max_length = min(self.row_length, max_context or self.row_length)
        for split, sources in self.sources.items():
            if isinstance(sources, dict) and not (apart and set(sources) == set(domains)):
                raise ValueError(
                    f"data.{split} has sources by name, for {list(sources)}; expected them for each of {list(domains)}."
                    if apart
                    else f"data.{split} has sources by name; expected one source or a list of them."
                )

    def train_dataloader(self) -> PackedLoader | SideBySide:
        trainer = self.trainer
        if trainer and trainer.max_steps == -1 and not isinstance(trainer.limit_train_batches, int):
            raise ValueError("training batches have no end: set trainer.max_steps, or an integer limit_train_batches.")

        def done() -> int:
            # A resumed run, or the next epoch, goes on behind what was trained on, not behind what was fetched.
            return trainer.global_step * trainer.accumulate_grad_batches if trainer else 0

        return self._loader("train", done, None)

    def val_dataloader(self) -> PackedLoader | SideBySide | list[Any]:
        return self._loader("val", lambda: 0, self.val_batches) if self.sources["val"] else []

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def _loader(self, split: str, first_batch: Callable[[], int], num_batches: int | None) -> PackedLoader | SideBySide:
        groups = [(name,) for name in self.domains] if self.apart else [self.domains]
        trainer = self.trainer
        with Encoder(self.tokenizer, max_length=self.max_length) as encoder:
            data = [self._examples(split, domains, encoder) for domains in groups]
        loaders = [
            PackedLoader(
                own,
                domains,
                row_length=self.row_length,
                rows=self.rows,
                pad_id=self.tokenizer.pad_token_id or 0,
                mix=self.activation,
                seed=self.seed,
                rank=trainer.global_rank if trainer else 0,
                world_size=trainer.world_size if trainer else 1,
                first_batch=first_batch,
                num_batches=num_batches,
            )
            for domains, own in zip(groups, data, strict=True)
        ]
        return loaders[0] if len(loaders) == 1 else SideBySide(loaders)

    def _examples(self, split: str, domains: tuple[str, ...], encoder: Encoder) -> list[Example]:
        given = self.sources[split]
        sources = as_list(given[domains[0]] if isinstance(given, dict) else given)
        data = [example for source in sources for example in self._encoded(split, source, encoder)]
        _check_domains(data, joined(sources), domains, labels_needed=self.labels_needed, apart=self.apart)
        return [own for example in data if (own := _part_for(example, domains[0]))] if self.apart else data

    def _encoded(self, split: str, source: str, encoder: Encoder) -> list[Example]:
        key = (split, source)
        if key not in self.encoded:
            if not (self.trainer and self.trainer.global_rank):
                say(Console(stderr=True), "•", f"Reading and tokenizing {source} ...")
            records = islice(read_records(source), self.max_records if split == "train" else None)
            self.encoded[key] = encoder.examples(records, source=str(source))
        return self.encoded[key]


def _part_for(example: Example, domain: str) -> Example | None:
    """What one adapter needs of a conversation: all up to the last token that it learns; None where it learns none."""
    writes = zip(example.learned[1:], example.domains, strict=False)
    own = [index for index, (is_learned, whose) in enumerate(writes) if is_learned and whose in (domain, None)]
    if not own:
        return None
    end = own[-1] + 2
    if end == len(example.token_ids):
        return example
    return replace(
        example, token_ids=example.token_ids[:end], learned=example.learned[:end], domains=example.domains[:end]
    )


def _check_domains(
    data: Sequence[Example], source: str, domains: Sequence[str], *, labels_needed: bool, apart: bool
) -> None:
    """
    Raises:
        ValueError: nothing in the data is for those that are trained.

    Warns:
        UserWarning: so many records teach them nothing; or, where they are not trained apart, have domains of none; or
            one of them has no record, where labels are learned.
    """
    known = {*domains, *([] if labels_needed else [None])}
    learned = [_domains(example, apart) for example in data]
    strange = [found for found in learned if (found.isdisjoint(known) if apart else found - known)]
    names = Counter(
        "no domain" if name is None else name if name == LABELS_ONLY else repr(name)
        for found in strange
        for name in found - known
    )
    others = joined(f"{name} ({count})" for name, count in names.most_common())
    if all(found.isdisjoint(known) for found in learned):
        raise ValueError(
            f"{source}: no record has a domain among {list(domains)}; the data's are {others}. Name the adapters after "
            "their domains."
        )
    if strange:
        warnings.warn(
            f"{source}: {len(strange)} of {len(data)} records have other domains than {joined(domains)}: {others}.",
            stacklevel=2,
        )
    missing = [name for name in domains if name != BASE and not any(name in found for found in learned)]
    if missing and labels_needed:
        warnings.warn(
            f"{source}: no record has the domain {joined(map(repr, missing))}, so nothing here teaches the router when "
            "to pick it; add records of it, or leave the adapter out.",
            stacklevel=2,
        )


def _domains(example: Example, apart: bool) -> set[str | None]:
    """Those of what is learned; where only labels are, the labels', which teach nobody who learns apart."""
    if any(example.learned):
        return {domain for domain, yes in zip(example.domains, example.learned, strict=True) if yes}
    return {LABELS_ONLY} if apart else {domain for domain in example.domains if domain is not None} or {None}


def as_list(sources: Sources | None) -> list[str]:
    """One source, several or none, as a list."""
    if sources is None:
        return []
    return [sources] if isinstance(sources, (str, Path)) else list(sources)
