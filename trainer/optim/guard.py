"""Non-finite guard: counts skipped steps, and rolls back module buffers after one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
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


class NonFiniteError(RuntimeError):
    """Too many steps of one epoch had a loss or gradient that was NaN or infinite."""


class Tracer:
    """Looks into skipped steps; this one does nothing.

    A context manager around each `fit`, also around one within a hook of another. A subclass is
    registered in `trainer.defaults.tracers`.
    """

    def begin_batch(self, batch: Any, weight: float, is_last: bool) -> None:
        """Called before a batch is trained on."""

    def skipped(self, report: StepReport) -> str:
        """Called when a step was skipped; return where more about it can be found, or nothing."""
        return ""

    def end_batch(self) -> None:
        """Called when the batch is over, and with it what the recipe's `fit_batch` computed."""

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Finish what the batch left open, also when the patience has run out within it."""


class NonFiniteGuard:
    """Counts the skipped steps of an epoch and undoes what their batches did to buffers.

    A NaN in an input is in the running statistics of a batch norm before any loss shows it, and
    never leaves them. The guard keeps the buffers at the start of each accumulation window and puts
    them back after a skipped step. The weights need no such care: a skipped step moves nothing.

    Args:
        modules: modules whose buffers are kept.
        patience: skipped steps of an epoch that are tolerated.
        progress: holds the count (``nonfinite_count``).
        in_window: returns True while any accumulation window is open.
    """

    def __init__(
        self, modules: nn.Module, patience: int, progress: Progress, in_window: Callable[[], bool]
    ) -> None:
        self.patience = patience
        self._progress, self._in_window = progress, in_window
        self._modules = modules
        self._suspects: dict[str, list[tuple[list[str], Tensor]]] = {}
        self._counted = False
        self.begin_stage()

    def begin_stage(self) -> None:
        """Find the buffers (modules may have been exchanged), and keep them."""
        self._spoilt = False  # True still if an error ended the last stage.
        found = [
            (f"{path}.{name}", module, name, buffer)
            for path, module in self._modules.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._names = [full_name for full_name, *_ in found]
        self._places = [(module._buffers, name) for _, module, name, _ in found]
        # torch's own norms change their buffers without a new tensor version.
        self._silent = [isinstance(module, _NormBase) for _, module, *_ in found]
        self._seen: list[Tensor] = [buffer for *_, buffer in found]
        self._versions = [buffer._version for buffer in self._seen]
        self._kept = [buffer.detach().clone() for buffer in self._seen]

    def begin_window(self) -> None:
        """Keep the buffers as they are now; only those that changed are copied."""
        copies: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for i in self._changed():
            buffers, name = self._places[i]
            buffer = buffers[name]
            assert buffer is not None
            if buffer.shape == self._kept[i].shape:
                targets, sources = copies.setdefault(buffer.dtype, ([], []))
                targets.append(self._kept[i])
                sources.append(buffer.detach())
            else:
                self._kept[i] = buffer.detach().clone()
            self._seen[i], self._versions[i] = buffer, buffer._version
        for targets, sources in copies.values():  # On a GPU, one kernel for many buffers.
            torch._foreach_copy_(targets, sources)

    def begin_batch(self) -> None:
        """A bad batch counts once, however many losses it spoils."""
        self._counted = False

    def add_loss(self, name: str, ids: list[str], loss: Tensor) -> None:
        """Remember a batch of an open window, to name it if the window is skipped."""
        self._suspects.setdefault(name, []).append((ids, loss.detach()))

    def skip(
        self,
        report: StepReport,
        ids: Callable[[], list[str]],
        last_norm: float | None,
        tracer: Tracer,
    ) -> None:
        """Count a skipped step, which all ranks agree on. Collective.

        Args:
            report: the outcome. One of weight 0 had no examples, and counts for nothing.
            ids: returns the names of the examples in the present batch.
            last_norm: last finite gradient norm of the optimizer.
            tracer: told about it.

        Raises:
            NonFiniteError: at ``patience`` + 1 skipped steps in an epoch.
        """
        self._spoilt = True
        if report.weight <= 0:
            return
        bad = self._bad_ids(report.name, ids)
        logger.warning(
            "epoch %d, batch %d: %s of %r not finite, step skipped (batch %s)",
            self._progress.epoch, self._progress.step,
            "loss" if report.loss is None else "gradients", report.name,
            ", ".join(bad) or "without ids",
        )  # fmt: skip
        hint = tracer.skipped(report)
        if not self._counted:
            self._counted = True
            self._count(report.name, last_norm, bad, hint)

    def close_window(self, name: str) -> None:
        """Forget the batches of an optimizer's window, which is closed."""
        self._suspects.pop(name, None)

    def settle(self) -> None:
        """Roll the buffers back if a step of this batch was skipped.

        Called after `fit_batch`: until then the graphs of other losses hold the buffers.
        """
        if self._spoilt:
            self.roll_back()
            self._spoilt = False

    def roll_back(self) -> None:
        """Put the buffers back as they were at the start of the window."""
        for i in self._changed():
            buffers, name = self._places[i]
            buffers[name] = self._seen[i]
            self._seen[i].detach().copy_(self._kept[i])
            self._versions[i] = self._seen[i]._version

    def forget(self) -> None:
        """Forget the batches of open windows, which were dropped."""
        self._suspects.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the kept values of the buffers that changed in the open window."""
        changed = self._changed() if self._in_window() else []
        return {
            "buffers": {self._names[i]: self._kept[i] for i in changed},
            "spoilt": self._spoilt,
            "counted": self._counted,
        }

    def snapshot(self) -> dict[str, Any]:
        """Return the state with the losses of open windows, for as long as the process lives."""
        losses = {name: list(window) for name, window in self._suspects.items()}
        return {**self.state_dict(), "losses": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.begin_stage()
        for i, name in enumerate(self._names):
            if name in state["buffers"]:
                self._kept[i].copy_(state["buffers"][name])
                self._versions[i] = -1
        self._spoilt, self._counted = state.get("spoilt", False), state.get("counted", False)
        self._suspects = {name: list(window) for name, window in state.get("losses", {}).items()}

    def _bad_ids(self, name: str, ids: Callable[[], list[str]]) -> list[str]:
        """Return the ids, of all ranks, of the batches whose loss is not finite, or of all."""
        window = self._suspects.get(name) or [(ids(), torch.zeros(()))]
        bad = [each for each, loss in window if not math.isfinite(loss.item())]  # Rare; syncs.
        own = list(chain(*(bad or [each for each, _ in window])))
        return list(chain(*distributed.all_gather_json(own)))

    def _count(self, name: str, norm: float | None, ids: list[str], hint: str) -> None:
        progress = self._progress
        progress.nonfinite_count += 1
        if progress.nonfinite_count <= self.patience:
            return
        self.roll_back()
        raise NonFiniteError(
            f"Loss or gradients were not finite {progress.nonfinite_count} times in epoch "
            f"{progress.epoch} (nonfinite_patience is {self.patience}); the last time at step "
            f"{progress.step}, optimizer {name!r}, batch {', '.join(ids) or 'without ids'}. "
            f"Its last finite gradient norm was {'never seen' if norm is None else f'{norm:.4g}'}. "
            "None of these steps touched the weights, which are finite. "
            f"{hint or ADVICE}. A lower learning rate, a lower max_grad_norm or precision fp32 "
            "are the usual cures."
        )

    def _changed(self) -> list[int]:
        """Return the indices of buffers that were changed in place or exchanged."""
        return [
            i
            for i, (buffers, name) in enumerate(self._places)
            if self._silent[i]
            or (buffer := buffers[name]) is not self._seen[i]
            or buffer._version != self._versions[i]
        ]
