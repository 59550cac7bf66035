"""A bank as a model of lm-evaluation-harness: importing this module registers `molora` there.

It scores and continues token ids as the server's `/v1/completions` does, by the same engine and with the same
activation, so that the harness's `local-completions` and `local-chat-completions` give the same figures over HTTP.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  # the harness looks for its own models only while it knows of none
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import molora
from molora.activation import Activation, Prompt, activation_of_text, check_activation
from molora.chat_template import apply_chat_template
from molora.cli_common import parse_activation, parse_route
from molora.generation import Generation, Sampling
from molora.serving.request import Request
from molora.serving.stream import Stream

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 64
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness calls a request, or None; the context's token ids; those of the continuation."""


class Conversation(str):
    """Messages as the chat template renders them, and the token index where each policy begins in them.

    The harness hands back the object that `apply_chat_template` gave it, and also keeps it in its cache of requests.
    """

    starts: Mapping[str, int]


@register_model("molora")
class MoLoRALM(TemplateLM):  # type: ignore[misc]  # the harness is not typed
    """A bank's base, its router, an adapter or a blend of adapters.

    Text is read as by `/v1/completions`: adapters act from the first token on, unless `activation` or the route's own
    policy says otherwise ("system", "invocation" or an index). Conversations (`--apply_chat_template`) are read as by
    `/v1/chat/completions`: adapters act from where the route's policy says. A policy is resolved once, on context and
    continuation together, which are read in one pass.
    """

    def __init__(
        self,
        bank: str | Path,
        base: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        route: str | Mapping[str, float] = "auto",
        activation: Activation | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        seed: int | None = 1234,
        **unknown: Any,
    ) -> None:
        """
        Args:
            bank, base, device, dtype: as for `molora.load`.
            route: "auto" (the router), "base", an adapter's name, or a blend, as {name: weight} or "a=0.7,b=0.3" (not
                within a string of arguments, which the harness cuts at commas).
            activation: where adapters may begin to act: a policy or an index of the tokens that are read.
            max_length: tokens that are read at most, plus one; what is longer loses its beginning. None is what the
                engine has room for.
            max_gen_toks: an answer's length at most, in tokens, where the task does not say.
            batch_size: requests that run at once; "auto" is max_batch_size, or 64.
            add_bos_token: begin texts with the special tokens that the tokenizer puts there; None is its own habit.
                (The harness's HTTP models leave them out unless told by an argument of the same name.)
            seed: of every draw, as the harness's HTTP models send it; None draws anew.

        Raises:
            ValueError, FileNotFoundError: the bank or a value is not as it should be.
        """
        super().__init__()
        if unknown:
            raise ValueError(
                f"unknown arguments of the model: {', '.join(sorted(unknown))}; see molora.lm_eval.MoLoRALM."
            )
        is_auto = str(batch_size).partition(":")[0] == "auto"  # "auto:4" asks others to look for it four times
        num_at_once = int(max_batch_size or MAX_SEQUENCES) if is_auto else int(batch_size)
        self._num_ahead = 2 * num_at_once  # half of them wait, so that whoever ends is followed at once
        engine = {"max_sequences": num_at_once, "max_waiting": self._num_ahead}
        self.m = m = molora.load(bank, base=base, device=device, dtype=dtype, engine=engine)
        self.tokenizer = m.tokenizer
        self.route = dict(route) if isinstance(route, Mapping) else parse_route(str(route))
        self.activation = parse_activation(activation) if isinstance(activation, str) else activation
        if self.activation is not None:
            check_activation(self.activation)
        m.resolve_route(self.route)
        self.max_length = m.engine.capacity if max_length is None else int(max_length)
        if not 3 <= self.max_length <= m.engine.capacity:
            raise ValueError(f"max_length is {max_length}; expected 3 to {m.engine.capacity} tokens.")
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self.seed = seed
        self._device = m.decoder.device

    @property
    def eot_token_id(self) -> int | None:
        token_id: int | None = self.tokenizer.eos_token_id
        return token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a continuation that has no context."""
        token_id: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token_id is None else token_id

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests, which holds rendered conversations."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Conversation:
        """
        Args:
            add_generation_prompt: if not, the last message is the beginning of an answer, which goes on.
        """
        text = Conversation(
            apply_chat_template(
                self.tokenizer,
                chat_history,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )
        prompt = self.m.render(chat_history if add_generation_prompt else chat_history[:-1])
        ids = tuple(self._encode(text, text))
        text.starts = {
            policy: start for policy, start in prompt.starts.items() if ids[:start] == prompt.token_ids[:start]
        }
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The token ids of a text."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = False if bos and string.startswith(bos) else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **options)["input_ids"])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text's log-probability, in windows that share a token with the one before."""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length - 2, context_len=1
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([each for some in windows for each in some], disable_tqdm))
        sums = [float(sum(next(scores)[0] for _ in some)) for some in windows]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context's answer, up to the first of its `until` strings."""
        wanted = [self._to_generate(*request.args) for request in requests]
        texts = []
        for request, out in zip(requests, self._answers(wanted, "Generating", disable_tqdm), strict=True):
            self.cache_hook.add_partial("generate_until", request.args, out.text)
            texts.append(out.text)
        return texts

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As any model of the harness, but that a conversation's special tokens are its template's."""
        whole = self._encode(context + continuation, context)
        num_context = len(self._encode(context.rstrip(), context))
        return whole[:num_context], whole[num_context:]

    def _encode(self, text: str, context: str) -> list[int]:
        return self.tok_encode(text, False if isinstance(context, Conversation) else None)

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        wanted = [self._to_score(*request) for request in requests]
        results = []
        for (key, _, scored), out in zip(requests, self._answers(wanted, "Scoring", disable_tqdm), strict=True):
            assert out.prompt_logprobs is not None
            first = len(out.prompt_logprobs) - len(scored)
            entries = [entry for entry in out.prompt_logprobs[first:] if entry is not None]
            is_greedy = all(entry.logprob >= entry.top[0][1] for entry in entries)
            results.append((sum(entry.logprob for entry in entries), is_greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def _to_score(self, key: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Request:
        # A token is drawn that nobody asked for, and takes room.
        ids = self._shorten(context + continuation, self.max_length - 1)
        if len(ids) <= len(continuation):
            raise ValueError(
                f"a continuation has {len(continuation)} tokens; with max_length={self.max_length} it may have "
                f"{self.max_length - 2}, and needs a token before it."
            )
        sampling = Sampling(max_new_tokens=1, prompt_logprobs=1)
        num_cut = len(context) + len(continuation) - len(ids)
        return self._request("" if key is None else key[0], ids, num_cut, sampling)

    def _to_generate(self, context: str, options: Mapping[str, Any]) -> Request:
        sampling = self._sampling(options)
        assert sampling.max_new_tokens is not None
        room = self.max_length - 1 - sampling.max_new_tokens
        if room < 1:
            raise ValueError(
                f"the task asks for {sampling.max_new_tokens} tokens, which leaves no room for its question within "
                f"max_length={self.max_length}."
            )
        whole = self._encode(context, context)
        ids = self._shorten(whole, room)
        return self._request(context, ids, len(whole) - len(ids), sampling)

    def _request(self, context: str, ids: list[int], num_cut: int, sampling: Sampling) -> Request:
        """
        Args:
            num_cut: tokens that were cut from the beginning of the context.
        """
        activation = self.activation
        if isinstance(context, Conversation):
            starts = {policy: max(0, start - num_cut) for policy, start in context.starts.items()}
            activation = self.m.activation_start(Prompt(tuple(ids), starts), self.route, activation)
        elif activation is None:
            policies = {info.name: info.activation for info in self.m.engine.adapters()}
            activation = activation_of_text(self.route, router=self.m.bank.config.activation, adapters=policies)
        return Request(prompt=ids, route=self.route, activation=activation, sampling=sampling)

    def _sampling(self, options: Mapping[str, Any]) -> Sampling:
        """
        Args:
            options: a task's `generation_kwargs`.

        Raises:
            ValueError: one is unknown.
        """
        fields = dict(options)
        until = fields.pop("until", None) or []
        stop = [until] if isinstance(until, str) else list(until)
        if self.tokenizer.eos_token is not None and self.tokenizer.eos_token not in stop:
            stop.append(self.tokenizer.eos_token)
        lengths = [fields.pop(name, None) for name in LENGTHS]
        temperature = float(fields.pop("temperature", 0.0))
        is_greedy = fields.pop("do_sample", None) is False
        known = set(Sampling.__dataclass_fields__) - {"n", "logprobs", "prompt_logprobs", "grammar", "stop"}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"generation_kwargs has unknown options {unknown}; known are {', '.join(sorted(known))}.")
        return Sampling(
            max_new_tokens=next((int(length) for length in lengths if length is not None), self.max_gen_toks),
            temperature=0.0 if is_greedy else temperature,
            stop=stop,
            **{"seed": self.seed, **fields},
        )

    def _shorten(self, ids: list[int], most: int) -> list[int]:
        if len(ids) > most:
            logger.warning("%d tokens are cut to the last %d, to keep to max_length.", len(ids), most)
        return ids[-most:]

    def _answers(self, requests: Sequence[Request], title: str, disable_tqdm: bool) -> Iterator[Generation]:
        """In the order of the requests, some of which run ahead."""
        running: deque[Stream] = deque()
        waiting = iter(requests)
        try:
            for _ in tqdm(requests, desc=title, disable=disable_tqdm):
                for request in islice(waiting, self._num_ahead - len(running)):
                    running.append(self.m.engine.submit(request))
                with running[0] as stream:
                    for _ in stream:
                        pass
                    yield running.popleft().result
        finally:
            for stream in running:
                stream.close()
