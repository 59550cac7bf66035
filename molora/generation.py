"""Decoding one conversation with a cache, one token at a time.

This module knows the decode loop: prefill what is not cached, sample, feed back. It knows nothing of banks or
policies; a request comes with its prompt ids and its routes already resolved.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from molora.injection import RoutedDecoder
from molora.prefix_cache import Encoding, PrefixCache, TokenRoute
from molora.routing import RouteRequest

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """One generated token: its id, the text it completes (empty inside a character), and the route that produced it."""

    id: int
    text: str
    route: TokenRoute


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        text: what was generated, without the prompt and without special tokens.
        token_ids: the prompt's ids and then the generated ones, a sampled end token included.
        routes: for each of `token_ids`, the (adapter name, gate) pairs that acted on it *as input*; [] is base. The
            last sampled token was never an input and has []. The route that produced token t is `routes[t - 1]`.
        num_prompt_tokens, num_generated_tokens: they add up to `len(token_ids)`.
        activation_start: index of the first token on which adapters could act; None if the base ran alone.
        num_reused_tokens: prompt tokens whose keys and values came from the cache.
        num_computed_tokens: rows that entered layer 0: prompt - reused + generated - 1.
        num_recomputed_tokens: live base entries that were computed again; always 0.
        num_reencoded_tokens: tokens that an earlier request computed as active and this one once as base.
    """

    text: str
    token_ids: list[int]
    routes: list[TokenRoute]
    num_prompt_tokens: int
    num_generated_tokens: int
    activation_start: int | None
    num_reused_tokens: int
    num_computed_tokens: int
    num_recomputed_tokens: int
    num_reencoded_tokens: int
    finish_reason: FinishReason

    @property
    def generated_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def generated_routes(self) -> list[TokenRoute]:
        """For each generated token, the route that produced it."""
        return self.routes[self.num_prompt_tokens - 1 : -1]


@dataclass(frozen=True)
class GenerationRequest:
    """One resolved request.

    Attributes:
        token_ids: the prompt.
        encoding: where the tokens begin to be active and by which route, for the cache.
        route: what the linears obey, or None for the base model.
        eos_ids: ids that end the answer.
    """

    token_ids: tuple[int, ...]
    encoding: Encoding
    route: RouteRequest | None
    max_new_tokens: int
    temperature: float
    seed: int | None
    eos_ids: Collection[int]


class RouteNames(Protocol):
    """Turns slots and gates of one token into (adapter name, gate) pairs."""

    def __call__(self, slots: list[int], gates: list[float]) -> TokenRoute: ...


@dataclass
class _Progress:
    token_ids: list[int]
    routes: list[TokenRoute]
    num_computed: int = 0
    finish_reason: FinishReason = "length"
    pieces: list[str] = field(default_factory=list)


