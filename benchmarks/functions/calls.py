"""How right and how calibrated each function is on held-out conversations, and what a call computes."""

from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from functions.training import WAYS
from molora.model import MoLoRA
from molora.serving.functions import Function, Verdict, call_each
from molora.training.examples import read_records
from molora.training.recipes.verdicts import INVOCATIONS, LABELS
from molora.training.scores import paired_difference

AT_ONCE = 64  # conversations that are read, asked about and forgotten, so that what is reused is of the same call
NUM_BINS = 15  # of the calibration error
ALL_WAYS = ("base", *WAYS)


def functions_of(name: str) -> dict[str, Function]:
    """A function in each way, the base first: it reads the conversations that the others find."""
    adapters = {"base": "base", **{way: name + ending for way, (ending, _, _) in WAYS.items()}}
    return {way: Function(adapter, INVOCATIONS[name], LABELS) for way, adapter in adapters.items()}


def measure_calls(m: MoLoRA, args: Namespace, name: str) -> dict[str, Any]:
    """Figures of one function, each way on the same conversations, right after the base has read them."""
    records = [*read_records(args.work / "data" / f"heldout_{name}.jsonl")][: args.limit]
    conversations = [record["messages"][:-2] for record in records]
    verdicts: dict[str, list[Verdict]] = {way: [] for way in ALL_WAYS}
    for first in range(0, len(records), AT_ONCE):
        m.engine.clear_cache()
        for way, function in functions_of(name).items():
            verdicts[way] += call_each(m, function, conversations[first : first + AT_ONCE])
    rows = {way: figures(records, found) for way, found in verdicts.items()}
    return {
        "num_items": len(records),
        "rows": rows,
        "activated minus plain": paired_difference(rows["activated"]["by_item"], rows["plain"]["by_item"]),
    }


def figures(records: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Accuracy, the area under the ROC curve, the calibration error, and means of tokens for a call."""
    is_right = [verdict.label == record["label"] for record, verdict in zip(records, verdicts, strict=True)]
    by_about: dict[str, list[bool]] = defaultdict(list)
    for record, right in zip(records, is_right, strict=True):
        by_about[record["about"]].append(right)
    scores = torch.tensor([verdict.score for verdict in verdicts], dtype=torch.float64)
    labels = torch.tensor([record["label"] == LABELS[0] for record in records], dtype=torch.long)
    return {
        "accuracy": fmean(is_right),
        "auroc": float(binary_auroc(scores, labels)),
        "calibration_error": float(binary_calibration_error(scores, labels, n_bins=NUM_BINS)),
        "by_about": {about: fmean(right) for about, right in sorted(by_about.items())},
        "prompt_tokens": fmean(verdict.num_prompt_tokens for verdict in verdicts),
        "reused_tokens": fmean(verdict.num_reused_tokens for verdict in verdicts),
        "computed_tokens": fmean(verdict.num_computed_tokens for verdict in verdicts),
        "by_item": "".join(str(int(right)) for right in is_right),
    }
