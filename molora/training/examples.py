"""From a conversation to token ids with, for every token, its domain and whether it is learned.

A record is what a line of JSONL holds:

    {"messages": [{"role": ..., "content": ...}, ...], "domain": ...}      or
    {"prompt": "...", "completion": "...", "domain": ...}

`domain` is optional; `"task"` may name what is asked where no adapter's domain does. A message's content may be a list
of text parts, each with a domain of its own (null is base): the parts of one answer that different adapters should
write. With `"labels_only": true` nothing of the answer is learned but whose it is.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from molora.activation import check_message, check_unicode, render
from molora.chat_template import apply_chat_template
from molora.display import joined

IGNORE = -100
BASE = "base"
FIELDS = frozenset({"messages", "prompt", "completion", "domain", "task", "labels_only"})  # what is read of a record
CHUNK = 500  # records that a process encodes at a time
MIN_CHUNKS = 8  # of a source that is worth processes
MAX_PROCESSES = 16


@dataclass(frozen=True)
class Example:
    """One conversation, tokenized.

    Attributes:
        token_ids: the prompt and the completion, its end token included.
        learned: for each token, whether predicting it is learned (it belongs to the completion, if that is learned).
        domains: for each token, the domain it belongs to: a name, "base", or None where nothing is known.
        turn: index of the first token of the last user message (0 for plain text).
        response: index of the first token of the generation prompt (of the completion for plain text).
        task: what is asked, where that is base's; None where nothing is known.
    """

    token_ids: tuple[int, ...]
    learned: tuple[bool, ...]
    domains: tuple[str | None, ...]
    turn: int
    response: int
    task: str | None = None


def read_records(source: str | Path, *, split: str = "train") -> Iterator[Mapping[str, Any]]:
    """Records of a JSONL file, or of any source that `datasets.load_dataset` knows.

    Raises:
        ValueError: a line is no JSON object, or the file is not UTF-8; the message names the file, and the line.
    """
    path = Path(source)
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
        return
    from datasets import load_dataset

    yield from load_dataset(str(source), split=split)


def encode(record: Mapping[str, Any], tokenizer: Any) -> Example:
    """Tokenize one record.

    Raises:
        ValueError: the record has neither `messages` nor `prompt` and `completion`, or does not end in an answer; the
            answer holds an end token, or its domains are a list that are not those of its parts.
    """
    if "messages" in record:
        example = _encode_messages(record, tokenizer)
    elif "prompt" in record and "completion" in record:
        example = _encode_text(record, tokenizer)
    else:
        raise ValueError(f"a record needs 'messages', or 'prompt' and 'completion'; this one has {sorted(record)}.")
    labels_only = record.get("labels_only")  # None where other records of a table have it
    if not isinstance(labels_only, bool | None):
        raise ValueError(f"a record's labels_only is {labels_only!r}; expected true or false.")
    task = record.get("task")
    learned = (False,) * len(example.learned) if labels_only else example.learned
    return replace(example, task=task if isinstance(task, str) else None, learned=learned)


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; `python -m molora.training.recipes` builds the demo's data.")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(_lines(file, path), 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from None
            except RecursionError:
                raise ValueError(f"{path}, line {number}: JSON that is nested too deeply to be read.") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected an object, found a {type(record).__name__}.")
            yield record


def _lines(file: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it in that encoding.") from None


def _encode_text(record: Mapping[str, Any], tokenizer: Any) -> Example:
    for key in ("prompt", "completion"):
        if not isinstance(record[key], str):
            raise ValueError(f"a record's {key} must be text, not {record[key]!r}.")
        check_unicode(record[key], f"a record's {key}")
    _check_domain_list(record, [])
    prompt = tokenizer(record["prompt"])["input_ids"]
    completion = [*tokenizer(record["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    learned = [False] * len(prompt) + [True] * len(completion)
    domains = [_own_domain(record)] * len(learned)
    return Example((*prompt, *completion), tuple(learned), tuple(domains), 0, len(prompt))


def _encode_messages(record: Mapping[str, Any], tokenizer: Any) -> Example:
    messages = record["messages"]
    if not isinstance(messages, list):
        raise ValueError(f"a record's messages must be a list, not {messages!r}.")
    plain = [check_message(message, index) for index, message in enumerate(messages)]
    roles = [message["role"] for message in plain]
    if roles[-1:] != ["assistant"] or "user" not in roles:
        raise ValueError("a record's messages must end with a user message and the assistant's answer.")
    last_user = max(index for index, role in enumerate(roles) if role == "user")
    _check_domain_list(record, messages[last_user:])
    prompt = render(tokenizer, plain[:-1])
    full = apply_chat_template(tokenizer, plain)
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if tuple(ids[: len(prompt.token_ids)]) != prompt.token_ids:
        raise ValueError("the chat template renders the prompt differently once it is answered; cannot train on it.")
    if tokenizer.eos_token_id not in ids[len(prompt.token_ids) :]:
        raise ValueError(f"the chat template does not end an answer with {tokenizer.eos_token!r}; cannot train on it.")
    if tokenizer.eos_token in plain[-1]["content"]:
        raise ValueError(
            f"the answer holds the end token {tokenizer.eos_token!r}, behind which nothing would be learned; remove it."
        )
    # The answer ends with its first end token; what the template writes behind it is never generated.
    end = ids.index(tokenizer.eos_token_id, len(prompt.token_ids)) + 1
    learned = [len(prompt.token_ids) <= i < end for i in range(end)]
    turn, response = prompt.starts.get("turn", 0), prompt.starts.get("response", len(prompt.token_ids))
    domains = _label(record, plain, full, offsets[:end], last_user)
    return Example(tuple(ids[:end]), tuple(learned), tuple(domains), turn, response)


def _label(
    record: Mapping[str, Any],
    plain: Sequence[Mapping[str, str]],
    full: str,
    offsets: Sequence[tuple[int, int]],
    last_user: int,
) -> list[str | None]:
    """Each token's domain. Template tokens between two texts belong to the one that follows them."""
    ends: list[int] = []  # character after each text
    texts: list[str | None] = []  # its domain
    cursor = 0
    for index, message in enumerate(record["messages"]):
        start, end, num_stripped = _find(plain[index]["content"], full, cursor)
        if index == last_user:
            turn_text, turn_at = start, len(ends)
        cursor = start - num_stripped
        for text, domain in _parts(message["content"], _own_domain(record) if index >= last_user else None):
            cursor += len(text)
            ends.append(min(max(cursor, start), end))
            texts.append(domain)
        cursor = end
    labels: list[str | None] = []
    at = 0
    for start, end in offsets:
        while at < len(ends) - 1 and max(start, end - 1) >= ends[at]:
            at += 1
        # What stands before the last turn's text comes before anything that could tell its domain.
        labels.append(None if at == turn_at and end <= turn_text else texts[at])
    return labels


