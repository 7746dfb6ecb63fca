"""Conventions of the toolkit that a recipe was written for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any


class Conventions:
    """Conventions of this framework; a subclass in `trainer.compat` has those of SpeechBrain.

    `trainer.defaults.make_conventions` chooses those of a Brain.

    Attributes:
        whole: every rank evaluates all data, since the recipe's metrics are not gathered.
        measures: `fit` accepts a Brain without an optimizer, as for k-means, and takes no steps.
    """

    whole = False
    measures = False

    def checkpointer(self, checkpointer: Any, hparams: SimpleNamespace) -> Any:
        """Return the checkpointer to use.

        Args:
            checkpointer: the checkpointer that the Brain was given.
            hparams: hyperparameters, which may have one, too.
        """
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
            make: function that makes the loader from the dataset and options.
            dataset: the dataset.
            train: True for a loader of training data.
            options: options of the loader that the recipe gives.
        """
        return make(dataset, **options)

    def step_without_gradients(self, error: ValueError) -> None:
        """Raise the error of a step for which no parameter has a gradient; a subclass may warn."""
        raise error
