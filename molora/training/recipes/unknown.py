"""What no adapter knows: other tasks of reasoning-gym, other requests, plain text. A router leaves it to base.

Of such a record only the label is learned: most of these answers the base model cannot write, and is not to. Those of
a task name it, so that a router may also practise on it what it does with an adapter that comes later.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from molora.training.recipes.choices import settle
from molora.training.recipes.told_wordings import OTHERS, told

TASKS = (  # none like an adapter's; each the same in every process, and without the story that passages are from
    "ab",
    "aiw",
    "base_conversion",
    "bf",
    "binary_alternation",
    "bitwise_arithmetic",
    "calendar_arithmetic",
    "coin_flip",
    "color_cube_rotation",
    "complex_arithmetic",
    "count_bits",
    "count_primes",
    "countdown",
    "course_schedule",
    "cryptarithm",
    "dice",
    "fraction_simplification",
    "game_of_life_halting",
    "gcd",
    "gsm_symbolic",
    "intermediate_integration",
    "knights_knaves",
    "largest_island",
    "lcm",
    "manipulate_matrix",
    "number_format",
    "number_sequence",
    "palindrome_generation",
    "power_function",
    "prime_factorization",
    "products",
    "puzzle24",
    "quantum_lock",
    "rotate_matrix",
    "self_reference",
    "simple_integration",
    "syllogism",
)
TEXT_SHARE, TOLD_SHARE = 0.3, 0.3  # of the records
ANNOUNCED_SHARE = 0.5  # of the tasks' answers: as the adapters announce theirs
_SEED, _SEED_STRIDE = 7_000_000, 10_000_000  # beyond those of the adapters' items, as their seeds are strode


def unknown(num_records: int, seed: int, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Questions, as many of each task, told requests, and texts, in any order. Equal seeds give equal ones."""
    rng = Random(f"unknown {seed}")
    records = [_text(rng.choice(texts), rng) for _ in range(round(TEXT_SHARE * num_records))]
    records += [_told(rng) for _ in range(round(TOLD_SHARE * num_records))]
    num_questions = num_records - len(records)
    for index, task in enumerate(TASKS):
        first, last = (num_questions * place // len(TASKS) for place in (index, index + 1))
        records += _questions(task, last - first, seed, rng)
    rng.shuffle(records)
    return records


def _text(text: str, rng: Random) -> dict[str, Any]:
    border = max(1, text.rfind(" ", 0, rng.randint(len(text) // 5, len(text) // 2)))
    return {"prompt": text[:border], "completion": text[border:], "domain": None, "labels_only": True}


def _told(rng: Random) -> dict[str, Any]:
    request, answer = rng.choice(told(OTHERS)).split(" ||| ")
    messages = [{"role": "user", "content": settle(request, rng)}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "domain": None, "labels_only": True}


def _questions(task: str, num_records: int, seed: int, rng: Random) -> Iterator[dict[str, Any]]:
    from reasoning_gym import create_dataset

    for entry in create_dataset(task, seed=_SEED + seed * _SEED_STRIDE, size=num_records) if num_records else ():
        answer = f"{'Answer: ' if rng.random() < ANNOUNCED_SHARE else ''}{entry['answer']}"
        messages = [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "domain": None, "labels_only": True, "task": task}
