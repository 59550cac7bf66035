"""Ways to answer the held-out items, a row each, in groups that are measured one after the other or apart."""

import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from molora.activation import Activation
from molora.adapter import WEIGHTS_FILE, Adapter
from molora.bank import Bank
from molora.model import MoLoRA
from molora.router import KeyRouter
from molora.training.bank import train_adapters
from molora.training.evaluate import answer, evaluate
from molora.training.examples import encode, read_records
from molora.training.newcomer import key_from_data
from molora.training.question import Question
from molora.training.scores import score_answers
from quality import peft_ways
from quality.classifier import routes_by_classifier
from quality.measurement import SCORED, Measurement, opened, what_answers
from quality.merges import MERGES, UPDATE_MERGES, loss_at, merge, merge_updates, weighted
from quality.training import STAGES, seed_folder, settings

MIN_GATE = 0.1  # of the sparse ones
MAX_TOP_K = 8  # the most adapters that the kernels give a token
STARTS = ("first", "system", "half", "turn", "response")
NEWCOMER = ("newcomer", "newcomer_composites")
NUM_VAL = 32  # records of each domain, by which a merge's weight is chosen


def measure(args: Namespace) -> None:
    with closing(Measurement(args)) as here:
        for group in args.rows_of:
            GROUPS[group](here)


def of_ways(*ways: str) -> Callable[[Measurement], None]:
    """Rows of the bank as it is, each named after `evaluate`'s way."""

    def run(here: Measurement) -> None:
        if here.missing(ways):
            m = here.loaded(seed_folder(here.args) / "bank")
            for way in ways:
                here.add(m, way, way)

    return run


def of_alone(here: Measurement) -> None:
    """Each adapter for everything."""
    of_ways(*here.args.domains)(here)


def of_classifier(here: Measurement) -> None:
    """One adapter for the whole sequence, chosen by a classifier that knows nothing of the router."""
    if not here.missing(["classifier"]):
        return
    begin_s, data = time.perf_counter(), here.args.work / "data" / "train_router.jsonl"
    m = here.loaded(seed_folder(here.args) / "bank")
    questions = {kind: here.questions(m, kind) for kind in SCORED}
    asked = [question.messages for kind in SCORED for question in questions[kind]]
    routes = iter(routes_by_classifier(m, asked, read_records(data)))
    rows = {}
    for kind, own in questions.items():
        chosen = [*islice(routes, len(own))]
        texts = answer(m, own, chosen, max_new_tokens=here.args.max_new_tokens)
        rows[kind] = score_answers(own, texts)
    took_s = time.perf_counter() - begin_s
    here.write("classifier", rows, took_s, [*what_answers(m.bank, "given"), data])


def of_merges(here: Measurement) -> None:
    """What else can be made of the adapters."""
    if not (missing := here.missing(MERGES)):
        return
    m, adapters = with_room_for_a_merge(here)
    for kind in missing:
        with acting(here, m, merge(adapters, kind, here.args.seed), kind):
            here.add(m, kind, kind)


def of_update_merges(here: Measurement) -> None:
    """Merges of the weight updates, each at the weight whose loss on some validation records is the lowest."""
    if not (missing := here.missing(UPDATE_MERGES)):
        return
    args = here.args
    m, adapters = with_room_for_a_merge(here)
    files = [args.work / "data" / f"val_{domain}.jsonl" for domain in args.domains]
    examples = [encode(record, m.tokenizer) for file in files for record in islice(read_records(file), NUM_VAL)]
    for kind in missing:
        whole = merge_updates(adapters, kind, args.seed)
        with acting(here, m, whole, kind):
            losses = {weight: loss_at(m, kind, weight, examples) for weight in (1 / len(args.domains), 0.5, 1.0)}
        weight = min(losses, key=losses.__getitem__)
        notes = {"weight": weight, "loss_by_weight": losses}
        with acting(here, m, weighted(whole, weight), kind):
            here.add(m, kind, kind, sources=[*what_answers(m.bank, kind), *files], notes=notes)


def with_room_for_a_merge(here: Measurement) -> tuple[MoLoRA, list[Adapter]]:
    """The bank, which holds one adapter of its adapters' total rank beside them, and these."""
    args = here.args
    m = here.loaded(seed_folder(args) / "bank", num_extra_slots=1, max_rank=args.rank * len(args.domains))
    return m, [m.bank.load_adapter(name) for name in args.domains]


