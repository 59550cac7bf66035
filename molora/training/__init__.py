"""Training adapters and routers with Lightning."""

from molora.training.adapter import AdapterTraining
from molora.training.callbacks import EMA
from molora.training.data import ChatData
from molora.training.router import RouterTraining

__all__ = ["EMA", "AdapterTraining", "ChatData", "RouterTraining"]
