"""Which checkpoints stay: the newest k, and the best k by any metric, in either direction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.checkpoint.manifest import Checkpoint


class Best(NamedTuple):
    """The `n` checkpoints with the lowest ("min") or highest ("max") value of a metric."""

    metric: str
    mode: str
    n: int = 1

    def of(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """The best first. A checkpoint without a finite value of the metric does not take part."""
        return ranked(checkpoints, self.metric, self.mode)[: self.n]


def ranked(checkpoints: Sequence[Checkpoint], metric: str, mode: str) -> list[Checkpoint]:
    """Those that have a finite value of `metric`, the best first; equals stay in order."""
    sign = 1 if mode == "min" else -1
    candidates = [each for each in checkpoints if _is_finite(each.meta.get(metric))]
    return sorted(candidates, key=lambda each: sign * each.meta[metric])


def _is_finite(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


@dataclass(frozen=True)
class Keep:
    """The newest `last` checkpoints and the best by each of `best`; the union of all stays."""

    last: int = 1
    best: tuple[Best, ...] = ()

    @classmethod
    def parse(cls, keep_last: Any, keep_best: Any) -> Keep:
        """From a YAML: ``keep_last: 3``, ``keep_best: {wer: min, accuracy: {mode: max, n: 2}}``."""
        if type(keep_last) is not int or keep_last < 1:
            raise ValueError(f"keep_last is {keep_last!r}; it must be a whole number of at least 1")
        if keep_best is not None and not isinstance(keep_best, Mapping):
            raise ValueError(f"keep_best is {keep_best!r}; it must map metrics to min or max")
        best = (_best(metric, rule) for metric, rule in (keep_best or {}).items())
        return cls(keep_last, tuple(best))

    def chosen(self, checkpoints: Sequence[Checkpoint]) -> set[Checkpoint]:
        """What stays of `checkpoints` (newest first); never nothing."""
        kept = set(checkpoints[: self.last]).union(*(rule.of(checkpoints) for rule in self.best))
        return kept or set(checkpoints[:1])

    def widened(self, last: int, min_keys: Iterable[str], max_keys: Iterable[str], n: int) -> Keep:
        """This, with at least the newest `last`, and with the best `n` by more metrics."""
        lowest = tuple(Best(metric, "min", n) for metric in min_keys)
        highest = tuple(Best(metric, "max", n) for metric in max_keys)
        return Keep(max(self.last, last) if last else 0, self.best + lowest + highest)


def _best(metric: Any, rule: Any) -> Best:
    known = rule if isinstance(rule, Mapping) else {"mode": rule}
    mode, n = str(known.get("mode")), known.get("n", 1)
    sound = mode in ("min", "max") and type(n) is int and n >= 1 and set(known) <= {"mode", "n"}
    if not sound or not isinstance(metric, str):
        raise ValueError(
            f"keep_best has {metric!r}: {rule!r}; a metric's rule is min, max, or a mapping like "
            "{mode: min, n: 3}"
        )
    return Best(metric, mode, n)