@contextmanager
def acting(here: Measurement, m: MoLoRA, merged: Adapter, name: str) -> Iterator[None]:
    """A merge that the engine knows by this name meanwhile, read from a folder that is written for it."""
    folder = seed_folder(here.args) / "merged" / name
    merged.write(folder)
    m.engine.load_adapter(name, folder, activation="turn")
    try:
        yield
    finally:
        m.engine.unload_adapter(name)


def of_random(here: Measurement) -> None:
    """A router that has learned nothing."""
    folder = seed_folder(here.args)
    if here.missing(["random"]):
        m = here.loaded(with_random_router(folder, here.args.seed))
        here.add(m, "random", "auto", sources=what_answers(opened(folder / "bank"), "given"))


def of_gates(label: str, most: int, min_gate: float = 0.0) -> Callable[[Measurement], None]:
    """The same scores as soft gates, not renormalized: of so many columns at most, perhaps without small ones."""

    def run(here: Measurement) -> None:
        folder, top_k = seed_folder(here.args), min(most, len(here.args.domains) + 1)
        if here.missing([label]):
            m = here.loaded(with_soft_gates(folder, label, top_k, min_gate))
            here.add(m, label, "auto", sources=what_answers(opened(folder / "bank"), "auto"))

    return run


def of_stage(stage: str) -> Callable[[Measurement], None]:
    """The router of another stage, and after joint fine-tuning also its adapters with the routes given; or one LoRA."""
    ways = {
        "joint": {"joint": "joint"},
        "plain": {"plain": "given"},
        "tuned": {"tuned": "auto", "tuned given": "given"},
    }
    # Nobody says whose the system message is, so a plain LoRA is given to single items only.
    kinds = SCORED[:1] if stage == "plain" else SCORED

    def run(here: Measurement) -> None:
        own = ways.get(stage, {stage: "auto"})
        if here.missing(list(own)):
            m = here.loaded(seed_folder(here.args) / stage)
            for label, way in own.items():
                here.add(m, label, way, kinds)

    return run


def of_nine(here: Measurement) -> None:
    """One more adapter: what becomes of the old tasks, and how well the new one is done, alone and among others."""
    kinds = (*SCORED, *NEWCOMER)
    ways = {"nine": "auto", "nine given": "given"}
    if here.missing(list(ways)):
        m = here.loaded(seed_folder(here.args) / "nine")
        for label, way in ways.items():
            here.add(m, label, way, kinds if way == "auto" else NEWCOMER)


def of_key(here: Measurement) -> None:
    """The same adapter beside the others of `open`, with a key from its own data and nothing else trained."""
    args, folder = here.args, seed_folder(here.args)
    if not here.missing(["key"]):
        return
    copy, data = copied(folder / "open", folder / "key"), args.work / "data" / f"train_{args.newcomer}.jsonl"
    m = here.loaded(copy)
    key = key_from_data(m, data, args.newcomer)
    del m
    here.close()
    adapter = train_adapters(settings(args, "nine"))[args.newcomer]
    Bank.open(copy).add(adapter, name=args.newcomer, activation="turn", key=key.values_D)
    m = here.loaded(copy)
    sources = [*what_answers(opened(folder / "open"), "auto"), data, adapter / WEIGHTS_FILE]
    here.add(m, "key", "auto", (*SCORED, *NEWCOMER), sources=sources)


def of_turns(stage: str, *ways: str) -> Callable[[Measurement], None]:
    """The last of two or three turns, each of them a task."""

    def run(here: Measurement) -> None:
        labels = {f"{way} behind tasks": way for way in ways}
        if here.missing(list(labels)):
            m = here.loaded(seed_folder(here.args) / stage)
            for label, way in labels.items():
                here.add(m, label, way, ("turns",))

    return run


def of_removed(here: Measurement) -> None:
    """The bank without its last adapter, and with it, on the single items of all the others."""
    args, folder = here.args, seed_folder(here.args)
    missing = here.missing(["not removed", "removed"])
    if not missing:
        return
    banks = {"not removed": folder / "bank", "removed": copied(folder / "bank", folder / "removed")}
    Bank.open(banks["removed"]).remove(args.domains[-1])
    for label in missing:
        begin_s = time.perf_counter()
        m = here.loaded(banks[label])
        questions = [each for each in here.questions(m, "singles") if each.domains != (args.domains[-1],)]
        ((_, found),) = evaluate(m, questions, ["auto"], max_new_tokens=args.max_new_tokens)
        del m
        sources = what_answers(opened(folder / "bank"), "auto")
        here.write(label, {"others": found}, time.perf_counter() - begin_s, sources)


