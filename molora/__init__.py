"""MoLoRA: per-token routing over a bank of activated LoRA adapters, on one frozen base model."""

from molora.adapter import Adapter, AdapterConfig
from molora.bank import AdapterEntry, Bank, BaseInfo
from molora.generation import Generation, Token
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
    "KeyRouter",
    "MoLoRA",
    "Route",
    "RouterConfig",
    "Token",
    "TokenRangeRouter",
    "load",
]
