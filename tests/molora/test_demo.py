"""The demo on a tiny base: what is computed, what is counted, and what is shown."""

import io
import re
from collections.abc import Callable

import pytest
import torch
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

import molora
from molora import demo
from molora.bank import Bank, BaseInfo
from molora.demo import DemoResult, Question, check_answers
from molora.digest import base_digest
from molora.display import Palette, RoutedWriter, label
from molora.generation import Generation
from molora.model import MoLoRA
from molora.router import KeyRouter
from molora.tiny import make_tiny_base

NAMES = ("sums", "words", "kin")
LAST_LINE = re.compile(r"base cache: (\d+) reused, (\d+) recomputed; router: (\d+) adapters over (\d+) tokens")
QUESTIONS = (Question("Count to two.", ("two",)), Question("1. Sort b a.\n2. Reverse ab.", ("a b", "ba")))


def make_adapter(seed: int) -> molora.Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in (1, 2, 3):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        tensors[f"{prefix}A.weight"] = torch.randn(4, 64, generator=generator)
        tensors[f"{prefix}B.weight"] = torch.randn(64, 4, generator=generator)
    return molora.Adapter.from_tensors(molora.AdapterConfig(r=4, lora_alpha=8, target_modules=["q_proj"]), tensors)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, key_router: Callable[..., KeyRouter]) -> MoLoRA:
    folder = tmp_path_factory.mktemp("demo")
    base = make_tiny_base(folder / "base", seed=0, vocab_size=259)  # every id is a byte
    bank = Bank.create(
        folder / "bank", name="tiny", base=BaseInfo("tiny", base_digest(base)), router_layer=1, max_rank=4
    )
    for seed, name in enumerate(NAMES):
        adapter = make_adapter(seed)
        (folder / name).mkdir()
        adapter.write(folder / name)
        bank.add(folder / name, activation="turn")
    bank.set_router(key_router(num_columns=len(NAMES) + 1))
    return molora.load(bank, base=base, device="cpu", dtype="float32")


def run(model: MoLoRA, **console: object) -> tuple[DemoResult, str, list[int]]:
    """The demo's result, what it wrote, and the rows of each forward that entered layer 0."""
    model.engine.clear_cache()
    rows: list[int] = []
    file = io.StringIO()
    layers = model.model.model.layers
    hook = layers[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    try:
        options = {"file": file, "width": 80, "highlight": False, **console}
        result = demo.run(model, Console(**options), questions=QUESTIONS, max_new_tokens=12)
    finally:
        hook.remove()
    return result, file.getvalue(), rows


def test_rows_that_enter_layer_0_are_prompt_less_reused_plus_generated_less_one(model):
    result, _, rows = run(model)
    assert [turn.route for turn in result.turns] == ["base", "auto", "base", "auto"]
    for turn in result.turns:
        out = turn.generation
        expected = out.num_prompt_tokens - out.num_reused_tokens + out.num_generated_tokens - 1
        of_turn = 0
        while of_turn < expected:  # the prompt's chunks, then a token each
            of_turn += rows.pop(0)
        assert of_turn == out.num_computed_tokens == expected
    assert rows == []


def test_each_routed_turn_takes_over_the_whole_base_conversation(model):
    result, _, _ = run(model)
    first = result.turns[0].generation
    for turn in result.routed:
        # The tiny base's answer is no text, and need not tokenize as it was written.
        assert turn.generation.num_reused_tokens >= first.num_prompt_tokens
        assert turn.generation.num_reencoded_tokens == 0
        assert all(route == () for route in turn.generation.routes[: turn.generation.activation_start])


def test_the_last_line_adds_up(model):
    result, written, _ = run(model)
    match = LAST_LINE.fullmatch(written.splitlines()[-1])
    assert match
    outs = [turn.generation for turn in result.routed]
    adapters = {name for out in outs for route in out.generated_routes for name, _ in route}
    assert [int(number) for number in match.groups()] == [
        sum(out.num_reused_tokens for out in outs),
        0,
        len(adapters),
        sum(out.num_generated_tokens for out in outs),
    ]
    assert sum(out.num_recomputed_tokens for out in outs) == 0
    assert adapters


def test_a_file_gets_marks_and_a_terminal_gets_colours(model):
    result, plain, _ = run(model)
    assert "\x1b" not in plain
    names = {name for turn in result.routed for route in turn.generation.generated_routes for name, _ in route}
    assert {name for name in NAMES if f"[{name}]" in plain} <= names
    assert "[base]" in plain
    assert any(f"[{name}]" in plain for name in names)
    assert max(map(len, plain.splitlines())) <= 80
    _, coloured, _ = run(model, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;" in coloured
    assert all(name in coloured and f"[{name}]" not in coloured for name in NAMES)  # the legend


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1. 3 + 4 = 7.\nAnswer: 7\n2. Answer: Tac", (True, True)),
        ("Answer: 7\nAnswer: cat\nAnswer: tac", (True, False)),
        ("Answer: 7", (True, False)),
        ("Answer: 71\nthe answer is tac", (False, False)),
        ("", (False, False)),
    ],
)
def test_answers_are_checked_in_order_and_exactly(text, right):
    assert check_answers(text, ("7", "tac")) == right


