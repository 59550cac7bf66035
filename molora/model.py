"""`molora.load`: a base model, a bank's adapters in its linears, and the router at its router layer."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora import activation as policies
from molora.activation import Activation, Messages, Prompt
from molora.bank import Bank
from molora.checkpoint import load_base, resolve_base
from molora.digest import base_digest
from molora.generation import Generation, GenerationRequest, TokenStream, read_routes
from molora.injection import RoutedDecoder, check_adapters, gates_tensor, slots_tensor, text_config
from molora.prefix_cache import Encoding, PrefixCache, TokenRoute
from molora.routing import Impl, RouteRequest

MAX_WEIGHT = 1e6
DEFAULT_MAX_NEW_TOKENS = 512
Route = str | Mapping[str, float]
"""`"auto"` (the router), `"base"`, an adapter's name, or `{name: weight, ...}`, a weighted blend."""


@dataclass(frozen=True)
class ResolvedRoute:
    """A route by slots: the router (`auto`), or explicit slots with their weights (none of them: base)."""

    auto: bool
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def is_base(self) -> bool:
        return not self.auto and not self.names


class MoLoRA:
    """A base model with a bank of adapters and a router.

    Attributes:
        model: the Hugging Face model; called directly it is the base model, and inside `routing()` it is routed.
        tokenizer: the base model's tokenizer.
        bank: the bank it was loaded from; a change to it takes effect when it is loaded again.
        base_dir: the folder of safetensors that the base was loaded from.
        decoder: the routed linears and their routes.
        cache: keys and values kept between calls of `generate`.
    """

    def __init__(self, model: Any, tokenizer: Any, bank: Bank, base_dir: Path, *, impl: Impl = "auto") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.bank = Bank(bank.path, bank.config)  # as it is now: a later change to `bank` is not loaded here
        self.base_dir = base_dir
        self.cache = PrefixCache()
        adapters = {entry.name: bank.load_adapter(entry.name) for entry in bank.adapters}
        modules = check_adapters(model, adapters)
        self._names = [entry.name for entry in bank.adapters]
        self.decoder = RoutedDecoder(
            model,
            modules,
            num_slots=max(1, len(adapters)),
            max_rank=bank.config.max_rank,
            router_layer=bank.config.router_layer,
            router=bank.load_router(),
            column_slots=[self._names.index(entry.name) for entry in bank.routable],
            impl=impl,
        )
        for slot, adapter in enumerate(adapters.values()):
            self.decoder.set_adapter(slot, adapter)
        self._invocation = {name: adapter.config.alora_invocation_tokens for name, adapter in adapters.items()}

    @property
    def max_context(self) -> int:
        """The most tokens that the base model can read, prompt and answer together."""
        return int(text_config(self.model).max_position_embeddings)

    def generate(
        self,
        messages_or_text: Messages | str | Sequence[int],
        *,
        route: Route = "auto",
        activation: Activation | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Generation:
        """Answer one conversation, reusing what earlier calls have read of it.

        Args:
            messages_or_text: chat messages, plain text, or token ids.
            route: who acts on the active tokens: the router, base, an adapter, or a weighted blend.
            activation: where adapters may begin to act: a policy or an absolute token index; None takes the policy
                that the route was trained with.
            max_new_tokens: the answer's length at most, in tokens; None is `DEFAULT_MAX_NEW_TOKENS`, or as many as the
                model's context has room for.
            temperature: 0 is greedy.
            seed: makes a draw at a temperature above 0 repeatable.

        Raises:
            ValueError: unknown route, empty or malformed prompt, a policy that does not apply to it, or a context
                longer than the model's. Raised before any work starts.
        """
        with self.stream(
            messages_or_text,
            route=route,
            activation=activation,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        ) as stream:
            for _ in stream:
                pass
            return stream.result

    def stream(
        self,
        messages_or_text: Messages | str | Sequence[int],
        *,
        route: Route = "auto",
        activation: Activation | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> TokenStream:
        """Like `generate`, token by token; everything is checked before this returns."""
        resolved = self._resolve_route(route)
        prompt = policies.render(self.tokenizer, messages_or_text)
        max_new_tokens = self._check_lengths(prompt, max_new_tokens)
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or a positive number.")
        if seed is not None and not -(1 << 63) <= (seed := _whole_number(seed, "seed")) < 1 << 64:
            raise ValueError(f"seed is {seed}; expected a whole number of 64 bits.")
        start = self._resolve_activation(resolved, activation, prompt)
        request = GenerationRequest(
            prompt.token_ids,
            self._encoding(resolved, start),
            None if resolved.is_base else self._route_request([resolved], [start]),
            max_new_tokens,
            temperature,
            seed,
            self._eos_ids(),
        )
        return TokenStream(self.decoder, self.tokenizer, self.cache, request, self._name_slots)

    @torch.inference_mode()
    def logits(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        activation_start: Sequence[int],
        route: Route | Sequence[Route] = "auto",
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[list[TokenRoute]]]:
        """One full forward without a cache.

        Args:
            input_ids: [B, T] token ids.
            activation_start: for each sequence, the index of its first active token, counted in real tokens (padding
                does not count); its length or more means never active.
            route: one route for all sequences, or one for each.
            attention_mask: [B, T], 0 on padding, left or right; None if there is none.

        Returns:
            Logits [B, T, V], and `routes[b][t]`, the (name, gate) pairs that acted on each token; [] for base.

        Raises:
            ValueError: shapes disagree, an index is negative, or a route is unknown.
        """
        device = self.decoder.device
        input_ids = torch.as_tensor(input_ids, device=device)
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected [B, T], with a token at least.")
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(f"input_ids is {input_ids.dtype}; expected whole numbers.")
        self._check_ids("input_ids", input_ids)
        num_seqs, num_tokens = input_ids.shape
        starts = _check_starts(activation_start)
        if len(starts) != num_seqs:
            raise ValueError(f"activation_start is {starts}; expected one index for each of {num_seqs} sequences.")
        if num_tokens > self.max_context:
            raise ValueError(f"the input has {num_tokens} tokens; the model reads at most {self.max_context}.")
        valid, lengths = None, [num_tokens] * num_seqs
        position_ids = torch.arange(num_tokens, device=device).expand(num_seqs, -1)
        if attention_mask is not None:
            attention_mask = torch.as_tensor(attention_mask, device=device)
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; expected {tuple(input_ids.shape)}."
                )
            valid = attention_mask.bool()
            lengths = valid.sum(-1).tolist()
            position_ids = (valid.long().cumsum(-1) - 1).clamp(min=0)
        resolved = self._resolve_routes(route, num_seqs)
        someone_acts = any(
            not each.is_base and start < length for each, start, length in zip(resolved, starts, lengths, strict=True)
        )
        request = self._route_request(resolved, starts, valid) if someone_acts else None
        with self.decoder.requested(request):
            out = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
            return out.logits, read_routes(self.decoder, self._name_slots, num_seqs, num_tokens)

    @contextmanager
    def routing(self, activation_start: Sequence[int], route: Route | Sequence[Route] = "auto") -> Iterator[None]:
        """Calls of `self.model` inside, `self.model.generate` included, are routed.

        Args:
            activation_start: for each sequence of the batch, the index of its first active token in real tokens.
                `generate` with n beams, or n returned sequences, runs each prompt n times in a row: repeat its index.
            route: one route for all sequences, or one for each.
        """
        starts = _check_starts(activation_start)
        resolved = self._resolve_routes(route, len(starts))
        someone_acts = any(not each.is_base for each in resolved)
        with self.decoder.requested(self._route_request(resolved, starts) if someone_acts else None):
            yield

    def render(self, messages_or_text: Messages | str | Sequence[int]) -> Prompt:
        """The prompt as the model reads it, with the activation points that its messages define."""
        return policies.render(self.tokenizer, messages_or_text)

    def activation_start(self, prompt: Prompt, route: Route = "auto", activation: Activation | None = None) -> int:
        """The absolute index from which `route` acts on a prompt; see `molora.activation` for the policies."""
        return self._resolve_activation(self._resolve_route(route), activation, prompt)

    def _resolve_route(self, route: Route) -> ResolvedRoute:
        if route == "auto":
            if not self.bank.has_router:
                raise ValueError(
                    f"the bank {self.bank.name!r} has no router, so route='auto' has nobody to ask; name an adapter "
                    "or 'base', or train a router."
                )
            return ResolvedRoute(auto=True)
        if route == "base":
            return ResolvedRoute(auto=False)
        if isinstance(route, str):
            return ResolvedRoute(False, (self.bank[route].name,), (1.0,))
        if isinstance(route, Mapping) and route:
            if not all(abs(weight) <= MAX_WEIGHT for weight in route.values()):
                raise ValueError(f"route {dict(route)!r} has a weight beyond {MAX_WEIGHT:g}, or not a number.")
            weights = tuple(float(weight) for weight in route.values())
            return ResolvedRoute(False, tuple(self.bank[name].name for name in route), weights)
        raise ValueError(
            f"route {route!r} is unknown; expected 'auto', 'base', an adapter's name, or {{name: weight}}."
        )

    def _resolve_routes(self, route: Route | Sequence[Route], num_seqs: int) -> list[ResolvedRoute]:
        if isinstance(route, (str, Mapping)):
            return [self._resolve_route(route)] * num_seqs
        if len(route) != num_seqs:
            raise ValueError(f"{len(route)} routes for {num_seqs} sequences; give one for each, or one for all.")
        return [self._resolve_route(each) for each in route]

    def _resolve_activation(self, route: ResolvedRoute, activation: Activation | None, prompt: Prompt) -> int:
        if activation is not None:
            policies.check_activation(activation)
        if route.is_base:
            return len(prompt.token_ids)
        if route.auto:
            policy = self.bank.config.activation if activation is None else activation
            return policies.resolve(prompt, policy, of="the router")
        starts = {
            name: policies.resolve(
                prompt,
                self.bank[name].activation if activation is None else activation,
                invocation_tokens=self._invocation[name],
                of=f"adapter {name!r}",
            )
            for name in route.names
        }
        if len(set(starts.values())) > 1:
            raise ValueError(
                f"the blended adapters would be activated at different tokens ({starts}); pass an explicit index."
            )
        return next(iter(starts.values()))

    def _encoding(self, route: ResolvedRoute, start: int) -> Encoding:
        if route.is_base:
            return Encoding(start, None)
        pairs = None if route.auto else list(zip(route.names, route.weights, strict=True))
        return Encoding(start, self.bank.route_digest(pairs))

    def _route_request(
        self, routes: Sequence[ResolvedRoute], starts: Sequence[int], valid: Tensor | None = None
    ) -> RouteRequest:
        device = self.decoder.device
        auto, slots, gates = None, None, None
        if any(route.auto for route in routes):
            auto = torch.tensor([[route.auto] for route in routes], device=device)
        if not all(route.auto for route in routes):
            slots = slots_tensor([[self._names.index(name) for name in route.names] for route in routes], device)
            gates = gates_tensor([route.weights for route in routes], device)
        return RouteRequest(torch.tensor(starts, device=device)[:, None], auto, slots, gates, valid)

    def _name_slots(self, slots: list[int], gates: list[float]) -> TokenRoute:
        return [(self._names[slot], gate) for slot, gate in zip(slots, gates, strict=True) if slot >= 0]

    def _eos_ids(self) -> frozenset[int]:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, (list, tuple)) else [configured]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    def _check_ids(self, name: str, ids: Tensor) -> None:
        vocab_size = int(text_config(self.model).vocab_size)
        if not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"{name} has token ids outside the model's vocabulary of 0 to {vocab_size - 1}.")

    def _check_lengths(self, prompt: Prompt, max_new_tokens: int | None) -> int:
        """Returns how many tokens may be generated."""
        num_tokens = len(prompt.token_ids)
        self._check_ids("the prompt", torch.tensor(prompt.token_ids))
        if num_tokens >= self.max_context:
            raise ValueError(
                f"the prompt has {num_tokens} tokens, but the model reads at most {self.max_context} tokens, answer "
                "included; shorten the conversation."
            )
        room = self.max_context - num_tokens
        if max_new_tokens is None:
            return min(DEFAULT_MAX_NEW_TOKENS, room)
        max_new_tokens = _whole_number(max_new_tokens, "max_new_tokens")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")
        if max_new_tokens > room:
            raise ValueError(
                f"the prompt has {num_tokens} tokens and {max_new_tokens} new ones are asked for, but the model reads "
                f"at most {self.max_context} tokens; ask for {room} new ones or fewer."
            )
        return max_new_tokens


