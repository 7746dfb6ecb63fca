"""The six experiments: what each claims, what counts as failure, and which cells it is made of.

Definitions were fixed before the first full run. Every kind of clipping has the same number of
settings to choose from (a kind without a threshold has more learning rates), tried on one tuning
seed; the best is then measured on seeds that tuning has not seen. A row of the results is one arm
and one kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from recipes.clipping_study.cells import Cell

TUNING = 1000  # seeds of tuning begin here, those of measurement at 1
Setting = dict[str, float]


@dataclass
class Experiment:
    """One question, its conditions, and the settings that each kind may choose from.

    ``score`` names what is tuned and told ("loss", the lower the better, or "accuracy"), ``failed``
    is the value from which on a training counts as failed. ``grid`` says that all settings are
    measured, with nothing chosen.
    """

    name: str
    title: str
    claim: str
    definition: str
    arms: Mapping[str, Mapping[str, Sequence[Setting]]]
    score: str = "loss"
    failed: float = math.inf
    grid: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)

    def cells(self, chosen: Mapping[tuple[str, str], Setting] | None, seeds: int) -> list[Cell]:
        """The cells of tuning (``chosen`` is None), or those of measurement."""
        if chosen is None and self.grid:
            return []
        found = []
        for arm, kinds in self.arms.items():
            for kind, settings in kinds.items():
                if chosen is not None and not self.grid:
                    settings = [chosen[arm, kind]]
                numbers = [TUNING] if chosen is None else range(1, seeds + 1)
                found += [
                    Cell(self.name, arm, kind, setting, number, self.sizes)
                    for setting, number in product(settings, numbers)
                ]
        return found

    def cost(self, result: Mapping[str, Any]) -> float:
        """Return the quantity that tuning minimises: the loss, or the share of errors."""
        if self.score == "accuracy":
            return 1.0 - float(result["accuracy"])
        return float(result["loss"])

    def has_failed(self, result: Mapping[str, Any]) -> bool:
        """Return true if a training counts as failed."""
        if self.score == "accuracy":
            return bool(result["accuracy"] < self.failed)
        return not result["loss"] < self.failed


def _settings(rates: Sequence[float], **values: Sequence[float]) -> list[Setting]:
    """All combinations of learning rates and of one value of a clipper."""
    if not values:
        return [{"lr": rate} for rate in rates]
    ((name, choices),) = values.items()
    return [{"lr": rate, name: value} for rate, value in product(rates, choices)]


def experiments(sizes: Mapping[str, Mapping[str, Any]]) -> list[Experiment]:
    """Return the experiments that have an entry in ``sizes``, in the order of the study.

    Raises ValueError for an unknown one.
    """
    makers = (_recurrent, _warmup, _speed, _spikes, _half, _scales)
    found = [make(dict(sizes.get(make.__name__[1:], {}))) for make in makers]
    if unknown := set(sizes) - {each.name for each in found}:
        known = ", ".join(each.name for each in found)
        raise ValueError(f"experiments has {', '.join(sorted(unknown))}; allowed: {known}")
    return [each for each in found if each.name in sizes]


def _recurrent(sizes: dict[str, Any]) -> Experiment:
    usual: dict[str, list[Setting]] = {
        "none": _settings([0.01, 0.03, 0.1, 0.3]),
        "NormClip": _settings([0.1, 0.3], limit=[0.1, 1.0]),
        "ValueClip": _settings([0.1, 0.3], limit=[0.01, 0.1]),
        "AutoClip": _settings([0.1, 0.3], percentile=[10, 50]),
    }
    others: dict[str, list[Setting]] = {
        "LayerClip": _settings([0.1, 0.3], limit=[0.1, 1.0]),
        "MedianClip": _settings([0.1, 0.3], scale=[1.0, 2.0]),
        "ZClip": _settings([0.1, 0.3], z=[1.0, 2.5]),
        "AdaGC": _settings([0.1, 0.3], lambda_rel=[1.05, 1.5]),
        "AGC": _settings([0.1, 0.3], clipping=[0.01, 0.1]),
    }
    lengths, all_at = sizes.pop("lengths", []), sizes.pop("all_kinds_at", None)
    return Experiment(
        "recurrent",
        "Recurrent networks on long sequences",
        "Recurrent networks train over 100 to 500 steps with clipping, and fail after 20 to 30 "
        "without.",
        "A plain tanh network of 32 units (SGD, momentum 0.9) must name the symbol that came "
        "first. Failure: fewer than 9 in 10 right at the end, where a guess gives 1 in 4.",
        {str(n): usual | (others if n == all_at else {}) for n in lengths},
        "accuracy",
        0.9,
        sizes=sizes,
    )


def _warmup(sizes: dict[str, Any]) -> Experiment:
    rates, limits = sizes.pop("rates", []), sizes.pop("limits", [])
    kinds: dict[str, list[Setting]] = {
        "none": _settings(rates),
        "NormClip": _settings(rates, limit=limits),
    }
    return Experiment(
        "warmup",
        "A transformer with and without warm-up",
        "Clipping takes the place of a warm-up; without either a transformer fails.",
        "A post-LN transformer (Adam, linear decay) learns a grammar in which two words decide the "
        "next one. Failure: a loss above 2.3 nats a word at the end, where ignorance has 2.48. All "
        "rates and limits are shown, none is chosen.",
        {str(steps): kinds for steps in sizes.pop("warmup_steps", [])},
        failed=2.3,
        grid=True,
        sizes=sizes,
    )


def _speed(sizes: dict[str, Any]) -> Experiment:
    models: dict[str, dict[str, list[Setting]]] = {
        "grammar, recurrent, SGD": {
            "none": _settings([0.03, 0.1, 0.2, 0.4]),
            "NormClip": _settings([0.2, 0.4], limit=[0.3, 1.0]),
        },
        "grammar, transformer, Adam": {
            "none": _settings([0.002, 0.005, 0.01, 0.02]),
            "NormClip": _settings([0.005, 0.01], limit=[0.3, 1.0]),
        },
        "recall, recurrent, SGD": {
            "none": _settings([0.01, 0.03, 0.1, 0.3]),
            "NormClip": _settings([0.1, 0.3], limit=[0.1, 1.0]),
        },
    }
    arms = {
        f"{model}, {schedule}": kinds
        for model, kinds in models.items()
        for schedule in ("constant", "decay")
    }
    return Experiment(
        "speed",
        "Speed of convergence against learning-rate decay alone",
        "With clipping training converges 30 to 50 % faster than with learning-rate decay alone.",
        "Steps until the mean loss of ten steps is that which decay without clipping, tuned, has "
        "over its last ten (the mean over its seeds, plus 2 %). A training that never gets there "
        "counts with all its steps.",
        arms if sizes else {},
        failed=2.3,
        sizes=sizes,
    )


def _spikes(sizes: dict[str, Any]) -> Experiment:
    def kinds(rates: list[float], more: list[float], adam: bool) -> dict[str, list[Setting]]:
        found: dict[str, list[Setting]] = {
            "none": _settings(more),
            "NormClip": _settings(rates, limit=[0.5, 2.0]),
            "ValueClip": _settings(rates, limit=[0.05, 0.2]),
            "AutoClip": _settings(rates, percentile=[10, 50]),
            "MedianClip": _settings(rates, scale=[1.0, 2.0]),
            "ZClip": _settings(rates, z=[1.0, 2.5]),
            "AdaGC": _settings(rates, lambda_rel=[1.05, 1.5]),
            "AGC": _settings(rates, clipping=[0.01, 0.1]),
        }
        if adam:
            found["SPAM"] = _settings(rates, theta=[50, 5000])
        return found

    arms = {
        "SGD": kinds([0.03, 0.1], [0.01, 0.03, 0.1, 0.2], False),
        "Adam": kinds([0.003, 0.01], [0.001, 0.003, 0.01, 0.02], True),
    }
    return Experiment(
        "spikes",
        "Spikes at known steps",
        "Adaptive kinds bear spikes better than a fixed threshold.",
        "A classifier is given broken batches (inputs many times too large, wrong targets) at "
        "known steps, the last of them near the end. Told: the loss at the end, the share of "
        "spikes and of other steps that were clipped, and the rise of the loss from the 5 steps "
        "before a spike to the 5 after it. "
        "Failure: a loss above 2.0 at the end, where ignorance has 2.08.",
        arms if sizes else {},
        failed=2.0,
        sizes=sizes,
    )


def _half(sizes: dict[str, Any]) -> Experiment:
    kinds: dict[str, list[Setting]] = {
        "none": _settings([0.1]),
        "NormClip": _settings([0.1], limit=[0.5]),
        "ValueClip": _settings([0.1], limit=[0.05]),
        "AutoClip": _settings([0.1], percentile=[10]),
        "AGC": _settings([0.1], clipping=[0.1]),
    }
    wrong = {kind: kinds[kind] for kind in ("NormClip", "ValueClip")}
    return Experiment(
        "half",
        "Half precision with loss scaling",
        "A limit means the same in fp16 as in fp32, if the scale is taken out before clipping.",
        "The classifier without spikes, at one setting for each kind: fp32, fp16 with loss "
        "scaling, and fp16 where the gradients are clipped while they are still scaled by 65,536. "
        "Failure: a loss above 2.0 at the end.",
        {"fp32": kinds, "fp16": kinds, "fp16, scaled gradients clipped": wrong} if sizes else {},
        failed=2.0,
        grid=True,
        sizes=sizes,
    )


def _scales(sizes: dict[str, Any]) -> Experiment:
    def kinds(
        rates: list[float], more: list[float], loose: list[float]
    ) -> dict[str, list[Setting]]:
        return {
            "none": _settings(more),
            "NormClip": _settings(rates, limit=[0.3, 3.0]),
            "LayerClip": _settings(rates, limit=[0.1, 1.0]),
            "ValueClip": _settings(rates, limit=[0.01, 0.1]),
            "AdaGC": _settings(rates, lambda_rel=[1.05, 1.5]),
            "AGC": _settings(loose, clipping=[0.01, 0.1]),
        }

    # A layer whose gradients are 100 times as large has weights that are 100 times as small.
    arms = {
        "SGD, 1:1": kinds([0.03, 0.1], [0.01, 0.03, 0.1, 0.2], [0.03, 0.1]),
        "SGD, 1:100": kinds([0.003, 0.03], [1e-5, 1e-4, 3e-4, 1e-3], [0.03, 0.1]),
        "Adam, 1:1": kinds([0.003, 0.01], [0.001, 0.003, 0.01, 0.03], [0.003, 0.01]),
        "Adam, 1:100": kinds([0.0003, 0.003], [0.0001, 0.0003, 0.001, 0.003], [0.0003, 0.003]),
    }
    return Experiment(
        "scales",
        "Layers whose scales differ by a hundred",
        "Where gradients of layers differ much, a limit for each layer is better than one for all.",
        "The classifier, whose middle layer has gradients 100 times those of the others (1:100), "
        "or of their own size (1:1). Failure: a loss above 2.0 at the end (ignorance: 2.08).",
        arms if sizes else {},
        failed=2.0,
        sizes=sizes,
    )
