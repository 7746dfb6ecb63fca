"""Gradient health: spikes in the norms of an optimizer, and warnings, each given once."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.metrics import StepReport

WINDOW = 100  # Steps that shares and medians are over.
MIN_NORMS = 20  # Norms in the window before any can be a spike.
SPIKE_FACTOR = 4.0  # A spike is above the median by this factor.
LARGE_NORM, LARGE_SHARE = 10.0, 0.8  # Warn if this share of the window is above this norm.
USUAL_CLIP_RATE = 0.95  # Adaptive clippers with a percentile of 10 clip 90 %.
TINY = 1e-6  # A vanishing norm, or share of the largest layer's norm.
PATIENCE = 3  # Records in a row before a layer is warned of.
GROWTH, BLOCKS = 4.0, 5  # Warn if so many medians in a row rise, by this factor in all.
MAX_NAMED = 3  # Layers or parameters that a sentence names.

# By layer: its norms "grad", "weight" and "update", and "ratio", which is update / weight. None: it
# has no gradient, or its weight is 0.
LayerNorms = dict[str, dict[str, float | None]]


class Health:
    """Recent steps of an optimizer, and the warnings that were given.

    Args:
        name: name of the optimizer.
        expected_clip_rate: share of clipped steps, from 0 to 1, above which there is a warning. If
            more than `USUAL_CLIP_RATE` is expected, large norms are not warned of either.
    """

    def __init__(self, name: str, expected_clip_rate: float = USUAL_CLIP_RATE) -> None:
        self.name, self.expected_clip_rate = name, expected_clip_rate
        self._window: deque[StepReport] = deque(maxlen=WINDOW)
        self._medians: deque[float] = deque(maxlen=BLOCKS)
        # By layer: number of records in a row in which it did not move.
        self._still: dict[str, int] = {}
        # By layer: number of records in a row in which its gradient was close to 0.
        self._faint: dict[str, int] = {}
        self._warned: set[str] = set()
        self._steps = 0

    def add(
        self, steps: Sequence[StepReport], layers: LayerNorms
    ) -> tuple[dict[str, Any], list[str]]:
        """Add the steps since the last record.

        Args:
            steps: reports of these steps, at least one.
            layers: norms of each layer at the last of them; empty where they were not measured.

        Returns:
            The figures to record, and new warnings.
        """
        norms, before = _norms(steps), _norms(self._window)
        usual = statistics.median(before) if len(before) >= MIN_NORMS else math.inf
        self._window.extend(steps)
        self._medians.append(statistics.median(norms))
        self._steps += len(steps)
        facts = {
            "norms": list(map(rounded, norms)),
            "norms_after": [
                None if step.norm_after is None else rounded(step.norm_after) for step in steps
            ],
            "limits": [step.limit for step in steps],  # Infinity, for no limit, is null in JSON.
            "clipped_share": rounded(sum([s.clipped for s in self._window]) / len(self._window)),
            "spikes": len([norm for norm in norms if norm > SPIKE_FACTOR * usual]),
        }
        warnings = []
        found = self._check_norms(len(steps)) | self._check_layers(layers)
        for kind, text in found.items():
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.append(text)
        return facts, warnings

    def _check_norms(self, block: int) -> dict[str, str]:
        """Return warnings by kind about whole steps, ``block`` of which were added."""
        found = {}
        medians, window = list(self._medians), list(self._window)
        rising = all(a < b for a, b in zip(medians, medians[1:], strict=False))
        if len(medians) == BLOCKS and rising and medians[-1] >= max(1.0, GROWTH * medians[0]):
            factor = medians[-1] / medians[0] if medians[0] else math.inf
            found["drift"] = (
                f"the gradient norm of {self.name!r} has grown without a pause over the last "
                f"{BLOCKS * block} steps, from {medians[0]:.3g} to {medians[-1]:.3g} ({factor:.2g} "
                "times): a run usually diverges soon after. Lower the learning rate now, or "
                "lengthen its warm-up; a checkpoint from before the growth is the one to go back to"
            )
        if len(window) < WINDOW:
            return found
        norms = sorted(_norms(window))
        middle, lr = statistics.median(norms), window[-1].lr
        large = len([norm for norm in norms if norm > LARGE_NORM])
        rate = "" if lr is None else f" (now {lr:.3g})"
        clipped = sum([step.clipped for step in window])
        meant = USUAL_CLIP_RATE * WINDOW < clipped <= self.expected_clip_rate * WINDOW
        if large >= LARGE_SHARE * WINDOW and not meant:
            found["large"] = (
                f"the gradient norm of {self.name!r} was above {LARGE_NORM:g} before clipping "
                f"in {large} of the last {WINDOW} steps (median {middle:.3g}). Lower the "
                f"learning rate{rate} or warm it up for longer; if the loss is a sum "
                "over frames or examples, take the mean"
            )
        too_often = clipped > self.expected_clip_rate * WINDOW
        if too_often and len({step.limit for step in window}) == 1:
            found["clipped"] = (
                f"{clipped} of the last {WINDOW} steps of {self.name!r} were clipped (limit "
                f"{window[-1].limit:g}, median norm {middle:.3g}): the limit, and not the "
                "gradient, decides how far a step goes. Raise max_grad_norm to about "
                f"{norms[int(0.9 * WINDOW)]:.2g}, the 90th percentile of these norms, or "
                "lower the learning rate if the loss jumps; if the limit is meant to be reached so "
                "often, set the run option expected_clip_rate to 1.0"
            )
        if norms[-1] < TINY:
            found["vanishing"] = (
                f"the gradient norm of {self.name!r} was below {TINY:g} in all of the last "
                f"{WINDOW} steps (median {middle:.3g}): nothing is learned any more. Look for "
                "a saturated output, dead activations, or a loss that is divided twice"
            )
        return found

    def _check_layers(self, layers: LayerNorms) -> dict[str, str]:
        """Return warnings by kind about layers that do not move or have hardly any gradient."""
        found: dict[str, str] = {}
        if not layers or self._window[-1].lr == 0:  # At a rate of 0 nothing is meant to move.
            return found
        largest = max((each["grad"] or 0.0 for each in layers.values()), default=0.0)
        still, faint = [], []
        for layer, each in layers.items():
            grad = each["grad"]
            self._still[layer] = 0 if each["update"] else self._still.get(layer, 0) + 1
            weak = grad is not None and 0.0 < grad < TINY * largest
            self._faint[layer] = self._faint.get(layer, 0) + 1 if weak else 0
            if self._still[layer] == PATIENCE:
                cause = "no gradient" if grad is None else f"gradient {grad:.2g}"
                still.append(f"{layer} ({'its gradient is 0' if grad == 0.0 else cause})")
            elif self._faint[layer] == PATIENCE:
                faint.append(layer)
        if still:
            found[f"still {still[0]}"] = (
                f"{first_names(still)} did not move in the last {PATIENCE} records, {self._steps} "
                f"steps into the run. If the loss of {self.name!r} depends on it, look for a "
                "detach() or an unused output on the way; if it does not, freeze it by "
                "requires_grad_(False)"
            )
        if faint:
            found[f"faint {faint[0]}"] = (
                f"gradients vanish on their way to {first_names(faint)}: less than {TINY:g} of the "
                f"largest layer's arrives, {PATIENCE} records in a row. Residual connections, "
                "another initialisation, a normalisation or fewer saturating activations help"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the recent steps, counts and warnings."""
        return {
            "window": pack(self._window),
            "medians": list(self._medians),
            "still": dict(self._still),
            "faint": dict(self._faint),
            "said": sorted(self._warned),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self._window = deque(unpack(self.name, state["window"]), maxlen=WINDOW)
        self._medians = deque(state["medians"], maxlen=BLOCKS)
        self._still, self._faint = dict(state["still"]), dict(state["faint"])
        self._warned, self._steps = set(state["said"]), state["steps"]


def pack(steps: Iterable[StepReport]) -> list[list[Any]]:
    """Return what is saved of reports: norm, norm after clipping, limit, clipped, learning rate."""
    return [[each.norm, each.norm_after, each.limit, each.clipped, each.lr] for each in steps]


def unpack(name: str, packed: Iterable[Sequence[Any]]) -> list[StepReport]:
    """Return the reports of an optimizer's steps from what `pack` returned."""
    return [
        StepReport(name, "stepped", None, 1.0, norm, norm_after, limit, clipped, lr=lr)
        for norm, norm_after, limit, clipped, lr in packed
    ]


def _norms(steps: Iterable[StepReport]) -> list[float]:
    return [each.norm for each in steps if each.norm is not None]


def rounded(value: float) -> float:
    """Round to five digits, to keep records short."""
    return float(f"{value:.5g}")


def first_names(names: Sequence[str], most: int = MAX_NAMED) -> str:
    """Return the first ``most`` names and the number of the others, such as "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
