"""Decisions at the end of an epoch: schedules that count epochs, and early stopping."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trainer import distributed
from trainer.metrics import StageReport
from trainer.optim.step import Update

logger = logging.getLogger("trainer")


def agree_on_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return rank 0's metrics on every rank, so that all ranks decide by the same numbers.

    Collective. Warns where another rank has other values.
    """
    if distributed.world_size() == 1:
        return dict(metrics)
    own = {name: v.item() if hasattr(v, "item") else v for name, v in metrics.items()}
    rows = distributed.all_gather_json(own)
    name = next((n for row in rows for n in row if repr(row[n]) != repr(rows[0].get(n))), None)
    if name is not None:
        warnings.warn(
            f"on_stage_end returned another {name!r} on each rank: every rank sees a part of the "
            "data only. Rank 0's is used; average it first, as with self.log or "
            "trainer.metrics.Mean().reduce(), or gather its parts with "
            "trainer.distributed.all_gather_json",
            stacklevel=2,
        )
    return dict(rows[0])


def all_metrics(report: StageReport) -> dict[str, Any]:
    """Return the losses and the metrics of a stage by name."""
    loss = report.loss
    return {**(loss if isinstance(loss, dict) else {"loss": loss}), **report.metrics}


def advance_schedules(updates: Iterable[Update], metrics: Mapping[str, Any]) -> None:
    """Advance the schedules that count epochs.

    Raises:
        ValueError: if a schedule watches a metric that the stage did not give.
    """
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    for update in updates:
        schedule = update.schedule
        if schedule is None or schedule.every != "epoch":
            continue
        if getattr(schedule, "needs_metric", isinstance(schedule, plateau)):
            schedule.step(_pick(metrics, getattr(schedule, "metric", "loss"), "schedule"))
        else:
            with warnings.catch_warnings():
                # torch's schedules ask for an optimizer step in this process, which there is none
                # of right after a resume, nor where fp16 overflowed for a whole epoch.
                message = "Detected call of `lr_scheduler.step"
                warnings.filterwarnings("ignore", message, UserWarning)
                schedule.step()


def should_stop(early_stopping: Any, metrics: Mapping[str, Any]) -> bool:
    """Return True if early stopping ends the training.

    Args:
        early_stopping: a `trainer.schedules.EarlyStopping`, or None.
        metrics: losses and metrics of the epoch.

    Raises:
        ValueError: if it watches a metric that the stage did not give.
    """
    if early_stopping is None:
        return False
    stopped = bool(early_stopping.update(_pick(metrics, early_stopping.metric, "early_stopping")))
    if stopped:
        logger.info("stopping early: %s has not improved", early_stopping.metric)
    return stopped


def still_stopped(early_stopping: Any) -> bool:
    """Return True if a run that early stopping has ended stays so: by the present patience."""
    return early_stopping is not None and bool(getattr(early_stopping, "is_exhausted", True))


def _pick(metrics: Mapping[str, Any], name: str, asker: str) -> float:
    if name not in metrics:
        raise ValueError(
            f"{asker} watches the metric {name!r}, which the stage did not give; it gave "
            f"{', '.join(metrics)}: log it with self.log, or return it from on_stage_end"
        )
    value = metrics[name]
    return float("nan") if value is None else float(value)
