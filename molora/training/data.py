"""Packed batches: several conversations in each row, none of which sees another.

Positions begin again at 0 with each conversation, which is what keeps attention apart, and activation is given
token by token. Batch number i depends only on the data, the seed and i, so that a resumed run sees what an
uninterrupted one would have seen.

Legend: B rows, L tokens a row.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from molora.adapter import check_whole
from molora.display import joined
from molora.progress import say
from molora.training.examples import BASE, IGNORE, Encoder, Example, read_records

NEVER = 1 << 30  # an activation start that no position reaches
OTHER = -1
LABELS_ONLY = "labels only"
MAX_STRAY_CHANCE = 0.5
NUM_SIGNS = 62  # ranks that a stranger's signs are drawn for; more have the same again


@dataclass
class Batch:  # not frozen: Lightning casts its fields where a trainer's precision asks for it
    """Packed rows, tensors [B, L] but for the last one.

    Attributes:
        input_ids, position_ids: int64; positions count from 0 within each conversation.
        targets: int64, the id that follows each token where it is learned, else -100.
        start: int64, the position from which the token's conversation is active.
        domains: int64, index of the token's domain in the loader's list, OTHER for one that is not in it, or -100
            where none is known.
        groups: int64, as `domains`, but base's tokens in a conversation whose task is known have that task's number
            there, which are behind the domains'.
        rest: bool, whether an adapter that is trained alone rests on the token.
        signs: int64, whose bits say which of its ranks act with the opposite sign there, as a stranger would.
        rows: int64 [B], numbers of the rows, the same in every epoch.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    start: Tensor
    domains: Tensor
    groups: Tensor
    rest: Tensor
    signs: Tensor
    rows: Tensor

    @classmethod
    def cat(cls, batches: Sequence[Batch]) -> Batch:
        return cls(**{name: torch.cat([vars(batch)[name] for batch in batches]) for name in vars(batches[0])})

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


