"""A classifier of whole questions, with nothing in it of the learned router: one adapter, or base, for a sequence.

Multinomial logistic regression on the mean of base's states at the router's layer over the user's turn, fitted to
records of one task, and base's, from the router's training data.

Legend: N questions, H hidden size, C base and the adapters.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.model import MoLoRA, Route
from molora.training.examples import BASE, check_message
from molora.training.router_report import router_inputs

NUM_RECORDS = 1000  # of each column, at most
WEIGHT_DECAY = 1e-3  # half of it times the squared weights, beside the mean loss


def routes_by_classifier(
    m: MoLoRA, asked: Sequence[Sequence[Mapping[str, Any]]], records: Iterable[Mapping[str, Any]]
) -> list[Route]:
    """One route for each whole question.

    Args:
        asked: each question's messages, the user's turn last.
        records: to fit to, of `domain` a name or None; those of several domains are passed over.
    """
    names, counts = [BASE, *(entry.name for entry in m.bank.adapters)], Counter[str]()
    columns = {name: column for column, name in enumerate(names)}
    chosen: list[Sequence[Mapping[str, Any]]] = []
    labels: list[int] = []
    for record in records:
        domain = BASE if record["domain"] is None else record["domain"]
        if isinstance(domain, str) and domain in columns and counts[domain] < NUM_RECORDS:
            counts[domain] += 1
            chosen.append([check_message(message, index) for index, message in enumerate(record["messages"][:-1])])
            labels.append(columns[domain])
    x_NH = means_over_turns(m, chosen)
    center_H, spread_H = x_NH.mean(0), x_NH.std(0).clamp(min=1e-6)
    weights_CH, bias_C = fit((x_NH - center_H) / spread_H, torch.tensor(labels, device=x_NH.device), len(names))
    scores_NC = (means_over_turns(m, asked) - center_H) / spread_H @ weights_CH.T + bias_C
    return [names[column] for column in scores_NC.argmax(-1).tolist()]


def means_over_turns(m: MoLoRA, asked: Sequence[Sequence[Mapping[str, Any]]]) -> Tensor:
    """Of base's states at the router's layer, from the last user's turn to the prompt's end, [N, H]."""
    prompts = [m.render(messages) for messages in asked]
    sequences = [prompt.token_ids for prompt in prompts]
    nowhere = [len(ids) for ids in sequences]  # the router's own LoRA acts nowhere either
    inputs = router_inputs(m, sequences, nowhere, batch_size=64)
    return torch.stack([x_TH[p.starts["turn"] :].float().mean(0) for p, x_TH in zip(prompts, inputs, strict=True)])


def fit(x_NH: Tensor, labels_N: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Weights [C, H] and biases [C] of the lowest cross entropy, with a penalty on the weights."""
    weights_CH = torch.zeros(num_columns, x_NH.shape[1], device=x_NH.device, requires_grad=True)
    bias_C = torch.zeros(num_columns, device=x_NH.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_CH, bias_C], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x_NH @ weights_CH.T + bias_C, labels_N) + WEIGHT_DECAY / 2 * weights_CH.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(loss)
    return weights_CH.detach(), bias_C.detach()
