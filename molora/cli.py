"""The command line: `molora demo`, `doctor`, `generate`, `bench`, `bank`, `train`, `eval` and `lm-eval`.

Nothing heavy is imported before a command runs, so that `molora --help` answers at once. What a user can get wrong
ends in one line on standard error and exit status 2.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

from molora.display import Palette, RoutedWriter, joined, make_console, one_line

if TYPE_CHECKING:
    from molora.activation import Activation
    from molora.bank import AdapterEntry, Bank
    from molora.model import MoLoRA, Route

# What the checks of bad input raise; anything else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)


class _OneLineErrors(TyperGroup):
    """Turns errors that a user can cause into one line and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read our output has gone; typer knows what to do
        except USER_ERRORS as error:
            _complain("error", "bold red", error)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_OneLineErrors,
    help="Per-token routing over a bank of activated LoRA adapters, on one frozen base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bank_app = typer.Typer(help="Look into a bank; add, remove, import or export its adapters.", no_args_is_help=True)
app.add_typer(bank_app, name="bank")
train_app = typer.Typer(help="Train what a bank holds.", no_args_is_help=True)
app.add_typer(train_app, name="train")


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Reader(StrEnum):
    vllm = "vllm"


BankOption = Annotated[Path | None, typer.Option("--bank", help="A bank's folder; the demo's if none is given.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="The base model, a folder or a hub name; the bank's own if none is given.")
]
DeviceOption = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="auto is bfloat16 on a GPU and float32 on a CPU.")]
BankArgument = Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from molora import __version__

        typer.echo(f"molora {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    bank: BankOption = None, base: BaseOption = None, device: DeviceOption = None, dtype: DtypeOption = Dtype.auto
) -> None:
    """A conversation that shows the point: one base cache, and adapters that change inside an answer."""
    from molora.demo import run

    run(_load(bank, base, device, dtype), make_console())