class TokenStream(Iterator[Token]):
    """The tokens of one generation as they come; `result` is the whole once they are exhausted."""

    def __init__(
        self, decoder: RoutedDecoder, tokenizer: Any, cache: PrefixCache, request: GenerationRequest, names: RouteNames
    ) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._cache = cache
        self._request = request
        self._names = names
        self._result: Generation | None = None
        self._steps = self._run()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        return next(self._steps)

    def close(self) -> None:
        """Stop generating; what was computed so far stays in the cache."""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def result(self) -> Generation:
        """The finished generation.

        Raises:
            RuntimeError: the stream has not come to its end.
        """
        if self._result is None:
            raise RuntimeError("the stream has no result before its last token; iterate it to the end first.")
        return self._result

    def _run(self) -> Generator[Token, None, None]:
        request = self._request
        reuse = self._cache.take(request.token_ids, request.encoding)
        now = _Progress(list(request.token_ids), list(reuse.routes))
        generator = _generator(request, self._decoder.device)
        inputs = now.token_ids[reuse.num_reused :]
        text = _TextStream(self._tokenizer)
        try:
            for step in range(request.max_new_tokens):
                logits_V = self._forward(inputs, len(now.token_ids) - len(inputs), reuse.cache, now)
                token_id = sample(logits_V, request.temperature, generator)
                now.token_ids.append(token_id)
                inputs = [token_id]
                stop = token_id in request.eos_ids
                last = stop or step == request.max_new_tokens - 1
                piece = text.push(token_id, flush=last)
                now.pieces.append(piece)
                if stop:
                    now.finish_reason = "stop"
                yield Token(token_id, piece, now.routes[-1])
                if stop:
                    break
        finally:
            self._cache.put(now.token_ids, request.encoding, now.routes, reuse.cache)
        num_prompt = len(request.token_ids)
        self._result = Generation(
            text="".join(now.pieces),
            token_ids=now.token_ids,
            routes=[*now.routes, []],
            num_prompt_tokens=num_prompt,
            num_generated_tokens=len(now.token_ids) - num_prompt,
            activation_start=None if request.route is None else request.encoding.start,
            num_reused_tokens=reuse.num_reused,
            num_computed_tokens=now.num_computed,
            num_recomputed_tokens=reuse.num_recomputed,
            num_reencoded_tokens=reuse.num_reencoded,
            finish_reason=now.finish_reason,
        )

    @torch.inference_mode()
    def _forward(self, token_ids: list[int], position: int, cache: Any, now: _Progress) -> Tensor:
        """Run the tokens at `position` and after it; returns the last one's logits [V] and notes the routes."""
        decoder = self._decoder
        end = position + len(token_ids)
        # The host knows when no token can be active: then there is no router, no plan and no adapter kernel.
        route = self._request.route if end > self._request.encoding.start else None
        input_ids = torch.tensor([token_ids], device=decoder.device)
        position_ids = torch.arange(position, end, device=decoder.device)[None]
        with decoder.requested(route):
            out = decoder.model(
                input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            now.routes.extend(read_routes(decoder, self._names, 1, len(token_ids))[0])
        now.num_computed += len(token_ids)
        logits_V: Tensor = out.logits[0, -1]
        return logits_V


def read_routes(decoder: RoutedDecoder, names: RouteNames, num_seqs: int, num_tokens: int) -> list[list[TokenRoute]]:
    """The routes of the forward that has just run, by name: [B][T] lists of pairs."""
    out: list[list[TokenRoute]] = [[[] for _ in range(num_tokens)] for _ in range(num_seqs)]
    # Explicit routes below the router layer are the same as from it on, so the later record says it all.
    record = decoder.routes.record
    if record is None:
        return out
    slots, gates = record.slots.tolist(), record.gates.tolist()
    for b in range(num_seqs):
        for t in range(num_tokens):
            out[b][t] = names(slots[b][t], gates[b][t])
    return out


def sample(logits_V: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """The next token: the most likely one at temperature 0 (ties: the lowest id), else a draw."""
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.double()
    probs_V = torch.softmax((logits_V - logits_V.max()) / temperature, -1)  # no overflow at tiny temperatures
    return int(torch.multinomial(probs_V, 1, generator=generator))


def _generator(request: GenerationRequest, device: torch.device) -> torch.Generator | None:
    if request.temperature == 0:
        return None
    generator = torch.Generator(device)
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)
    return generator


class _TextStream:
    """Turns ids into text as they come, holding back characters whose bytes are not complete."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        self._shown = 0  # characters of the pending ids that were given out

    def push(self, token_id: int, *, flush: bool) -> str:
        self._ids.append(token_id)
        text: str = self._decode(self._ids, skip_special_tokens=True)
        if text.endswith("\ufffd") and not flush:
            return ""
        piece, self._shown = text[self._shown :], len(text)
        # Some tokenizers glue a word to the one before it: keep a few ids as context and forget the rest.
        if len(self._ids) > 64:
            self._ids = self._ids[-32:]
            self._shown = len(self._decode(self._ids, skip_special_tokens=True))
        return piece
