"""The benchmark of quality, all its stages on a tiny model: which learns nothing, but every way is measured."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch

import molora
from molora import Adapter, Bank, KeyRouter, MoLoRA, RouterConfig
from molora.routing import RouteRequest
from molora.training.examples import encode, read_records
from molora.training.recipes import TASKS, Item, build
from molora.training.recipes.build import RESERVED
from molora.training.recipes.documents import Document
from molora.training.recipes.surfaces import SURFACE_FORMS
from molora.training.recipes.wordings import WORDINGS

REPOSITORY = Path(__file__).parents[1]
DOMAINS = ["arithmetic", "words", "legs"]
SINGLES = {
    "base",
    "best single",
    "classifier",
    "sequence",
    "uniform",
    "ties",
    "dare",
    "dare_ties",
    "arrow",
    "xlora",
    "random",
}
SINGLES |= {
    "ties_svd",
    "dare_svd",
    "dare_ties_svd",
    "lm",
    "token",
    "own",
    "auto",
    "top-2",
    "sparse",
    "soft",
    "steady",
    "steadier",
    "open",
    "key",
    "given",
    "tuned",
    "tuned given",
    "joint",
    "plain",
    "nine",
    *DOMAINS,
}
RANK = 4
TINY = ["--base", "tiny-random/llama", "--router-layer", "1", "--rows", "1", "--domains", *DOMAINS]
TINY += ["--newcomer", "sorting", "--num-train", "40", "--device", "cpu", "--dtype", "float32"]
TINY += ["--steps", "2", "--router-steps", "2", "--xlora-steps", "2", "--singles", "1", "--composites", "2"]
TINY += ["--histories", "1", "--turns", "2", "--limit-peft", "1", "--max-new-tokens", "4"]
TINY += ["--rank", str(RANK), "--kv-cache-bytes", str(1 << 24)]
FREE = ("train adapters", "eval joint")
STARTS = ("first", "system", "half", "turn", "response")


@pytest.fixture
def short_recipe(benchmark_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few texts, items and records: their making and measuring takes most of a stage, and a few show as much."""
    texts = [Document("module", f"Text number {i}.", f"It is number {i}.") for i in range(220)]
    recipe, data = sys.modules[build.__module__], benchmark_module("quality.data")
    monkeypatch.setattr(recipe, "documents", lambda: list(texts))
    monkeypatch.setattr(recipe, "NUM_HELD_OUT_COMPOSITES", 1)
    monkeypatch.setattr(recipe, "NUM_VAL", 2)
    for module in (recipe, data):
        monkeypatch.setattr(module, "RESERVED", 40)
    monkeypatch.setattr(benchmark_module("quality.rows"), "NUM_VAL", 2)


