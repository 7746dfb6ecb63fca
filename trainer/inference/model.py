"""Base class of trained models; imports no training loop.

class Spotter(trainer.Model):
    best_checkpoint = {"max_key": "acc"}

    def classify(self, samples): ...

model = trainer.load("results/spotter/1", model=Spotter, allow=["spotter"])
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import nn

from trainer.adapters import apply_adapters
from trainer.devices import pick_device, prepare_modules
from trainer.optim.precision import Precision
from trainer.options import RunOptions

logger = logging.getLogger("trainer")

# Methods of recipes' models, one for each task.
TASKS = ("transcribe", "enhance", "separate", "vocode", "synthesise", "classify", "embed")


class Model:
    """Trained model: networks in evaluation mode, and the methods of its task.

    `trainer.load` makes one from a run folder. Recipes subclass it, and name their class in
    ``MODEL`` of their package.

    Args:
        modules: networks by name; their weights are loaded after the constructor.
        hparams: values and objects of the run's YAML, without those only for training.
        options: device and precision.

    Attributes:
        modules: the networks, an ``nn.ModuleDict`` on ``device``.
        hparams: the hyperparameters, a namespace.
        device: device of the networks.
        folder: the run folder; None for a model that `trainer.load` did not make.
        uses: class attribute: names of the modules to build and load, such as ``("generator",)``;
            empty for all.
        units: class attribute: units of metrics by name for the model card, such as
            ``{"wer": "%"}``; metrics without a unit are left out.

    Raises:
        ValueError: for a device or module that cannot be used.
    """

    uses: ClassVar[Sequence[str]] = ()
    units: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, modules: Mapping[str, nn.Module], hparams: Mapping[str, Any], options: RunOptions
    ) -> None:
        self.folder: Path | None = None
        self.hparams = SimpleNamespace(**hparams)
        self.device = pick_device(options.device)
        self.modules = prepare_modules(modules, options, self.device)
        apply_adapters(self.modules, hparams.get("adapters"))
        name = options.eval_precision or options.precision
        try:
            self._precision = Precision(name, self.device)
        except ValueError:
            logger.warning("%s does not compute in %s: fp32 is used", self.device, name)
            self._precision = Precision("fp32", self.device)

    @property
    def best_checkpoint(self) -> Mapping[str, str | None]:
        """Metric that chooses the checkpoint, such as ``{"min_key": "wer"}``; empty for the newest.

        Subclasses override it by a property or a class attribute.
        """
        return {}

    def prepare(self) -> None:
        """Compute objects that depend on the weights; called once these are loaded."""

    def autocast(self) -> AbstractContextManager[object]:
        """Return torch's autocast context manager for the evaluation precision of the run."""
        return self._precision.autocast()

    @classmethod
    def tasks(cls) -> list[str]:
        """Return the task methods that the class has, such as ``["transcribe"]``."""
        return [name for name in TASKS if callable(getattr(cls, name, None))]

    def __getattr__(self, name: str) -> Any:
        if name in TASKS:
            tasks = " and ".join(self.tasks()) or "none of these methods"
            raise AttributeError(f"{type(self).__name__} cannot {name}: it has {tasks}")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.modules.parameters())
        tasks = ", ".join(self.tasks()) or "no task"
        precision = self._precision.name
        return f"{type(self).__name__}({tasks}; {count:,} parameters, {precision}, {self.device})"
