"""The command line: `molora demo`, `doctor`, `generate`, `bench`, `bank`, `train`, `eval` and `lm-eval`.

Nothing heavy is imported before a command runs, so that `molora --help` answers at once. What a user can get wrong
ends in one line on standard error and exit status 2.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

from molora.cli_bank import bank_app
from molora.cli_common import (
    BankArgument,
    BankOption,
    BaseOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    complain,
    load_model,
    parse_activation,
    parse_route,
    print_table,
)
from molora.display import Palette, RoutedWriter, joined, make_console

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
            complain("error", "bold red", error)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_OneLineErrors,
    help="Per-token routing over a bank of activated LoRA adapters, on one frozen base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bank_app, name="bank")
train_app = typer.Typer(help="Train what a bank holds.", no_args_is_help=True)
app.add_typer(train_app, name="train")


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

    run(load_model(bank, base, device, dtype), make_console())


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
    model = load_model(bank, base, device, dtype)
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

    model = load_model(bank, base, device, dtype)
    rows = measure(
        model, repeats=repeats, num_prompt_tokens=prompt_tokens, num_new_tokens=new_tokens, text=text or TEXT
    )
    titles = ("prefill tokens/s", "x base", "decode ms/token", "x base", "adapted")
    table = Table("route", *(Column(title, justify="right") for title in titles))
    for row in rows:
        prefill, decode = f"{row.prefill_tokens_per_s:.0f}", f"{row.decode_ms_per_token:.2f}"
        ratios = f"{row.prefill_ratio:.2f}", f"{row.decode_ratio:.2f}"
        table.add_row(row.route, prefill, ratios[0], decode, ratios[1], f"{row.adapted_share:.0%}")
    print_table(table)
    if out is not None:
        from molora.files import write_atomic

        write_atomic(out, json.dumps(report(model, rows), indent=2) + "\n")


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

    model = load_model(bank, base, device, dtype)
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