def _whole_number(value: Any, name: str) -> int:
    """`value` as an int, whatever kind of integer it is.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, bool):
        with suppress(TypeError):
            return operator.index(value)
    raise ValueError(f"{name} is {value!r}; expected a whole number.")


def _check_starts(activation_start: Sequence[int]) -> list[int]:
    starts = [_whole_number(start, "activation_start") for start in activation_start]
    if not all(0 <= start < 1 << 63 for start in starts):
        raise ValueError(f"activation_start is {starts}; expected token indices of 0 or more.")
    return starts


def load(
    bank: str | Path | Bank,
    *,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    impl: Impl = "auto",
) -> MoLoRA:
    """Load a bank and its base model.

    Args:
        bank: a bank, or its folder.
        base: a local folder of the base model, or a hub name; None takes the name that the bank records.
        device: None takes a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto" (bfloat16 on a GPU, float32 on a CPU).
        impl: implementation of the routed linears: "auto", "torch" or "triton".

    Raises:
        FileNotFoundError, ValueError: the bank or the base model is missing, damaged, or they do not fit each other.

    Warns:
        UserWarning: the base's weights are not those that the bank was trained on.
    """
    bank = bank if isinstance(bank, Bank) else Bank.open(bank)
    base_dir = resolve_base(str(base) if base is not None else bank.config.base.name)
    digest = base_digest(base_dir)
    if digest != bank.config.base.digest:
        warnings.warn(
            f"bank {bank.name!r} was trained on {bank.config.base.name} with weights {bank.config.base.digest}, but "
            f"{base_dir} holds {digest}; answers and routes may differ from the bank's card.",
            stacklevel=2,
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_base(base_dir, device=device, dtype=dtype)
    return MoLoRA(model, tokenizer, bank, base_dir, impl=impl)
