"""Searches in the place of a training: which clip limit, which learning rate.

    python recipes/asr/train.py hparams/asr/demo.yaml --find_clip
    python recipes/asr/train.py hparams/asr/demo.yaml --find_lr --find_clip

Any recipe can be asked so, with a line in none: the first `fit` trains short trials on the recipe's
own data, all of them from one and the same state, and ends the program with a recommendation for
each optimizer, a page and a JSON in the run folder. Nothing is kept of what was trained.

`trials` runs a short training from a restored state, `limit` and `rate` decide what to try and what
to recommend, `page` shows it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from trainer import distributed
from trainer.data.feed import DataFeed
from trainer.tuner.course import Course
from trainer.tuner.limit import Advice, advise, find_limit
from trainer.tuner.page import write_findings
from trainer.tuner.rate import Suggestion, base_rates, rates_of_test, scaled, set_rates, suggest
from trainer.tuner.trials import Bench
from trainer.tuner.watched import Watched, like

logger = logging.getLogger("trainer")

OPTIONS = ("NormClip", "ValueClip")  # the kinds whose limit is the option max_grad_norm
AGAINST = (
    "The losses of players that train against each other do not say which limit is better, only "
    "which fail: trust the percentiles more than the order."
)
TOGETHER = (
    "Limit and learning rate act together: each was found at the other as it is. Change one, and "
    "look for the other again; --find_lr --find_clip looks for the limit at the rate that it finds."
)


class SearchOver(SystemExit):
    """What a `fit` that was a search ends with: there is nothing trained to go on with.

    A script that does not know it ends with exit code 0; ``findings`` has the recommendations of
    each search ("find_clip", "find_lr") by optimizer.
    """

    def __init__(self, findings: dict[str, dict[str, Any]]) -> None:
        super().__init__(0)
        self.findings = findings


def search(brain: Any, feed: DataFeed, epochs: Iterable[int]) -> SearchOver:
    """Do the searches that the options ask for; afterwards the Brain is as its training begins.

    Raises ValueError where an epoch has too few batches for a trial, or where no optimizer steps
    through `Brain.optimize`.
    """
    options = brain.options
    findings: dict[str, dict[str, Any]] = {}
    ratios: dict[str, float] = {}
    with Bench(brain, feed, epochs) as bench:
        names = bench.names()
        if options.find_lr:
            rates = {name: _rate(bench, name) for name in names}
            findings["find_lr"] = rates
            ratios = {name: each.ratio for name, each in rates.items()}
        if options.find_clip:
            findings["find_clip"] = {name: _limit(bench, name, ratios) for name in names}
    if distributed.is_main():
        _tell(brain, findings)
    return SearchOver(findings)


def _limit(bench: Bench, name: str, ratios: dict[str, float]) -> Advice:
    """Trials of one optimizer under limits, the others clipped as the recipe has it."""
    options, update = bench.brain.options, bench.brain.updates[name]
    make = like(update.clip)

    def trial(limit: float) -> Course:
        logger.info("find_clip: %s under limit %.3g", name, limit)
        clip = Watched(make(limit))
        with bench.clipping(name, clip):
            course = bench.run(name, options.find_steps, partial(scaled, bench.brain, ratios))
        course.norms = clip.seen
        return course

    courses = find_limit(trial, options.find_trials)
    with bench.restored():
        scaled(bench.brain, ratios, 0)
        rate = float(base_rates(update)[0])
    return advise(type(make(1.0)).__name__, courses, rate)


def _rate(bench: Bench, name: str) -> Suggestion:
    """One pass over all learning rates, beside one over the same batches in which nothing moves.

    Other optimizers rest in both: what they learn would hide what this one does.
    """
    brain, update = bench.brain, bench.brain.updates[name]
    steps = 2 * brain.options.find_steps
    rates = rates_of_test(steps)
    logger.info("find_lr: %s from %.3g to %.3g", name, rates[0], rates[-1])
    base, limit = base_rates(update), update.clip.limit

    def hold(rates: Sequence[float], step: int) -> None:
        for other in brain.updates.values():
            set_rates(other, [0.0] * len(other.optimizer.param_groups))
        rate = rates[min(step, len(rates) - 1)]
        set_rates(update, [rate * each / base[0] if base[0] else rate for each in base])

    with bench.constant_rates():
        still = bench.run(name, steps, partial(hold, [0.0]))
        course = bench.run(name, steps, partial(hold, rates), still.losses)
    return suggest(rates, still, course, base[0], limit)


def _tell(brain: Any, findings: dict[str, dict[str, Any]]) -> None:
    """What is recommended, in words and as settings for the command line; the page's place."""
    several = len(brain.updates) > 1
    notes = [*([AGAINST] if several else []), TOGETHER]
    for kind, found in findings.items():
        for name, each in found.items():
            print(f"{kind}: {f'{name}: ' if several else ''}{each.sentence()}", flush=True)
        if kind == "find_clip" and all(each.kind in OPTIONS for each in found.values()):
            own = {name: brain.updates[name].clip.limit for name in found}
            print(f"{kind}: {_option(found, own)}", flush=True)
    for note in notes:
        print(note, flush=True)
    folder = brain.journal.folder
    if folder is not None:
        for path in write_findings(folder, findings, notes, brain.options.find_steps):
            logger.info("written: %s", path)


def _option(found: dict[str, Advice], own: dict[str, float]) -> str:
    """The recommendations as an option for the command line; where there is none, the own limit."""
    limits = {n: own[n] if each.limit is None else each.limit for n, each in found.items()}
    if len(limits) == 1:
        return f"--max_grad_norm {next(iter(limits.values())):g}"
    return f"--max_grad_norm '{{{', '.join(f'{n}: {value:g}' for n, value in limits.items())}}}'"
