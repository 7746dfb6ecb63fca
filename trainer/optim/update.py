"""An `Update` owns one optimizer and what belongs to it: scaler, clipper, schedule, open window.

`trainer.optim.step` takes a loss through it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.clipping import Clipper, Gradients
from trainer.metrics import Outcome, StepReport

# What an `Update` saves beside its scaler, in the order in which it is restored.
PARTS = ("optimizer", "schedule", "clip")


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


class Look(Protocol):
    """Something that measures at a step of an optimizer.

    ``waiting`` is a vector of what it has measured, on the device, or None; the next transfer to
    the host brings it to `take`.
    """

    waiting: Tensor | None

    def before(self) -> None:
        """The optimizer is about to step."""

    def after(self, gradients: Gradients) -> None:
        """The optimizer has stepped with these."""

    def take(self, values: Sequence[float]) -> None:
        """The numbers of ``waiting``."""


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
        self.window = Window()
        self.sparse: set[Tensor] = set()  # Whose gradients may be in sparse layout.
        self.last_norm: float | None = None
        # Parameters and their gradients' norms, as last measured.
        self.seen: tuple[list[Tensor], list[float]] = [], []
        self.look: Look | None = None
        self.stepping = self._told = False

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

    def open(self) -> None:
        """Begin a window, if none is open: what is in the gradients by now is not of it."""
        if self.window.count:
            return
        foreign = False
        for p in self._all_params():
            if p.grad is not None:
                p.grad, foreign = None, True
        if foreign and not self._told:
            self._told = True
            warnings.warn(
                f"the parameters of the optimizer {self.name!r} had gradients that no optimize() "
                "made (a backward() by hand, perhaps of another player's loss): they are dropped",
                stacklevel=6,
            )

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
        for p in self._all_params():
            p.grad = None
        self.window = Window()

    def step(self, gradients: Gradients, loss: float, weight: float, scale: float) -> StepReport:
        """Clip and step with finite gradients, then move the schedule on."""
        clipped = self.clip(gradients)
        lr, look = self.lr, self.look
        if look is not None:
            look.before()
        self.stepping = True
        self.optimizer.step()
        self.stepping = False
        if look is not None:
            look.after(gradients)
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
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        kinds = {name: type(part).__name__ for name, part in self._parts().items()}
        scaler = self.scaler.state_dict()
        return {**parts, "kinds": kinds, "scaler": scaler, "last_norm": self.last_norm}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where a saved state is that of another optimizer or schedule."""
        kinds = {name: type(part).__name__ for name, part in self._parts().items()}
        for name in PARTS:
            saved, own = state["kinds"].get(name, "none"), kinds.get(name, "none")
            if saved != own:
                raise ValueError(
                    f"the saved {name} of the optimizer {self.name!r} is {saved}, this Brain's is "
                    f"{own}: the checkpoint was made with other settings"
                )
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        saved_sizes = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        if sizes != saved_sizes:
            raise ValueError(
                f"the saved optimizer {self.name!r} has groups of {saved_sizes} parameters, this "
                f"Brain's of {sizes}: the checkpoint was made with other settings"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        if state["scaler"]:  # Empty if the run was not in fp16 until now: the scaler starts anew.
            self.scaler.load_state_dict(state["scaler"])
        self.last_norm = state["last_norm"]

    def _parts(self) -> dict[str, Any]:
        """What has a state, the optimizer first: a schedule changes its learning rate."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in parts.items() if hasattr(part, "load_state_dict")}

    def window_state(self) -> dict[str, Any]:
        """The open window with its gradients; each rank has its own."""
        w = self.window
        return {
            "count": w.count, "weight": w.weight, "reference": w.reference,
            "loss": None if w.loss is None else w.loss.detach().clone(),
            "grads": [p.grad for p in self._all_params()],  # Without a window: a recipe's own.
            "scale": float(self.scaler.get_scale()),
        }  # fmt: skip

    def load_window_state(self, state: dict[str, Any]) -> None:
        """Reopen a saved window, under the loss scale of now."""
        self.drop()
        params = self._all_params()
        self.scaler.scale(torch.ones((), device=params[0].device))  # It wakes up at its first use.
        factor = float(self.scaler.get_scale()) / state["scale"] if state["count"] else 1.0
        for p, grad in zip(params, state["grads"], strict=True):
            if grad is not None:
                p.grad = grad.to(p.device) if factor == 1.0 else grad.to(p.device) * factor
        loss = None if state["loss"] is None else state["loss"].to(params[0].device)
        self.window = Window(state["count"], state["weight"], state["reference"], loss)

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]
