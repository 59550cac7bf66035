"""A whole bank from one file: its adapters, side by side, and then the router over them.

Under `work` each adapter has a folder, and the router another one, named after the digest of all that decides what
becomes of it: settings, the data's contents, the base. What is done is found there again; what was broken off goes on
from its last checkpoint, to the same result; other settings are other work.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from molora.adapter import check_above_zero, check_whole
from molora.bank import BANK_FILE
from molora.checkpoint import is_short_of_memory, resolve_base
from molora.digest import base_digest, json_digest
from molora.display import joined, one_line
from molora.files import write_atomic
from molora.progress import say
from molora.training.adapter import ALPHA, RANK
from molora.training.callbacks import LastCheckpoint, Watch
from molora.training.data import ChatData, as_list
from molora.training.trainer import Trainer

SECTIONS = ("model", "data", "trainer")  # of a stage
DONE = "done.json"
DECIDES_NOTHING = frozenset(
    {"logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary"}
)  # of a trainer


@dataclass(frozen=True)
class Domain:
    """An adapter's own settings.

    Attributes:
        train, val: where its data is, as `ChatData` takes them.
        rank, alpha: None is what `model` of the stage says.
    """

    train: str | list[str]
    val: str | list[str] | None = None
    rank: int | None = None
    alpha: float | None = None

    @property
    def shape(self) -> dict[str, float]:
        """What it has of its own."""
        return {name: value for name in ("rank", "alpha") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class AdapterStage:
    """
    Attributes:
        domains: by the names of the adapters.
        side_by_side: adapters that are trained at once; None is all of them, or as many as the GPU's memory holds.
        model, data, trainer: settings of `AdapterTraining`, `ChatData` and Lightning's `Trainer`.
    """

    domains: Mapping[str, Domain]
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    side_by_side: int | None = None

    def __post_init__(self) -> None:
        _check_sections(self, "adapters")
        if not self.domains:
            raise ValueError("adapters.domains names none.")
        for name, domain in self.domains.items():
            if domain.rank is not None:
                check_whole(f"adapters.domains.{name}.rank", domain.rank)
            if domain.alpha is not None:
                check_above_zero(f"adapters.domains.{name}.alpha", domain.alpha)
        if self.side_by_side is not None and self.side_by_side < 1:
            raise ValueError(f"adapters.side_by_side is {self.side_by_side}; expected 1 or more.")
        if len({domain.val is None for domain in self.domains.values()}) > 1:
            raise ValueError("adapters.domains: give val for every domain, or for none.")
        if self.side_by_side != 1 < len(self.domains) and any("EarlyStopping" in each for each in self._callbacks):
            raise ValueError(
                "adapters.trainer.callbacks: EarlyStopping would end all that are trained side by side at once, by "
                "their mean loss; set adapters.side_by_side to 1."
            )

    @property
    def _callbacks(self) -> list[str]:
        return [str(callback) for callback in as_list(self.trainer.get("callbacks"))]


@dataclass(frozen=True)
class RouterStage:
    """
    Attributes:
        model, data, trainer: settings of `RouterTraining`, `ChatData` and Lightning's `Trainer`.
    """

    data: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_sections(self, "router")


@dataclass(frozen=True)
class BankSettings:
    """What `configs/bank.yaml` holds.

    Attributes:
        output: the bank's folder.
        work: where adapters, checkpoints and logs are kept.
        checkpoint_every: so many optimizer steps.
    """

    base: str
    output: str
    work: str
    adapters: AdapterStage
    router: RouterStage
    router_layer: int = 8
    seed: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every}; expected 1 or more.")

    @classmethod
    def read(cls, file: Path) -> BankSettings:
        """
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a key is missing, unknown or of the wrong type; the message names the file.
        """
        from jsonargparse import ArgumentError, ArgumentParser

        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, or is no file.")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("expected keys and values.")
            given = parser.parse_object(deepcopy(values)).as_dict()
            # Sections as they were typed, and no objects: each run of a stage makes callbacks and loggers of its own.
            adapters, router = (
                given[name] | {key: values[name][key] for key in SECTIONS if key in values[name]}
                for name in ("adapters", "router")
            )
            domains = {name: Domain(**domain) for name, domain in adapters["domains"].items()}
            stages = {"adapters": AdapterStage(**adapters | {"domains": domains}), "router": RouterStage(**router)}
            return cls(**given | stages)
        except (ArgumentError, yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {one_line(error)}") from None


def train_bank(settings: BankSettings) -> Path:
    """Train what is not trained yet.

    Returns:
        The bank's folder.

    Raises:
        ValueError: a setting is wrong, or a loss is not a number; or `output` holds what this has not written.
        FileNotFoundError: there is no such data.
    """
    work = _Work(settings)
    router = work.router()
    _build(router.config, "router")  # what is wrong there is wrong before hours of training
    output, done = Path(settings.output), _banks_of(router.folder)
    present = _bank_digest(output)
    if present is not None and present not in work.written():
        raise ValueError(
            f"{output} holds a bank that this command has not written, or that was changed since; name another output, "
            "or move it away."
        )
    _train_adapters(work)
    if present not in done:
        _say("•", f"router over {joined(settings.adapters.domains)}")
        router.run(settings.checkpoint_every)
        write_atomic(router.folder / DONE, json.dumps({"banks": [*done, _bank_digest(output)]}) + "\n")
    _say("[green]✓[/]", f"bank {output}")
    return output


def train_adapters(settings: BankSettings) -> dict[str, Path]:
    """Train the adapters that are not trained yet.

    Returns:
        Their folders, by name.
    """
    return _train_adapters(_Work(settings))


def _train_adapters(work: _Work) -> dict[str, Path]:
    settings = work.settings
    folders = {name: work.adapter(name) for name in settings.adapters.domains}
    work.take_finished()
    waiting = [name for name, folder in folders.items() if not folder.is_dir()]  # it gets its name when it is whole
    if waiting:
        _build(work.group(waiting).config, "adapters")
    size = min(settings.adapters.side_by_side or len(folders), max(1, len(waiting)))
    while waiting:
        group, rest = waiting[:size], waiting[size:]
        _say("•", joined(group) + (", side by side" if len(group) > 1 else ""))
        stage = work.group(group)
        try:
            stage.run(settings.checkpoint_every)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            size = (size + 1) // 2
            _say("•", f"the GPU's memory does not hold so many side by side; now {size} at once")
            gc.collect()
            torch.cuda.empty_cache()
            continue
        write_atomic(stage.folder / DONE, json.dumps({name: folders[name].name for name in group}) + "\n")
        work.take_finished()
        waiting = rest
    _say("[green]✓[/]", joined(folders))
    return folders


class _Work:
    """Where everything is kept, and by which names."""

    def __init__(self, settings: BankSettings) -> None:
        self.settings, self.root = settings, Path(settings.work)
        self.common = {"router_layer": settings.router_layer, "seed": settings.seed}
        self.base_digest = base_digest(resolve_base(settings.base))

    def adapter(self, name: str) -> Path:
        """An adapter's folder; it is there once the adapter is trained."""
        stage, domain = self.settings.adapters, self.settings.adapters.domains[name]
        decides = [
            stage.model,
            self.common,
            self._data(stage.data),
            _of_trainer(stage.trainer),
            _contents(domain.train),
            *([domain.shape] if domain.shape else []),
        ]
        if stage.trainer.get("callbacks"):  # which may look at validation's losses
            decides.append(_contents(domain.val))
        return self.root / "adapters" / f"{name}-{self._digest(name, decides)}"

    def take_finished(self) -> None:
        """Give the adapters of stages that have ended their own folders; a kill may have left some where they were."""
        for done in self.root.glob(f"adapters-*/{DONE}"):
            for name, folder in json.loads(done.read_text(encoding="utf-8")).items():
                made, own = done.parent / "adapters" / name, self.root / "adapters" / folder
                if made.is_dir() and not own.is_dir():
                    own.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        os.rename(made, own)
                    except OSError:
                        if not own.is_dir():  # another process, of other adapters in the same folder, was first
                            raise

    def group(self, names: Sequence[str]) -> _Stage:
        """The training of several adapters."""
        stage, splits = self.settings.adapters, dict[str, Any]()
        for split in ("train", "val"):
            sources = {name: getattr(stage.domains[name], split) for name in names}
            if all(sources.values()):
                splits[split] = sources
        folder = self.root / f"adapters-{self._digest([self.adapter(name).name for name in names])}"
        init_args = {"base": self.settings.base, **self.common, **stage.model, "output_dir": str(folder / "adapters")}
        for setting, usual in (("rank", RANK), ("alpha", ALPHA)):
            if any(setting in stage.domains[name].shape for name in names):
                others = stage.model.get(setting, usual)
                init_args[setting] = {name: stage.domains[name].shape.get(setting, others) for name in names}
        config = self._config(
            "AdapterTraining", {"name": list(names), **init_args}, self._data(stage.data) | splits, stage.trainer
        )
        return _Stage(folder, config, [folder / "adapters" / name for name in names])

    def router(self) -> _Stage:
        stage, settings = self.settings.router, self.settings
        adapters = [self.adapter(name) for name in settings.adapters.domains]
        data = self._data(stage.data)
        sources = [each for split in ("train", "val") for each in as_list(data.get(split))]
        decides = [stage.model, self.common, data, _of_trainer(stage.trainer), _contents(sources)]
        folder = self.root / f"router-{self._digest([each.name for each in adapters], decides)}"
        named = {name: str(adapter) for name, adapter in zip(settings.adapters.domains, adapters, strict=True)}
        init_args = {"base": settings.base, **self.common, "output": settings.output, **stage.model}
        return _Stage(folder, self._config("RouterTraining", {**init_args, "adapters": named}, data, stage.trainer), [])

    def written(self) -> set[str]:
        """Digests of the banks that routers' stages have written."""
        return {bank for folder in self.root.glob("router-*") for bank in _banks_of(folder)}

    def _data(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return {"seed": self.settings.seed, **data}

    def _digest(self, *decides: Any) -> str:
        digest = json_digest(_plain([self.base_digest, *decides]))
        return digest.rpartition(":")[2][:8]

    def _config(
        self, module: str, init_args: Mapping[str, Any], data: Mapping[str, Any], trainer: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "seed_everything": self.settings.seed,
            "model": {"class_path": f"molora.training.{module}", "init_args": dict(init_args)},
            "data": dict(data),
            "trainer": {"devices": 1, "enable_checkpointing": False, "use_distributed_sampler": False, **trainer},
        }


@dataclass(frozen=True)
class _Stage:
    """One run of a trainer.

    Attributes:
        folder: for its checkpoint and logs.
        config: as `train.py fit` takes it.
        results: folders that it writes.
    """

    folder: Path
    config: dict[str, Any]
    results: list[Path]

    def run(self, checkpoint_every: int) -> None:
        """Begin, or go on from the last checkpoint, and write what was learned."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "settings.yaml", yaml.safe_dump(_plain(self.config)))
        cli = _build(self.config, self.folder.name, default_root_dir=str(self.folder))
        trainer, checkpoint = cli.trainer, self.folder / "last.ckpt"
        if "logger" not in self.config["trainer"]:
            start = len(list(self.folder.glob("csv-*")))  # each start has logs of its own
            trainer.loggers = [
                CSVLogger(self.folder, name="", version=f"csv-{start}"),
                TensorBoardLogger(self.folder, name="", version=f"tensorboard-{start}"),
            ]
        trainer.callbacks += [Watch(), LastCheckpoint(checkpoint, checkpoint_every)]  # type: ignore[attr-defined]
        found = str(checkpoint) if _is_whole(checkpoint) else None
        try:
            trainer.fit(cli.model, cli.datamodule, ckpt_path=found, weights_only=False)
        except SIGTERMException:
            raise SystemExit(143) from None


def _check_sections(stage: AdapterStage | RouterStage, name: str) -> None:
    for section in SECTIONS:
        if not isinstance(value := getattr(stage, section), dict):
            raise ValueError(f"{name}.{section} is {value!r}; expected keys and values.")


def _build(config: Mapping[str, Any], section: str, **trainer: Any) -> LightningCLI:
    """
    Raises:
        ValueError: a setting is wrong; the message names its section.
        FileNotFoundError: a file of data is not there.
    """
    from jsonargparse import ArgumentError

    for split in ("train", "val"):
        given = config["data"].get(split)
        for sources in given.values() if isinstance(given, dict) else [given]:
            _contents(sources)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # ours come from nowhere else
            cli = LightningCLI(
                datamodule_class=ChatData,
                trainer_class=Trainer,
                subclass_mode_model=True,
                save_config_callback=None,
                run=False,
                parser_kwargs={"exit_on_error": False},
                args=deepcopy({**config, "trainer": {**config["trainer"], **trainer}}),  # which the parser changes
            )
    except (ArgumentError, TypeError, AttributeError) as error:
        raise ValueError(f"{section}: {one_line(error)}") from None
    if cli.trainer.world_size > 1:
        raise ValueError(f"{section}: a bank is trained on one device; for several, run its stages by train.py.")
    return cli


def _is_whole(checkpoint: Path) -> bool:
    """One that cannot be read, as after a power cut, is put aside, and training begins anew."""
    if not checkpoint.exists():
        return False
    try:
        torch.load(checkpoint, weights_only=False, map_location="cpu")
    except Exception as error:  # whatever unpickling makes of bytes that nobody has written
        if is_short_of_memory(error):
            raise  # it may well be whole
        aside = checkpoint.with_suffix(".broken")
        os.replace(checkpoint, aside)
        _say("[yellow]•[/]", f"{checkpoint} is broken; it is now {aside.name}, and the stage begins anew")
        return False
    return True


def _plain(settings: Any) -> Any:
    """As JSON has it.

    Raises:
        ValueError: an object is among the settings, which nobody could find again.
    """

    def other(value: Any) -> str:
        if isinstance(value, Path):
            return str(value)
        raise ValueError(f"{value!r} is no setting that can be written down; give its class_path and init_args.")

    return json.loads(json.dumps(settings, default=other))


def _of_trainer(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What of a trainer's settings decides what is learned."""
    return {name: value for name, value in trainer.items() if name not in DECIDES_NOTHING}


def _contents(sources: str | list[str] | None) -> list[str]:
    """Digests of files; of what `datasets` loads by name, the name.

    Raises:
        FileNotFoundError: there is no such file.
    """
    found = []
    for source in as_list(sources):
        path = Path(source)
        if path.suffix == ".jsonl" and not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; `python -m molora.training.recipes --out data` builds the demo's data."
            )
        files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        found += [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else source for file in files]
    return found


def _banks_of(folder: Path) -> list[str]:
    """Digests of the banks that a router's stage has written, to any place."""
    file = folder / DONE
    return list(json.loads(file.read_text(encoding="utf-8"))["banks"]) if file.is_file() else []


def _bank_digest(bank: Path) -> str | None:
    """Of its description, which holds the digests of all in it."""
    file = bank / BANK_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _say(mark: str, text: str) -> None:
    say(Console(file=sys.stderr), mark, text)
