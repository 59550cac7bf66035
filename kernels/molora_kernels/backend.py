"""Where the Triton kernels can run. Knows nothing about what they compute."""

import importlib
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch

HAS_TRITON = find_spec("triton") is not None  # Triton has no wheels for macOS

fusing: Any = None
if HAS_TRITON:
    from molora_kernels import arithmetic

    with suppress(ImportError, AttributeError):  # Gluon is experimental: where it is missing or another, so is `fused`
        fusing = importlib.import_module("molora_kernels.fused")

INTERPRETED: bool = HAS_TRITON and arithmetic.INTERPRETED.value


def triton_runs_on(device: torch.device) -> bool:
    """True on a GPU with Triton installed, and anywhere if the kernels were imported under TRITON_INTERPRET=1."""
    return INTERPRETED or (HAS_TRITON and device.type == "cuda")
