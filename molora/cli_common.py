"""What several commands of the command line take and do alike: options, the model, and what they print."""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from molora.display import make_console, one_line

if TYPE_CHECKING:
    from molora.activation import Activation
    from molora.model import MoLoRA, Route


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


BankOption = Annotated[Path | None, typer.Option("--bank", help="A bank's folder; the demo's if none is given.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="The base model, a folder or a hub name; the bank's own if none is given.")
]
DeviceOption = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="auto is bfloat16 on a GPU and float32 on a CPU.")]
BankArgument = Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder.")]


def parse_route(text: str) -> Route:
    """`auto`, `base` or a name as it is; `a=0.5,b=0.5` as weights."""
    if "=" not in text:
        return text
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = (piece.strip() for piece in part.partition("="))
        try:
            number = float(weight)
        except ValueError:
            raise ValueError(
                f"route {text!r}: {part!r} is no NAME=WEIGHT; write it as in sums=0.7,words=0.3."
            ) from None
        if name in weights:
            raise ValueError(f"route {text!r} names {name!r} twice.")
        weights[name] = number
    return weights


def parse_activation(text: str | None) -> Activation | None:
    """A policy's name, or a token index in digits."""
    if text is None:
        return None
    from molora.activation import check_activation

    return check_activation(int(text) if text.isascii() and text.isdigit() else text)


def load_model(bank: Path | None, base: str | None, device: str | None, dtype: Dtype) -> MoLoRA:
    """Load a bank and its base, saying on standard error what takes long or is not as it should be."""
    from molora.demo import demo_bank_path

    folder = demo_bank_path() if bank is None else bank
    check_folder(folder)
    console = make_console(stderr=True)
    with console.status("Loading PyTorch and Transformers"):
        import molora
        from molora.checkpoint import resolve_base, resolve_device
    opened = molora.Bank.open(folder)
    resolve_device(device)
    base_dir = resolve_base(base or opened.config.base.name, console=console)
    with warnings.catch_warnings(record=True) as caught, console.status("Loading the base model and the bank"):
        warnings.simplefilter("always", UserWarning)
        model = molora.load(opened, base=base_dir, device=device, dtype=dtype.value)
    for warning in caught:
        complain("warning", "bold yellow", warning.message)
    return model


def check_folder(folder: Path) -> None:
    """Say at once what the imports would say seconds later."""
    if not (folder / "molora.json").is_file():
        raise FileNotFoundError(f"{folder} is not a bank: it has no molora.json.")


def complain(word: str, style: str, what: BaseException | str) -> None:
    message = Text.assemble((f"{word}: ", style), one_line(what))
    make_console(stderr=True).print(message, soft_wrap=True)


def print_table(table: Table) -> None:
    console = make_console()
    if not console.is_terminal:
        console.width = 200  # nothing needs to be cut to fit a file
    console.print(table)
