"""Guards against non-finite steps, and against batches for which memory runs out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trainer import distributed
from trainer.metrics import StepReport
from trainer.progress import Progress

logger = logging.getLogger("trainer")

ADVICE = "To find the operation, run that batch under torch.autograd.detect_anomaly()"
MEMORY_ADVICE = (
    "Allowed: a smaller batch_size (with grad_accumulation_factor, for the same batch per step), "
    "batches or items of bounded length, precision bf16 or fp16, or a device with more memory"
)

# Parts of the messages of torch's allocators, drivers and libraries (cuBLAS, cuDNN, cuFFT and the
# like) that raise a plain RuntimeError.
MEMORY_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "error: out of memory",
    "_ALLOC_FAILED",
    "MPS backend out of memory",
)


class NonFiniteError(RuntimeError):
    """Too many steps of one epoch had a loss or gradient that was NaN or infinite."""


class Tracer:
    """Base class of tracers, which examine skipped steps; it does nothing.

    A tracer is a context manager around each `fit`, also a nested one. Subclasses are registered in
    `trainer.defaults.tracers`.
    """

    def begin_batch(self, batch: Any, is_last: bool, opens_window: bool) -> None:
        """Called before training on a batch; ``is_last`` is True for the last one of an epoch."""

    def skipped(self, report: StepReport, reports: Sequence[StepReport]) -> str:
        """Called when a step was skipped.

        Args:
            report: the outcome.
            reports: all outcomes of the batch; later losses add theirs to it.

        Returns:
            A pointer to more about the step for the message, or an empty text.
        """
        return ""

    def end_batch(self) -> None:
        """Called when the batch is over and the tensors of `fit_batch` are released."""

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Finish an examination that the batch left open, also after a `NonFiniteError`."""


@dataclass(slots=True)
class _Buffer:
    """A buffer of a module, and its value at the start of the accumulation window."""

    name: str
    owner: dict[str, Tensor | None]  # The buffers of its module.
    key: str
    unversioned: bool  # True if it changes without a new tensor version, as in torch's norms.
    tensor: Tensor | None  # None if the module had none.
    version: int
    kept: Tensor | None  # Copy of its value.

    def changed(self) -> bool:
        """Return True if the buffer was changed in place or replaced."""
        now = self.owner.get(self.key)
        return now is not self.tensor or (
            now is not None and (self.unversioned or now._version != self.version)
        )


