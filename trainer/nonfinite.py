"""Patience with losses and gradients that are not finite: how many, and what is said then."""

from __future__ import annotations

from typing import Any


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
        self, name: str, norm: float | None, epoch: int | None, step: int, ids: list[str]
    ) -> None:
        """One more skipped step of the optimizer ``name``, whose last finite norm was ``norm``.

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
            "None of these steps touched the weights, which are finite. To find the operation, run "
            "that batch under torch.autograd.detect_anomaly(); a lower learning rate, a lower "
            "max_grad_norm or precision fp32 are the usual cures."
        )

    def state_dict(self) -> dict[str, Any]:
        """The count of the running epoch."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a saved state."""
        self.count = state["count"]