def _find(content: str, full: str, cursor: int) -> tuple[int, int, int]:
    """Where a message's content begins and ends in the rendered conversation, from `cursor` on.

    A template may strip it; the third number says how many characters of its beginning are missing.
    """
    kept = content.strip()
    num_leading = content.index(kept)
    if (start := full.find(kept, cursor)) < 0:
        raise ValueError(f"the chat template changes the message {content!r}; cannot train on it.")
    if start - num_leading >= cursor and full.startswith(content, start - num_leading):
        return start - num_leading, start - num_leading + len(content), 0
    return start, start + len(kept), num_leading


def _own_domain(record: Mapping[str, Any]) -> str | None:
    """The domain of a record's last turn: None where it says nothing, base where it says null."""
    domain = record.get("domain", "")
    if isinstance(domain, list):  # of the parts
        return None
    return _domain(domain) if domain != "" else None


def _check_domain_list(record: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
    """
    Args:
        messages: the last turn's.

    Raises:
        ValueError: the record's domain is a list, and not of its parts'.
    """
    if not isinstance(domains := record.get("domain"), list):
        return
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    parts = {domain for content in contents for _, domain in _parts(content, None)}
    if not parts or any(_domain(each) not in parts for each in domains):
        raise ValueError(
            f"a record's domain is the list {domains!r}; expected a name, or null for the base: a list belongs to a "
            "message whose content is a list of parts with these domains."
        )


def _parts(content: str | Sequence[Mapping[str, Any]], domain: str | None) -> list[tuple[str, str | None]]:
    if isinstance(content, str):
        return [(content, domain)]
    return [(part["text"], _domain(part.get("domain"))) for part in content]


def _domain(name: Any) -> str:
    if not isinstance(name, str | None):
        raise ValueError(f"a domain is {name!r}; expected a name, or null for the base.")
    return name or BASE


def _has_answer(record: Mapping[str, Any]) -> bool:
    if "messages" not in record:
        return bool(record["completion"].strip())
    return any(text.strip() for text, _ in _parts(record["messages"][-1]["content"], None))


def examples(
    records: Iterable[Mapping[str, Any]], tokenizer: Any, *, max_length: int, source: str = "data"
) -> list[Example]:
    """`Encoder.examples`, of one source."""
    with Encoder(tokenizer, max_length=max_length) as encoder:
        return encoder.examples(records, source=source)


class Encoder:
    """Encodes the records of sources, one source after another; many are shared out among processes.

    The processes are forked for the first source that has enough, and end with the `with` block.
    """

    def __init__(self, tokenizer: Any, *, max_length: int) -> None:
        self._encode_chunk = partial(_encode_chunk, tokenizer=tokenizer, max_length=max_length)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *raised: object) -> None:
        self._end()

    def examples(self, records: Iterable[Mapping[str, Any]], *, source: str = "data") -> list[Example]:
        """Encode records, leaving out those without an answer, or longer than `max_length` tokens.

        Args:
            source: what messages call the records' origin.

        Raises:
            ValueError: nothing is left, or a record is malformed; the message gives its number.

        Warns:
            UserWarning: so many records were left out, and why.
        """
        numbered = [(number, _needed(record)) for number, record in enumerate(records, 1)]
        chunks = [(source, numbered[first : first + CHUNK]) for first in range(0, len(numbered), CHUNK)]
        encoded = self._encode(chunks, source)
        out = [each for chunk in encoded for each in chunk if isinstance(each, Example)]
        if not numbered:
            raise ValueError(f"{source} has no records.")
        if len(numbered) > len(out):
            reasons = Counter(each for chunk in encoded for each in chunk if isinstance(each, str))
            why = joined(f"{count} {reason}" for reason, count in reasons.items())
            message = f"{source}: {len(numbered) - len(out)} of {len(numbered)} records are left out: {why}."
            if not out:
                raise ValueError(message)
            warnings.warn(message, stacklevel=3)
        return out

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _encode(self, chunks: Sequence[_Chunk], source: str) -> list[list[Example | str]]:
        num_processes = min(MAX_PROCESSES, os.cpu_count() or 1)
        if self._pool is None and num_processes > 1 and len(chunks) >= MIN_CHUNKS and sys.platform == "linux":
            # By fork: a script without a main guard must not run again.
            self._pool = ProcessPoolExecutor(
                num_processes,
                multiprocessing.get_context("fork"),
                _begin,
                (self._encode_chunk,),
            )
        if self._pool is None or len(chunks) < MIN_CHUNKS:
            return [self._encode_chunk(chunk) for chunk in chunks]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)  # no child calls torch
            try:
                return list(self._pool.map(_do, chunks))
            except BrokenProcessPool:
                self._end()
                message = f"{source}: a process that tokenizes it was killed, perhaps for want of memory."
                raise OSError(message) from None


def _needed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what `encode` does not read: that need not travel to another process."""
    return {key: value if key in FIELDS else None for key, value in record.items()}


_Chunk = tuple[str, Sequence[tuple[int, Mapping[str, Any]]]]
"""A source, and some of its records by their numbers."""

_work: Callable[[_Chunk], list[Example | str]]  # of a process that was forked for it


def _begin(work: Callable[[_Chunk], list[Example | str]]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a trainer's handler would outlive it


def _do(chunk: _Chunk) -> list[Example | str]:
    return _work(chunk)


def _encode_chunk(chunk: _Chunk, *, tokenizer: Any, max_length: int) -> list[Example | str]:
    """Each record's example, or why it is left out."""
    out: list[Example | str] = []
    source, numbered = chunk
    for number, record in numbered:
        try:
            example = encode(record, tokenizer)
        except ValueError as error:
            raise ValueError(f"{source}: record {number}: {error}") from error
        if not _has_answer(record):
            out.append("with an empty answer")
        elif len(example.token_ids) > max_length:
            out.append(f"longer than {max_length} tokens")
        else:
            out.append(example)
    return out
