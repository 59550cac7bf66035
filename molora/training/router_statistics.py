"""What a router does, token by token: whom it confuses, how sure and how calibrated it is, how often it switches.

Legend: N tokens, C columns (base and adapters), B bins of confidence, H bins of entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_BINS = 15
NUM_ENTROPY_BINS = 30


@dataclass(frozen=True)
class RouterStatistics:
    """Sums over the tokens that count, on their device. Those of two batches add up to those of both.

    A neighbour is a pair of tokens that follow each other in one conversation and both count.

    Attributes:
        confusion_CC: int64, labelled tokens by the column of their label (row) and of their route.
        routes_C: int64, tokens by their route, labelled or not.
        count_B: int64, labelled tokens by confidence, the probability of the route, in equal bins from 0 to 1.
        right_B: int64, those of them that are routed as labelled.
        confidence_B: float32, sums of their confidence.
        entropy_H: int64, tokens by the entropy of their probabilities, in equal bins from 0 to `max_entropy`.
        entropy: float32, sum of the entropies in nats.
        switches_34: int64, neighbours, those where the route changes, those where both have a label, and those of them
            where it changes: of all tokens (row 0), inside a word or a number (row 1), and inside one that the model
            writes (row 2).
    """

    confusion_CC: Tensor
    routes_C: Tensor
    count_B: Tensor
    right_B: Tensor
    confidence_B: Tensor
    entropy_H: Tensor
    entropy: Tensor
    switches_34: Tensor

    @classmethod
    def zeros(cls, num_columns: int, device: torch.device | None = None) -> RouterStatistics:
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        return cls.of(torch.zeros(0, num_columns, device=device), nothing, nothing)

    @classmethod
    def of(
        cls,
        logits_NC: Tensor,
        labels_N: Tensor,
        positions_N: Tensor,
        goes_on_N: Tensor | None = None,
        counted_N: Tensor | None = None,
        written_N: Tensor | None = None,
    ) -> RouterStatistics:
        """
        Args:
            logits_NC: scores, whose softmax are the probabilities.
            labels_N: the right column, or below 0 where none is known.
            positions_N: count from 0 in each conversation.
            goes_on_N: bool, whether a token goes on with the word or number of the one before; None is nowhere.
            counted_N: bool, whether a token counts; None is where it has a label.
            written_N: bool, whether the model writes the token, rather than read it; None is nowhere.
        """
        num_columns = logits_NC.shape[-1]
        counted_N = labels_N >= 0 if counted_N is None else counted_N
        labelled_N = (counted_N & (labels_N >= 0)).long()
        probs_NC = logits_NC.float().softmax(-1)
        routes_N = logits_NC.argmax(-1)
        confidence_N = probs_NC.gather(-1, routes_N[:, None])[:, 0]
        entropy_N = torch.special.entr(probs_NC).sum(-1)
        bin_N = _bins(confidence_N, NUM_BINS)
        right_N = labelled_N * (routes_N == labels_N)
        return cls(
            confusion_CC=_sums(
                labels_N.clamp(min=0) * num_columns + routes_N, labelled_N, num_columns * num_columns
            ).view(num_columns, num_columns),
            routes_C=_sums(routes_N, counted_N.long(), num_columns),
            count_B=_sums(bin_N, labelled_N, NUM_BINS),
            right_B=_sums(bin_N, right_N, NUM_BINS),
            confidence_B=_sums(bin_N, labelled_N * confidence_N, NUM_BINS),
            entropy_H=_sums(
                _bins(entropy_N / max_entropy(num_columns), NUM_ENTROPY_BINS), counted_N.long(), NUM_ENTROPY_BINS
            ),
            entropy=(counted_N * entropy_N).sum(),
            switches_34=_switches(routes_N, labels_N, positions_N, counted_N, goes_on_N, written_N),
        )

    def __add__(self, other: RouterStatistics) -> RouterStatistics:
        return RouterStatistics(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    def map(self, of: Callable[[Tensor], Tensor]) -> RouterStatistics:
        """Each tensor changed: moved, or summed over processes."""
        return RouterStatistics(**{name: of(value) for name, value in vars(self).items()})

    @property
    def num_columns(self) -> int:
        return len(self.confusion_CC)

    @property
    def num_tokens(self) -> int:
        return int(self.routes_C.sum())

    @property
    def num_labelled(self) -> int:
        return int(self.confusion_CC.sum())

    @property
    def accuracy(self) -> float:
        """The share of labelled tokens that are routed so."""
        return int(self.confusion_CC.diagonal().sum()) / max(1, self.num_labelled)

    @property
    def load(self) -> list[float]:
        """The share of tokens that each column takes."""
        return [count / max(1, self.num_tokens) for count in self.routes_C.tolist()]

    @property
    def label_load(self) -> list[float]:
        """The share of labelled tokens that each column should take."""
        return [count / max(1, self.num_labelled) for count in self.confusion_CC.sum(1).tolist()]

    @property
    def ece(self) -> float:
        """Expected calibration error, the mean distance of confidence and accuracy (arXiv 1706.04599, eq. 3)."""
        return float((self.right_B - self.confidence_B).abs().sum()) / max(1, self.num_labelled)

    @property
    def mean_entropy(self) -> float:
        """Of a token's probabilities, in nats."""
        return float(self.entropy) / max(1, self.num_tokens)

    @property
    def switch_rate(self) -> float:
        """The share of neighbours whose routes differ."""
        return self._rate(0)

    @property
    def label_switch_rate(self) -> float:
        """The share of labelled neighbours whose labels differ."""
        return self._rate(2)

    def _rate(self, column: int) -> float:
        num_pairs, num_switches = self.switches_34[0, column : column + 2].tolist()
        return float(num_switches / max(1, num_pairs))

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """The figures, with the columns' names."""
        (num_inside, inside, _, label_inside), (num_written, written, *_) = self.switches_34[1:].tolist()
        return {
            "num_tokens": self.num_tokens,
            "accuracy": self.accuracy,
            "ece": self.ece,
            "entropy": self.mean_entropy,
            "switch_rate": self.switch_rate,
            "label_switch_rate": self.label_switch_rate,
            "neighbours_in_words": num_inside,
            "switches_in_words": inside,
            "label_switches_in_words": label_inside,
            "neighbours_in_written_words": num_written,
            "switches_in_written_words": written,
            "load": dict(zip(names, self.load, strict=True)),
            "columns": list(names),
            "confusion": self.confusion_CC.tolist(),
        }