@dataclass(frozen=True)
class ActivationMix:
    """Where training activates each conversation, so that an adapter works wherever it is activated.

    `first`, `before`, `turn`, `between` and `response` are the shares of conversations activated at the first token, at
    one drawn uniformly up to the last user turn, there, at one drawn uniformly between there and the generation prompt,
    and at that prompt; they add up to 1.

    An adapter that is trained alone also rests where a router may send tokens elsewhere: on the parts of other domains
    in the share `others_rest` of the conversations, and in the share `strays` on single tokens between the turn's start
    and the response, each with a chance drawn for the conversation between 0 and `MAX_STRAY_CHANCE`. In the share
    `strangers` it meets what other adapters may have written: on the parts of other domains, and from the turn's start
    to a token drawn uniformly before the response, each of its ranks acts with a random sign.
    """

    turn: float = 0.6
    response: float = 0.2
    between: float = 0.2
    first: float = 0.0
    before: float = 0.0
    others_rest: float = 0.5
    strays: float = 0.0
    strangers: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in vars(self).values()):
            raise ValueError(f"activation shares {self} must be between 0 and 1.")
        if not math.isclose(self.first + self.before + self.turn + self.between + self.response, 1):
            raise ValueError(f"activation shares {self}: first, before, turn, between and response must add up to 1.")

    def draw(self, example: Example, rng: random.Random) -> int:
        share = rng.random()
        if share < self.turn:
            return example.turn
        if share < self.turn + self.response:
            return example.response
        if share < self.turn + self.response + self.first:
            return 0
        if share < self.turn + self.response + self.first + self.before:
            return rng.randint(0, example.turn)
        return rng.randint(example.turn, example.response)

    def draw_others(
        self, example: Example, foreign: NDArray[np.bool_], rng: random.Random
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """For each token, `Batch.rest` and `Batch.signs`; `foreign` marks the parts of other domains."""
        others_rest = rng.random() < self.others_rest
        chance = rng.uniform(0, MAX_STRAY_CHANCE) if rng.random() < self.strays else 0.0
        signs = np.zeros(len(foreign), np.int64)
        if self.strangers and rng.random() < self.strangers:
            others_rest = False
            signs[foreign] = rng.getrandbits(NUM_SIGNS)
            signs[example.turn : rng.randint(example.turn, example.response)] = rng.getrandbits(NUM_SIGNS)
        rest = foreign & others_rest
        if chance:
            for i in range(example.turn, example.response):
                rest[i] = rest[i] or rng.random() < chance
        return rest, signs


class PackedLoader:
    """Endless batches of packed rows (or `num_batches` of them), from number `first_batch()` on.

    The conversations are shuffled and packed once, first fit, into rows of `row_length` tokens; each epoch shuffles
    the rows, and draws other activation points.
    """

    def __init__(
        self,
        data: Sequence[Example],
        domains: Sequence[str],
        *,
        row_length: int,
        rows: int,
        pad_id: int,
        mix: ActivationMix,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        first_batch: Callable[[], int] = lambda: 0,
        num_batches: int | None = None,
    ) -> None:
        self.data = data
        self.domains = {name: index for index, name in enumerate(domains)}
        tasks = sorted({example.task for example in data if example.task is not None})
        self.tasks = {name: index for index, name in enumerate(tasks, len(self.domains))}
        self.row_length, self.rows, self.pad_id = row_length, rows, pad_id
        self.mix, self.seed, self.rank, self.world_size = mix, seed, rank, world_size
        self.first_batch, self.num_batches = first_batch, num_batches
        self.packed = self._pack()
        self._read = cache(self._read_row)  # each row is served once an epoch

    def __iter__(self) -> Iterator[Batch]:
        begin = self.first_batch()
        epoch, order = -1, list[int]()
        numbers = count() if self.num_batches is None else range(self.num_batches)
        for number in numbers:
            first = ((begin + number) * self.world_size + self.rank) * self.rows
            rows = []
            for index in range(first, first + self.rows):
                wanted, place = divmod(index, len(self.packed))
                if wanted != epoch:
                    epoch, order = wanted, self._order(wanted)
                rows.append(self._row(order[place], index))
            yield Batch(**{name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]})

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.packed)))
        random.Random(f"{self.seed}/epoch/{epoch}").shuffle(order)
        return order

    def _pack(self) -> list[list[Example]]:
        order = list(self.data)
        random.Random(f"{self.seed}/pack").shuffle(order)
        rows: list[list[Example]] = []
        open_rows: list[tuple[int, list[Example]]] = []  # (free tokens, row), a few at a time
        for example in order:
            length = len(example.token_ids)
            for i, (free, row) in enumerate(open_rows):
                if length <= free:
                    row.append(example)
                    open_rows[i] = (free - length, row)
                    break
            else:
                row = [example]
                rows.append(row)
                open_rows.append((self.row_length - length, row))
                if len(open_rows) > 32:
                    open_rows.remove(min(open_rows, key=lambda item: item[0]))
        return rows

    def _row(self, row: int, index: int) -> dict[str, Any]:
        """Row `row` of the packed ones, as number `index` of all that are served."""
        rng = random.Random(f"{self.seed}/row/{index}")
        own = self._read(row)
        start, rest = np.full(self.row_length, NEVER), np.zeros(self.row_length, bool)
        signs = np.zeros(self.row_length, np.int64)
        foreign, begin = own["domains"] == OTHER, 0
        for example in self.packed[row]:
            end = begin + len(example.token_ids)
            start[begin:end] = self.mix.draw(example, rng)
            rest[begin:end], signs[begin:end] = self.mix.draw_others(example, foreign[begin:end], rng)
            begin = end
        drawn = {"start": start, "rest": rest, "signs": signs}
        return own | drawn | {"rows": np.int64(row)}

    def _read_row(self, row: int) -> dict[str, NDArray[np.int64]]:
        """What is the same whenever a row is served. Padding is one more conversation, of which nothing is learned."""
        out = {
            "input_ids": np.full(self.row_length, self.pad_id),
            "position_ids": np.zeros(self.row_length, np.int64),
            "targets": np.full(self.row_length, IGNORE),
            "domains": np.full(self.row_length, IGNORE),
            "groups": np.full(self.row_length, IGNORE),
        }
        begin = 0
        for example in self.packed[row]:
            end = begin + len(example.token_ids)
            ids = out["input_ids"][begin:end] = np.array(example.token_ids)
            out["position_ids"][begin:end] = np.arange(end - begin)
            out["targets"][begin : end - 1] = np.where(example.learned[1:], ids[1:], IGNORE)
            out["domains"][begin:end] = [IGNORE if d is None else self.domains.get(d, OTHER) for d in example.domains]
            out["groups"][begin:end] = [
                self.tasks[example.task] if d == BASE and example.task is not None else group
                for d, group in zip(example.domains, out["domains"][begin:end].tolist(), strict=True)
            ]
            begin = end
        out["position_ids"][begin:] = np.arange(self.row_length - begin)
        return out


@dataclass(frozen=True)
class SideBySide:
    """Batches of several loaders at once, one's rows after the other's: what each gives is what it gives alone."""

    loaders: Sequence[PackedLoader]

    def __iter__(self) -> Iterator[Batch]:
        for batches in zip(*self.loaders, strict=True):
            yield Batch.cat(batches)


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
