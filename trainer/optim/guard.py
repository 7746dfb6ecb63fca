"""Losses and gradients that are not finite: how many are borne, and what they must not leave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

UNKNOWN = "To find the operation, run that batch under torch.autograd.detect_anomaly()"


class NonFiniteError(RuntimeError):
    """Too many steps of one epoch had a loss or gradient that was NaN or infinite."""


class Patience:
    """Counts the skipped steps of an epoch, and ends the run after more than ``limit`` of them.

    The weights are the last finite ones whenever it raises: a skipped step moves nothing.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"nonfinite_patience is {limit}; allowed: 0 and above")
        self.limit = limit
        self.count = 0

    def reset(self) -> None:
        """A new epoch begins."""
        self.count = 0

    def spend(
        self,
        name: str,
        norm: float | None,
        epoch: int | None,
        step: int,
        ids: list[str],
        hint: str = "",
    ) -> None:
        """One more skipped step of the optimizer ``name``, whose last finite norm was ``norm``.

        ``hint`` says where more is known of it.

        Raises NonFiniteError at ``limit`` + 1.
        """
        self.count += 1
        if self.count <= self.limit:
            return
        raise NonFiniteError(
            f"Loss or gradients were not finite {self.count} times in epoch {epoch} "
            f"(nonfinite_patience is {self.limit}); the last time at step {step}, "
            f"optimizer {name!r}, batch {', '.join(ids) or 'without ids'}. "
            f"Its last finite gradient norm was {'never seen' if norm is None else f'{norm:.4g}'}. "
            "None of these steps touched the weights, which are finite. "
            f"{hint or UNKNOWN}. A lower learning rate, a lower max_grad_norm or precision fp32 "
            "are the usual cures."
        )

    def state_dict(self) -> dict[str, Any]:
        """The count of the running epoch."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a saved state."""
        self.count = state["count"]


class Statistics:
    """The buffers that forward passes change, such as the running means of a batch norm.

    A NaN in an input is in them before any loss tells of it, and it never leaves: `put_back` makes
    them what they were at the last `keep`. Only those that have changed since are copied.
    """

    def __init__(self, modules: nn.Module) -> None:
        self._modules = modules
        self.begin()

    def begin(self) -> None:
        """Look for the buffers (anew: modules may have been exchanged), and keep them."""
        found = [
            (f"{path}.{name}", module, name, buffer)
            for path, module in self._modules.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._names = [full_name for full_name, *_ in found]
        self._places = [(module._buffers, name) for _, module, name, _ in found]
        # torch's own norms change theirs without counting it as a new version.
        self._silent = [isinstance(module, _NormBase) for _, module, *_ in found]
        self._seen: list[Tensor] = [buffer for *_, buffer in found]
        self._versions = [buffer._version for buffer in self._seen]
        self._kept = [buffer.detach().clone() for buffer in self._seen]

    def keep(self) -> None:
        """The buffers are as they should be."""
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

    def put_back(self) -> None:
        """Undo what happened to the buffers since `keep`."""
        for i in self._changed():
            buffers, name = self._places[i]
            buffers[name] = self._seen[i]
            self._seen[i].detach().copy_(self._kept[i])
            self._versions[i] = self._seen[i]._version

    def state_dict(self) -> dict[str, Tensor]:
        """What the changed ones were."""
        return {self._names[i]: self._kept[i] for i in self._changed()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state: some of the buffers have changed since `keep`."""
        for i, name in enumerate(self._names):
            if name in state:
                self._kept[i].copy_(state[name])
                self._versions[i] = -1

    def _changed(self) -> list[int]:
        """Which have been computed in place, or exchanged for another tensor."""
        return [
            i
            for i, (buffers, name) in enumerate(self._places)
            if self._silent[i]
            or (buffer := buffers[name]) is not self._seen[i]
            or buffer._version != self._versions[i]
        ]
