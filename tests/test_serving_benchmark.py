"""The benchmark of the engine: every suite on a tiny model, and what its figures rest on."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SUITES = ["cpu", "decode", "mixed", "invoke", "conversation", "counters", "load", "plain"]
TIMEOUT_S = 300
HEAD = {
    **{"command": "bench", "device": "here", "versions": {"torch": "2", "cuda": None}, "commit": "abc"},
    **{"shape": "tiny", "dtype": "float32"},
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # nothing here is large enough to share


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a run of every suite prints, and the file that it writes."""
    out = tmp_path_factory.mktemp("benchmark") / "serving.json"
    command = [sys.executable, str(BENCHMARKS / "serving.py"), "--shape", "tiny", "--device", "cpu", "--repeats", "2"]
    for suite in SUITES:
        command += ["--suite", suite]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=TIMEOUT_S, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def figures(result: dict[str, Any], suite: str) -> dict[str, dict[str, Any]]:
    return {figure["name"]: figure for figure in result["figures"] if figure["suite"] == suite}


def test_a_result_says_where_and_on_what_it_was_measured(ran: tuple[str, dict[str, Any]]) -> None:
    _, result = ran
    assert "serving.py --shape tiny" in result["command"]
    assert result["device"]
    assert result["versions"]["torch"] == torch.__version__
    assert {"commit", "num_cpus", "num_threads", "load_average_at_start", "dtype", "shape", "seed", "repeats"} <= set(
        result
    )
    assert (result["shape"], result["repeats"], result["seed"]) == ("tiny", 2, 0)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_gives_figures_without_targets_on_a_tiny_model(ran: tuple[str, dict[str, Any]], suite: str) -> None:
    printed, result = ran
    found = figures(result, suite)
    assert found
    for figure in found.values():
        assert math.isfinite(figure["value"])
        assert figure["value"] >= 0
        assert figure["unit"] in ("x", "GB/s", "TFLOP/s", "tokens")
        assert (figure["at_least"], figure["at_most"], figure["reached"]) == (None, None, None)
    table = printed[printed.rindex("suite ") :].splitlines()
    assert sum(line.startswith(suite) for line in table[1:]) == len(found)


def test_answers_are_checked_before_they_are_timed(ran: tuple[str, dict[str, Any]]) -> None:
    printed, result = ran
    checks = {(check["suite"], check["what"]): check for check in result["checks"]}
    for suite in ("cpu", "decode", "load"):  # the first one of each model
        check = checks[suite, "answers equal those of full forwards"]
        assert check["num_answers"] >= 16
        assert check["num_reused_tokens"] > 0
        assert check["largest_difference"] < 2e-3
        assert check["share_flipped"] == 0
        assert printed.index(f"{suite}: checked") < printed.index(f"{suite}: {next(iter(figures(result, suite)))}")
    assert ("cpu", "base writes the tokens of transformers' generate") in checks
    assert sum(suite == "invoke" for suite, _ in checks) == 2  # a history each


def test_cpu_has_each_route_alone_and_with_clients(ran: tuple[str, dict[str, Any]]) -> None:
    names = list(figures(ran[1], "cpu"))
    for label in ("base", "explicit", "routed"):
        mine = [name for name in names if name.startswith(label)]
        assert any("1 client, 8 tokens of context" in name for name in mine)
        assert any("8 clients" in name for name in mine)
        assert sum("decode after" in name for name in mine) == 2
    assert sum("invoked after" in name for name in names) == 4


def test_decode_routes_no_token_to_base(ran: tuple[str, dict[str, Any]]) -> None:
    found = figures(ran[1], "decode")
    for kind in ("uniform", "zipf"):
        for batch in (1, 4):
            shares = found[f"routed, {kind}, batch {batch}, of base's tokens/s"]["details"]["shares"]
            assert sum(shares.values()) == pytest.approx(1, abs=0.01)
            assert "base" not in shares
    floors = [figure for name, figure in found.items() if "floor" in name]
    assert [figure["details"]["weight_bytes"] for figure in floors] == [4 * 180_800] * 2


