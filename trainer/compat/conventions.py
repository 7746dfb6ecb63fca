"""SpeechBrain's conventions, for its recipes and its objects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.compat import toolkit
from trainer.conventions import Conventions


class SpeechBrainConventions(Conventions):
    """Conventions of SpeechBrain.

    Datasets and checkpointers of SpeechBrain are supported in any recipe. The other conventions
    apply only to a recipe that was written for SpeechBrain.

    Args:
        kind: class of the recipe's Brain.
    """

    def __init__(self, kind: type) -> None:
        self.whole = self.measures = toolkit.written_for_it(kind)
        toolkit.check_lengths()
        if self.whole:
            toolkit.warn_of_uncalled(kind)

    def checkpointer(self, checkpointer: Any, hparams: SimpleNamespace) -> Any:
        """Return a `Checkpointer` of this package, converted from SpeechBrain's if necessary."""
        if not toolkit.is_theirs(checkpointer):
            return checkpointer
        ours = Checkpointer(
            checkpointer.checkpoints_dir, allow_partial_load=checkpointer.allow_partial_load
        )
        for name, obj in checkpointer.recoverables.items():
            ours.add_recoverable(
                name,
                obj,
                checkpointer.custom_load_hooks.get(name),
                checkpointer.custom_save_hooks.get(name),
                checkpointer.optional_recoverables.get(name, False),
            )
        for name, value in vars(hparams).items():
            if value is checkpointer:
                setattr(hparams, name, ours)
        return ours

    def make_loader(
        self, make: Callable[..., Any], dataset: Any, train: bool, options: Mapping[str, Any]
    ) -> Any:
        """Return a loader with SpeechBrain's defaults for its recipes and datasets.

        SpeechBrain's datasets give its own batches, with lengths relative to the longest item. Its
        recipes get training items in the dataset's order, which they may have sorted, unless an
        option sets another order. The option ``looped_nominal_epoch`` is the number of batches in
        an epoch of a loader that starts over at its end.

        Raises:
            ValueError: ``looped_nominal_epoch`` is given, and SpeechBrain is not imported.
        """
        options = dict(options)
        looped = options.pop("looped_nominal_epoch", None)
        of_theirs = toolkit.is_theirs(dataset) or toolkit.is_theirs(  # Also a Subset of one.
            getattr(dataset, "dataset", None)
        )
        batches = sys.modules.get(f"{toolkit.PACKAGE}.dataio.batch")
        if of_theirs and batches is not None and options.get("collate_fn") is None:
            options["collate_fn"] = batches.PaddedBatch
        orders = ("shuffle", "sampler", "batch_sampler")
        ordered = any(options.get(name) is not None for name in orders)
        if train and (of_theirs or self.measures) and not ordered:
            options["shuffle"] = False
            toolkit.warn_once(
                f"the training data keep the order of their {type(dataset).__name__}, as in "
                "SpeechBrain; the loader option shuffle: true gives another order in each epoch"
            )
        loader = make(dataset, **options)
        if looped is None:
            return loader
        dataloader = sys.modules.get(f"{toolkit.PACKAGE}.dataio.dataloader")
        if dataloader is None:
            raise ValueError(
                "the loader option looped_nominal_epoch is one of SpeechBrain's, which this "
                "program has not imported: give an iterable of as many batches"
            )
        return dataloader.LoopedLoader(loader, looped)

    def step_without_gradients(self, error: ValueError) -> None:
        """Warn once in a SpeechBrain recipe, where such a step is allowed; raise in others."""
        if not self.measures:
            raise error
        toolkit.warn_once(str(error))
