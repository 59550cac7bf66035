"""MoLoRA: per-token routing over a bank of activated LoRA adapters, on one frozen base model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molora.adapter import Adapter, AdapterConfig
    from molora.bank import AdapterEntry, Bank, BaseInfo
    from molora.generation import Generation, Grammar, Sampling, Token
    from molora.model import MoLoRA, Route, load
    from molora.router import KeyRouter, RouterConfig, TokenRangeRouter

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterEntry",
    "Bank",
    "BaseInfo",
    "Generation",
    "Grammar",
    "KeyRouter",
    "MoLoRA",
    "Route",
    "RouterConfig",
    "Sampling",
    "Token",
    "TokenRangeRouter",
    "load",
]

_MODULES = {
    "adapter": ("Adapter", "AdapterConfig"),
    "bank": ("AdapterEntry", "Bank", "BaseInfo"),
    "generation": ("Generation", "Grammar", "Sampling", "Token"),
    "model": ("MoLoRA", "Route", "load"),
    "router": ("KeyRouter", "RouterConfig", "TokenRangeRouter"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that `molora --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"molora.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
