"""Training adapters and routers with Lightning."""

from molora.training.data import ChatData
from molora.training.module import AdapterTraining, RouterTraining

__all__ = ["AdapterTraining", "ChatData", "RouterTraining"]