@app.command()
def doctor(
    bank: BankOption = None,
    base: BaseOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look whether everything works here (packages, GPU, kernels, cache, bank, base), and say what to do.

    Nothing is downloaded or changed. The exit status is 1 if something is wrong.
    """
    from molora.demo import demo_bank_path

    with make_console(stderr=True).status("Loading PyTorch and Transformers"):
        from molora.doctor import examine
    console, findings = make_console(), []
    marks = {"well": "[green]✓[/]", "note": "[yellow]•[/]", "wrong": "[red]✗[/]"}
    for finding in examine(demo_bank_path() if bank is None else bank, base):
        findings.append(finding)
        if not as_json:
            advice = f"\n    [dim]{escape(finding.advice)}[/]" if finding.advice else ""
            console.print(f"{marks[finding.state]} {finding.subject:<9} {escape(finding.text)}{advice}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="A user's message; with --text, plain text to go on from.")],
    bank: BankOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.auto,
    route: Annotated[
        str, typer.Option(help="auto (the router), base, an adapter's name, or a blend such as sums=0.7,words=0.3.")
    ] = "auto",
    activation: Annotated[
        str | None,
        typer.Option(help="Where adapters begin to act: a policy or a token index; the bank's policy if none."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The answer's length at most, in tokens; 512 or what fits if not given.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes a draw at a temperature above 0 repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Read the prompt as plain text, not as a chat message.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print token ids, routes and counts as JSON.")] = False,
) -> None:
    """Answer one prompt; each token is coloured by the adapter that produced it."""
    if text and system is not None:
        raise ValueError("--system needs a chat message, and --text is plain text; leave one of them out.")
    chosen, start = parse_route(route), parse_activation(activation)
    model = _load(bank, base, device, dtype)
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    stream = model.stream(
        prompt if text else messages,
        route=chosen,
        activation=start,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    console = make_console()
    palette = Palette([entry.name for entry in model.bank.adapters], console.color_system)
    writer = RoutedWriter(console, palette)
    with stream:
        for token in stream:
            if not as_json:
                writer.push(token.text, token.route)
        out = stream.result
    if as_json:
        typer.echo(json.dumps(asdict(out)))
        return
    writer.end()
    produced: dict[str, int] = {}
    for pairs in out.generated_routes:
        for name in [name for name, _ in pairs] or ["base"]:
            produced[name] = produced.get(name, 0) + 1
    counts = joined(f"{name} {count}" for name, count in produced.items())
    console.print()
    console.print(
        Text(f"{out.num_prompt_tokens} prompt tokens, {out.num_generated_tokens} written: {counts}", "dim"),
        soft_wrap=True,
    )


@app.command()
def bench(
    bank: BankOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.auto,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each route; the medians are shown.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens to prefill.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    text: Annotated[
        str | None, typer.Option(help="What the tokens say, over and over; the router may rest on plain prose.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures and the circumstances to this JSON.")] = None,
) -> None:
    """Prefill and decode speed of each route, as ratios to the base model's in the same run."""
    from molora.benchmark import TEXT, measure, report

    model = _load(bank, base, device, dtype)
    rows = measure(
        model, repeats=repeats, num_prompt_tokens=prompt_tokens, num_new_tokens=new_tokens, text=text or TEXT
    )
    titles = ("prefill tokens/s", "x base", "decode ms/token", "x base", "adapted")
    table = Table("route", *(Column(title, justify="right") for title in titles))
    for row in rows:
        prefill, decode = f"{row.prefill_tokens_per_s:.0f}", f"{row.decode_ms_per_token:.2f}"
        ratios = f"{row.prefill_ratio:.2f}", f"{row.decode_ratio:.2f}"
        table.add_row(row.route, prefill, ratios[0], decode, ratios[1], f"{row.adapted_share:.0%}")
    _print_table(table)
    if out is not None:
        from molora.files import write_atomic

        write_atomic(out, json.dumps(report(model, rows), indent=2) + "\n")


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
    _print_table(table)


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
        found = key_from_data(_load(folder, base, device, dtype), key_from, name or adapter.resolve().name)
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
    _print_table(table)


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


def _load(bank: Path | None, base: str | None, device: str | None, dtype: Dtype) -> MoLoRA:
    """Load a bank and its base, saying on standard error what takes long or is not as it should be."""
    from molora.demo import demo_bank_path

    folder = demo_bank_path() if bank is None else bank
    _check_folder(folder)
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
        _complain("warning", "bold yellow", warning.message)
    return model


@app.command("eval")
def evaluate(
    bank: BankArgument,
    data: Annotated[
        Path,
        typer.Option(
            help="A .jsonl file of held-out items (`python -m molora.training.recipes`) or of texts "
            "(`python -m molora.training.recipes.texts`)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the figures are written, as JSON.")],
    way: Annotated[
        list[str] | None,
        typer.Option(
            help="base, auto, uniform, an adapter's name or, for items, given or sequence; repeatable. All if none."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="An answer's length at most, in tokens.")] = 192,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many items.")] = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Measure a bank by verified answers, or by perplexity where the data holds texts, each way to route alike.

    Where auto is among the ways of answering, the folder OUT.plots gets plots of the router (confusion matrix, load,
    calibration, entropy, switch rate) as PNG, and routes.html: answers, each token in the colour of its adapter.
    """
    import shlex
    import sys

    model = _load(bank, base, device, dtype)
    from molora.training.evaluate import measure_bank
    from molora.training.perplexity import holds_texts, measure_texts

    command = shlex.join(["molora", *sys.argv[1:]])
    if holds_texts(data):
        measure_texts(model, str(data), out, ways=way, limit=limit, command=command)
        return
    measure_bank(model, str(data), out, ways=way, max_new_tokens=max_new_tokens, limit=limit, command=command)


@app.command()
def convert(
    gguf: Annotated[Path, typer.Argument(metavar="GGUF", help="A GGUF file, of any quantization.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The base model's folder, which is made.")],
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file, for a model that comes without a chat template.")
    ] = None,
) -> None:
    """Make a base model of a GGUF file, in bfloat16: a folder that --base takes."""
    template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    from molora.gguf import convert_gguf
    from molora.progress import step

    with step(make_console(stderr=True), f"Converting {gguf}"):
        convert_gguf(gguf, folder, chat_template=template)


@train_app.command("bank")
def train_bank(
    config: Annotated[Path, typer.Option("--config", help="A YAML file such as configs/bank.yaml.")],
) -> None:
    """Train a whole bank: its adapters side by side, then the router. What was broken off goes on where it was."""
    from molora.training.bank import BankSettings, train_bank

    train_bank(BankSettings.read(config))


@app.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def lm_eval(ctx: typer.Context) -> None:
    """lm-evaluation-harness with a model more: --model molora --model_args bank=BANK,route=auto. Takes its options."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: run pip install "molora[lm-eval]"') from None

    import molora.lm_eval  # noqa: F401  # registers the model

    sys.argv = ["lm-eval", *ctx.args]  # the harness reads no other
    cli_evaluate()


def _open(folder: Path) -> Bank:
    _check_folder(folder)
    from molora.bank import Bank

    return Bank.open(folder)


def _check_folder(folder: Path) -> None:
    """Say at once what the imports would say seconds later."""
    if not (folder / "molora.json").is_file():
        raise FileNotFoundError(f"{folder} is not a bank: it has no molora.json.")


def _complain(word: str, style: str, what: BaseException | str) -> None:
    message = Text.assemble((f"{word}: ", style), one_line(what))
    make_console(stderr=True).print(message, soft_wrap=True)


def _print_table(table: Table) -> None:
    console = make_console()
    if not console.is_terminal:
        console.width = 200  # nothing needs to be cut to fit a file
    console.print(table)


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
