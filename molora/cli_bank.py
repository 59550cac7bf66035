"""The commands of `molora bank`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from molora.cli_common import (
    BankArgument,
    BaseOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    check_folder,
    load_model,
    parse_activation,
    print_table,
)
from molora.display import joined

if TYPE_CHECKING:
    from molora.bank import AdapterEntry, Bank

bank_app = typer.Typer(help="Look into a bank; add, remove, import or export its adapters.", no_args_is_help=True)


class Reader(StrEnum):
    vllm = "vllm"


@bank_app.command("list")
def list_adapters(folder: BankArgument) -> None:
    """The adapters of a bank, one a line."""
    bank = _open(folder)
    titles = ("adapter", "rank", "layers", "routable", "activation", "digest", "size")
    table = Table(*titles, box=None, pad_edge=False)
    for entry in bank.adapters:
        adapter = bank.load_adapter(entry.name)
        table.add_row(
            Text(entry.name),
            str(adapter.max_rank),
            _ranges(sorted(adapter.layers)),
            "yes" if entry.routable else "no",
            str(entry.activation),
            _short(entry.digest),
            _size(bank.adapter_folder(entry.name)),
        )
    print_table(table)


@bank_app.command()
def add(
    folder: BankArgument,
    adapter: Annotated[Path, typer.Argument(metavar="PEFT_FOLDER", help="A LoRA or aLoRA folder as PEFT writes it.")],
    name: Annotated[str | None, typer.Option(help="How requests name it; the folder's name if none is given.")] = None,
    activation: Annotated[
        str | None,
        typer.Option(help="Its policy or token index; if none, invocation where it has such tokens, else 0."),
    ] = None,
    routable: Annotated[
        bool | None, typer.Option("--routable/--explicit-only", help="Whether the router may pick it.")
    ] = None,
    key_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Its data, whose domain is its name: of these a router that was trained with losses.newcomer gets a "
            "key for it.",
        ),
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Copy a PEFT adapter into a bank."""
    bank = _open(folder)
    key = None
    if key_from is not None:
        from molora.adapter import Adapter
        from molora.training.newcomer import key_from_data

        Adapter.read(adapter)  # what is wrong is said before the model is loaded
        found = key_from_data(load_model(folder, base, device, dtype), key_from, name or adapter.resolve().name)
        key = found.values_D
        taken = "" if found.taken is None else f", and {found.taken:.2f} of the others' beside them"
        typer.echo(f"its key takes {found.share:.2f} of its own tokens{taken}")
    entry = bank.add(adapter, name=name, activation=parse_activation(activation), routable=routable, key=key)
    typer.echo(_added(entry, folder))


@bank_app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder, which is made if need be.")],
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A PEFT folder, a folder of many, or an X-LoRA checkpoint.")
    ],
    name: Annotated[str | None, typer.Option(help="How requests name it, where it is only one adapter.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="A new bank's base, a folder or a hub name; the one that the adapters name if none."),
    ] = None,
    router_layer: Annotated[
        int | None, typer.Option(min=0, help="A new bank's; the first layer that an adapter acts in if none.")
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(help="Their policy or token index; if none, invocation for each with such tokens, else 0."),
    ] = None,
) -> None:
    """Copy all adapters of a folder into a bank, or none if one of them cannot be used."""
    start = parse_activation(activation)
    from molora.interop import import_adapters

    done = import_adapters(folder, source, name=name, base=base, router_layer=router_layer, activation=start)
    config = done.bank.config
    if done.is_new:
        typer.echo(
            f"made {folder} (base {config.base.name}, router layer {config.router_layer}, maximum rank "
            f"{config.max_rank})"
        )
    for entry in done.entries:
        typer.echo(_added(entry, folder))
    for line in done.left_out:
        typer.echo(f"left out: {line}")


@bank_app.command()
def export(
    folder: BankArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make: one folder for each adapter.")],
    reader: Annotated[Reader, typer.Option("--for", help="What is to load them.")],
    adapter: Annotated[list[str] | None, typer.Option(help="Which; repeatable. All if none.")] = None,
) -> None:
    """Write a bank's adapters as plain LoRAs for another server, and say what is lost."""
    bank = _open(folder)
    from molora.interop import export_for_vllm

    done = export_for_vllm(bank, out, adapter)
    for line in (*done.notes, done.command):
        typer.echo(line)