def test_the_demo_counts_only_routed_turns():
    out = Generation("", [1, 2, 3, 4], [[], [("a", 1.0)], [("b", 1.0)], []], 2, 2, 1, 5, 0, 0, 0, "stop")
    turns = (demo.Turn("base", out, ()), demo.Turn("auto", out, (True,)))
    line = "base cache: 5 reused, 0 recomputed; router: 2 adapters over 2 tokens"
    assert DemoResult(turns).summary == line


def write(tokens: list[tuple[str, list[tuple[str, float]]]], **options: object) -> str:
    console = Console(**{"file": io.StringIO(), "width": 20, "color_system": None, **options})
    writer = RoutedWriter(console, Palette(["a", "b"]), indent=2)
    for text, route in tokens:
        writer.push(text, route)
    writer.end()
    return console.file.getvalue()


def test_marks_stand_where_the_route_changes():
    a, b = [("a", 1.0)], [("b", 1.0)]
    assert write([("on", a), ("e", a), (" two", b), ("!", a)]) == "  [a] one [b]\n  two[a]!\n"
    assert write([("one\n", a), ("\n", b), ("two", a)]) == "  [a] one\n\n  two\n"
    assert write([("x", []), (" y", [("a", 0.25), ("b", 0.5)])], width=40) == "  [base] x [0.25 a + 0.5 b] y\n"


def test_lines_break_between_words_even_where_a_token_ends_inside_one():
    tokens = [("aaaa bb", []), ("bb cc", []), ("cc dd", []), ("dddd", [])]
    written = write(tokens, force_terminal=True, color_system="truecolor")
    assert re.sub(r"\x1b\[[0-9;]*m", "", written) == "  aaaa bbbb cccc\n  dddddd\n"


@pytest.mark.parametrize(
    ("color_system", "shown"),
    [
        ("truecolor", ColorSystem.TRUECOLOR),
        ("256", ColorSystem.EIGHT_BIT),
        ("standard", ColorSystem.STANDARD),
        ("windows", ColorSystem.WINDOWS),
    ],
)
def test_a_terminal_shows_eight_adapters_in_colours_that_can_be_told_apart_and_read(color_system, shown):
    names = [f"adapter{index}" for index in range(8)]
    palette = Palette(names, color_system)
    styles = [Style.parse(palette.style([(name, 1.0)])) for name in names]
    codes = {style.color.downgrade(shown).get_ansi_codes() for style in styles}
    assert len(codes) == 8
    assert (
        not {("30",), ("34",), ("37",), ("90",), ("97",)} & codes
    )  # black, dark blue, white, and what is close to them


def test_colours_tell_neighbours_apart():
    names = [f"adapter{index}" for index in range(12)]
    palette = Palette(names)
    styles = [palette.style([(name, 1.0)]) for name in names]
    assert len(set(styles)) == 12
    assert palette.style([]) not in styles
    assert palette.style([("adapter1", 0.2), ("adapter2", 0.7)]) == styles[2]
    assert label([("adapter1", 1.0)]) == "adapter1"


def test_a_missing_demo_bank_is_an_error_that_says_where_it_should_be(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "molora" / "demo.py"))
    with pytest.raises(FileNotFoundError, match=r"neither in .*name a bank with --bank"):
        demo.demo_bank_path()
    for folder in (tmp_path / "banks", tmp_path / "molora" / "banks"):  # a checkout's, then a wheel's before it
        path = folder / demo.BANK_NAME
        path.mkdir(parents=True)
        (path / "molora.json").touch()
        assert demo.demo_bank_path() == path
