"""`molora.load`: a base model, a bank's adapters in its linears, and the router at its router layer."""

from __future__ import annotations

import operator
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from molora import activation as policies
from molora.activation import Activation, Messages, Prompt
from molora.bank import Bank
from molora.checkpoint import load_base, resolve_base, resolve_device
from molora.digest import base_digest
from molora.generation import Generation, Sampling, TokenRoute
from molora.injection import RoutedDecoder, check_adapters, gates_tensor, linears_of_layers, slots_tensor, text_config
from molora.routing import Impl, RouteRequest
from molora.slots import NUM_VERSIONS, AdapterSlots, BankVersion, Hold, ResolvedRoute, read_route
from molora.text_limit import TextLimit, text_limit

if TYPE_CHECKING:
    from molora.serving.engine import Engine, EngineConfig
    from molora.serving.stream import Stream

MAX_WEIGHT = 1e6
DEFAULT_MAX_NEW_TOKENS = 512
REFUSED_INSIDE = {
    "init_continuous_batching": "transformers' continuous batching (generate_batch) cannot tell whose token is whose; "
    "outside it, m.engine.generate answers many conversations at once, each by its own route.",
    "load_custom_generate": "a way to decode that is code on the hub may call the model in any order, so nobody can "
    "say which token is routed how; use greedy, sampling, beam or assisted decoding.",
}  # methods of a model of transformers
Route = str | Mapping[str, float]
"""`"auto"` (the router), `"base"`, an adapter's name, or a weighted blend, which maps names to weights."""