@pytest.fixture
def terminated_as_before() -> Iterator[None]:
    """Whatever the stage `all` makes of the signal."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(
    benchmark_module: Callable[[str], ModuleType],
    load_script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    terminated_as_before: None,
) -> Iterator[Callable[..., None]]:
    """A stage as the script runs it, in this process: a new one takes many seconds to import what it needs."""
    benchmark_module("quality")
    script = load_script("benchmarks/quality.py")
    gc.freeze()  # what rows collect is what they have left, not all that earlier tests have

    def run(stage: str, work: Path, *options: str) -> None:
        monkeypatch.setattr(sys, "argv", [script.__file__, stage, "--work", str(work), *TINY, *options])
        monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as where a person runs it
            script.main()

    yield run
    gc.unfreeze()


@pytest.mark.usefixtures("short_recipe")
def test_every_way_is_measured_on_the_same_items(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("peft")
    out, work = tmp_path / "quality.json", tmp_path / "work"
    for stage in ("data", "train", "eval", "table"):
        run(stage, work, "--out", str(out))
    result = json.loads(out.read_text())
    assert result["num_items"]["singles"] == 3
    assert result["num_items"]["composites"] == 2
    rows = result["rows"]
    assert set(rows["singles"]) == SINGLES
    assert set(rows["composites"]) == SINGLES - {"plain"}
    assert set(rows["histories"]) == {f"{bank} from {start}" for bank in ("bank", "plain") for start in STARTS}
    assert set(rows["turns"]) == {f"{way} behind tasks" for way in ("auto", "given", "joint")}
    assert rows["turns"]["joint behind tasks"]["minus given behind tasks"]["num_items"] == 2 * len(DOMAINS)
    assert set(rows["newcomer"]) == set(rows["newcomer_composites"]) == {"nine", "nine given", "key"}
    assert set(rows["others"]) == {"removed", "not removed"}
    assert len(rows["others"]["removed"]["by_item"]["0"]) == 2
    assert rows["others"]["removed"]["minus not removed"]["num_items"] == 2
    for label in ("ties_svd", "dare_svd", "dare_ties_svd"):
        row = json.loads((work / "rows" / "seed-0" / f"{label}.json").read_text())
        assert {*row["loss_by_weight"]} == {str(weight) for weight in (1 / 3, 0.5, 1.0)}
        assert row["loss_by_weight"][str(row["weight"])] == min(row["loss_by_weight"].values())
        assert rows["singles"][label]["weights"] == {"0": row["weight"]}
        measured = Adapter.read(work / "seed-0" / "merged" / label).config
        assert measured.lora_alpha == pytest.approx(row["weight"] * RANK * len(DOMAINS))
        assert {f"data/val_{domain}.jsonl" for domain in DOMAINS} < {*row["of"]["files"]}
    for label, row in rows["singles"].items():
        assert len(row["by_item"]["0"]) == (1 if label in ("arrow", "xlora") else 3)
        assert row["minus auto"]["num_items"] == len(row["by_item"]["0"])
    assert set(result["routes"]["singles"]) == {
        "auto",
        "random",
        "token",
        "lm",
        "own",
        "steady",
        "steadier",
        "open",
        "key",
        "top-2",
        "sparse",
        "soft",
        "tuned",
        "nine",
    }
    steady = result["routes"]["composites"]["steady"]
    assert steady["neighbours_in_words"] > steady["neighbours_in_written_words"] > 0
    assert "| xlora | 0.000 (1 items)" in out.with_suffix(".md").read_text()
    for file in (work / "rows" / "seed-0").iterdir():
        files = json.loads(file.read_text())["of"]["files"]
        assert None not in files.values()
        assert {name.startswith("data/") for name in files} == {False, True}  # what was measured, and on what
    asking, others = ("auto", "top-2", "sequence", "removed", "key"), ("given", "dare_svd", "random", "bank-from-turn")
    for label in (*asking, *others):  # whose router is not asked needs not be measured again where another one is there
        of = json.loads((work / "rows" / "seed-0" / f"{label}.json").read_text())["of"]
        assert any(name.endswith("/molora.json") for name in of["files"]) == (label in asking)
        assert ("drift" in of["options"]) == (label in asking)
    (work / "rows" / "seed-0" / "given.json").unlink()  # what is there is not measured again
    capsys.readouterr()
    run("eval", work)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["given"]


def items_of(folder: Path, names: Iterable[str]) -> set[tuple[str, str]]:
    """What files ask, in earlier exchanges too: a domain, and what tells its items apart in whatever wording."""
    found = set()
    for name in names:
        for record in read_records(folder / f"{name}.jsonl"):
            messages, is_composite = record["messages"], record["kind"] == "composite"
            for question, answer in zip(messages[::2], messages[1::2], strict=True):
                is_last = answer is messages[-1]
                marks = SURFACE_FORMS[record["wording"]].reply_marks if is_composite and is_last else ("",)
                asked, answered = (
                    [{"text": each["content"], "domain": record["domain"]}]
                    if isinstance(each["content"], str)
                    else each["content"]
                    for each in (question, answer)
                )
                for part, reply, mark in zip(asked, answered, marks, strict=False):
                    if reply["domain"] == "family":  # its replies are a word or two
                        found.add(("family", " ".join(re.findall(r"\w+ is married to \w+\.", part["text"]))))
                    elif reply["domain"] is not None:  # workings name their item
                        found.add((reply["domain"], reply["text"].lstrip("\n").removeprefix(mark)))
    return found


def test_what_is_held_out_is_in_no_file_of_training(
    benchmark_module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    data, own = benchmark_module("quality.data"), ["arithmetic", "family", "filtering"]
    texts = [Document("module", f"Text number {i}.", f"It is number {i}.") for i in range(220)]
    monkeypatch.setattr(sys.modules[build.__module__], "documents", lambda: list(texts))
    held_out = ["singles", "composites", "histories", "turns", "newcomer", "newcomer_composites"]
    sizes = {"num_train": 40, "singles": 20, "composites": 40, "histories": 20, "turns": 20}
    shared = {}
    for is_broken in (False, True):
        if is_broken:
            monkeypatch.setattr(data, "held_out_items", training_items)
        work = tmp_path / str(is_broken)
        data.make_data(Namespace(work=work, domains=own, newcomer="words", data_seed=0, **sizes))
        names = sorted(path.stem for path in (work / "data").glob("*.jsonl"))
        labelled = [name for name in names if name.startswith("train_") and name != "train_unknown"]
        assert {*names} == {*held_out, *labelled, *(f"val_{name}" for name in own), "joint", "train_unknown"}
        learned = items_of(work / "data", labelled)
        shared[is_broken] = {name: items_of(work / "data", [name]) & learned for name in held_out}
        joint, apart = (
            {
                _text(record["messages"][-1])
                for name in files
                for record in read_records(work / "data" / f"{name}.jsonl")
            }
            for files in (["joint"], [f"train_{name}" for name in own])
        )
        assert joint == apart  # their domains are not told, but they are the adapters' own
    assert shared[False] == {name: set() for name in held_out}
    for name, items in shared[True].items():  # what would be found
        wanted = {"words", *own} if name == "newcomer_composites" else {"words"} if name == "newcomer" else {*own}
        assert {domain for domain, _ in items} == wanted, name


def training_items(args: Namespace, domains: Sequence[str]) -> dict[str, Iterator[Item]]:
    """In place of those that are held out."""
    known = {name: TASKS[name].items(args.data_seed, 2 * RESERVED + args.num_train, 2 * RESERVED) for name in domains}
    return {name: cycle(items[2 * RESERVED :]) for name, items in known.items()}


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_a_random_router_has_nothing_of_the_learned_one(
    benchmark_module: Callable[[str], ModuleType],
    make_bank: Callable[..., Bank],
    key_router: Callable[..., KeyRouter],
    tmp_path: Path,
) -> None:
    config = RouterConfig(hidden_dim=32, key_dim=16, lora_rank=2)
    bank = make_bank(tmp_path, router=key_router(config))
    learned, there = bank.load_router(), tmp_path / "random"
    assert isinstance(learned, KeyRouter)
    assert benchmark_module("quality.rows").with_random_router(tmp_path, seed=1) == there
    assert Bank.open(there).adapters == bank.adapters
    m = molora.load(there, device="cpu", dtype="float32")
    assert isinstance(m.decoder.router, KeyRouter)
    random = m.decoder.router.tensors()
    assert {*random} == {*learned.state_dict()}  # no LoRA
    assert not any(torch.equal(values, learned.tensors()[name]) for name, values in random.items())
    ids_BT = torch.arange(3, 40)[None]
    asked = RouteRequest(torch.zeros(1, 1, dtype=torch.long), auto=torch.ones(1, 1, dtype=torch.bool))
    plain, routed = (m.decoder.router_input(request, input_ids=ids_BT, use_cache=False) for request in (None, asked))
    assert torch.equal(plain, routed)
    assert Bank.open(bank.path).config == bank.config


def test_a_bank_stays_loaded_until_another_one_is_or_it_changes(
    benchmark_module: Callable[[str], ModuleType], make_bank: Callable[..., Bank], tmp_path: Path
) -> None:
    bank = make_bank(tmp_path)
    args = Namespace(work=tmp_path, seed=0, base=None, device="cpu", dtype="float32", kv_cache_bytes=2**20)
    here = benchmark_module("quality.measurement").Measurement(args)
    first = here.loaded(bank.path)
    engine = first.engine
    assert here.loaded(bank.path) is first
    assert here.loaded(bank.path, num_extra_slots=1) is not first
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([5, 6, 7])
    whole = here.loaded(bank.path)
    bank.remove(bank.adapters[-1].name)
    assert here.loaded(bank.path) is not whole
    assert here.loaded(bank.path).bank.adapters == Bank.open(bank.path).adapters
    here.close()
    assert here.loaded(bank.path).bank.adapters == Bank.open(bank.path).adapters


def test_a_row_of_other_data_banks_or_limits_is_measured_again_and_not_compared(
    benchmark_module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    measurement, table = benchmark_module("quality.measurement"), benchmark_module("quality.table")
    args = Namespace(work=tmp_path, seed=0, base="", device="cpu", dtype="auto", labels=None, steps=1)
    args = Namespace(**vars(args), limit=None, max_new_tokens=9, drift=0.3, domains=["words"], out=None)
    bank, items, others = (
        tmp_path / name for name in ("seed-0/bank/molora.json", "data/singles.jsonl", "data/turns.jsonl")
    )
    for file in (bank, items, others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"domain": "words", "wording": WORDINGS["words"].indices("held out")[0]}) + "\n")
    here, score = measurement.Measurement(args), {"accuracy": 1.0, "by_domain": {"words": 1.0}, "by_item": "1"}

    def write(label: str) -> None:
        here.write(label, {"singles": score}, 1.0, [bank])

    write("auto")
    write("given")
    others.write_text("of no concern")
    assert here.missing(["auto", "given", "base"]) == ["base"]
    table.make_table(args)
    for file in (bank, items):
        before = file.read_text()
        file.write_text(2 * before)
        assert here.missing(["auto", "given"]) == ["auto", "given"]
        write("given")
        assert here.missing(["auto", "given"]) == ["auto"]
        with pytest.raises(SystemExit, match=f"differ in {file.relative_to(tmp_path)}"):
            table.make_table(args)
        file.write_text(before)
        write("given")
    for name, value in (("limit", 1), ("max_new_tokens", 8)):
        before = getattr(args, name)
        setattr(args, name, value)
        assert here.missing(["auto"]) == ["auto"]
        write("given")
        with pytest.raises(SystemExit, match=f"differ in {name}"):
            table.make_table(args)
        setattr(args, name, before)
        write("given")
    there = json.loads(here.file("given").read_text())
    here.file("given").write_text(json.dumps(there | {"device": "another"}))
    table.make_table(Namespace(**vars(args) | {"out": tmp_path / "table.json"}))
    result = json.loads((tmp_path / "table.json").read_text())
    assert result["device"].split(", ").count("another") == 1
    assert sorted(run["rows"] for run in result["measured"]) == [["auto"], ["given"]]
    assert f"- another, commit {there['commit']}: given\n" in (tmp_path / "table.md").read_text()
    here.file("given").write_text(json.dumps(there | {"steps": 2}))
    with pytest.raises(SystemExit, match="differ in their steps"):
        table.make_table(args)
    here.file("given").write_text(json.dumps(there))
    for label in ("auto", "given"):  # as rows were written once
        there = json.loads(here.file(label).read_text())
        here.file(label).write_text(json.dumps({name: value for name, value in there.items() if name != "of"}))
    items.write_text(2 * items.read_text())
    args.limit = 1
    assert here.missing(["auto", "given"]) == []
    table.make_table(args)


@pytest.mark.parametrize("kind", ["ties", "dare", "dare_ties"])
def test_merged_updates_are_peft_s(
    benchmark_module: Callable[[str], ModuleType], make_adapter: Callable[..., Adapter], kind: str
) -> None:
    """Where the SVD cuts nothing off; scalings differ, and so would A and B that are merged each by themselves."""
    merge_utils, merges = pytest.importorskip("peft.utils.merge_utils"), benchmark_module("quality.merges")
    adapters = [make_adapter(seed=seed, rank=32, alpha=16 * seed) for seed in (1, 2, 3)]
    merged = merges.merge_updates(adapters, f"{kind}_svd", seed=5)
    half = merges.weighted(merged, 0.5)
    combine = getattr(merge_utils, {"dare": "dare_linear"}.get(kind, kind))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for module in adapters[0].weights:
            updates = [_update(adapter, module) for adapter in adapters]
            expected = combine(updates, torch.full((3,), 0.5), 0.5)
            assert expected.norm() > 0
            torch.testing.assert_close(_update(half, module), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(_update(merged, module), 2 * expected, rtol=1e-4, atol=1e-4)


def _update(adapter: Adapter, module: str) -> torch.Tensor:
    weights = adapter.weights[module]
    return weights.scaling * weights.b_OR @ weights.a_RI


def test_the_weight_of_a_merge_is_chosen_by_the_loss_of_answers(
    benchmark_module: Callable[[str], ModuleType], m: MoLoRA
) -> None:
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"{i} and {7 * i}?"}, {"role": "assistant", "content": str(8 * i)}]}
        for i in range(3)
    ]
    examples = [encode(record, m.tokenizer) for record in records]
    total, num_tokens = 0.0, 0
    for example in examples:
        logits_TV = m.logits([example.token_ids], [example.turn], {"x": 0.5})[0][0].log_softmax(-1)
        for at, (token, is_learned) in enumerate(zip(example.token_ids, example.learned, strict=True)):
            total -= float(logits_TV[at - 1, token]) * is_learned
            num_tokens += is_learned
    loss_at = benchmark_module("quality.merges").loss_at
    assert loss_at(m, "x", 0.5, examples) == pytest.approx(total / num_tokens, rel=1e-4)
    assert loss_at(m, "x", 1.0, examples) != pytest.approx(total / num_tokens, rel=1e-2)


def test_a_classifier_of_questions_learns_whose_they_are(
    benchmark_module: Callable[[str], ModuleType], m: MoLoRA
) -> None:
    """Each domain has words of its own; what stands before the turn and who answers say nothing."""
    names, rng = [entry.name for entry in m.bank.adapters][:2], Random(0)
    own = {names[0]: "abcdefg", names[1]: "hijklmn", None: "opqrstu"}

    def messages(domain: str | None) -> list[dict[str, Any]]:
        said = "".join(rng.choices(own[domain], k=20))
        earlier = "".join(rng.choices("abcdefghijklmnopqrstu", k=rng.randrange(40)))
        parts = [
            {"type": "text", "text": said[:9], "domain": domain},
            {"type": "text", "text": said[9:], "domain": domain},
        ]
        return [
            {"role": "user", "content": earlier},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": parts if rng.random() < 0.5 else said},
        ]

    domains = [*own] * 60
    answer = {"role": "assistant", "content": "yes"}
    records = [{"messages": [*messages(domain), answer], "domain": domain} for domain in domains]
    records += [{"messages": [*messages(names[0]), answer], "domain": names}] * 100  # of several: passed over
    asked = [[*messages(None)[:2], {"role": "user", "content": "".join(rng.choices(own[d], k=20))}] for d in domains]
    routes = benchmark_module("quality.classifier").routes_by_classifier(m, asked, records)
    right = [route == (domain or "base") for route, domain in zip(routes, domains, strict=True)]
    assert sum(right) > 0.9 * len(right)


@pytest.mark.usefixtures("short_recipe")
def test_seeds_are_trained_and_measured_by_one_command(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("reasoning_gym")
    run("data", tmp_path)
    capsys.readouterr()
    run("all", tmp_path, "--stages", "bank", "--rows-of", "top-2", "--seeds", "1", "--shares", "2")
    said = capsys.readouterr().out.splitlines()
    assert {line.rpartition(":")[0] for line in said if line.endswith(" s")} == {
        f"seed 1 {job}" for job in ("train adapters 1/2", "train adapters 2/2", "train bank", "eval top-2")
    }
    assert "• arithmetic, legs, side by side" in (tmp_path / "logs" / "seed-1-train-adapters-1-of-2.log").read_text()
    assert (tmp_path / "rows" / "seed-1" / "top-2.json").is_file()


def test_every_job_of_every_seed_is_a_process_with_its_options(
    benchmark_module: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminated_as_before: None,
) -> None:
    script, stages = tmp_path / "quality.py", ["bank", "joint"]
    script.write_text(
        "import json, sys\n"
        "print(json.dumps(sys.argv[1:]))\n"
        "sys.exit('no such data' if 'joint' in sys.argv or {'2/2', '1'} < {*sys.argv} else 0)\n"
    )
    monkeypatch.setattr(sys, "argv", [str(script), "--lr", "7", "all"])
    options = {"evals_per_device": 2, "device": "cpu", "share": (1, 1), "domains": DOMAINS, "work": tmp_path}
    args = Namespace(seeds=[0, 1], stages=stages, rows_of=["top-2", "joint"], shares=2, **options)
    with pytest.raises(SystemExit, match="7 of 12 failed"):
        benchmark_module("quality.schedule").run_all(args)
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    done = {"seed 0 train adapters 1/2", "seed 0 train adapters 2/2", "seed 0 train bank", "seed 0 eval top-2"}
    done |= {"seed 1 train adapters 1/2"}
    failed = {"seed 1 train adapters 2/2", "seed 0 train joint", "seed 1 train joint"}
    assert {name for name, end in said.items() if end.endswith(" s")} == done
    assert {name for name, end in said.items() if end.startswith("failed, see ")} == failed
    assert {name for name, end in said.items() if end == "left out"} == {
        "seed 1 train bank",
        "seed 1 eval top-2",
        "seed 0 eval joint",
        "seed 1 eval joint",
    }
    begun = {path.stem: json.loads(path.read_text().splitlines()[0]) for path in (tmp_path / "logs").iterdir()}
    assert begun == {
        f"seed-{seed}-{name}": [kind, "--lr", "7", "--seed", seed, *options]
        for seed, name, kind, *options in (
            ("0", "train-adapters-1-of-2", "train", "--stages", "adapters", "--share", "1/2"),
            ("0", "train-adapters-2-of-2", "train", "--stages", "adapters", "--share", "2/2"),
            ("1", "train-adapters-1-of-2", "train", "--stages", "adapters", "--share", "1/2"),
            ("1", "train-adapters-2-of-2", "train", "--stages", "adapters", "--share", "2/2"),
            ("0", "train-bank", "train", "--stages", "bank"),
            ("0", "train-joint", "train", "--stages", "joint"),
            ("1", "train-joint", "train", "--stages", "joint"),
            ("0", "eval-top-2", "eval", "--rows-of", "top-2"),
        )
    }
    assert (tmp_path / "logs" / "seed-0-train-joint.log").read_text().endswith("no such data\n")


@pytest.mark.parametrize(
    ("stage", "options", "said"),
    [
        ("train", [], "data has no items yet; run the stage data first"),
        ("eval", [], "data has no items yet; run the stage data first"),
        ("train", ["--drift", "much"], "argument --drift: invalid weight value: 'much'"),
        ("train", ["--drift", "-1"], "argument --drift: '-1' is no weight of 0 or more"),
        ("train", ["--drift", "nan"], "argument --drift: 'nan' is no weight of 0 or more"),
    ],
)
def test_what_cannot_run_says_so(
    run: Callable[..., None],
    stage: str,
    options: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        run(stage, tmp_path, *options)
    assert said in capsys.readouterr().err


def test_without_a_bank_nothing_is_measured(
    run: Callable[..., None], benchmark_module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("turns", "train_router"):
        (tmp_path / "data" / f"{name}.jsonl").touch()
    for group in benchmark_module("quality.rows").GROUPS:
        with pytest.raises(SystemExit, match="is no bank yet; run the stage train first"):
            run("eval", tmp_path, "--rows-of", group)
    with pytest.raises(SystemExit, match=r"^2$"):
        run("all", tmp_path / "elsewhere")


def test_a_routers_row_is_not_compared_with_one_of_other_adapters(
    benchmark_module: Callable[[str], ModuleType],
    make_bank: Callable[..., Bank],
    key_router: Callable[..., KeyRouter],
    tmp_path: Path,
) -> None:
    measurement, table = benchmark_module("quality.measurement"), benchmark_module("quality.table")
    bank = make_bank(tmp_path, router=key_router())
    options = {"base": None, "device": "cpu", "dtype": "float32", "limit": None, "max_new_tokens": 9, "drift": 0.3}
    here = measurement.Measurement(Namespace(work=tmp_path, seed=0, steps=1, **options))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/singles.jsonl").touch()
    score = {"accuracy": 1.0, "by_domain": {}, "by_item": "1"}
    for way in ("given", "auto"):
        here.write(way, {"singles": score}, 1.0, measurement.what_answers(bank, way))
    read = [json.loads(here.file(way).read_text()) for way in ("given", "auto")]
    table.check_alike(here.args, read)
    assert [row["of"]["options"].get("drift") for row in read] == [None, 0.3]
    (weights, *_) = measurement.what_answers(bank, "given")
    weights.write_bytes(weights.read_bytes() + b" ")
    here.write("auto", {"singles": score}, 1.0, measurement.what_answers(bank, "auto"))
    with pytest.raises(SystemExit, match=f"differ in {weights.relative_to(tmp_path)}"):
        table.check_alike(here.args, [read[0], json.loads(here.file("auto").read_text())])


def test_a_share_of_the_adapters_is_one_of_so_many(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in ("0/2", "3/2", "half"):
        with pytest.raises(SystemExit, match=r"^2$"):
            run("train", tmp_path, "--share", wrong)
        assert f"'{wrong}' is no i/n with i from 1 to n" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    (tmp_path / "data/turns.jsonl").touch()
    for stage, options, said in (
        ("all", ["--shares", "5"], "--shares is 5; expected 1 to 4"),  # there are three adapters, and a newcomer
        ("all", ["--share", "1/2"], "expected --shares"),
        ("train", ["--share", "1/2"], "expected --stages adapters"),
        ("train", ["--share", "5/5", "--stages", "adapters"], "--share is 5/5; there are 4 adapters"),
    ):
        with pytest.raises(SystemExit, match=said):
            run(stage, tmp_path, *options)


def test_every_group_of_rows_is_of_a_stage(benchmark_module: Callable[[str], ModuleType]) -> None:
    stage_of = benchmark_module("quality.schedule").STAGE_OF
    groups, stages = (benchmark_module(f"quality.{name}") for name in ("rows", "training"))
    assert {stage_of.get(group, group) for group in groups.GROUPS} <= {*stages.STAGES}
    assert {*stage_of} <= {*groups.GROUPS}


def test_a_router_waits_for_all_shares_of_its_adapters(benchmark_module: Callable[[str], ModuleType]) -> None:
    jobs = benchmark_module("quality.schedule").jobs_of([0], ["bank", "joint"], ["given"], 2)
    needs = {job.name: set(job.needs) for job in jobs}
    assert needs == {
        "seed 0 train adapters 1/2": set(),
        "seed 0 train adapters 2/2": set(),
        "seed 0 train bank": {"seed 0 train adapters 1/2", "seed 0 train adapters 2/2"},
        "seed 0 train joint": set(),
        "seed 0 eval given": {"seed 0 train bank"},
    }
    assert [job.options[2:] for job in jobs[:2]] == [["--stages", "adapters", "--share", f"{i}/2"] for i in (1, 2)]


def test_a_job_waits_for_what_it_needs_and_goes_with_it(benchmark_module: Callable[[str], ModuleType]) -> None:
    schedule = benchmark_module("quality.schedule")
    Board, jobs_of = schedule.Board, schedule.jobs_of
    jobs = jobs_of([0, 1], ["nine", "bank", "open"], ["key", "joint"])
    assert {job.name for job in jobs if not job.needs} == {f"seed {seed} {job}" for seed in (0, 1) for job in FREE}
    board, found = Board(jobs), []
    first, second = board.take("train"), board.take("train")
    assert first is not None
    assert second is not None
    assert [job.name for job in (first, second)] == ["seed 0 train adapters", "seed 1 train adapters"]
    board.end(second, well=False)  # and with it go the stages and rows of that seed, but for those that need nothing
    waiting = threading.Thread(target=lambda: found.append(board.take("train")))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()  # the stages of seed 0 need its adapters
    board.end(first, well=True)
    waiting.join(10)
    assert found[0].name == "seed 0 train nine"  # the first that was asked for
    assert {job.seed for job in board.waiting if job.kind == "train"} == {0}
    assert {job.name for job in board.waiting if job.seed == 1} == {"seed 1 eval joint"}
    board.stop()
    assert board.take("train") is board.take("eval") is None
    assert "seed 0 eval key" in board.failed


def test_a_process_that_cannot_begin_is_a_failure_and_nobody_waits_for_it(
    benchmark_module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = benchmark_module("quality.schedule")
    board = schedule.Board(schedule.jobs_of([0], ["bank"], ["bank", "joint"]))
    monkeypatch.setattr(sys, "argv", ["quality.py", "all"])
    no_folder = tmp_path / "a full disk"
    workers = [
        threading.Thread(target=schedule._work, args=(board, kind, None, 1, no_folder), daemon=True)
        for kind in ("train", "eval")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert not any(worker.is_alive() for worker in workers)
    assert board.done == set()
    assert board.failed == {f"seed 0 {job}" for job in ("train adapters", "train bank", "eval bank", "eval joint")}


def test_what_runs_is_terminated_with_the_command(tmp_path: Path) -> None:
    pid_file, script = tmp_path / "pid", tmp_path / "quality.py"
    settings = "seeds=[0], stages=['joint'], rows_of=[], evals_per_device=1, device='cpu', "
    settings += f"shares=1, share=(1, 1), domains=[], work=Path({str(tmp_path)!r})"
    script.write_text(
        f"""
