"""Out-of-memory guard: recognise the errors, skip the batch, and count the batches in a row."""

from __future__ import annotations

import logging

import torch

from trainer import distributed
from trainer.progress import Progress

logger = logging.getLogger("trainer")

ADVICE = (
    "Allowed: a smaller batch_size (with grad_accumulation_factor, for the same batch per step), "
    "batches or items of bounded length, precision bf16 or fp16, or a device with more memory"
)

# Parts of the messages of torch's allocators, drivers and libraries (cuBLAS, cuDNN, cuFFT and the
# like) that raise a plain RuntimeError.
MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "error: out of memory",
    "_ALLOC_FAILED",
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for the errors by which torch says that memory has run out."""
    # C++ code in which an allocation of the host fails raises MemoryError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in MESSAGES)
    )


class MemoryGuard:
    """Counts the batches in a row for which memory ran out.

    Args:
        patience: number of them that is tolerated.
        progress: holds the count (``out_of_memory_count``).
    """

    def __init__(self, patience: int, progress: Progress) -> None:
        self.patience, self._progress = patience, progress

    def skip(self, reason: str | None) -> None:
        """Count a batch that all ranks have given up. Collective.

        Args:
            reason: names the batch and the error on a rank that ran out of memory; None elsewhere.

        Raises:
            torch.OutOfMemoryError: at ``patience`` + 1 batches in a row.
        """
        progress = self._progress
        reasons = enumerate(distributed.all_gather_json(reason))
        found = [f"rank {rank}: {each}" for rank, each in reasons if each is not None]
        if distributed.world_size() == 1:
            found = [str(reason)]
        if distributed.is_main():
            logger.warning(
                "epoch %d, batch %d: out of memory, batch and open accumulation windows skipped "
                "(%s)",
                progress.epoch, progress.step, "; ".join(found),
            )  # fmt: skip
        progress.out_of_memory_count += 1
        if progress.out_of_memory_count > self.patience:
            raise torch.OutOfMemoryError(
                f"memory ran out in {progress.out_of_memory_count} batches in a row (oom_patience "
                f"is {self.patience}); the last was batch {progress.step} of epoch "
                f"{progress.epoch} ({'; '.join(found)}). None of them touched the weights. {ADVICE}"
            )
