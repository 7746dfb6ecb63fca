"""Numeric precision: full, or mixed by autocast, with a loss scaler for fp16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FULL: AbstractContextManager[None] = nullcontext()


class Precision:
    """Autocast and loss scaling for a precision on a device.

    fp32 does nothing: its autocast is an empty context and its scaler is disabled.

    Args:
        name: "fp32", "fp16" or "bf16".
        device: device of the run.

    Attributes:
        scaler: makes a loss scaler, enabled for fp16 (CUDA and CPU).

    Raises:
        ValueError: for an unknown name, and for a device that does not support it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in DTYPES:
            raise ValueError(f"precision is {name!r}; allowed: {', '.join(DTYPES)}")
        self.name, self.dtype, self.device = name, DTYPES[name], device
        self.mixed = name != "fp32"
        self.scaler = partial(torch.amp.GradScaler, device.type, enabled=name == "fp16")
        if self.mixed and not _supported(device, self.dtype):
            raise ValueError(
                f"precision {name!r} is not supported on the device {str(device)!r} "
                f"by torch {torch.__version__}; use fp32 there"
            )

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context manager for a forward pass."""
        return torch.autocast(self.device.type, self.dtype) if self.mixed else _FULL


def _supported(device: torch.device, dtype: torch.dtype) -> bool:
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        return False
    if device.type == "cuda" and dtype is torch.bfloat16:
        return bool(torch.cuda.is_bf16_supported())
    try:
        # A step needs the scaler and operations in that type: try both.
        torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        torch.ones(2, 2, device=device, dtype=dtype) @ torch.ones(2, 2, device=device, dtype=dtype)
    except RuntimeError:
        return False
    return True