import os, sys, time
from argparse import Namespace
from pathlib import Path
if sys.argv[1] == "all":
    sys.path.insert(0, {str(REPOSITORY / "benchmarks")!r})
    from quality.schedule import run_all
    run_all(Namespace({settings}))
Path({str(tmp_path / "new")!r}).write_text(str(os.getpid()))
os.rename({str(tmp_path / "new")!r}, {str(pid_file)!r})
time.sleep(600)
"""
    )
    command = subprocess.Popen([sys.executable, str(script), "all"], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not pid_file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        command.terminate()
        assert command.wait(60) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid_file.read_text()), 0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)


def test_the_page_is_that_of_its_figures_and_says_what_the_intervals_are_over(
    benchmark_module: Callable[[str], ModuleType],
) -> None:
    results = REPOSITORY / "benchmarks/results"
    page = (results / "quality-h100.md").read_text()
    figures = json.loads((results / "quality-h100.json").read_text())
    assert page == benchmark_module("quality.table").markdown(figures)
    assert "Intervals are 95% ones over items" in page


@pytest.mark.parametrize(
    ("begins", "label"),
    [
        ("base", "base"),
        ("PEFT's merge", "ties"),
        ("one adapter for the whole sequence, by the router", "sequence"),
        ("one adapter for the whole sequence, by a classifier", "classifier"),
        ("the router, an adapter", "auto"),
        ("the router, soft gates of the two", "top-2"),
        ("the right adapter", "given"),
        ("one LoRA of eight times", "joint"),
    ],
)
def test_the_readme_says_what_was_measured(begins: str, label: str) -> None:
    rows = json.loads((REPOSITORY / "benchmarks/results/quality-h100.json").read_text())["rows"]
    (line,) = [line for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith(f"| {begins}")]
    measured = [f"{rows[kind][label]['accuracy']:.3f}" for kind in ("singles", "composites")]
    assert [cell.strip() for cell in line.split("|")[2:4]] == measured
