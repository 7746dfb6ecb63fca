"""One training of the study: a Brain as any other, and what is kept of how it went."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recipes.clipping_study.tasks import Batches
from trainer import Brain, NonFiniteError, Stage, StepReport

CURVE = 50  # points that are kept of a curve


class Learner(Brain):
    """Learns to name classes; ``reports`` has what became of each of its steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reports: list[StepReport] = []

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        logits: Tensor = self.modules.model(batch[0])
        return logits

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return cross_entropy(predictions.float().flatten(0, -2), batch[1].flatten())

    def fit_batch(self, batch: Any) -> StepReport:
        report: StepReport = super().fit_batch(batch)
        self.reports.append(report)
        return report


@dataclass
class Lesson:
    """Record of a training: a loss and a norm for each step, the clipped steps, and the end.

    ``loss`` and ``accuracy`` are of data that was not trained on; infinity and 0 where the training
    was given up, since too many steps were not finite.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clipped: list[bool] = field(default_factory=list)
    skipped: int = 0
    overflowed: int = 0
    loss: float = math.inf
    accuracy: float = 0.0

    def curve(self) -> list[float]:
        """The losses as at most `CURVE` means."""
        return shortened(self.losses)

    def facts(self) -> dict[str, Any]:
        """Return the facts that every cell keeps."""
        norms = sorted(self.norms) or [math.nan]
        return {
            "loss": self.loss, "accuracy": self.accuracy, "skipped": self.skipped,
            "overflowed": self.overflowed, "steps": len(self.losses),
            "clipped": sum(self.clipped) / max(1, len(self.clipped)),
            "norm": norms[len(norms) // 2], "norm_max": norms[-1], "curve": self.curve(),
        }  # fmt: skip


def shortened(values: Sequence[float]) -> list[float]:
    """Means over equal stretches."""
    number = min(CURVE, len(values))
    edges = [round(i * len(values) / number) for i in range(number + 1)] if number else [0]
    return [
        sum(values[low:high]) / (high - low) for low, high in zip(edges, edges[1:], strict=False)
    ]


def learn(
    model: nn.Module,
    train: Batches,
    valid: Batches,
    optimizer: Callable[..., Any],
    clip: Any = None,
    schedule: Any = None,
    **options: Any,
) -> Lesson:
    """Train on each batch once, in their order, and measure on ``valid``."""
    hparams = {"clip": clip, "schedule": schedule}
    options = {"device": "cpu", "progressbar": False, "monitor_every": 0, **options}
    brain = Learner({"model": model}, optimizer, hparams, options)
    lesson = Lesson()
    try:
        brain.fit([1], train)
        lesson.loss, lesson.accuracy = _measured(model, valid)
    except NonFiniteError:
        lesson.skipped += 1  # The one too many, of which there is no report.
    for report in brain.reports:
        lesson.skipped += report.outcome == "skipped"
        lesson.overflowed += report.outcome == "overflowed"
        if report.stepped and report.loss is not None and report.norm is not None:
            lesson.losses.append(report.loss)
            lesson.norms.append(report.norm)
            lesson.clipped.append(report.clipped)
    return lesson


@torch.no_grad()
def _measured(model: nn.Module, valid: Batches) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    logits = torch.cat([model(inputs).flatten(0, -2) for inputs, _ in valid])
    targets = torch.cat([targets.flatten() for _, targets in valid])
    loss = float(cross_entropy(logits, targets))
    accuracy = float((logits.argmax(-1) == targets).double().mean())
    return (loss if math.isfinite(loss) else math.inf), accuracy


SGD = partial(torch.optim.SGD, momentum=0.9)
ADAM = torch.optim.Adam
