"""What a subclass of `Brain` may say of its own: the stages, and a hook for each moment of a run.

The names and arguments are the ones that users of SpeechBrain's ``Brain`` know.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.options import RunOptions


class Stage(enum.Enum):
    """What a pass over data is for."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


class Hooks:
    """Every overridable moment of a `Brain`, with what happens when it is not overridden.

    ``compute_forward`` and ``compute_objectives`` are the two that a usual recipe must write.
    """

    modules: torch.nn.ModuleDict
    hparams: SimpleNamespace
    options: RunOptions
    opt_class: Any
    optimizer: torch.optim.Optimizer
    optimizers_dict: dict[str, torch.optim.Optimizer]
    checkpointer: Any

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        """Predictions from a batch, under autocast where precision is mixed."""
        raise NotImplementedError(
            f"{type(self).__name__} has no compute_forward(batch, stage), "
            "which the default fit_batch and evaluate_batch call"
        )

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Tensor:
        """The loss: a scalar, the mean over what `count_examples` counts."""
        raise NotImplementedError(
            f"{type(self).__name__} has no compute_objectives(predictions, batch, stage), "
            "which the default fit_batch and evaluate_batch call"
        )

    def init_optimizers(self) -> None:
        """Make the optimizers: by default ``opt_class`` over all parameters of ``modules``.

        An override sets ``self.optimizer``, or ``self.optimizers_dict`` with a name for each.
        """
        if self.opt_class is not None:
            self.optimizer = self.opt_class(self.modules.parameters())

    def freeze_optimizers(
        self, optimizers: dict[str, torch.optim.Optimizer]
    ) -> dict[str, torch.optim.Optimizer]:
        """Those of the optimizers that step now; the others collect no gradients.

        Asked at the start of every accumulation window.
        """
        return optimizers

    def on_fit_start(self) -> None:
        """Before the first epoch, after the last checkpoint was restored.

        In a resumed run, numbers and stateful objects are as they were saved once it has run,
        whatever it does to them. What it does to weights and optimizers stays.
        """

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        """Before each pass over data; the place to make metrics anew.

        It runs again when a run resumes in the middle of a pass. Then everything is as it was saved
        once it has run: nothing is done a second time. An object with a state that is to outlive
        the pass is made before, in the constructor or in `on_fit_start`.
        """

    def on_stage_end(
        self, stage: Stage, stage_loss: Any, epoch: int | None = None
    ) -> Mapping[str, float] | None:
        """After each pass, on every rank. Metrics that it returns, ``{"wer": 3.2}``, are logged,
        choose checkpoints, drive schedules and stop early.

        ``stage_loss`` is the average over examples: a float, or a dict if the losses are one.
        """

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        """Before each training batch; ``should_step`` when it closes an accumulation window."""

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        """After each training batch."""

    def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
        """Before `evaluate`, with the weights that it uses in place."""

    def count_examples(self, batch: Any) -> float:
        """How much a batch weighs in averages and windows: what its loss is a mean over.

        By default its number of examples: the first dimension of the first tensor in a tensor,
        list, tuple or mapping; the length of a list of mappings, and of anything else.
        """
        return float(_count(batch))

    def batch_ids(self, batch: Any) -> list[str]:
        """Names of the examples for messages: by default the batch's ``id``, where it has one."""
        ids = batch.get("id", []) if isinstance(batch, Mapping) else getattr(batch, "id", [])
        return [str(each) for each in ids] if isinstance(ids, (list, tuple)) else [str(ids)]


def _count(batch: Any) -> int:
    tensor = _first_tensor(batch)
    if tensor is not None:
        return tensor.shape[0]
    if isinstance(batch, Mapping):
        return next((len(part) for part in batch.values() if isinstance(part, (list, tuple))), 1)
    return len(batch) if hasattr(batch, "__len__") and not isinstance(batch, (Tensor, str)) else 1


def _first_tensor(batch: Any) -> Tensor | None:
    """The first one that has dimensions."""
    if isinstance(batch, Tensor):
        return batch if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)) or any(isinstance(part, Mapping) for part in batch):
        return None  # Examples that nobody has joined, for one.
    return next((t for part in batch if (t := _first_tensor(part)) is not None), None)
