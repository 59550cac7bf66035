"""Train a bank on verifiable tasks, and measure its router against every other way to use the same adapters.

    python benchmarks/quality.py data --work runs/quality              # needs reasoning-gym, and no GPU
    python benchmarks/quality.py train --work runs/quality --seed 0    # once for each seed
    python benchmarks/quality.py eval --work runs/quality --seed 0
    python benchmarks/quality.py all --work runs/quality --seeds 0 1 2 # or both of all seeds, on every GPU at once
    python benchmarks/quality.py all --work runs/quality --seeds 0 --shares 2  # two GPUs share the seed's adapters
    python benchmarks/quality.py table --work runs/quality --out benchmarks/results/quality.json

Held-out items have wordings that training never shows, and keys that no training item has. Single items ask one task,
composites two or three in one message, answered in one reply; a composite is right if all of it is. Every seed trains
on the same data and answers the same items.

    base, <adapter>     for everything
    best single         the oracle's choice of one adapter for the whole sequence: right if any adapter alone is
    classifier          one adapter for the whole sequence, by logistic regression on base's mean state over the user's
                        turn, fitted to the router's records
    sequence            the same by the router's scores over the user's turn
    uniform             all adapters at once, in equal shares (the average of their weight updates)
    ties, dare, dare_ties   PEFT's merges of the adapters' A and B, density 0.5, weights 1
    ties_svd, dare_svd, dare_ties_svd   PEFT's merges of their weight updates, cut to the adapters' total rank, at one
                        weight for all: of 1/E (E adapters), 1/2 and 1 that of the lowest loss on validation records
    arrow, xlora        PEFT's routers; X-LoRA's classifier is trained on the router's data
    random              a router of random weights, without a LoRA of its own
    auto                the learned router, by labels, one adapter a token
    token, lm           the same by each adapter's loss on the token, and by the language model loss alone
    own                 the same by labels, whose language model loss is under its own choice, not the labels'
    steady, steadier    the same by labels, with a price on switches between tokens of one domain, 0.1 and 1
    open                the same by labels; it also practises to know a newcomer by the mean of its queries
    top-2, soft         auto's scores as soft gates, not renormalized: of the two likeliest columns, and of all, or the
                        eight likeliest
    sparse              top-2, where a second gate below 0.1 is left out
    given               the right adapter on every token: of the user's turn by its labels, of the answer part by part
    tuned, tuned given  a router that was trained while the adapters went on learning
    joint               one LoRA of the adapters' total rank, trained on all tasks at once, on as many tokens
    key                 open's, with one more adapter, whose key is the mean of the router's queries on its data
    nine, nine given    auto and given, with one more adapter, which the router was trained with from the start
    removed             auto without its last adapter, and (not removed) with it, on the other tasks
    plain               the right adapter of those that were trained, and act, from the first token on

Rows are measured in groups (--rows-of), most of them of one row's or one stage's name; bank is auto, whole is base and
sequence, alone is each adapter, update merges are the _svd ones.

Behind an earlier exchange ("histories"), the right adapter of the bank and of the plain ones acts from the first token,
from behind the system message, from half of what is before the last turn, from that turn, or only in the response.
Behind one or two other tasks ("turns") the router, the right adapters and the joint LoRA act from the last turn on.
"""

import argparse
from pathlib import Path

from quality.data import LAST_FILE, make_data
from quality.rows import GROUPS, measure
from quality.schedule import run_all
from quality.table import make_table
from quality.training import STAGES, train

from molora.training.evaluate import MAX_NEW_TOKENS
from molora.training.recipes.tasks import TASKS

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def weight(text: str) -> float:
    """Of a loss."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no weight of 0 or more")
    return value


def share(text: str) -> tuple[int, int]:
    """Which one of how many, as i/n."""
    index, slash, number = text.partition("/")
    if not (slash and index.isdecimal() and number.isdecimal() and 1 <= int(index) <= int(number)):
        raise argparse.ArgumentTypeError(f"{text!r} is no i/n with i from 1 to n")
    return int(index), int(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["data", "train", "eval", "all", "table"])
    parser.add_argument("--work", type=Path, required=True, help="a folder for data, checkpoints, banks and rows")
    parser.add_argument("--base", default=BASE, help="a local folder, or a hub name")
    parser.add_argument("--domains", nargs="+", default=list(TASKS)[:8])
    parser.add_argument("--newcomer", default=list(TASKS)[8], help="the domain of an adapter that comes later")
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of training: initial weights, order, activation points")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of all")
    parser.add_argument("--shares", type=int, default=1, help="of all: jobs that share the adapters of a seed")
    parser.add_argument("--share", type=share, default="1/1", help="of train: i/n, every n-th adapter from the i-th on")
    parser.add_argument("--evals-per-device", type=int, default=4, help="of all: groups of rows measured at once")
    parser.add_argument("--num-train", type=int, default=24000, help="records of each adapter")
    parser.add_argument("--singles", type=int, default=320, help="held-out items of each domain")
    parser.add_argument("--composites", type=int, default=1600)
    parser.add_argument("--histories", type=int, default=100, help="held-out items of each domain")
    parser.add_argument("--turns", type=int, default=100, help="held-out items of each domain behind other tasks")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="of train and all")
    parser.add_argument("--rank", type=int, default=32, help="of each adapter")
    parser.add_argument("--strangers", type=float, default=0.0, help="share of the adapters' conversations")
    parser.add_argument("--drift", type=weight, default=0.3, help="weight of the loss of that name, of all routers")
    parser.add_argument("--steps", type=int, default=3200, help="of the adapters, 16 rows of 512 tokens each")
    parser.add_argument("--router-steps", type=int, default=3000)
    parser.add_argument("--xlora-steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--router-layer", type=int, default=8)
    parser.add_argument("--rows-of", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="of eval and all")
    parser.add_argument("--labels", nargs="+", help="of eval: only these rows")
    parser.add_argument(
        "--limit", type=int, help="of eval: only so many items of each kind; measures rows of others again"
    )
    parser.add_argument("--limit-peft", type=int, help="the same for PEFT's routers")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    parser.add_argument("--kv-cache-bytes", type=int, help="of eval's engine; several may share a device")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="of table: a JSON file to write, and a Markdown file beside it")
    args = parser.parse_args()
    if args.stage in ("train", "eval", "all") and not (args.work / "data" / LAST_FILE).is_file():
        parser.error(f"{args.work / 'data'} has no items yet; run the stage data first.")
    {"data": make_data, "train": train, "eval": measure, "all": run_all, "table": make_table}[args.stage](args)


if __name__ == "__main__":
    main()