def test_no_history_is_computed_again(ran: tuple[str, dict[str, Any]]) -> None:
    found = figures(ran[1], "counters")
    assert found["history tokens computed again"]["value"] == 0
    assert found["requests that found all of their history"]["value"] == 1


def test_adapters_are_loaded_while_others_decode(ran: tuple[str, dict[str, Any]]) -> None:
    (figure,) = figures(ran[1], "load").values()
    assert len(figure["details"]["load_ms"]) == 4
    assert figure["details"]["num_steps_during_loads"] >= 4


Modules = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def module(benchmark_module: Modules) -> Modules:
    """Imports a part of the benchmark."""
    return lambda name: benchmark_module(f"serving.{name}")


@pytest.fixture(scope="module")
def script(benchmark_module: Modules, load_script: Modules) -> ModuleType:
    return load_script("benchmarks/serving.py")


@pytest.fixture(scope="module")
def bench(module: Modules) -> Iterator[Any]:
    shape = module("shapes").SHAPES["tiny"]
    make = module("bench").random_bench
    with make(shape, torch.device("cpu"), torch.float32, has_router=True, repeats=2, seed=0) as made:
        yield made


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "cpu", "--shape", "8b"], "the suite cpu runs SmolLM2"),
        (["--suite", "nothing"], "invalid choice: 'nothing'"),
        (["--suite", "cpu", "--repeats", "1"], "--repeats must be at least 2"),
    ],
)
def test_a_wrong_argument_is_named(
    script: ModuleType,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["serving.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.parse_arguments(on_gpu=False)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_each_machine_has_its_suites(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serving.py"])
    assert script.parse_arguments(on_gpu=False).suite == ["cpu"]
    assert ["cpu", *script.parse_arguments(on_gpu=True).suite] == SUITES


def test_the_check_finds_a_wrong_route_a_wrong_token_and_a_wrong_logprob(module: Modules, bench: Any) -> None:
    checks = module("checks")
    request = bench.request(bench.ids(20), "adapter-0", 4, start=0, logprobs=checks.NUM_TOP)
    (out,) = bench.engine.generate(request)
    assert checks.compare(bench.m, request, out)["largest_difference"] < 1e-3
    with pytest.raises(checks.WrongAnswerError, match="routed otherwise"):
        checks.compare(bench.m, replace(request, route="adapter-1"), out)
    with pytest.raises(checks.WrongAnswerError, match="log-probabilities"):  # the gate is another one, not the name
        checks.compare(bench.m, replace(request, route={"adapter-0": 0.5}), out)
    with pytest.raises(checks.WrongAnswerError, match="log-probabilities"):
        checks.compare(bench.m, request, replace(out, token_ids=[*out.token_ids[:19], 5, *out.token_ids[20:]]))
    with pytest.raises(checks.WrongAnswerError, match="the engine wrote"):
        checks.check_same_tokens("base", [1, 2], [1, 3])


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_routes_are_forced(module: Modules, bench: Any, kind: str) -> None:
    routes = module("routes")
    routes.force(bench.m, bench.forced[kind])
    ids = torch.randint(3, 512, (4, 256), generator=torch.Generator().manual_seed(1))
    _, found = bench.m.logits(ids, [0] * 4, "auto")
    counts = Counter(name for row in found for route in row for name, _ in route)
    routes.force(bench.m, bench.forced["uniform"])
    wanted = routes.SHARES[kind]
    assert counts.total() == 1024
    for name, share in zip(bench.adapters, wanted, strict=True):
        assert counts[name] / 1024 == pytest.approx(share / sum(wanted), abs=0.06)


def test_an_answer_of_the_random_model_wanders(bench: Any) -> None:
    (out,) = bench.engine.generate(bench.request(bench.ids(16), "base", 64))
    assert len(set(out.generated_ids)) > 32


