"""Numeric precision of a run: full, or mixed by autocast, with a gradient scaler for fp16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FULL: AbstractContextManager[None] = nullcontext()


class Precision:
    """What ``fp32``, ``fp16`` or ``bf16`` means on a device.

    fp32 is the one that does nothing: its autocast is an empty context and its scaler is disabled.

    Raises ValueError for an unknown name, and for a device that has no support for it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in DTYPES:
            raise ValueError(f"precision is {name!r}; allowed: {', '.join(DTYPES)}")
        self.name, self.dtype, self.device = name, DTYPES[name], device
        self.mixed = name != "fp32"
        if self.mixed and not _supported(device, self.dtype):
            raise ValueError(
                f"precision {name!r} is not supported on the device {str(device)!r} "
                f"by torch {torch.__version__}; use fp32 there"
            )

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a forward pass runs."""
        return torch.autocast(self.device.type, self.dtype) if self.mixed else _FULL

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler of one's own: enabled for fp16 (CUDA and CPU), else a no-op."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def _supported(device: torch.device, dtype: torch.dtype) -> bool:
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        return False
    if device.type == "cuda" and dtype is torch.bfloat16:
        return bool(torch.cuda.is_bf16_supported())
    try:
        # The scaler and an op in that type are what a step needs: ask the device, not a table.
        torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        torch.ones(2, 2, device=device, dtype=dtype) @ torch.ones(2, 2, device=device, dtype=dtype)
    except RuntimeError:
        return False
    return True