def max_entropy(num_columns: int) -> float:
    """Of a router that knows nothing, in nats; above 0, also where there is nothing to choose."""
    return math.log(max(2, num_columns))


def _bins(values_N: Tensor, num_bins: int) -> Tensor:
    """The bin of each value, of equal ones from 0 to 1."""
    return (values_N * num_bins).long().clamp(0, num_bins - 1)


def _sums(index_N: Tensor, values_N: Tensor, size: int) -> Tensor:
    return values_N.new_zeros(size).index_add(0, index_N, values_N)


def _switches(
    routes_N: Tensor,
    labels_N: Tensor,
    positions_N: Tensor,
    counted_N: Tensor,
    goes_on_N: Tensor | None,
    written_N: Tensor | None,
) -> Tensor:
    pairs_N = counted_N[1:] & counted_N[:-1] & (positions_N[1:] > 0)
    labelled_N = pairs_N & (labels_N[1:] >= 0) & (labels_N[:-1] >= 0)
    switched_N, relabelled_N = (each[1:] != each[:-1] for each in (routes_N, labels_N))
    changed_N4 = torch.stack([pairs_N, pairs_N & switched_N, labelled_N, labelled_N & relabelled_N], -1)
    nowhere_N = torch.zeros_like(pairs_N)
    inside_N = nowhere_N if goes_on_N is None else goes_on_N[1:]
    inside_written_N = nowhere_N if written_N is None else inside_N & written_N[1:] & written_N[:-1]
    kinds_N3 = torch.stack([~nowhere_N, inside_N, inside_written_N], -1)
    return (kinds_N3[..., None] & changed_N4[:, None]).sum(0)
