"""Train functions that are called behind a conversation, and measure them: activated against plain LoRA.

    python -m molora.training.recipes.functions --out runs/functions/data     # needs reasoning-gym, and no GPU
    python benchmarks/functions.py data --work runs/functions                 # the bank's adapters draft answers
    python benchmarks/functions.py train --work runs/functions
    python benchmarks/functions.py eval --work runs/functions --out benchmarks/results/functions.json
    python benchmarks/functions.py all --work runs/functions --out ...        # the last three, one after the other

What was drafted or trained is not drafted or trained again. Held-out items have wordings, and questions, names or
stories, that training never shows.

    base        the base model, asked in the same words
    activated   an adapter that acts from its invocation on: what stands before it is the base's cache
    plain       the same adapter, trained as a plain LoRA: it acts, and reads, from the first token on

Best of n: the adapter of a question's domain drafts, and one of its first n drafts is taken:

    random            any of them: the mean of all
    oracle            a right one, if there is one
    majority          the first of the commonest answer
    log-probability   the one with the highest mean log-probability of its tokens
    activated, plain, base             the one with the highest score of `check`
    activated vote                     the first of the answer whose drafts' scores add up to most
"""

import argparse
from pathlib import Path

from functions.evaluation import measure
from functions.training import draft_answers, train

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
STAGES = {"data": draft_answers, "train": train, "eval": measure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, required=True, help="a folder for data, adapters and banks")
    parser.add_argument("--bank", type=Path, default=Path("banks/smollm2-demo"), help="whose adapters draft")
    parser.add_argument("--base", default=BASE, help="a local folder, or a hub name")
    parser.add_argument("--seed", type=int, default=0, help="of drafts and of training")
    parser.add_argument("--temperature", type=float, default=1.0, help="of drafts")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="of 512 tokens, of each function in a step")
    parser.add_argument("--limit", type=int, help="only the first so many questions, and held-out items of a function")
    parser.add_argument("--num-counted", type=int, default=50, help="questions whose tokens are counted one by one")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="of eval: a JSON file to write, and a Markdown file beside it")
    args = parser.parse_args()
    if args.out is None and args.stage in ("eval", "all"):
        parser.error("eval writes its figures: name a file with --out.")
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
