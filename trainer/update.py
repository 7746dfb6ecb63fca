"""An `Update` owns one optimizer and what belongs to it: scaler, clipper, schedule, open window.

`trainer.step` takes a loss through it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.clipping import Clipper, Gradients
from trainer.report import Outcome, StepReport


@dataclass(slots=True)
class Window:
    """An accumulation window: what its backward passes have left in the gradients.

    Gradients and loss are sums of w_i/w_1 · (·)_i over its batches i of weight w_i, so that the
    first batch enters as it is and half precision sees its usual range.
    """

    count: int = 0
    weight: float = 0.0
    reference: float = 1.0
    loss: Tensor | None = None


class Update:
    """One optimizer, from loss to step.

    Args:
        name: what `Brain.optimize` calls it.
        optimizer: any torch optimizer.
        scaler: a loss scaler of its own, disabled except for fp16.
        clip: called with the measured `Gradients` of every finite step.
        schedule: a torch LRScheduler, or None for a constant rate.
        window: how many batches make a step (gradient accumulation).
        skip_nonfinite_grads: freeze, for one step, the parameters whose gradient is not finite
            instead of skipping the step. Ignored (with a warning) under an enabled scaler.
        alone: whether no parameter outside of this optimizer could collect gradients; if not,
            backward is told which are meant, so that one player's loss never reaches the other.
    """

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip: Clipper,
        schedule: Any = None,
        window: int = 1,
        skip_nonfinite_grads: bool = False,
        alone: bool = False,
    ) -> None:
        if skip_nonfinite_grads and scaler.is_enabled():
            warnings.warn(
                "skip_nonfinite_grads is ignored under precision fp16: there, a gradient that is "
                "not finite is how the scaler learns that its scale is too high",
                stacklevel=2,
            )
            skip_nonfinite_grads = False
        self.name, self.optimizer, self.scaler = name, optimizer, scaler
        self.clip, self.schedule, self.size = clip, schedule, window
        self.skip_nonfinite_grads, self.alone = skip_nonfinite_grads, alone
        self.elementwise = bool(getattr(clip, "elementwise", False))
        self.window = Window()
        self.last_norm: float | None = None
        self.stepping = False

    @property
    def params(self) -> list[Tensor]:
        """The parameters that can move now."""
        return [
            p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad
        ]

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def add(self, loss: Tensor, weight: float, reference: float) -> None:
        """Count a batch whose backward pass is done."""
        window = self.window
        if not window.weight:
            window.reference = reference or 1.0
            window.loss = loss if weight else torch.zeros_like(loss)
        elif weight:
            assert window.loss is not None
            window.loss = window.loss + loss * (weight / window.reference)
        window.count += 1
        window.weight += weight

    def drop(self) -> None:
        """Forget the window and its gradients."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        self.window = Window()

    def step(self, gradients: Gradients, loss: float, weight: float, scale: float) -> StepReport:
        """Clip and step with finite gradients, then move the schedule on."""
        clipped = self.clip(gradients)
        lr = self.lr
        self.stepping = True
        self.optimizer.step()
        self.stepping = False
        if self.schedule is not None and getattr(self.schedule, "every", None) == "step":
            self.schedule.step()
        for p in gradients.params:
            p.grad = None
        self.window = Window()
        self.last_norm = norm = gradients.norm
        return StepReport(
            self.name,
            "stepped",
            loss,
            weight,
            norm,
            gradients.norm_after,
            self.clip.limit,
            clipped,
            scale,
            lr,
        )

    def report(self, outcome: Outcome, **facts: Any) -> StepReport:
        """What to say of a loss that did not move the weights."""
        return StepReport(self.name, outcome, limit=self.clip.limit, lr=self.lr, **facts)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, schedule, scaler and clipper; the same on every rank."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        for name in ("schedule", "clip"):
            part = getattr(self, name)
            state[name] = part.state_dict() if hasattr(part, "state_dict") else {}
        return {**state, "last_norm": self.last_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # Empty if the run was not in fp16 until now: the scaler starts anew.
            self.scaler.load_state_dict(state["scaler"])
        for name in ("schedule", "clip"):
            part = getattr(self, name)
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(state[name])
        self.last_norm = state["last_norm"]

    def window_state(self) -> dict[str, Any]:
        """The open window with its gradients; each rank has its own."""
        w = self.window
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        return {
            "count": w.count, "weight": w.weight, "reference": w.reference,
            "loss": None if w.loss is None else w.loss.detach().clone(),
            "grads": grads if w.count else [],
        }  # fmt: skip

    def load_window_state(self, state: dict[str, Any]) -> None:
        """Reopen a saved window."""
        self.drop()
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if state["count"]:
            for p, grad in zip(params, state["grads"], strict=True):
                p.grad = None if grad is None else grad.to(p.device)
        device = params[0].device
        loss = None if state["loss"] is None else state["loss"].to(device)
        self.window = Window(state["count"], state["weight"], state["reference"], loss)