class NonFiniteGuard:
    """Counts the skipped steps of an epoch, and restores the buffers after each.

    A NaN in an input enters the running statistics of a batch norm in the forward pass, and stays.
    The guard copies the buffers at the start of each accumulation window and restores them after a
    skipped step, which does not move the weights.

    Args:
        modules: modules whose buffers are kept.
        patience: skipped steps of an epoch that are tolerated.
        progress: holds the count (``nonfinite_count``).
        in_window: returns True while any accumulation window is open.
    """

    def __init__(
        self, modules: nn.Module, patience: int, progress: Progress, in_window: Callable[[], bool]
    ) -> None:
        self.patience, self._modules = patience, modules
        self._progress, self._in_window = progress, in_window
        self._losses: dict[str, list[tuple[list[str], Tensor]]] = {}
        self._skipped = self._counted = False
        self.begin_stage()

    def begin_stage(self) -> None:
        """Find the buffers (modules may have been replaced), and keep them."""
        self._skipped = False  # An error that ended the last stage may have left it True.
        self._buffers = [
            _Buffer(
                f"{path}.{key}", module._buffers, key, isinstance(module, _NormBase), buffer,
                buffer._version, buffer.detach().clone(),
            )
            for path, module in self._modules.named_modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]  # fmt: skip

    def begin_window(self) -> None:
        """Keep the present buffers; only changed ones are copied."""
        copies: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for each in self._changed():
            now, kept = each.owner.get(each.key), each.kept
            each.tensor = now
            if now is not None:
                each.version = now._version
            if now is None or kept is None or (now.shape, now.dtype) != (kept.shape, kept.dtype):
                each.kept = None if now is None else now.detach().clone()
            else:
                copies.setdefault(now.dtype, []).append((kept, now.detach()))
        for pairs in copies.values():  # On a GPU, one kernel for many buffers.
            torch._foreach_copy_([kept for kept, _ in pairs], [now for _, now in pairs])

    def begin_batch(self) -> None:
        """Begin a batch, in which at most one skipped step counts."""
        self._counted = False

    def add_loss(self, name: str, ids: list[str], loss: Tensor) -> None:
        """Record a batch of an optimizer's open window, to name it if the window is skipped."""
        self._losses.setdefault(name, []).append((ids, loss.detach()))

    def skip(
        self,
        report: StepReport,
        ids: Callable[[], list[str]],
        last_norm: float | None,
        trace: Callable[[], str],
    ) -> None:
        """Count a skipped step. Collective.

        Args:
            report: the outcome; one of weight 0 had no examples and does not count.
            ids: returns the names of the examples in the present batch.
            last_norm: last finite gradient norm of the optimizer.
            trace: called before the step is counted; returns a pointer to more about it.

        Raises:
            NonFiniteError: at ``patience`` + 1 skipped steps in an epoch.
        """
        self._skipped = True
        if report.weight <= 0:
            return
        progress, what = self._progress, "loss" if report.loss is None else "gradients"
        named = ", ".join(self._bad_ids(report.name, ids)) or "without ids"
        logger.warning(
            "epoch %d, batch %d: %s of %r not finite, step skipped (batch %s)",
            progress.epoch, progress.step, what, report.name, named,
        )  # fmt: skip
        hint = trace()
        if self._counted:
            return
        self._counted = True
        progress.nonfinite_count += 1
        if progress.nonfinite_count > self.patience:
            self.roll_back()
            norm = "no gradient norm was finite before"
            if last_norm is not None:
                norm = f"the last finite gradient norm was {last_norm:.4g}"
            raise NonFiniteError(
                f"Loss or gradients were not finite {progress.nonfinite_count} times in epoch "
                f"{progress.epoch} (nonfinite_patience is {self.patience}); the last time in batch "
                f"{progress.step}, optimizer {report.name!r} ({named}); {norm}. None of these "
                f"steps touched the weights, which are finite. {hint or ADVICE}. Where no cause is "
                "found there, a lower learning rate, a lower max_grad_norm or precision fp32 are "
                "the usual cures."
            )

    def close_window(self, name: str) -> None:
        """Forget the batches of an optimizer's window, which is closed."""
        self._losses.pop(name, None)

    def settle(self) -> None:
        """Roll the buffers back if a step of this batch was skipped.

        Called after `fit_batch`: until then the graphs of other losses hold the buffers.
        """
        if self._skipped:
            self.roll_back()

    def roll_back(self) -> None:
        """Restore the buffers to their values at the start of the window."""
        self._skipped = False
        for each in self._changed():
            each.owner[each.key] = each.tensor
            if each.tensor is not None and each.kept is not None:
                each.tensor.detach().copy_(each.kept)
                each.version = each.tensor._version

    def forget(self) -> None:
        """Forget the batches of open windows, after these were dropped."""
        self._losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the kept values of the buffers that changed in the open window."""
        changed = self._changed() if self._in_window() else []
        return {
            "buffers": {each.name: each.kept for each in changed if each.kept is not None},
            "spoilt": self._skipped,
            "counted": self._counted,
        }

    def snapshot(self) -> dict[str, Any]:
        """Return the state with the losses of open windows, for use within this process."""
        losses = {name: list(window) for name, window in self._losses.items()}
        return {**self.state_dict(), "losses": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.begin_stage()
        for each in self._buffers:
            if each.kept is not None and each.name in state["buffers"]:
                each.kept.copy_(state["buffers"][each.name])
                each.version = -1
        self._skipped, self._counted = state["spoilt"], state["counted"]
        self._losses = {name: list(window) for name, window in state.get("losses", {}).items()}

    def _bad_ids(self, name: str, ids: Callable[[], list[str]]) -> list[str]:
        """Return the ids, on all ranks, of batches with a non-finite loss; without one, all ids."""
        window = self._losses.get(name) or [(ids(), torch.zeros(()))]
        bad = [each for each, loss in window if not math.isfinite(loss.item())]  # Rare; syncs.
        own = list(chain(*(bad or [each for each, _ in window])))
        return list(chain(*distributed.all_gather_json(own)))

    def _changed(self) -> list[_Buffer]:
        return [each for each in self._buffers if each.changed()]


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for the errors that torch raises when memory runs out."""
    # C++ code raises MemoryError if an allocation on the host fails.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in MEMORY_MESSAGES)
    )


class MemoryGuard:
    """Counts the batches in a row for which memory ran out.

    Args:
        patience: number of such batches that is tolerated.
        progress: holds the count (``out_of_memory_count``).
    """

    def __init__(self, patience: int, progress: Progress) -> None:
        self.patience, self._progress = patience, progress

    def skip(self, reason: str | None) -> None:
        """Count a batch that all ranks gave up. Collective.

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
                f"{progress.epoch} ({'; '.join(found)}). None of them touched the weights. "
                f"{MEMORY_ADVICE}"
            )
