"""A whole bank from one file: its adapters, side by side, and then the router over them.

Each stage has a folder under `work`, named after the digest of all that decides its result. A stage that is done is not
done again, and one that was broken off goes on from its last checkpoint, to the same result. Another setting is another
stage.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console

from molora.adapter import Adapter
from molora.bank import Bank
from molora.digest import json_digest
from molora.display import joined
from molora.files import write_atomic
from molora.progress import say
from molora.training.callbacks import LastCheckpoint, Watch
from molora.training.data import ChatData

DONE = "done.json"


@dataclass(frozen=True)
class Domain:
    """Where an adapter's data is: what `ChatData` takes as `train` and `val`."""

    train: str | list[str]
    val: str | list[str] | None = None


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


@dataclass(frozen=True)
class RouterStage:
    """
    Attributes:
        model, data, trainer: settings of `RouterTraining`, `ChatData` and Lightning's `Trainer`.
    """

    data: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BankSettings:
    """What `configs/bank.yaml` holds.

    Attributes:
        output: the bank's folder.
        work: where stages keep their checkpoints and logs.
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

    @classmethod
    def read(cls, file: Path) -> BankSettings:
        """
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a key is missing, unknown or of the wrong type; the message names the file.
        """
        from jsonargparse import ArgumentError, ArgumentParser

        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist.")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            found: BankSettings = cls(**vars(parser.instantiate(parser.parse_object(values))))
        except (ArgumentError, yaml.YAMLError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from None
        if not found.adapters.domains:
            raise ValueError(f"{file}: adapters.domains names none.")
        return found


def train_bank(settings: BankSettings) -> Path:
    """Train what is not trained yet.

    Returns:
        The bank's folder.

    Raises:
        ValueError: a setting is wrong, or a loss is not a number.
        FileNotFoundError: there is no such data.
    """
    folders = train_adapters(settings)
    stage = settings.router
    adapters = [str(folder) for folder in folders.values()]
    config = {
        "seed_everything": settings.seed,
        "model": {
            "class_path": "molora.training.RouterTraining",
            "init_args": {
                **{"base": settings.base, "router_layer": settings.router_layer, "seed": settings.seed},
                **{"adapters": adapters, "output": settings.output, **stage.model},
            },
        },
        "data": {"seed": settings.seed, **stage.data},
        "trainer": stage.trainer,
    }
    contents = {name: Adapter.read(folder).digest for name, folder in folders.items()}
    folder = _stage_folder(settings, "router", config, contents)
    output = Path(settings.output)
    done = _read(folder / DONE)
    if done is None or not (output / "molora.json").is_file() or _router_digest(output) != done.get("router"):
        _say("•", f"router over {joined(folders)}")
        _run(folder, config, settings.checkpoint_every)
        write_atomic(folder / DONE, json.dumps({"router": _router_digest(output)}) + "\n")
    _say("[green]✓[/]", f"bank {output}")
    return output


def train_adapters(settings: BankSettings) -> dict[str, Path]:
    """Train the adapters that are not trained yet.

    Returns:
        Their folders, by name.
    """
    stage = settings.adapters
    names = list(stage.domains)
    size = stage.side_by_side or len(names)
    while True:
        try:
            groups = [_train_group(settings, group) for group in _chunks(names, size)]
            return {name: folder for group in groups for name, folder in group.items()}
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
        size = (size + 1) // 2
        _say("•", f"the GPU's memory does not hold so many side by side; now {size} at once")
        gc.collect()
        torch.cuda.empty_cache()


def _train_group(settings: BankSettings, names: Sequence[str]) -> dict[str, Path]:
    stage = settings.adapters
    data = {"seed": settings.seed, **stage.data}
    for split in ("train", "val"):
        if any(getattr(stage.domains[name], split) for name in names):
            data[split] = {name: getattr(stage.domains[name], split) for name in names}
    init_args = {"base": settings.base, "router_layer": settings.router_layer, "seed": settings.seed, **stage.model}
    config = {
        "seed_everything": settings.seed,
        "model": {"class_path": "molora.training.AdapterTraining", "init_args": {"name": list(names), **init_args}},
        "data": data,
        "trainer": stage.trainer,
    }
    folder = _stage_folder(settings, "adapters", config, {})
    init_args = config["model"]["init_args"]  # type: ignore[index]
    init_args["output_dir"] = str(folder / "adapters")
    if _read(folder / DONE) is None:
        _say("•", f"{joined(names)}" + (", side by side" if len(names) > 1 else ""))
        _run(folder, config, settings.checkpoint_every)
        write_atomic(folder / DONE, json.dumps({"adapters": list(names)}) + "\n")
    _say("[green]✓[/]", joined(names))
    return {name: folder / "adapters" / name for name in names}


def _run(folder: Path, config: dict[str, Any], checkpoint_every: int) -> None:
    trainer = {
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "default_root_dir": str(folder),
        **config["trainer"],
    }
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "LightningCLI's args parameter"
        )  # ours come from the file, and from nowhere else
        cli = LightningCLI(
            datamodule_class=ChatData,
            subclass_mode_model=True,
            save_config_callback=None,
            run=False,
            args={**config, "trainer": trainer},
        )
    if "logger" not in trainer:
        cli.trainer.loggers = [
            CSVLogger(folder, name="", version="csv"),
            TensorBoardLogger(folder, name="", version="tb"),
        ]
    watch = Watch()
    checkpoint = folder / "last.ckpt"
    cli.trainer.callbacks += [watch, LastCheckpoint(checkpoint, checkpoint_every, watch)]  # type: ignore[attr-defined]
    cli.trainer.fit(
        cli.model, cli.datamodule, ckpt_path=str(checkpoint) if checkpoint.exists() else None, weights_only=False
    )
    if cli.trainer.interrupted:
        raise KeyboardInterrupt


def _stage_folder(settings: BankSettings, kind: str, config: Mapping[str, Any], contents: Mapping[str, str]) -> Path:
    """Made if need be; its name says what it is for, and everything that its result depends on."""
    files = {path: _content(path) for path in sorted(set(_sources(config["data"])))}
    digest = json_digest(json.loads(json.dumps([config, files, contents], default=str)))
    folder = Path(settings.work) / f"{kind}-{digest.rpartition(':')[2][:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "settings.yaml").exists():
        write_atomic(folder / "settings.yaml", yaml.safe_dump(json.loads(json.dumps(config, default=str))))
    return folder


def _sources(data: Mapping[str, Any]) -> Iterator[str]:
    for split in ("train", "val"):
        given = data.get(split)
        for sources in given.values() if isinstance(given, dict) else [given]:
            yield from [sources] if isinstance(sources, str) else sources or ()


def _content(source: str) -> str:
    """A file's digest; of what `datasets` loads, the name."""
    path = Path(source)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else source


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _router_digest(bank: Path) -> str | None:
    config = Bank.open(bank).config.router
    return None if config is None else config.digest


def _chunks(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[first : first + size] for first in range(0, len(names), size)]


def _say(mark: str, text: str) -> None:
    say(Console(file=sys.stderr), mark, text)
