"""Attributes that SpeechBrain's `Brain` has, for recipes that use them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.optim.precision import Precision
from trainer.optim.step import Update
from trainer.options import RunOptions
from trainer.progress import Progress, Stage

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")

# Run options that SpeechBrain's recipes read as attributes of their Brain.
OPTIONS = (
    "precision", "eval_precision", "max_grad_norm", "grad_accumulation_factor", "debug",
    "debug_batches", "debug_epochs", "nonfinite_patience", "skip_nonfinite_grads",
    "optimizer_step_limit", "test_only", "profile_training",
)  # fmt: skip

# Options that take effect when a Brain is made, with the types of values that a recipe cannot set
# later, since they may be meant as the option. Other values, such as a metric, are its own.
SETTINGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("max_grad_norm", "grad_accumulation_factor", "nonfinite_patience", "skip_nonfinite_grads"),
        (str, Real, type(None)),
    ),
    "precision": (str,),
}


class SpeechBrainNames:
    """Mixin of `Brain`: counters, options and helpers under SpeechBrain's names.

    A recipe may set most of these names; they are then attributes of its own.
    """

    device: torch.device
    modules: nn.ModuleDict
    options: RunOptions
    progress: Progress
    updates: dict[str, Update]
    optimizers_dict: Any = None
    __added_steps = (0, 0)  # An epoch, and the steps that a recipe has added in it.

    if not TYPE_CHECKING:  # mypy is to refuse these names

        def __getattr__(self, name: str) -> Any:
            """Return the value of a SpeechBrain name; called for attributes that are not set."""
            if name == "last_batch":
                return self.is_last_batch
            if "options" in vars(self):  # Not before the constructor has run.
                if name in OPTIONS:
                    return getattr(self.options, name)
                if name in READ:
                    return READ[name](self)
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=self)

    @property
    def epoch(self) -> Any:
        """Current epoch, as the epoch counter numbers it, until a recipe sets its own."""
        return vars(self).get("epoch", self.progress.epoch)

    @epoch.setter
    def epoch(self, value: Any) -> None:
        vars(self)["epoch"] = value  # The loop uses `progress.epoch`.

    @epoch.deleter
    def epoch(self) -> None:
        del vars(self)["epoch"]

    @property
    def step(self) -> int:
        """Number of batches of the current epoch so far, plus what a recipe has added to it."""
        epoch, added = self.__added_steps
        return self.progress.step + (added if epoch == self.progress.epoch else 0)

    @step.setter
    def step(self, value: int) -> None:
        self.__added_steps = self.progress.epoch, value - self.progress.step

    @property
    def optimizer_step(self) -> int:
        """Number of optimizer steps since the run began."""
        return self.progress.optimizer_step

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        self.progress.optimizer_step, self.progress.counted_by_hand = value, True

    @property
    def nonfinite_count(self) -> int:
        """Number of skipped steps in the current epoch."""
        return self.progress.nonfinite_count

    @nonfinite_count.setter
    def nonfinite_count(self, value: int) -> None:
        self.progress.nonfinite_count = value

    @contextmanager
    def no_sync(self, use: bool = True) -> Iterator[None]:
        """Context manager that does nothing: ranks exchange gradients at steps only."""
        yield

    def check_loss_isfinite(self, loss: Tensor) -> None:
        """Count a loss that is not finite, for a `fit_batch` that steps by hand.

        Args:
            loss: a tensor of any shape; every element must be finite.

        Raises:
            ValueError: after more such losses in an epoch than ``nonfinite_patience``.
        """
        if not bool(torch.isfinite(loss).all()):
            self.nonfinite_count += 1
            if self.nonfinite_count > self.options.nonfinite_patience:
                raise ValueError(
                    f"{self.nonfinite_count} losses of epoch {self.epoch} were not finite, more "
                    f"than nonfinite_patience ({self.options.nonfinite_patience}) allows"
                )
            logger.warning("the loss of batch %d is not finite", self.step)

    def check_gradients(self) -> None:
        """Drop gradients that are not finite, for a `fit_batch` that steps by hand."""
        for name, parameter in self.modules.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                parameter.grad = None
                logger.warning("the gradient of %s is not finite and is left out", name)


def _average(brain: Brain) -> Any:
    """Return the average of this rank's training losses of the epoch so far; 0.0 before the first.

    Named losses give a mapping.
    """
    return brain.stateful()["metrics"].part.average.value() or 0.0


def _scaler(brain: Brain) -> torch.amp.GradScaler:
    """Return the loss scaler of the first optimizer, which is disabled except for fp16."""
    first = next(iter(brain.updates.values()), None)
    return first.scaler if first else Precision(brain.options.precision, brain.device).scaler()


# Attributes that are computed when they are read, as functions of the Brain.
READ: dict[str, Callable[[Brain], Any]] = {
    "training_ctx": lambda brain: brain.autocast(Stage.TRAIN),
    "evaluation_ctx": lambda brain: brain.autocast(Stage.VALID),
    "scaler": _scaler,
    "avg_train_loss": _average,
    "noprogressbar": lambda brain: not brain.options.progressbar,
    "distributed_launch": lambda brain: distributed.world_size() > 1,
    "train_sampler": lambda brain: None,
    "raw_modules": lambda brain: brain.modules,
    "rank": lambda brain: distributed.rank(),
}
