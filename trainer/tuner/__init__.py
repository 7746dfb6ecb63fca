"""Searches for the clip limit and the learning rate of each optimizer, instead of training.

    python train.py demo.yaml --find_clip
    python train.py demo.yaml --find_lr --find_clip

Searches work with any recipe, unchanged. The first `fit` runs short trials on the recipe's own
data, each from the state of a new run, and ends the program with a recommendation for each
optimizer, and a page and a JSON file in the run folder. The trials leave nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainer import distributed, signals
from trainer.defaults import DriverFinished
from trainer.metrics import StepReport
from trainer.tuner.clip_limit import ClipSuggestion, find_limit
from trainer.tuner.learning_rate import RateSuggestion, range_test
from trainer.tuner.report import Suggestions, write_findings
from trainer.tuner.trial import TrialRunner

if TYPE_CHECKING:
    from trainer.brain import Brain, FitArguments

__all__ = ["ClipSuggestion", "RateSuggestion", "SearchOver", "search"]

logger = logging.getLogger("trainer")

ADVERSARIAL = (
    "The losses of networks that train against each other show which limits fail, but not which is "
    "best: trust the percentiles more than the order."
)
INTERACTION = (
    "Clip limit and learning rate act together: each was searched at the other's present value. "
    "After changing one, search the other again; --find_lr --find_clip searches the limit at the "
    "rate that it finds."
)


class SearchOver(DriverFinished):
    """End of a search, with suggestions by option ("find_clip", "find_lr") and optimizer."""

    def __init__(self, findings: dict[str, Suggestions]) -> None:
        super().__init__()
        self.findings = findings


def search(brain: Brain, arguments: FitArguments) -> NoReturn:
    """Run the searches of the run options, print and write the results. Collective.

    This is the driver of `Brain.fit` under ``--find_lr`` and ``--find_clip``. The state of the
    Brain is restored.

    Raises:
        SearchOver: when done.
        ValueError: if an epoch has too few batches for a trial, or if no optimizer steps through
            `Brain.optimize`.
    """
    findings: dict[str, Suggestions] = {}
    ratios: dict[str, float] = {}
    reports: list[StepReport] = []
    with signals.at_safe_points(), brain.sandbox(on_loss=reports.append):
        runner = TrialRunner(brain, brain.start_training(arguments), reports)
        names = runner.optimizers()
        if brain.options.find_lr:
            findings["find_lr"] = rates = {name: range_test(runner, name) for name in names}
            ratios = {name: each.ratio for name, each in rates.items()}
        if brain.options.find_clip:
            findings["find_clip"] = {name: find_limit(runner, name, ratios) for name in names}
        if distributed.is_main():
            _report(brain, findings)
    raise SearchOver(findings)


def _report(brain: Brain, findings: Mapping[str, Suggestions]) -> None:
    """Print the suggestions, also as options for the command line, and write the files."""
    several = len(brain.updates) > 1
    for kind, found in findings.items():
        # For the option max_grad_norm; without a suggestion, the recipe's own limit.
        limits = {}
        for name, each in found.items():
            print(f"{kind}: {f'{name}: ' if several else ''}{each.sentence()}", flush=True)
            if isinstance(each, ClipSuggestion) and each.kind in ("NormClip", "ValueClip"):
                limits[name] = brain.updates[name].clip.limit if each.limit is None else each.limit
        if len(limits) == len(found):
            values = ", ".join(f"{name}: {limit:g}" for name, limit in limits.items())
            setting = f"'{{{values}}}'" if len(limits) > 1 else values.partition(": ")[2]
            print(f"{kind}: --max_grad_norm {setting}", flush=True)
    notes = [ADVERSARIAL, INTERACTION] if several else [INTERACTION]
    print(*notes, sep="\n", flush=True)
    options = brain.options
    if options.output_folder is not None and not options.debug:
        folder = Path(options.output_folder)
        try:
            for path in write_findings(folder, findings, notes, options.find_steps):
                logger.info("written: %s", path)
        except OSError as error:  # A full disk; the results are on the screen.
            logger.warning("the files of the search are not complete: %s", error)