def of_starts(stage: str) -> Callable[[Measurement], None]:
    """Adapters that are named, behind an earlier exchange: from which token on does one act?"""

    def run(here: Measurement) -> None:
        labels = {start: f"{stage} from {start}" for start in STARTS}
        if not here.missing(list(labels.values())):
            return
        m = here.loaded(seed_folder(here.args) / stage)
        questions = here.questions(m, "histories")
        for start, label in labels.items():
            if here.missing([label]):
                begin_s = time.perf_counter()
                points = [_start(m, question, start) for question in questions]
                ((_, found),) = evaluate(
                    m, questions, ["given"], max_new_tokens=here.args.max_new_tokens, activations=points
                )
                took_s = time.perf_counter() - begin_s
                here.write(label, {"histories": found}, took_s, what_answers(m.bank, "given"))

    return run


def _start(m: MoLoRA, question: Question, start: str) -> Activation:
    if start == "first":
        return 0
    if start == "half":
        return m.render(question.messages).starts["turn"] // 2
    return start


def of_peft(way: str) -> Callable[[Measurement], None]:
    """A router of PEFT's over the same adapters, as PEFT runs it: from the first token on."""

    def run(here: Measurement) -> None:
        args = here.args
        if not here.missing([way]):
            return
        begin_s = time.perf_counter()
        folder = seed_folder(args)
        m = here.loaded(folder / "bank")  # for its tokenizer, prompts and items
        asked = {kind: here.questions(m, kind)[: args.limit_peft] for kind in SCORED}
        prompts = {kind: [m.render(each.messages).token_ids for each in asked[kind]] for kind in SCORED}
        tokenizer, eos_ids, base_dir = m.tokenizer, m.eos_ids, m.base_dir
        adapters = [m.bank.load_adapter(name) for name in args.domains]
        sources, options = what_answers(m.bank, "given"), ["limit_peft"]
        del m
        here.close()
        folders = peft_ways.write_plain(adapters, folder / "peft" / way, in_all_layers=way == "arrow")
        build = peft_ways.arrow if way == "arrow" else peft_ways.xlora
        model = build(base_dir, folders, args, tokenizer, here.device)
        rows = {}
        for kind, questions in asked.items():
            texts = peft_ways.answers(model, prompts[kind], tokenizer, eos_ids, args.max_new_tokens)
            rows[kind] = score_answers(questions, texts)
        if way == "xlora":
            sources.append(args.work / "data" / "train_router.jsonl")
            options.append("xlora_steps")
        here.write(way, rows, time.perf_counter() - begin_s, sources, options=options)

    return run


GROUPS: dict[str, Callable[[Measurement], None]] = {
    "bank": of_ways("auto"),
    "given": of_ways("given"),
    "whole": of_ways("base", "sequence"),
    "classifier": of_classifier,
    "uniform": of_ways("uniform"),
    "alone": of_alone,
    "merges": of_merges,
    "update merges": of_update_merges,
    "random": of_random,
    "top-2": of_gates("top-2", 2),
    "sparse": of_gates("sparse", 2, MIN_GATE),
    "soft": of_gates("soft", MAX_TOP_K),
    **{stage: of_stage(stage) for stage in STAGES if stage not in ("adapters", "bank", "nine")},
    "nine": of_nine,
    "key": of_key,
    "removed": of_removed,
    "turns": of_turns("bank", "auto", "given"),
    "joint turns": of_turns("joint", "joint"),
    "starts": of_starts("bank"),
    "plain starts": of_starts("plain"),
    "arrow": of_peft("arrow"),
    "xlora": of_peft("xlora"),
}


def copied(bank: Path, copy: Path) -> Path:
    """A bank to change; what stood in the copy's place goes."""
    opened(bank)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bank, copy)
    return copy


def with_soft_gates(folder: Path, label: str, top_k: int, min_gate: float) -> Path:
    """A copy of the bank whose router blends."""
    copy = copied(folder / "bank", folder / "gates" / label)
    bank = Bank.open(copy)
    router = bank.load_router()
    assert isinstance(router, KeyRouter)
    router.config = replace(router.config, gate="soft", top_k=top_k, min_gate=min_gate)
    bank.set_router(router)
    return copy


def with_random_router(folder: Path, seed: int) -> Path:
    """A copy of the bank whose router has random weights, and no LoRA of its own: nothing that was learned."""
    copy = copied(folder / "bank", folder / "random")
    bank = Bank.open(copy)
    learned = bank.load_router()
    assert isinstance(learned, KeyRouter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bank.set_router(KeyRouter(replace(learned.config, lora_rank=0), learned.hidden_size, learned.num_columns))
    return copy
