"""The command line: what the commands do and print, and one line for what a user gets wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import molora
from molora.bank import Bank, BaseInfo
from molora.benchmark import measure
from molora.cli import app
from molora.cli_common import parse_activation, parse_route
from molora.digest import base_digest
from molora.router import KeyRouter
from molora.tiny import make_tiny_base

NAMES = ("sums", "words")


def write_adapter(folder: Path, seed: int, *, layers: tuple[int, ...] = (1, 2, 3)) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        prefix = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_"
        tensors[f"{prefix}A.weight"] = torch.randn(4, 64, generator=generator)
        tensors[f"{prefix}B.weight"] = torch.randn(128, 4, generator=generator)
    config = molora.AdapterConfig(r=4, lora_alpha=8, target_modules=["up_proj"])
    folder.mkdir(parents=True)
    molora.Adapter.from_tensors(config, tensors).write(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("cli") / "base", seed=0, vocab_size=259)


@pytest.fixture
def bank(tmp_path: Path, base: Path, key_router: Callable[..., KeyRouter]) -> Path:
    """A bank of two adapters with a router."""
    made = Bank.create(
        tmp_path / "bank", name="tiny", base=BaseInfo(str(base), base_digest(base)), router_layer=1, max_rank=4
    )
    for seed, name in enumerate(NAMES):
        made.add(write_adapter(tmp_path / name, seed), activation="turn")
    made.set_router(key_router(num_columns=len(NAMES) + 1))
    return made.path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments: object) -> str:
    """The one line that a command ends in when the user is wrong."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_help_and_version_import_neither_torch_nor_transformers():
    script = (
        "import sys\nfrom molora.cli import app\n"
        "try:\n    app([{!r}])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {{'torch', 'transformers', 'numpy'}} & set(sys.modules)"
    )
    for option, expected in (("--help", "demo"), ("--version", f"molora {molora.__version__}")):
        done = subprocess.run([sys.executable, "-c", script.format(option)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_lm_eval_hands_its_arguments_to_the_harness(monkeypatch):
    harness = pytest.importorskip("lm_eval.__main__")
    registry = pytest.importorskip("lm_eval.api.registry")
    asked = []

    def evaluate():
        assert registry.get_model("molora").__module__ == "molora.lm_eval"
        assert registry.get_model("local-completions")
        asked.append(sys.argv)

    monkeypatch.setattr(sys, "argv", ["molora"])
    monkeypatch.setattr(harness, "cli_evaluate", evaluate)
    arguments = ["--model", "molora", "--model_args", "bank=b,route=auto", "--tasks", "a,b", "--help"]
    result = call("lm-eval", *arguments)
    assert result.exit_code == 0, result.output
    assert asked == [["lm-eval", *arguments]]

    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert 'run pip install "molora[lm-eval]"' in fails("lm-eval")


def test_demo_ends_in_its_last_line(bank):
    result = call("demo", "--bank", bank)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1].startswith("base cache: ")


def test_another_base_is_one_warning_line(bank, tmp_path):
    other = make_tiny_base(tmp_path / "other", seed=1, vocab_size=259)
    result = call("generate", "hello", "--bank", bank, "--base", other, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: bank 'tiny' was trained on ")
    assert result.stderr.count("\n") == 1


def test_generate_json_is_what_the_api_returns(bank):
    options = ["--max-new-tokens", 6, "--route", "sums=0.5,words=0.25", "--system", "Be brief."]
    result = call("generate", "hello", "--bank", bank, "--json", *options)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    out = molora.load(bank).generate(messages, route={"sums": 0.5, "words": 0.25}, max_new_tokens=6)
    assert set(said) == set(out.__dataclass_fields__)
    assert said["token_ids"] == out.token_ids
    assert said["text"] == out.text
    assert said["routes"] == [[[name, gate] for name, gate in route] for route in out.routes]
    counts = ("num_prompt_tokens", "num_generated_tokens", "num_computed_tokens", "activation_start", "finish_reason")
    assert {name: said[name] for name in counts} == {name: getattr(out, name) for name in counts}


def test_generate_writes_text_and_counts(bank):
    result = call("generate", "hello", "--bank", bank, "--route", "words", "--text", "--activation", 0)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("[words] ")
    assert result.stdout.splitlines()[-1].startswith("5 prompt tokens, ")
    drawn = ["generate", "hello", "--bank", bank, "--temperature", 2, "--seed", 3, "--max-new-tokens", 8]
    assert call(*drawn).stdout == call(*drawn).stdout != call(*drawn, "--seed", 4).stdout


def test_bench_compares_each_route_with_base(bank, tmp_path):
    file = tmp_path / "bench.json"
    options = ["--repeats", 1, "--prompt-tokens", 16, "--new-tokens", 2, "--out", file]
    result = call("bench", "--bank", bank, *options)
    assert result.exit_code == 0, result.output
    said = json.loads(file.read_text())
    assert [row["route"] for row in said["routes"]] == ["base", *NAMES, "auto"]
    assert said["routes"][0]["prefill_ratio"] == said["routes"][0]["decode_ratio"] == 1
    assert all(row["decode_ms_per_token"] > 0 and row["prefill_tokens_per_s"] > 0 for row in said["routes"])
    shares = {row["route"]: row["adapted_share"] for row in said["routes"]}
    assert shares == {"base": 0, "sums": 1, "words": 1, "auto": shares["auto"]}
    assert {"command", "device", "dtype", "versions", "commit"} <= set(said)
    assert said["versions"]["torch"] == torch.__version__
    assert all(name in result.stdout for name in ("base", *NAMES, "auto"))


def test_bench_says_on_how_much_of_its_text_adapters_acted(bank):
    model, text = molora.load(bank), "abcdefgh"
    auto = measure(model, repeats=1, num_prompt_tokens=4, num_new_tokens=12, text=text)[-1]
    ids = model.tokenizer(text * 2, add_special_tokens=False)["input_ids"]
    routes = model.logits([ids], [0])[1][0]
    assert auto.adapted_share == sum(bool(route) for route in routes[4:]) / 12
    assert 0 < auto.adapted_share < 1
    with pytest.raises(ValueError, match="no tokens"):
        measure(model, repeats=1, num_prompt_tokens=4, num_new_tokens=12, text="")


def test_bank_list_and_inspect(bank):
    listed = call("bank", "list", bank)
    assert listed.exit_code == 0, listed.output
    header, *rows = listed.stdout.splitlines()
    assert header.split() == ["adapter", "rank", "layers", "routable", "activation", "digest", "size"]
    digest = Bank.open(bank)["sums"].digest.removeprefix("sha256:")
    assert rows[0].split()[:6] == ["sums", "4", "1-3", "yes", "turn", digest[:12]]
    assert [row.split()[0] for row in rows] == list(NAMES)
    whole = call("bank", "inspect", bank).stdout
    assert Bank.open(bank).config.base.digest in whole
    assert "router columns" in whole
    assert "words" in whole
    one = call("bank", "inspect", bank, "sums").stdout
    assert digest in one
    assert "words" not in one


def test_bank_add_and_remove(bank, tmp_path):
    early = write_adapter(tmp_path / "early", 7, layers=(0, 2))
    result = call("bank", "add", bank, early, "--name", "first", "--activation", "response")
    assert result.exit_code == 0, result.output
    entry = Bank.open(bank)["first"]
    assert (entry.routable, entry.activation) == (False, "response")
    assert "0, 2" in call("bank", "list", bank).stdout
    assert "layer 0, below the router layer 1" in fails("bank", "add", bank, early, "--name", "x", "--routable")
    assert call("bank", "remove", bank, "sums").stdout == f"removed sums from {bank}\n"
    assert [entry.name for entry in Bank.open(bank).adapters] == ["words", "first"]
    assert "has no adapter 'sums'" in fails("bank", "remove", bank, "sums")


def test_bank_add_with_a_key_from_data(bank, tmp_path):
    late, data = write_adapter(tmp_path / "cooking", 7), tmp_path / "cooking.jsonl"
    messages = [{"role": "user", "content": "Soup?"}, {"role": "assistant", "content": "Boil it."}]
    data.write_text(json.dumps({"messages": messages, "domain": "cooking"}) + "\n")
    assert "no token of the domain 'x'" in fails("bank", "add", bank, late, "--name", "x", "--key-from", data)
    assert "does not exist" in fails("bank", "add", bank, late, "--key-from", tmp_path / "nowhere.jsonl")
    old = Bank.open(bank).load_router()
    result = call("bank", "add", bank, late, "--activation", "turn", "--key-from", data)
    assert result.exit_code == 0, result.output
    assert "added cooking (routable" in result.output
    router = Bank.open(bank).load_router()
    assert torch.equal(router.keys_CD[:-1], old.keys_CD)
    assert torch.allclose(router.keys_CD[-1].norm(), old.keys_CD.norm(dim=1).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--route", "cooking"], "has no adapter 'cooking'; its adapters are: sums, words"),
        (["--route", "sums=much"], "'sums=much' is no NAME=WEIGHT"),
        (["--activation", "later"], "activation 'later' is unknown"),
        (["--activation", "-1"], "activation '-1' is unknown"),
        (["--activation", "invocation"], "no alora_invocation_tokens"),
        (["--text"], "needs chat messages"),
        (["--text", "--system", "Be brief."], "leave one of them out"),
        (["--max-new-tokens", "5000"], "reads at most 2048 tokens"),
        (["--max-new-tokens", "0"], "expected 1 or more"),
        (["--temperature", "-1"], "expected 0 (greedy) or a positive number"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--base", "no/such/model/anywhere"], "give a folder, or a name such as"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(bank, options, message):
    assert message in fails("generate", "hello", "--bank", bank, *options)


def test_damaged_banks_are_one_line(bank, tmp_path):
    assert "is not a bank" in fails("demo", "--bank", tmp_path / "nowhere")
    assert "is not a bank" in fails("bank", "list", tmp_path)
    weights = bank / "adapters" / "sums" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "adapter_model.safetensors" in fails("generate", "hello", "--bank", bank)
    assert "adapter_model.safetensors" in fails("bank", "list", bank)
    (bank / "molora.json").write_text("{")
    assert "not valid JSON" in fails("bank", "inspect", bank)


def test_a_bug_keeps_its_traceback(bank, monkeypatch):
    def broken(*arguments: object, **options: object) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(Bank, "remove", broken)
    result = call("bank", "remove", bank, "sums")
    assert isinstance(result.exception, AssertionError)


def test_routes_and_activations_are_read_as_written():
    assert parse_route("auto") == "auto"
    assert parse_route("a = 0.5, b=-1") == {"a": 0.5, "b": -1.0}
    with pytest.raises(ValueError, match="names 'a' twice"):
        parse_route("a=1,a=2")
    assert parse_activation(None) is None
    assert parse_activation("17") == 17
    assert parse_activation("turn") == "turn"