RepositoryArgument = Annotated[str, typer.Argument(metavar="REPOSITORY", help="Such as someone/my-bank.")]


@bank_app.command()
def push(
    folder: BankArgument,
    repo: RepositoryArgument,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; the account's default if none.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Write a bank to a repository of the Hugging Face hub, with a card; log in by `hf auth login` before."""
    bank = _open(folder)
    from molora.hub import push

    typer.echo(push(bank, repo, private=private, message=message))


@bank_app.command()
def pull(
    repo: RepositoryArgument,
    folder: Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder, which is made.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit; the main branch if none.")] = None,
) -> None:
    """Fetch a bank from the Hugging Face hub, and check it."""
    from molora.hub import pull

    bank = pull(repo, folder, revision=revision)
    typer.echo(f"{folder}: {len(bank)} adapters over {bank.config.base.name}")


@bank_app.command()
def remove(folder: BankArgument, name: Annotated[str, typer.Argument(help="The adapter's name.")]) -> None:
    """Drop an adapter, and its key in the router, from a bank."""
    _open(folder).remove(name)
    typer.echo(f"removed {name} from {folder}")


@bank_app.command()
def inspect(folder: BankArgument, name: Annotated[str | None, typer.Argument(help="One adapter only.")] = None) -> None:
    """All that a bank, or one of its adapters, says of itself."""
    bank = _open(folder)
    table = Table(Column(no_wrap=True), Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for key, value in _adapter_details(bank, name) if name is not None else _bank_details(bank):
        table.add_row(Text(key, "bold"), Text(value))
    print_table(table)


def _open(folder: Path) -> Bank:
    check_folder(folder)
    from molora.bank import Bank

    return Bank.open(folder)


def _bank_details(bank: Bank) -> list[tuple[str, str]]:
    config = bank.config
    details = [
        ("bank", f"{config.name} (format {config.format_version})"),
        ("folder", str(bank.path)),
        ("base", config.base.name),
        ("base digest", config.base.digest),
        ("router layer", str(config.router_layer)),
        ("maximum rank", str(config.max_rank)),
        ("activation", str(config.activation)),
    ]
    if config.router is None:
        details.append(("router", "none"))
    else:
        details += [(f"router {key}", str(value)) for key, value in config.router.config.to_json().items()]
        details.append(("router digest", config.router.digest))
        details.append(("router columns", joined(["base", *(entry.name for entry in bank.routable)])))
    for entry in bank.adapters:
        details.append(("", ""))
        details += _adapter_details(bank, entry.name)
    return details


def _adapter_details(bank: Bank, name: str) -> list[tuple[str, str]]:
    entry = bank[name]
    adapter = bank.load_adapter(name)
    config = adapter.config
    targets = config.target_modules
    details = [
        ("adapter", entry.name),
        ("digest", entry.digest),
        ("folder", str(bank.adapter_folder(name))),
        ("size", _size(bank.adapter_folder(name))),
        ("routable", "yes" if entry.routable else "no, explicit routes only"),
        ("activation", str(entry.activation)),
        ("rank", str(adapter.max_rank)),
        ("alpha", f"{config.lora_alpha:g}" + (" (rsLoRA)" if config.use_rslora else "")),
        ("layers", _ranges(sorted(adapter.layers))),
        ("modules", f"{len(adapter.weights)}: {targets if isinstance(targets, str) else joined(sorted(targets))}"),
        ("made for", config.base_model_name_or_path or "not said"),
    ]
    if config.alora_invocation_tokens:
        details.append(("invocation tokens", joined(config.alora_invocation_tokens)))
    return details


def _ranges(numbers: list[int]) -> str:
    """`0, 8-29` for 0, 8, 9, ..., 29."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return joined("-".join(map(str, run)) for run in runs) or "none"


def _added(entry: AdapterEntry, folder: Path) -> str:
    kind = "routable" if entry.routable else "explicit routes only"
    return f"added {entry.name} ({kind}, activation {entry.activation}, {_short(entry.digest)}) to {folder}"


def _short(digest: str) -> str:
    return digest.rpartition(":")[2][:12]


def _size(folder: Path) -> str:
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"
