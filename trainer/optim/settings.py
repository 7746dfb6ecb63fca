"""Changed settings of optimizers and schedules in a resumed run.

A checkpoint holds the present and the initial value of each setting. If a resumed run builds a
setting with another initial value, it uses that: a learning rate keeps its ratio to the initial
one, which a schedule has set, and other settings are replaced.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from trainer import distributed

RATES = ("lr", "_last_lr", "base_lrs")
# Schedules of torch whose rates depend only on the number of steps.
CLOSED = (
    lr_scheduler.ConstantLR, lr_scheduler.CosineAnnealingLR, lr_scheduler.CyclicLR,
    lr_scheduler.CosineAnnealingWarmRestarts, lr_scheduler.ExponentialLR, lr_scheduler.LambdaLR,
    lr_scheduler.LinearLR, lr_scheduler.MultiStepLR, lr_scheduler.OneCycleLR,
    lr_scheduler.PolynomialLR, lr_scheduler.StepLR,
)  # fmt: skip

logger = logging.getLogger("trainer")


def with_new_settings(
    state: Mapping[str, Any], now: Mapping[str, Any], name: str
) -> Mapping[str, Any]:
    """Return a saved state of an `Update`, with the settings that this run has changed.

    Args:
        state: the saved state; it is not changed.
        now: the settings that this run builds.
        name: name of the optimizer, for messages.

    Returns:
        ``state`` itself if no setting differs.
    """
    saved, then = state["optimizer"]["param_groups"], state.get("built")
    if then is None:
        _warn_of_other_settings(saved[0], now["groups"][0], name)
    if then is None or then == now:
        return state
    built = list(zip(then["groups"], now["groups"], strict=True))
    pairs = [(old, new, old | new) for old, new in built]
    pairs.append((then["schedule"], now["schedule"], now["schedule"]))
    changes = {
        key: f"{key}: {old.get(key)} -> {new.get(key)}"
        for old, new, keys in pairs
        for key in keys
        if old.get(key) != new.get(key) and not key.startswith("_")
    }
    if changes and distributed.is_main():
        logger.warning(
            "the optimizer %r resumes with other settings than it was saved with: %s",
            name, "; ".join(changes.values()),
        )  # fmt: skip
    groups = [_merged_group(each, *pair) for each, pair in zip(saved, built, strict=True)]
    changed = {**state, "optimizer": {**state["optimizer"], "param_groups": groups}}
    if "schedule" in state:
        changed["schedule"] = _merged(state["schedule"], then["schedule"], now["schedule"])
    return changed


def set_rates_anew(schedule: Any) -> None:
    """Recompute the learning rates of a torch schedule whose settings have changed."""
    if isinstance(schedule, CLOSED):
        with (
            warnings.catch_warnings(),
            suppress(ValueError),
        ):  # It may be past its new end.
            warnings.simplefilter("ignore", UserWarning)  # torch deprecates steps with a number.
            schedule.step(schedule.last_epoch)


def _merged(saved: Any, then: Any, now: Any, is_rate: bool = False) -> Any:
    """Return a saved value, with settings that the user has changed since at their new value.

    Args:
        saved: value at the time of saving, which schedules may have changed.
        then: initial value in the saving run.
        now: initial value in this run.
        is_rate: True for a learning rate, which keeps its ratio to the initial value.
    """
    if then == now:
        return saved
    if type(saved) is dict and isinstance(now, dict) and isinstance(then, dict):
        common = [key for key in now if key in then and key in saved]
        return saved | {k: _merged(saved[k], then[k], now[k], k in RATES) for k in common}
    listed = all(isinstance(each, (list, tuple)) for each in (saved, then, now))
    if listed and len(saved) == len(then) == len(now):
        return type(saved)(_merged(*each, is_rate) for each in zip(saved, then, now, strict=True))
    if is_rate and then and saved != then:
        now = float(saved) * now / then
    return torch.full_like(saved, now) if isinstance(saved, Tensor) else now


def _merged_group(
    saved: Mapping[str, Any], then: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a saved group with the settings that were changed, added or removed since."""
    kept = {k: v for k, v in _merged(saved, then, now).items() if k in now or k not in then}
    return kept | {k: v for k, v in now.items() if k not in then}


def _warn_of_other_settings(saved: Mapping[str, Any], now: Mapping[str, Any], name: str) -> None:
    """Warn of changed settings, for a checkpoint without initial values."""
    for key in ("initial_lr" if "initial_lr" in saved else "lr", "weight_decay"):
        old, new = saved.get(key), now.get(key)
        if old is not None and new is not None and old != new:
            logger.warning(
                "the optimizer %r goes on with the %s %s of its checkpoint, which an earlier "
                "version has written, and not with %s", name, key, old, new,
            )  # fmt: skip
