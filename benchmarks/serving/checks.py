"""What the engine answers is what full forwards without a cache say. Nothing is timed before this was seen."""

from collections.abc import Sequence
from typing import Any

import torch

from molora.generation import Generation
from molora.model import MoLoRA
from molora.serving.request import Request
from serving.bench import Bench
from serving.figures import Report

NUM_TOP = 20
MOST = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.4}
"""Between log-probabilities, in nats. On the random models a wrong adapter, gate or context makes about 1."""
MOST_FLIPPED = {torch.float32: 0.0, torch.float16: 0.02, torch.bfloat16: 0.1}
"""The share of tokens whose route is another one, where two columns' scores are closer than rounding."""


class WrongAnswerError(RuntimeError):
    """The engine's answer is not the reference's."""


def check_against_forwards(bench: Bench, report: Report, *, prompt_length: int, num_new: int) -> None:
    """Every kind of route: together from an empty cache, then alone with what is in the cache by then.

    Raises:
        WrongAnswerError: a token, a route or a log-probability is not that of the full forward.
    """
    m, first, second = bench.m, bench.adapters[0], bench.adapters[1]
    routes: list[Any] = ["base", first, second, {first: 0.5, second: 0.5}]
    routes += ["auto"] if m.bank.has_router else []
    ids = bench.ids(prompt_length)
    requests = [
        bench.request(ids, route, num_new, start=start, logprobs=NUM_TOP)
        for route in routes
        for start in (0, prompt_length // 2)
    ]
    together = bench.engine.generate(requests)
    alone = [out for request in requests for out in bench.engine.generate(request)]
    found = [compare(m, request, out) for request, out in zip(requests * 2, together + alone, strict=True)]
    report.checked(
        "answers equal those of full forwards",
        num_answers=len(found),
        num_reused_tokens=sum(out.num_reused_tokens for out in together + alone),
        **{name: max(each[name] for each in found) for name in ("largest_difference", "share_flipped")},
    )


def compare(m: MoLoRA, request: Request, out: Generation) -> dict[str, float]:
    """An answer and the forward of all its tokens.

    Raises:
        WrongAnswerError: they differ by more than rounding.
    """
    assert isinstance(request.activation, int)
    assert out.logprobs is not None
    logits, routes = m.logits([out.token_ids], [request.activation], request.route)
    flipped = [
        [name for name, _ in mine] != [name for name, _ in theirs]
        for mine, theirs in zip(out.routes[:-1], routes[0][:-1], strict=True)
    ]
    share_flipped = sum(flipped) / len(flipped)
    if share_flipped > MOST_FLIPPED[m.model.dtype]:
        raise WrongAnswerError(f"route {request.route!r}: {share_flipped:.0%} of the tokens were routed otherwise.")
    logprobs_GV = logits[0, out.num_prompt_tokens - 1 : -1].float().log_softmax(-1)
    most = MOST[m.model.dtype]
    largest = 0.0
    for index, (token, reference_V) in enumerate(zip(out.logprobs, logprobs_GV, strict=True)):
        if flipped[out.num_prompt_tokens - 1 + index]:
            continue
        pairs = [*token.top, (token.token_id, token.logprob)]
        theirs = reference_V[[token_id for token_id, _ in pairs]]
        difference = (torch.tensor([value for _, value in pairs]) - theirs.cpu()).abs().max().item()
        behind = (reference_V.max() - reference_V[token.token_id]).item()  # it was greedy
        largest = max(largest, difference, behind)
        if not largest <= most:
            raise WrongAnswerError(
                f"route {request.route!r}: token {index} of the answer has log-probabilities up to {difference:.3g} "
                f"from a full forward's, and stands {behind:.3g} behind its best; at most {most:g} is rounding."
            )
    return {"largest_difference": largest, "share_flipped": share_flipped}


def check_same_tokens(what: str, mine: Sequence[int], theirs: Sequence[int]) -> None:
    """
    Raises:
        WrongAnswerError: they are not the same.
    """
    if list(mine) != list(theirs):
        raise WrongAnswerError(f"{what}: the engine wrote {list(mine)}, the reference {list(theirs)}.")