class MoLoRA:
    """A base model with a bank of adapters and a router.

    Attributes:
        model: the Hugging Face model; called directly it is the base model, and inside `routing()` it is routed.
        tokenizer: the base model's tokenizer.
        bank: the bank it was loaded from; a change to it takes effect when it is loaded again.
        base_dir: the folder of safetensors that the base was loaded from.
        base_digest: of the base's weights.
        decoder: the routed linears and their routes.
        slots: which adapter lies where; the engine loads and replaces adapters there.
        lock: held by whoever runs the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Bank,
        base_dir: Path,
        base_digest: str,
        *,
        impl: Impl = "auto",
        num_extra_slots: int = 0,
        max_rank: int | None = None,
        engine: EngineConfig | None = None,
    ) -> None:
        """See `load`."""
        self.model = model
        self.tokenizer = tokenizer
        self.bank = Bank(bank.path, bank.config)  # as it is now: a later change to `bank` is not loaded here
        self.base_dir = base_dir
        self.base_digest = base_digest
        self.lock = threading.RLock()
        self._routing_thread: int | None = None
        self._engine_config = engine
        self._engine: Engine | None = None
        adapters = {entry.name: bank.load_adapter(entry.name) for entry in bank.adapters}
        modules = check_adapters(model, adapters)
        if num_extra_slots:
            modules |= linears_of_layers(model)
        names = [entry.name for entry in bank.adapters]
        self.decoder = RoutedDecoder(
            model,
            modules,
            num_slots=max(1, len(adapters) + num_extra_slots),
            max_rank=max(bank.config.max_rank, max_rank or 0),
            router_layer=bank.config.router_layer,
            router=bank.load_router(),
            column_slots=[names.index(entry.name) for entry in bank.routable],
            num_versions=NUM_VERSIONS,
            impl=impl,
        )
        self.slots = AdapterSlots(self.decoder, self.bank, adapters)

    def __repr__(self) -> str:
        names = ", ".join(self.slots.current.adapters)
        who = f"a router over {names}" if self.bank.has_router else names or "no adapters"
        return f"MoLoRA({self.bank.name!r}: {who}, on {self.bank.config.base.name}, {self.decoder.device})"

    @cached_property
    def max_context(self) -> int:
        """The most tokens that the base model can read, prompt and answer together."""
        return int(text_config(self.model).max_position_embeddings)

    @cached_property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return int(text_config(self.model).vocab_size)

    @cached_property
    def text_limit(self) -> TextLimit | None:
        """What every text keeps to that the base model can read; None if nothing is certain before it is tokenized."""
        return text_limit(self.tokenizer, self.max_context)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, (list, tuple)) else [configured]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    @property
    def engine(self) -> Engine:
        """What `generate` and `stream` run on, many requests at once over one cache; made when it is first needed."""
        if self._engine is None:
            # The one import that goes to the right: an engine is made for a model, and a model answers by its engine.
            from molora.serving.engine import Engine

            with self.lock:
                if self._engine is None:
                    self._engine = Engine(self, self._engine_config)
        return self._engine

    def generate(
        self,
        messages_or_text: Messages | str | Sequence[int],
        *,
        route: Route = "auto",
        activation: Activation | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        **sampling: Any,
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
            sampling: the other fields of `molora.Sampling`, such as `top_p` and `stop`.

        Raises:
            ValueError: unknown route, empty or malformed prompt, a policy that does not apply to it, or a context
                longer than the model's. Raised before any work starts.
            EngineError: the forward failed.
        """
        with self.stream(
            messages_or_text,
            route=route,
            activation=activation,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            **sampling,
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
        **sampling: Any,
    ) -> Stream:
        """Like `generate`, token by token; everything is checked before this returns."""
        from molora.serving.request import Request

        if unknown := sorted(set(sampling) - set(Sampling.__dataclass_fields__)):
            known = ", ".join(Sampling.__dataclass_fields__)
            raise ValueError(f"unknown options {unknown}; sampling has {known}.")
        if sampling.get("n", 1) != 1:
            raise ValueError("generate gives one answer; for several, use m.engine.generate.")
        options = Sampling(
            max_new_tokens=None if max_new_tokens is None else _whole_number(max_new_tokens, "max_new_tokens"),
            temperature=temperature,
            seed=None if seed is None else _whole_number(seed, "seed"),
            **sampling,
        )
        return self.engine.submit(
            Request(prompt=messages_or_text, route=route, activation=activation, sampling=options)
        )

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
        self.check_token_ids("input_ids", input_ids)
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
        with self.lock, self._holding(resolved) as holds:
            request = self._route_request(resolved, holds, starts, valid) if someone_acts else None
            with self.decoder.requested(request, early=_act_early(holds)):
                out = self.model(
                    input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
                )
                return out.logits, self._read_routes(holds, num_tokens)

    @contextmanager
    def routing(self, activation_start: Sequence[int], route: Route | Sequence[Route] = "auto") -> Iterator[None]:
        """Calls of `self.model` inside, `self.model.generate` included, are routed.

        Args:
            activation_start: for each sequence of the batch, the index of its first active token in real tokens.
                `generate` with n beams, or n returned sequences, runs each prompt n times in a row: repeat its index.
            route: one route for all sequences, or one for each.

        Inside, the model is this thread's alone: answers of the engine wait until it is left. A packed row, whose
        `position_ids` begin again, has one start and one route, and each of its sequences is active from its own token
        of that index. transformers' continuous batching (`generate_batch`) is refused: it packs prompts, each of which
        has a start of its own, in an order that only it knows. So is decoding by code on the hub, such as contrastive
        search.
        """
        starts = _check_starts(activation_start)
        resolved = self._resolve_routes(route, len(starts))
        someone_acts = any(not each.is_base for each in resolved)
        with self.lock, self._holding(resolved) as holds:
            before, self._routing_thread = self._routing_thread, threading.get_ident()
            request = self._route_request(resolved, holds, starts) if someone_acts else None
            try:
                with _refused(self.model), self.decoder.requested(request, early=_act_early(holds)):
                    yield
            finally:
                self._routing_thread = before

    def check_not_routing(self) -> None:
        """
        Raises:
            RuntimeError: this thread is inside `routing`, where an answer of the engine would be waited for in vain.
        """
        if self._routing_thread == threading.get_ident():
            raise RuntimeError(
                "inside m.routing(...), use m.model.generate; m.generate runs on the engine, outside it."
            )

    def render(self, messages_or_text: Messages | str | Sequence[int]) -> Prompt:
        """The prompt as the model reads it, with the activation points that its messages define."""
        return policies.render(self.tokenizer, messages_or_text, limit=self.text_limit)

    def activation_start(self, prompt: Prompt, route: Route = "auto", activation: Activation | None = None) -> int:
        """The absolute index from which `route` acts on a prompt; see `molora.activation` for the policies."""
        return self.resolve_activation(self.resolve_route(route), activation, prompt)

    def resolve_route(self, route: Route) -> ResolvedRoute:
        """
        Raises:
            ValueError: the route is malformed, or names what is not there.
        """
        version = self.slots.current
        if route == "auto":
            if version.router is None:
                raise ValueError(
                    f"the bank {self.bank.name!r} has no router, so route='auto' has nobody to ask; name an adapter "
                    "or 'base', or train a router."
                )
            return ResolvedRoute(auto=True)
        if route == "base":
            return ResolvedRoute(auto=False)
        if isinstance(route, str):
            return ResolvedRoute(False, (version[route].name,), (1.0,))
        if isinstance(route, Mapping) and route:
            if not all(isinstance(weight, Real) and abs(weight) <= MAX_WEIGHT for weight in route.values()):
                raise ValueError(f"route {dict(route)!r} has a weight beyond {MAX_WEIGHT:g}, or one that is no number.")
            weights = tuple(float(weight) for weight in route.values())
            return ResolvedRoute(False, tuple(version[name].name for name in route), weights)
        raise ValueError(
            f"route {route!r} is unknown; expected 'auto', 'base', an adapter's name, or {{name: weight}}."
        )

    def _resolve_routes(self, route: Route | Sequence[Route], num_seqs: int) -> list[ResolvedRoute]:
        if isinstance(route, (str, Mapping)):
            return [self.resolve_route(route)] * num_seqs
        if len(route) != num_seqs:
            raise ValueError(f"{len(route)} routes for {num_seqs} sequences; give one for each, or one for all.")
        return [self.resolve_route(each) for each in route]

    def resolve_activation(
        self, route: ResolvedRoute, activation: Activation | None, prompt: Prompt, version: BankVersion | None = None
    ) -> int:
        """The absolute index from which a route acts on a prompt; the prompt's length for base.

        Args:
            version: what the route's names mean; None is the current one.

        Raises:
            ValueError: the policy does not apply to the prompt.
        """
        if activation is not None:
            policies.check_activation(activation)
        if route.is_base:
            return len(prompt.token_ids)
        if route.auto:
            policy = self.bank.config.activation if activation is None else activation
            return policies.resolve(prompt, policy, of="the router")
        starts = {}
        version = self.slots.current if version is None else version
        for name in route.names:
            info = version[name]
            starts[name] = policies.resolve(
                prompt,
                info.activation if activation is None else activation,
                invocation_tokens=info.invocation_tokens,
                of=f"adapter {name!r}",
            )
        if len(set(starts.values())) > 1:
            raise ValueError(
                f"the blended adapters would be activated at different tokens ({starts}); pass an explicit index."
            )
        return next(iter(starts.values()))

    @contextmanager
    def _holding(self, routes: Sequence[ResolvedRoute]) -> Iterator[list[Hold | None]]:
        """Keep what the routes use from being taken away."""
        with ExitStack() as stack:
            holds: list[Hold | None] = []
            for route in routes:
                hold = None if route.is_base else self.slots.acquire(route)
                if hold is not None:
                    stack.callback(self.slots.release, hold)
                holds.append(hold)
            yield holds

    def _route_request(
        self,
        routes: Sequence[ResolvedRoute],
        holds: Sequence[Hold | None],
        starts: Sequence[int],
        valid: Tensor | None = None,
    ) -> RouteRequest:
        device = self.decoder.device
        auto, slots, gates = None, None, None
        if any(route.auto for route in routes):
            auto = torch.tensor([[route.auto] for route in routes], device=device)
        if not all(route.auto for route in routes):
            slots = slots_tensor([() if hold is None else hold.slots for hold in holds], device)
            gates = gates_tensor([route.weights for route in routes], device)
        version = torch.tensor([[0 if hold is None else hold.version.number] for hold in holds], device=device)
        return RouteRequest(torch.tensor(starts, device=device)[:, None], auto, slots, gates, valid, version)

    def _read_routes(self, holds: Sequence[Hold | None], num_tokens: int) -> list[list[TokenRoute]]:
        """The routes of the forward that has just run, by name: [B][T] lists of pairs."""
        # Explicit routes below the router layer are the same as from it on, so the later record says it all.
        record = self.decoder.routes.record
        if record is None:
            return [[()] * num_tokens for _ in holds]
        slots_BTK, gates_BTK = record.slots.tolist(), record.gates.tolist()
        return [
            [
                () if hold is None else hold.name(read_route(slots, gates, hold.digests))
                for slots, gates in zip(slots_TK, gates_TK, strict=True)
            ]
            for hold, slots_TK, gates_TK in zip(holds, slots_BTK, gates_BTK, strict=True)
        ]

    def check_token_ids(self, name: str, ids: Sequence[int] | Tensor) -> None:
        """
        Raises:
            ValueError: one is outside the model's vocabulary.
        """
        if len(ids) == 0:
            return
        all_ids = ids if isinstance(ids, Tensor) else np.asarray(ids)
        if not 0 <= all_ids.min() <= all_ids.max() < self.vocab_size:
            raise ValueError(f"{name} has token ids outside the model's vocabulary of 0 to {self.vocab_size - 1}.")

    def check_lengths(self, prompt: Prompt, max_new_tokens: int | None, most: int | None = None) -> int:
        """How many tokens may be generated.

        Args:
            most: of a sequence, if that is fewer than the model reads.

        Raises:
            ValueError: there is no room for the prompt and that many new tokens.
        """
        most = self.max_context if most is None else most
        num_tokens = len(prompt.token_ids)
        who = "the model reads" if most == self.max_context else "the cache holds"
        if num_tokens >= most:
            raise ValueError(
                f"the prompt has {num_tokens} tokens, but {who} at most {most} tokens, answer "
                "included; shorten the conversation."
            )
        room = most - num_tokens
        if max_new_tokens is None:
            return min(DEFAULT_MAX_NEW_TOKENS, room)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")
        if max_new_tokens > room:
            raise ValueError(
                f"the prompt has {num_tokens} tokens and {max_new_tokens} new ones are asked for, but {who} "
                f"at most {most} tokens; ask for {room} new ones or fewer."
            )
        return max_new_tokens