def test_generate_goes_on_after_a_cache_as_after_the_prompt(module: Modules, bench: Any) -> None:
    random_model, shape = module("models").random_model, bench.shape
    plain = module("plain").Plain(random_model(shape, torch.device("cpu"), torch.float32, 0))
    ids = bench.ids(24)
    (out,) = bench.engine.generate(bench.request(ids, "base", 6))
    assert plain.answer(ids, 6) == out.generated_ids
    cache = plain.read(ids)
    for _ in range(2):  # it stays as it was
        assert len(plain.stamps_after(cache, ids, 6)) == 6
        assert cache.get_seq_length() == 23
    assert len(plain.stamps(ids, 6)) == 6


def test_sequences_are_dealt_to_adapters_by_their_shares(module: Modules) -> None:
    deal, names = module("decode").deal, [f"adapter-{index}" for index in range(8)]
    zipf = module("routes").SHARES["zipf"]
    assert deal(names, zipf, 1) == ["adapter-0"]
    assert deal(names, [1.0] * 8, 8) == names
    counts = Counter(deal(names, zipf, 64))
    assert counts.total() == 64
    assert [counts[name] for name in names] == sorted(counts.values(), reverse=True)
    assert counts["adapter-0"] == 24


def test_decode_steps_want_answers_that_outlast_them(module: Modules, bench: Any) -> None:
    clocks = module("clocks")
    ids = bench.ids(8)
    steps = clocks.decode_steps(bench.engine, [bench.request(ids, "base", 200)], 5)
    assert len(steps) == 5
    assert all(begin < end for begin, end in steps)
    with pytest.raises(RuntimeError, match="ask for longer ones"):
        clocks.decode_steps(bench.engine, [bench.request(ids, "base", 6)], 5)


def test_the_floors_are_those_of_llama_8b(module: Modules) -> None:
    ceilings, shape = module("ceilings"), module("shapes").SHAPES["8b"]
    config = AutoConfig.for_model("llama", **shape.config, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert ceilings.weight_bytes(model) / 4.25e12 == pytest.approx(3.53e-3, rel=2e-3)
    assert ceilings.cache_bytes(model, 1) == 128 << 10
    linears, attention = 2 * 6.98e9 * 65536, 2 * 32 * 4096 * 65536**2
    assert ceilings.prompt_flops(model, 65536) == pytest.approx(linears + attention, rel=1e-3)


def test_a_figure_is_held_against_its_target(module: Modules, tmp_path: Path) -> None:
    report = module("figures").Report(HEAD, tmp_path / "out.json")
    report.suite = "decode"
    report.add("fast enough", 0.95, "x", at_least=0.9, step_ms=4.0)
    report.add("too slow", 1.5, "x", at_most=1.25)
    report.has_targets = False
    report.add("told", 1234.5, "GB/s", at_least=2.0)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["device"] == "here"
    assert [(figure["reached"], figure["at_least"]) for figure in written["figures"]] == [
        (True, 0.9),
        (False, None),
        (None, None),
    ]
    assert written["figures"][0]["details"] == {"step_ms": 4.0}
    assert [line.split() for line in report.table().splitlines()[1:]] == [
        ["decode", "fast", "enough", "0.95", "x", ">=", "0.9", "yes"],
        ["decode", "too", "slow", "1.5", "x", "<=", "1.25", "NO"],
        ["decode", "told", "1234", "GB/s", "-"],
    ]
    page = (tmp_path / "out.md").read_text()
    assert "tiny in float32 on here, commit abc. torch 2." in page
    assert "| decode | too slow | 1.5 | x | <= 1.25 | NO |" in page


def test_sides_take_turns_after_a_warm_up(module: Modules) -> None:
    calls: list[str] = []

    def side(name: str) -> Callable[[], int]:
        return lambda: calls.append(name) or len(calls)  # type: ignore[func-returns-value]

    found = module("clocks").in_turns({"a": side("a"), "b": side("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert found == {"a": [3, 5], "b": [4, 6]}
    calls.clear()
    pairs = module("clocks").beside(side("base"), {"a": side("a"), "b": side("b")}, 1)
    assert calls == ["base", "a", "base", "b"] * 2
    assert pairs == {"a": [(5, 6)], "b": [(7, 8)]}
