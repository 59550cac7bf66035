"""What one seed's rows are measured with, and the files that they are written to, each with what it was measured of."""

import gc
import json
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from serving.machine import describe_machine

import molora
from molora.adapter import WEIGHTS_FILE
from molora.bank import BANK_FILE, Bank
from molora.files import write_atomic
from molora.model import MoLoRA
from molora.training.evaluate import evaluate
from molora.training.examples import encode, read_records
from molora.training.question import Question
from molora.training.router_report import column_names, router_statistics
from quality.provenance import provenance

SCORED = ("singles", "composites")
ITEMS_OF = {"others": "singles"}  # where they have a file of another name
OPTIONS = ("limit", "max_new_tokens")  # by which every row is measured
ROUTERS_OPTION = "drift"  # of this command as of the one that trained the router
ROUTERS_WAYS = ("auto", "sequence")  # of `evaluate`: those that ask the router


class Measurement:
    """The items, and what is found on them.

    Attributes:
        folder: where the rows of one seed are written.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.folder = args.work / "rows" / f"seed-{args.seed}"
        self.options: dict[str, Any] = {"base": args.base, "device": args.device, "dtype": args.dtype}
        self._last: tuple[object, MoLoRA] | None = None  # what was loaded, and of what

    @cached_property
    def device(self) -> torch.device:
        return torch.device(self.args.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def records(self, kind: str) -> list[Mapping[str, Any]]:
        return list(read_records(self.args.work / "data" / f"{kind}.jsonl"))[: self.args.limit]

    def questions(self, m: MoLoRA, kind: str) -> list[Question]:
        return [Question.from_record(record, m.tokenizer) for record in self.records(kind)]

    def file(self, label: str) -> Path:
        path: Path = self.folder / f"{label.replace(' ', '-')}.json"
        return path

    def missing(self, labels: Sequence[str]) -> list[str]:
        wanted = self.args.labels or labels
        return [label for label in labels if label in wanted and not self.is_measured(label)]

    def is_measured(self, label: str) -> bool:
        """Whether its row is there, and of the files and options of today, as far as it says what they were."""
        if not self.file(label).is_file():
            return False
        of = json.loads(self.file(label).read_text()).get("of")
        return of is None or bool(of == provenance(self.args, of["files"], of["options"]))

    def write(
        self,
        label: str,
        rows: dict[str, dict[str, Any]],
        took_s: float,
        sources: Sequence[Path],
        routes: dict[str, dict[str, Any]] | None = None,
        options: Sequence[str] = (),
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            sources: the files of what was measured: a bank's description has the digests of all that it holds.
            options: those by which the row was measured, beside `OPTIONS` and, where a bank's description is among the
                sources, the router's.
            notes: what else the row says.
        """
        args = self.args
        files = [f"data/{ITEMS_OF.get(kind, kind)}.jsonl" for kind in rows]
        files += [file.relative_to(args.work).as_posix() for file in sources]
        asks_router = any(file.name == BANK_FILE for file in sources)
        of = provenance(args, files, [*OPTIONS, *options, *([ROUTERS_OPTION] if asks_router else [])])
        head = describe_machine(self.device) | {"seed": args.seed, "steps": args.steps, "took_s": round(took_s)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(
            self.file(label),
            json.dumps({**head, "label": label, "of": of, **(notes or {}), "rows": rows, "routes": routes or {}})
            + "\n",
        )
        found = "  ".join(f"{kind} {row['accuracy']:.4f}" for kind, row in rows.items())
        print(f"{label:>24}  {found}  {took_s:.0f} s", flush=True)

    def add(
        self,
        m: MoLoRA,
        label: str,
        way: str,
        kinds: Sequence[str] = SCORED,
        *,
        sources: Sequence[Path] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """The items of these kinds, answered in one of `evaluate`'s ways; for the router's, also what it does.

        Args:
            sources: the files of what was measured, or of what it was made of; None takes `what_answers`.
            notes: what else the row says.
        """
        if not self.missing([label]):
            return
        begin_s = time.perf_counter()
        rows = {
            kind: found
            for kind in kinds
            for _, found in evaluate(m, self.questions(m, kind), [way], max_new_tokens=self.args.max_new_tokens)
        }
        routes = {kind: self.routes(m, kind) for kind in kinds} if way == "auto" else None
        sources = what_answers(m.bank, way) if sources is None else sources
        self.write(label, rows, time.perf_counter() - begin_s, sources, routes, notes=notes)

    def routes(self, m: MoLoRA, kind: str) -> dict[str, Any]:
        """`RouterStatistics` on the items with their reference answers."""
        starts = [m.activation_start(m.render(question.messages)) for question in self.questions(m, kind)]
        conversations = [encode(record, m.tokenizer) for record in self.records(kind)]
        return router_statistics(m, conversations, starts).to_json(column_names(m))

    def loaded(self, bank: Path, **options: Any) -> MoLoRA:
        """The bank as it is now; it stays loaded, with what its engine was given and cached, until another one is."""
        of = bank, opened(bank).config, options
        if self._last is None or self._last[0] != of:
            self.close()
            engine = {"max_sequences": 256, "kv_cache_bytes": self.args.kv_cache_bytes}
            self._last = of, molora.load(bank, engine=engine, **self.options, **options)
        return self._last[1]

    def close(self) -> None:
        """Make room: what was loaded goes, once nobody else holds it."""
        if self._last is None:
            return
        m, self._last = self._last[1], None
        if m._engine is not None:
            m.engine.close()
        del m
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def opened(bank: Path) -> Bank:
    """
    Raises:
        SystemExit: there is no bank yet.
    """
    if not (bank / BANK_FILE).is_file():
        raise SystemExit(f"{bank} is no bank yet; run the stage train first.")
    return Bank.open(bank)


def what_answers(bank: Bank, way: str) -> list[Path]:
    """The files by which a bank answers in one of `evaluate`'s ways: its adapters', and where its router is asked the
    description, which names all that it holds.
    """
    adapters = [bank.adapter_folder(adapter.name) / WEIGHTS_FILE for adapter in bank.adapters]
    return [*adapters, bank.path / BANK_FILE] if way in ROUTERS_WAYS else adapters
