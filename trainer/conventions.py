"""Conventions that a recipe counts on: those of the toolkit that it was written for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any


class Conventions:
    """Conventions of this framework; a subclass in `trainer.compat` has those of another toolkit.

    `trainer.defaults` makes those of a Brain.

    Attributes:
        whole: every rank evaluates all data, since the recipe's metrics are those of one process.
        measures: a recipe without an optimizer measures in place of training.
    """

    whole = False
    measures = False

    def checkpointer(self, checkpointer: Any, hparams: SimpleNamespace) -> Any:
        """Return the checkpointer of a run, for what a Brain was given as one."""
        return checkpointer

    def make_loader(
        self,
        make: Callable[..., Any],
        dataset: Any,
        train: bool,
        options: Mapping[str, Any],
    ) -> Any:
        """Return a loader of a dataset.

        Args:
            make: makes it of the dataset and options, such as `trainer.data.make_loader`.
            dataset: the dataset.
            train: True for a loader of training data.
            options: options of the loader that the recipe gives.
        """
        return make(dataset, **options)

    def step_without_gradients(self, error: ValueError) -> None:
        """Raise the error of a step for which no parameter has a gradient, unless it is allowed."""
        raise error
