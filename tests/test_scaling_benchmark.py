"""The model of a fleet: its invariants, the simulations and real caches that it is held against, and its command."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from molora.serving.cluster.config import RayConfig
from molora.serving.engine import GPU_CACHE_SHARE

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
Modules = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def module(benchmark_module: Modules) -> Modules:
    """Imports a part of the benchmark."""
    return lambda name: benchmark_module(f"scaling.{name}")


@pytest.fixture(scope="module")
def script(benchmark_module: Modules, load_script: Modules) -> ModuleType:
    return load_script("benchmarks/scaling.py")


@pytest.fixture(scope="module")
def measurements(module: Modules) -> Any:
    return module("measured").Measurements()


@pytest.fixture
def fleet(module: Modules, measurements: Any) -> Any:
    """An 8B base, a thousand adapters, forty requests a second."""
    return module("search").at(module("results").fleet_of(measurements), 40.0)


def returns(module: Modules, num_gpus: int, routing: str, turns: int = 4, answer_s: float = 2.0) -> Any:
    traffic = module("parts").Traffic(requests_per_s=1, turns=turns)
    return module("returns").Returns.of(traffic, answer_s, num_gpus, routing)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((BENCHMARKS / "results" / "scaling.json").read_text())
    return found


def test_a_base_takes_what_the_measured_one_took(module: Modules, measurements: Any) -> None:
    base = module("measured").BASE
    found = measurements.details("decode", "base, batch 64, of the floor of weights and cache")
    assert base.step_bytes == found["weight_bytes"]
    assert 64 * (1024 + 28) * base.token_bytes == found["cache_bytes"]


def test_a_base_and_its_slots_take_what_a_real_model_takes(module: Modules) -> None:
    with module("real_slots").loaded(num_slots=3, rank=5) as (m, _):
        base = module("base").Base.from_config(m.model.config.to_dict(), dtype="float32")
        by_kind = {True: 0, False: 0}
        for name, weights in m.model.named_parameters():
            by_kind[".lora_" in name] += weights.nbytes
    assert base.num_bytes == by_kind[False]
    assert 3 * module("parts").Adapters(number=9, rank=5).slot_bytes(base) == by_kind[True]


def test_the_cache_gets_the_engines_share(module: Modules) -> None:
    assert module("model").CACHE_SHARE == GPU_CACHE_SHARE


def test_memory_is_shared_out_and_not_made(module: Modules, fleet: Any) -> None:
    outlook, before = module("outlook"), 10**9
    for slots in (1, 8, 64, 512):
        found = outlook.assess(fleet, 4, slots)
        free = fleet.gpu.memory_bytes - fleet.gpu.context_bytes - found.base_bytes - found.slots_bytes
        assert found.kv_bytes == pytest.approx(GPU_CACHE_SHARE * free, abs=fleet.base.token_bytes)
        assert found.slots_bytes == slots * fleet.adapters.slot_bytes(fleet.base)
        assert found.kv_tokens < before
        before = found.kv_tokens


def test_a_step_takes_longer_with_everything_that_it_reads(module: Modules, fleet: Any) -> None:
    def step_s(batch: float, kv_tokens: float, num_adapters: float) -> float:
        return float(module("model").step_s(fleet, batch=batch, kv_tokens=kv_tokens, num_adapters=num_adapters))

    assert step_s(1, 0, 0) > fleet.base.step_bytes / fleet.gpu.bytes_per_s
    assert step_s(1, 0, 0) < step_s(2, 0, 0) < step_s(2, 100, 0) < step_s(2, 100, 1) < step_s(2, 100, 2)
    read_s = 1000 * fleet.base.token_bytes / fleet.gpu.bytes_per_s
    assert step_s(2, 1100, 1) - step_s(2, 100, 1) == pytest.approx(read_s)
    assert step_s(10_000, 0, 0) > 2 * fleet.base.num_layer_weights * 10_000 / fleet.costs.flops_per_s


def test_popularity_is_shared_out_and_groups_are_as_good_as_adapters(module: Modules) -> None:
    popularity, dealing = module("popularity"), module("dealing")
    for number in (1, 10, 1000, 1001, 100_000):
        for zipf in (0.0, 1.0, 1.5):
            found = popularity.Popularity.zipf(number, zipf)
            assert found.counts_A.sum() == number
            assert found.counts_A @ found.shares_A == pytest.approx(1)
    shares_A = dealing.zipf_shares(5000, 1.0)
    exact = popularity.Popularity(shares_A, shares_A * 0 + 1)
    for routing in module("parts").ROUTINGS:
        rates = [
            popularity.Placement.of(each, 8, routing).slot_hit_rate(100, returns(module, 8, routing), 1.0)
            for each in (exact, popularity.Popularity.zipf(5000, 1.0))
        ]
        assert rates[0] == pytest.approx(rates[1], abs=1e-3)


def test_adapters_are_found_more_often_with_slots_and_by_affinity_with_gpus(module: Modules) -> None:
    popularity = module("popularity")
    shares = popularity.Popularity.zipf(10_000, 1.0)

    def hit_rate(num_gpus: int, routing: str, num_slots: int, turns: int = 4) -> float:
        placement = popularity.Placement.of(shares, num_gpus, routing)
        return float(placement.slot_hit_rate(num_slots, returns(module, num_gpus, routing, turns), 1.0))

    by_slots = [hit_rate(1, "affinity", slots) for slots in (1, 10, 100, 1000, 9999)]
    assert by_slots == sorted(by_slots)
    assert by_slots[-1] > 0.99
    assert hit_rate(1, "affinity", 10_000) == 1
    by_gpus = [hit_rate(gpus, "affinity", 50) for gpus in (1, 2, 8, 100, 1000)]
    assert by_gpus == sorted(by_gpus)
    # By prefix only a conversation's own turns find more than in turn: single questions find the same.
    assert {round(hit_rate(gpus, "prefix", 50), 6) for gpus in (1, 8, 1000)} == {round(by_gpus[0], 6)}
    assert hit_rate(1, "round-robin", 50) == by_gpus[0]
    assert hit_rate(8, "round-robin", 50, turns=1) == hit_rate(8, "prefix", 50, turns=1)
    by_turns = [hit_rate(gpus, "round-robin", 50) for gpus in (1, 2, 8, 100, 1000)]
    assert by_turns == sorted(by_turns, reverse=True)
    assert by_turns[-1] == pytest.approx(hit_rate(8, "prefix", 50, turns=1), abs=0.001)


def test_a_placement_gives_every_gpu_its_share(module: Modules) -> None:
    popularity = module("popularity")
    for number, num_gpus in ((10, 1000), (1000, 8), (100_000, 300)):
        found = popularity.Placement.of(popularity.Popularity.zipf(number, 1.0), num_gpus, "affinity")
        assert found.weights_A @ found.rates_A == pytest.approx(1)  # of its requests
        assert found.hosts_A.min() >= 1
        assert found.rates_A.max() <= 1  # no adapter needs more than the GPU


ROUTED = [(1, "affinity"), (4, "affinity"), (4, "round-robin"), (4, "prefix")]


@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize(("num_gpus", "routing"), ROUTED)
def test_che_is_near_to_lru(module: Modules, num_gpus: int, routing: str, turns: int) -> None:
    popularity = module("popularity")
    traffic = module("parts").Traffic(requests_per_s=num_gpus, turns=turns)
    how = {"number": 500, "zipf": 1.0, "num_gpus": num_gpus, "routing": routing}
    asked = module("dealing").requests(traffic, **how, answer_s=4.0, num_requests=40_000, seed=3)
    simulated = module("simulate").slot_hit_rate(asked, num_gpus=num_gpus, num_slots=60, held_s=4.0)
    placement = popularity.Placement.of(popularity.Popularity.zipf(500, 1.0), num_gpus, routing)
    found = placement.slot_hit_rate(60, returns(module, num_gpus, routing, turns, answer_s=4.0), 1.0)
    assert found == pytest.approx(simulated, abs=0.012)


def test_a_conversation_is_dealt_out_turn_by_turn(module: Modules) -> None:
    dealing = module("dealing")
    traffic = module("parts").Traffic(requests_per_s=4, turns=3)
    how = {"number": 50, "zipf": 1.0, "num_gpus": 4, "answer_s": 2.0, "num_requests": 4000, "seed": 0}
    stays = {}
    for routing in module("parts").ROUTINGS:
        asked = dealing.requests(traffic, **how, routing=routing)
        times = [each.time_s for each in asked]
        assert times == sorted(times)
        assert len(asked) / times[-1] == pytest.approx(4, rel=0.1)
        by_conversation: dict[int, list[Any]] = {}
        for each in asked:
            by_conversation.setdefault(each.conversation, []).append(each)
        for turns in by_conversation.values():
            assert [each.turn for each in turns] == [*range(1, len(turns) + 1)]
            assert len({each.adapter for each in turns}) == 1
            pauses = [after.time_s - before.time_s for before, after in pairwise(turns)]
            assert min(pauses, default=2.0) >= 2.0
        stays[routing] = dealing.share_that_stays(asked)
    assert stays["affinity"] == 1
    assert stays["prefix"] > 0.99  # some go elsewhere because of the load
    assert stays["round-robin"] == pytest.approx(0.25, abs=0.05)


def test_by_prefix_load_moves_a_conversation_and_what_is_forgotten_does(module: Modules) -> None:
    def stays(requests_per_s: float, **changes: int) -> float:
        traffic = module("parts").Traffic(requests_per_s=requests_per_s)
        how = {"number": 1, "zipf": 1.0, "num_gpus": 8, "routing": "prefix", "answer_s": 2.0, "seed": 0}
        asked = module("dealing").requests(traffic, **how, num_requests=6000, **changes)
        return float(module("dealing").share_that_stays(asked))

    assert stays(8) > 0.999
    assert 0.9 < stays(160) < 0.999
    assert stays(8, max_keys=100) < 0.5


def test_the_engines_slots_find_what_the_simulation_finds(module: Modules) -> None:
    asked = module("dealing").requests(
        module("parts").Traffic(requests_per_s=1),
        **{"number": 15, "zipf": 1.0, "num_gpus": 1, "routing": "prefix"},
        answer_s=2.0,
        num_requests=300,
        seed=5,
    )
    found = module("real_slots").same_hits(asked, number=15, num_slots=6, held_s=2.0)
    assert 100 < found["num_found"] < 290


def test_a_slot_that_is_held_is_not_given_away(module: Modules) -> None:
    slots = module("simulate").SlotCache(2)
    assert [slots.acquire(adapter) for adapter in (1, 2, 1)] == [False, False, True]
    with pytest.raises(RuntimeError, match="all 2 slots are held"):
        slots.acquire(3)
    slots.release(2)
    assert not slots.acquire(3)
    slots.release(1)
    assert slots.acquire(1)  # it was asked for twice


@pytest.mark.parametrize("keeps_active", [False, True])
@pytest.mark.parametrize(("num_gpus", "routing"), [(1, "prefix"), (3, "prefix"), (3, "round-robin")])
def test_prefixes_are_found_as_by_the_engines_block_managers(
    module: Modules, keeps_active: bool, num_gpus: int, routing: str
) -> None:
    traffic = module("parts").Traffic(
        requests_per_s=num_gpus, system_tokens=16, user_tokens=24, answer_tokens=40, keeps_active=keeps_active
    )
    how = {"num_gpus": num_gpus, "answer_s": 5.0}
    asked = module("dealing").requests(
        traffic, **how, number=1, zipf=1.0, routing=routing, num_requests=2000 * num_gpus, seed=1
    )
    simulated = module("simulate").prefix_hit_rate(traffic, asked, **how, cache_tokens=5000, block_size=8, seed=1)
    model = module("prefixes").find_prefixes(
        traffic, module("returns").Returns.of(traffic, 5.0, num_gpus, routing), requests_per_s=1, cache_tokens=5000
    )
    assert 0.1 < simulated < 0.8
    assert model.hit_rate == pytest.approx(simulated, abs=0.025)


def test_prefixes_have_bounds(module: Modules) -> None:
    traffic = module("parts").Traffic(requests_per_s=1)

    def found(cache_tokens: float, num_gpus: int = 1, **changes: Any) -> Any:
        changed = replace(traffic, **changes)
        dealt = module("returns").Returns.of(changed, 2.0, num_gpus, "round-robin")
        return module("prefixes").find_prefixes(changed, dealt, requests_per_s=1, cache_tokens=cache_tokens)

    rates = [found(size).hit_rate for size in (1e3, 1e4, 1e5, 1e6, 1e9)]
    assert rates == sorted(rates)
    assert found(0).computed_tokens == traffic.mean_prompt_tokens - traffic.system_tokens
    # With room for all, a first turn computes its own tokens, a later one those of the turn before as well, as base ...
    first, later = traffic.user_tokens, traffic.turn_tokens + traffic.user_tokens
    assert found(1e12).computed_tokens == pytest.approx((first + 3 * later) / 4)
    assert found(1e12, keeps_active=True).computed_tokens == pytest.approx(first)  # ... or they are still good
    assert found(1e5, num_gpus=1000).hit_rate < found(1e5, num_gpus=2).hit_rate < found(1e5).hit_rate
    assert found(1e5, turns=1).hit_rate == pytest.approx(traffic.system_tokens / (traffic.system_tokens + first))


def test_little_holds_and_more_load_is_never_lighter(module: Modules, fleet: Any) -> None:
    outlook, search, before = module("outlook"), module("search"), 0.0
    for load in (1.0, 10.0, 30.0, 60.0):
        found = outlook.assess(search.at(fleet, load), 4, 64)
        assert found.batch == pytest.approx(found.requests_per_s * 200 * found.token_s, rel=1e-3)
        assert found.computing > before
        assert found.loads_per_s == pytest.approx(found.requests_per_s * (1 - found.slot_hit_rate))
        before = found.computing


def test_the_fewest_gpus_are_found(module: Modules, fleet: Any) -> None:
    search = module("search")
    needed = []
    for load in (5.0, 40.0, 300.0):
        loaded = search.at(fleet, load)
        found = search.gpus_needed(loaded)
        assert not found.problems
        if found.num_gpus > 1:
            assert search.with_best_slots(loaded, found.num_gpus - 1).problems
        needed.append(found.num_gpus)
    assert needed == sorted(needed)
    by_turns = replace(search.at(fleet, 300.0), routing="round-robin")
    assert search.gpus_needed(by_turns).num_gpus > needed[2]


def test_what_is_held_out_changes_no_constant(module: Modules, measurements: Any, tmp_path: Path) -> None:
    measured = module("measured")
    points = measured.compare(measurements)
    fitted = [point for point in points if point.fitted]
    assert len(fitted) == 8
    changed = json.loads(json.dumps(measurements.result))
    for figure in changed["figures"]:
        details = figure["details"]
        alike = figure["name"].startswith("routed, uniform") and "batch 2," in figure["name"]
        if alike or figure["suite"] in ("plain", "conversation", "mixed"):
            for name in ("base_step_ms", "step_ms", "ours_ms"):
                if name in details:
                    details[name] *= 3
    (tmp_path / "other.json").write_text(json.dumps(changed))
    other = measured.Measurements(tmp_path / "other.json")
    assert measured.fit(other) == measured.fit(measurements)
    assert measured.compare(other) != points


def test_the_steps_of_one_gpu_are_predicted(module: Modules, measurements: Any) -> None:
    points = module("measured").compare(measurements)
    steps = [point for point in points if point.what.startswith("step") and not point.fitted]
    assert len(steps) == 22
    assert max(abs(point.error) for point in steps) < 0.035


def test_the_replayed_traffic_is_that_which_was_measured(module: Modules, measurements: Any, fleet: Any) -> None:
    measured = module("measured")
    found = measurements.details(*measured.MIXED)
    prompts, answers = zip(*measured.mixed_lengths(), strict=True)
    assert (sum(prompts), sum(answers)) == (found["num_prompt_tokens"], found["num_new_tokens"])
    assert measured.replay(fleet, 8) > measured.replay(fleet, 1) > sum(answers) / 64 * 5e-3


def test_a_plan_is_printed(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["plan", "--adapters", "100", "--requests-per-s", "10"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^GPUs +1  prefix$", printed, flags=re.MULTILINE)
    assert "does not work" not in printed
    command = ["plan", "--adapters", "9000", "--requests-per-s", "90", "--gpus", "2", "--json"]
    assert script.main(command) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["num_gpus"] == 2
    assert any("Take more GPUs" in problem for problem in found["problems"])
    assert found["first_token_s"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu-memory-gb", "16"], "the base takes 16.1 GB, and the GPU has 16.0 GB"),
        (["--gpus", "1", "--slots", "900"], "900 slots take 75.5 GB beside the base"),
        (["--gpus", "1", "--slots", "795"], "has room for"),
        (["--gpus", "0"], "there are 0 GPUs; give 1 or more"),
        (["--slots", "4"], "give --gpus as well"),
        (["--turns", "2000"], "a conversation grows to 700200"),
        (["--adapters", "0"], "must be at least 1"),
        (["--requests-per-s", "0"], "requests_per_s is 0.0; expected more than 0"),
        (["--first-layer", "32"], "adapters act from layer 32 on; the base has 32"),
        (["--base", "nowhere"], "nowhere is no config.json"),
        (["--rank", "16", "--requests-per-s", "1e9"], "100,000 GPUs are not enough"),
    ],
)
def test_what_is_impossible_is_said(
    script: ModuleType, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["plan", "--adapters", "2000", "--requests-per-s", "50", *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{}", "no field 'hidden_size'"),
        ("[", "is no JSON"),
        ("[]", "holds a list"),
        ('{"model_type": "mixtral"}', "the config is of a mixtral"),
    ],
)
def test_a_config_that_cannot_be_counted_is_named(module: Modules, tmp_path: Path, config: str, says: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=re.escape(says)):
        module("base").Base.read(tmp_path)


DOCS = (REPOSITORY / "docs" / "scaling.md").read_text()
WORDS = " ".join(DOCS.split())


def test_the_result_covers_the_grid(result: dict[str, Any]) -> None:
    points = {(row["routing"], row["num_gpus"], row["number"]) for row in result["grid"]}
    assert {gpus for _, gpus, _ in points} >= {1, 10, 100, 1000}
    assert {number for _, _, number in points} >= {10, 100, 1000, 10_000, 100_000}
    assert len(points) == 3 * 7 * 5 == len(result["grid"])
    assert result["seed"] == 0
    assert result["commit"]


def test_the_result_is_what_the_model_says_now(module: Modules, result: dict[str, Any], measurements: Any) -> None:
    grid, fleet = module("grid"), module("results").fleet_of(measurements)
    rows = (grid.points(measurements), grid.slots_against_cache(fleet))
    for now, then in zip(rows, (result["points"], result["slots"]), strict=True):
        for ours, theirs in zip(now, then, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                if isinstance(value, float):
                    assert value == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
                else:
                    assert value == theirs[name], name
    for row in result["needed"][::7]:
        loaded = module("search").at(grid.with_adapters(fleet, row["number"], row["routing"]), row["requests_per_s"])
        found = module("search").gpus_needed(loaded)
        assert (found.num_gpus, found.num_slots) == (row["num_gpus"], row["num_slots"])
    assert (BENCHMARKS / "results" / "scaling.md").read_text() == module("pages").page(result)


def test_the_tables_of_the_page_are_those_of_the_result(module: Modules, result: dict[str, Any]) -> None:
    pages = module("pages")
    for table in (pages.needed(result), pages.constants(result), pages.held_out(result)):
        assert table in DOCS


def test_the_commands_of_the_page_print_what_it_says(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```bash\n(.*?)\n```\n\n```text\n(.*?)```", DOCS, flags=re.DOTALL)
    assert len(blocks) == 3
    for command, printed in blocks:
        script.main(command.removeprefix("python benchmarks/scaling.py ").split())
        assert capsys.readouterr().out == printed


def test_the_figures_in_the_text_of_the_page(
    script: ModuleType, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(options: str) -> dict[str, Any]:
        script.main(["plan", *options.split(), "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    two_thousand, questions = "--adapters 2000 --requests-per-s 50", "--turns 1"
    gpus = {
        (routing, more): plan(f"{two_thousand} --routing {routing} {more}")["num_gpus"]
        for routing in ("prefix", "affinity", "round-robin")
        for more in ("", questions)
    }
    assert f"With affinity it is {gpus['affinity', '']} as well, with round-robin {gpus['round-robin', '']}" in WORDS
    alone = f"the same load needs {gpus['prefix', questions]} GPUs by prefix, and {gpus['affinity', questions]} with"
    assert alone in WORDS
    found = plan(two_thousand)
    assert f"{found['slot_hit_rate']:.0%} of the requests find their adapter" in WORDS
    assert gpus["prefix", ""] == found["num_gpus"]
    hundred_thousand = "--adapters 100000 --requests-per-s 40"
    assert f"Without `--gpus` the answer is {plan(hundred_thousand)['num_gpus']} GPUs" in WORDS
    assert f"at `--rank 8` {plan(f'{hundred_thousand} --rank 8')['num_gpus']} are enough" in WORDS
    singly = plan(f"{hundred_thousand} --turns 1")
    assert f"single questions (`--turns 1`) need {singly['num_gpus']}" in WORDS
    long = "--adapters 20 --requests-per-s 3 --gpus 1 --user-tokens 1000 --answer-tokens 300 --turns 8"
    turn, kept = plan(long), plan(f"{long} --keeps-active")
    assert turn["problems"]
    assert not kept["problems"]
    rates = [f"{each['prefix_hit_rate']:.0%}" for each in (kept, turn)]
    assert f"{rates[0]} of the prompts' tokens are found rather than {rates[1]}" in WORDS
    assert plan(f"{long} --keeps-active".replace("-s 3", "-s 4"))["prefix_hit_rate"] < 0.05
    che = max(abs(each["difference"]) for each in result["slot_checks"])
    few = [each for each in result["prefix_checks"] if each["requests_per_s"] == 1]
    many = [each for each in result["prefix_checks"] if each["requests_per_s"] > 1]
    differences = [max(abs(each["difference"]) for each in cases) for cases in (many, few)]
    assert f"off by at most {che:.4f} in {len(result['slot_checks'])} cases" in WORDS
    assert f"off by at most {differences[0]:.4f} from those" in WORDS
    assert f"`BlockManager`, in {len(many)} cases" in WORDS
    assert f"about ten conversations it is off by {differences[1]:.4f}, in {len(few)} cases" in WORDS
    assert f"{result['engine_slots']['num_requests']:,} requests for 40 adapters in 12 slots" in WORDS
    assert f"{result['fleet']['gpu']['bytes_per_s'] / 1e9:.0f} GB/s" in WORDS
    (load,) = (each["measured"] for each in result["points"] if each["what"] == "loading an adapter")
    assert f"{500 * load / 60e3:.0f} minutes for 500" in WORDS
    stays = {(each["num_gpus"], each["max_keys"]): each["stays"] for each in result["stays"]}
    default, more = sorted({max_keys for _, max_keys in stays})
    assert default == RayConfig().max_prefix_keys
    kept = [f"{stays[num_gpus, max_keys]:.3f}" for num_gpus, max_keys in ((4, default), (16, default), (64, default))]
    assert f"{kept[0]} of the later turns stay on 4 GPUs, {kept[1]} on 16 and {kept[2]} on 64" in WORDS
    remembered = [f"{stays[num_gpus, more]:.3f}" for num_gpus in (16, 64)]
    assert f"`max_prefix_keys` of {more:,} they are {remembered[0]} and {remembered[1]}" in WORDS
    by_case: dict[Any, dict[str, int]] = {}
    for each in result["needed"]:
        by_case.setdefault((each["requests_per_s"], each["number"]), {})[each["routing"]] = each["num_gpus"]
    more_than = [
        max(case[routing] / case["affinity"] for case in by_case.values()) for routing in ("prefix", "round-robin")
    ]
    assert f"by prefix up to {more_than[0]:.1f} times as many GPUs are needed as with affinity" in WORDS
    assert f"as well, up to {more_than[1]:.1f} times" in WORDS
    busiest = {(each["num_gpus"], each["number"]): each["busiest"] for each in result["balance"]}
    assert f"has {busiest[100, 1000]:.2f} of its share with 1,000 adapters, but {busiest[100, 10]:.2f} with 10" in WORDS
    firsts = [each for each in result["points"] if each["what"].startswith("first token")]
    missing_ms = [each["measured"] - each["predicted"] for each in firsts]
    assert f"takes {min(missing_ms):.0f} to {max(missing_ms):.0f} ms more than the step" in WORDS
    assert f"a server loads {result['fleet']['costs']['host_bytes_per_s'] / 1e6:.0f} MB/s" in WORDS
