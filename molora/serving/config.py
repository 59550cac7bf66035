"""What the server is told when it starts: a YAML file, and flags that override it. It imports no torch and no FastAPI.

Every value is checked when a `ServeConfig` is built, and an unknown key is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml  # type: ignore[import-untyped]

from molora.generation import MAX_TOP_LOGPROBS

if TYPE_CHECKING:
    from molora.serving.engine import EngineConfig


LOG_FORMATS = ("plain", "json")


def _default_engine() -> EngineConfig:
    from molora.serving.engine import EngineConfig

    return EngineConfig()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request may ask for; beyond it the answer is 400, or 413 and 408 for a body.

    Attributes:
        max_body_bytes: of a request's body, counted while it is read.
        max_body_s: seconds that a body may take to arrive.
        max_prompt_tokens: of one prompt; None is what the model's context holds.
        max_prompts: in the list of one completion request.
        max_n: answers to one prompt.
        max_stop_strings, max_stop_chars: how many, and the length of each.
        max_logprobs: likely tokens reported beside each token.
        max_grammar_bytes: of a JSON schema or a regular expression.
        max_adapter_bytes: of the files of an adapter that is loaded while serving.
        max_adapter_rank: of such an adapter, and what its slot has room for; None is the bank's own maximum.
    """

    max_body_bytes: int = 8 << 20
    max_body_s: int = 60
    max_prompt_tokens: int | None = None
    max_prompts: int = 64
    max_n: int = 16
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_logprobs: int = MAX_TOP_LOGPROBS
    max_grammar_bytes: int = 64 << 10
    max_adapter_bytes: int = 2 << 30
    max_adapter_rank: int | None = None

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self)):
            if (value := getattr(self, name)) is not None or name not in ("max_prompt_tokens", "max_adapter_rank"):
                check_int(f"limits.{name}", value, low=1)
        if self.max_logprobs > MAX_TOP_LOGPROBS:
            raise ValueError(f"limits.max_logprobs is {self.max_logprobs}; the engine reports {MAX_TOP_LOGPROBS}.")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One server.

    Attributes:
        bank: the bank's folder.
        base: base model to use instead of the one that the bank names: a folder or a hub name.
        device, dtype: as for `molora.load`.
        host, port: where to listen; port 0 takes a free one.
        api_keys: a client must send one of them; without any, everyone may ask.
        api_key_file: a file with one more key on each line; empty lines and those that begin with # hold none.
        adapter_folders: clients may load adapters that lie in these; without any, loading is off.
        num_extra_slots: adapters that fit beside the bank's own; without any, only these can be replaced.
        drain_s: told to stop, how long running requests may take to finish; what is left is answered by 503, or by an
            error as the last event of its stream.
        keep_alive_s: how long a client may leave a connection idle; longer than load balancers do, which use 60 s, so
            that none of them sends a request into a connection that is being closed.
        max_connections: open at once, idle ones included; requests on one more are answered by 503.
        log_format: of standard error; "plain" has warnings only, "json" a line for each of them and for each request.
        otlp_endpoint: where traces of requests are sent, such as http://localhost:4318/v1/traces; None makes none.
        engine: the engine's own settings.
        limits: of one request.
    """

    bank: str
    base: str | None = None
    device: str | None = None
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: str | None = None
    adapter_folders: tuple[str, ...] = ()
    num_extra_slots: int = 0
    drain_s: int = 30
    keep_alive_s: int = 75
    max_connections: int = 512
    log_format: str = "plain"
    otlp_endpoint: str | None = None
    engine: EngineConfig = field(default_factory=_default_engine)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("bank", "dtype", "host"):
            check_text(name, getattr(self, name))
        for name in ("base", "device", "api_key_file", "otlp_endpoint"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        if self.log_format not in LOG_FORMATS:
            raise ValueError(f"log_format is {self.log_format!r}; expected {' or '.join(LOG_FORMATS)}.")
        check_int("port", self.port, low=0, high=65535)
        for name in ("drain_s", "num_extra_slots"):
            check_int(name, getattr(self, name), low=0)
        for name in ("keep_alive_s", "max_connections"):
            check_int(name, getattr(self, name), low=1)
        for name in ("api_keys", "adapter_folders"):
            for value in getattr(self, name):
                check_text(name, value)
        if not all(key.isascii() and key.isprintable() and " " not in key for key in self.api_keys):
            raise ValueError("api_keys has a key with spaces or with characters that no HTTP header can carry.")
        for folder in self.adapter_folders:
            if not Path(folder).is_dir():
                raise ValueError(f"adapter_folders names {folder}, which is no folder.")

    @classmethod
    def build(cls, values: Mapping[str, Any], *, source: str) -> Self:
        """From plain values such as a YAML file holds; `engine` and `limits` are mappings.

        Raises:
            ValueError: a key is unknown or missing, or a value is wrong; the message names the source and the key.
            FileNotFoundError: there is no file of API keys.
        """
        from molora.serving.engine import EngineConfig

        try:
            values = dict(values)
            for name, section in (("engine", EngineConfig), ("limits", Limits)):
                values[name] = build_section(section, values.get(name), f"{name}.")
            for name in ("api_keys", "adapter_folders"):
                values[name] = _tuple(name, values.get(name))
            if isinstance(file := values.get("api_key_file"), str):
                values["api_keys"] += _read_keys(file)
            config: Self = build_section(cls, values, "")
            return config
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def read_config(file: str | Path | None, flags: Mapping[str, Any]) -> ServeConfig:
    """A file's values, overridden by flags, which have the file's names and shape.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML mapping, a key is unknown, or a value is wrong.
    """
    values, source = read_values(file, flags)
    if "ray" in values:
        raise ValueError(f"{source}: the section 'ray' is for --ray; add that flag, or take the section out.")
    return ServeConfig.build(values, source=source)


def read_values(file: str | Path | None, flags: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Of a file and flags, not checked yet, and what to call their source.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML mapping.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no YAML: {error}") from None
        if not isinstance(loaded, dict) and loaded is not None:
            raise ValueError(f"{file} holds a {type(loaded).__name__}; expected keys and values.")
        values = dict(loaded or {})
    for name, value in flags.items():
        if not isinstance(value, dict):
            values[name] = value
        elif isinstance(section := values.get(name) or {}, dict):
            values[name] = section | value
    return values, "the command line" if file is None else str(file)


def build_section(cls: Any, values: object, prefix: str) -> Any:
    """A dataclass of plain values.

    Args:
        prefix: of the section's keys in messages, such as "limits."; empty for the whole file.

    Raises:
        ValueError: a key is unknown or missing, or a value is wrong; the message names the key.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')} is {values!r}; expected keys and values.")
    known = {each.name: each for each in fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown key '{prefix}{name}'; expected one of {', '.join(known)}.")
    for name, each in known.items():
        if name not in values and each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"key '{prefix}{name}' is missing.")
    try:
        return cls(**values)
    except TypeError as error:  # such as a comparison with a value of another type
        raise ValueError(f"{prefix.rstrip('.') or 'a value'} is of the wrong type: {error}") from None


def _read_keys(file: str) -> tuple[str, ...]:
    lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"api_key_file {file} holds no key, so nobody would be kept out.")
    return keys


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {value!r}; expected a list.")
    return tuple(value)


def check_int(name: str, value: object, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        wanted = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; expected a whole number {wanted}.")


def check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} has {value!r}; expected some text.")
