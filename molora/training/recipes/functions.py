"""Data of three functions that are called behind a conversation: answerability, uncertainty, and the check of answers.

python -m molora.training.recipes.functions --out data/functions --bank banks/smollm2-demo

First the files that need no model: the records of "answerability" and the questions of the demo's domains, many of them
harder than what its adapters were trained on, so that some answers are wrong. This needs reasoning-gym. Then, with
`--bank`, its adapters draft answers to the questions, these are verified, and the records of "uncertainty" and "check"
are made of them. This needs a GPU for more than a try.

Held-out records have wordings and questions, names or stories that are in no other file.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from molora.files import write_atomic
from molora.model import load
from molora.training.examples import read_records
from molora.training.recipes.answerability import answerability
from molora.training.recipes.build import write_records
from molora.training.recipes.choices import Split
from molora.training.recipes.conversations import Material, Record
from molora.training.recipes.drafts import draft
from molora.training.recipes.items import Item
from molora.training.recipes.tasks import DEMO, TASKS
from molora.training.recipes.verdicts import check, uncertainty

NUM_VAL = 200
ITEMS_SEED = 2000  # of the items' generators, beyond those of the recipe that the adapters are trained with
WIDER: Mapping[str, Mapping[str, object]] = {
    "arithmetic": {"max_terms": 4},
    "words": {"min_word_len": 4, "max_word_len": 7},
    "family": {},  # reasoning-gym's larger families are not right
    "sorting": {"max_numbers": 8},
    "legs": {"max_animals": 5, "max_instances": 10},
}
"""What is changed of the settings of each domain's generator, to make harder items as well."""

SPLITS: dict[str, Split] = {"train": "train", "val": "val", "heldout": "held out", "best": "held out"}
"""Files of questions, and whose wordings each has; of those in "best", the best of n drafts is taken."""

NUM_DRAFTS = {"train": 4, "val": 4, "heldout": 2, "best": 8}
CONTEXTS = 4  # training records of "answerability" for each question: they cost no drafts
MAX_CONTEXTS_HELDOUT = 2000


def questions(seed: int, nums: Mapping[str, int]) -> dict[str, list[Record]]:
    """Questions of each split, of all domains in turn, with their reference answers; no item is in two of them."""
    share = {name: -(-num // len(DEMO)) for name, num in nums.items()}
    items: dict[str, list[Item]] = {}
    for domain in DEMO:
        task = TASKS[domain]
        wider = replace(task, config={**task.config, **WIDER[domain]})
        items[domain] = wider.items(ITEMS_SEED + seed, sum(share.values()))
        Random(f"questions {domain} {seed}").shuffle(items[domain])
    found: dict[str, list[Record]] = {}
    first = 0
    for name, num in share.items():
        own = {domain: iter(each[first : first + num]) for domain, each in items.items()}
        material = Material(Random(f"questions {name} {seed}"), SPLITS[name], own)
        found[name] = [material.single(domain) for _ in range(num) for domain in DEMO][: nums[name]]
        first += num
    return found


def write_questions(out: Path, *, seed: int, num_train: int, num_heldout: int, num_best: int) -> dict[str, Any]:
    """Write what needs no model, and say what recipe.json says of it.

    Raises:
        ValueError: a number is below 1.
    """
    if min(num_train, num_heldout, num_best) < 1:
        raise ValueError(f"{num_train}, {num_heldout} and {num_best} questions; expected 1 or more of each kind.")
    nums = {"train": num_train, "val": min(NUM_VAL, num_train), "heldout": num_heldout, "best": num_best}
    files = {}
    for name, records in questions(seed, nums).items():
        files[f"questions_{name}.jsonl"] = write_records(out / f"questions_{name}.jsonl", records)
    contexts = {"train": CONTEXTS * num_train, "val": nums["val"], "heldout": min(num_heldout, MAX_CONTEXTS_HELDOUT)}
    for name, num in contexts.items():
        verdicts = answerability(num, SPLITS[name], seed)
        files[f"{name}_answerability.jsonl"] = write_records(out / f"{name}_answerability.jsonl", verdicts)
    return files


def write_verdicts(out: Path, m: Any, *, seed: int, temperature: float, limit: int | None = None) -> dict[str, Any]:
    """Draft, verify, and write the records of "uncertainty" and "check"; the drafts are kept, and not drawn again.

    Args:
        m: the loaded bank whose adapters draft.
        limit: only the first so many questions of each split; the others' drafts may be drawn later.

    Raises:
        ValueError: no domain of the training questions has both right and wrong drafts.
    """
    files = {}
    for name in SPLITS:
        asked: Sequence[Mapping[str, Any]] = [*read_records(out / f"questions_{name}.jsonl")]
        drafts = draft(
            m,
            asked,
            out / f"drafts_{name}.jsonl",
            num_drafts=NUM_DRAFTS[name],
            temperature=temperature,
            seed=seed,
            limit=limit,
        )
        if name == "best":
            continue
        asked = asked[:limit]
        rng = Random(f"verdicts {name} {seed}")
        is_heldout = name == "heldout"
        for function, records in (
            ("uncertainty", uncertainty(asked, drafts, rng, num_each=1 if is_heldout else None)),
            ("check", check(asked, drafts, rng, fills=not is_heldout)),
        ):
            if not records:
                raise ValueError(
                    f"no domain of {len(asked)} questions has both right and wrong drafts, so {function!r} "
                    "has nothing to tell apart; take more questions, or another temperature."
                )
            files[f"{name}_{function}.jsonl"] = write_records(out / f"{name}_{function}.jsonl", records)
    return files


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line (or `arguments`), write the files and say how many records each holds."""
    parser = argparse.ArgumentParser(
        prog="python -m molora.training.recipes.functions", description="Make the data of three functions."
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to; what is in it is used")
    parser.add_argument("--bank", type=Path, help="whose adapters draft answers; without, only what needs no model")
    parser.add_argument("--base", help="the bank's base model, if it is not where the bank says")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal questions (default: 0)")
    parser.add_argument("--num-train", type=int, default=3000, help="questions to learn from (default: 3000)")
    parser.add_argument("--num-heldout", type=int, default=5000, help="held-out ones, two drafts each (default: 5000)")
    parser.add_argument("--num-best", type=int, default=1000, help="held-out ones, eight drafts each (default: 1000)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the drafts (default: 1)")
    parser.add_argument("--limit", type=int, help="draft only for the first so many questions of each file for now")
    options = parser.parse_args(arguments)
    recipe = options.out / "recipe.json"
    made = {name: getattr(options, name) for name in ("seed", "num_train", "num_heldout", "num_best")}
    try:
        summary = json.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
        if summary.get("questions") != made:
            summary = {"questions": made, "files": write_questions(options.out, **made)}
            write_atomic(recipe, json.dumps(summary, indent=2) + "\n")
        if options.bank is not None:
            m = load(options.bank, base=options.base, device=options.device, dtype=options.dtype)
            summary["drafts"] = {"bank": m.bank.name, "temperature": options.temperature, "limit": options.limit}
            summary["files"] |= write_verdicts(
                options.out, m, seed=options.seed, temperature=options.temperature, limit=options.limit
            )
            write_atomic(recipe, json.dumps(summary, indent=2) + "\n")
    except ModuleNotFoundError as error:
        parser.error(f'{error.name} is not installed; pip install -e ".[data]" installs what the recipe needs')
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for name, file in summary["files"].items():
        Console().print(f"{file['num_records']:6,}  {options.out / name}", highlight=False)


if __name__ == "__main__":
    main()