@contextmanager
def _refused(model: Any) -> Iterator[None]:
    """Refuse what every way into transformers' continuous batching calls, and what loads a decoding from the hub."""
    own = vars(model)
    before = {name: own.get(name) for name in REFUSED_INSIDE}
    own.update({name: partial(_refuse, reason) for name, reason in REFUSED_INSIDE.items()})
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                del own[name]
            else:
                own[name] = method


def _refuse(reason: str, *args: Any, **options: Any) -> None:
    raise RuntimeError(f"inside m.routing(...), {reason}")


def _whole_number(value: Any, name: str) -> int:
    """`value` as an int, whatever kind of integer it is.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, bool):
        with suppress(TypeError):
            return operator.index(value)
    raise ValueError(f"{name} is {value!r}; expected a whole number.")


def _act_early(holds: Sequence[Hold | None]) -> bool:
    """Whether anything that was asked for acts below the router layer."""
    return any(hold is not None and hold.acts_early for hold in holds)


def _check_starts(activation_start: Sequence[int]) -> list[int]:
    if not isinstance(activation_start, Iterable) or isinstance(activation_start, str):
        raise ValueError(f"activation_start is {activation_start!r}; expected a token index for each sequence.")
    starts = [_whole_number(start, "activation_start") for start in activation_start]
    if not all(0 <= start < 1 << 63 for start in starts):
        raise ValueError(f"activation_start is {starts}; expected token indices of 0 or more.")
    return starts


def _engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    """
    Raises:
        ValueError: one is unknown, or has a wrong value.
    """
    from molora.serving.engine import EngineConfig

    known = EngineConfig.__dataclass_fields__
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"engine has unknown settings {unknown}; expected {', '.join(known)}.")
    return EngineConfig(**settings)


def load(
    bank: str | Path | Bank,
    *,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    impl: Impl = "auto",
    num_extra_slots: int = 0,
    max_rank: int | None = None,
    engine: Mapping[str, Any] | None = None,
) -> MoLoRA:
    """Load a bank and its base model.

    Args:
        bank: a bank, or its folder.
        base: a local folder of the base model, or a hub name; None takes the name that the bank records.
        device: None takes a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto" (bfloat16 on a GPU, float32 on a CPU).
        impl: implementation of the routed linears: "auto", "torch" or "triton".
        num_extra_slots: room for adapters that are loaded later, by the engine; with it, every linear of the decoder's
            layers can be adapted.
        max_rank: of adapters that are loaded later, if it is to be more than the bank's.
        engine: settings of `EngineConfig` by name, such as `kv_cache_bytes` and `max_sequences`.

    Raises:
        FileNotFoundError, ValueError: the bank or the base model is missing, damaged, or they do not fit each other; or
            there is no such device.

    Warns:
        UserWarning: the base's weights are not those that the bank was trained on.
    """
    engine_config = None if engine is None else _engine_config(engine)
    device = resolve_device(device)
    bank = bank if isinstance(bank, Bank) else Bank.open(bank)
    base_dir = resolve_base(str(base) if base is not None else bank.config.base.name)
    digest = base_digest(base_dir)
    if digest != bank.config.base.digest:
        warnings.warn(
            f"bank {bank.name!r} was trained on {bank.config.base.name} with weights {bank.config.base.digest}, but "
            f"{base_dir} holds {digest}; answers and routes may differ from the bank's card.",
            stacklevel=2,
        )
    model, tokenizer = load_base(base_dir, device=device, dtype=dtype)
    return MoLoRA(
        model,
        tokenizer,
        bank,
        base_dir,
        digest,
        impl=impl,
        num_extra_slots=num_extra_slots,
        max_rank=max_rank,
        engine=engine_config,
    )
