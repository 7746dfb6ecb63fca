"""Decisions at the end of an epoch: schedules that count epochs, and early stopping."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainer import distributed
from trainer.metrics import StageReport
from trainer.optim.step import Update
from trainer.tree import leaves, map_leaves, plain_number

logger = logging.getLogger("trainer")


def agree_on_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return rank 0's metrics on every rank, so that all ranks decide by the same numbers.

    Collective. Tensors and arrays of one element become numbers; others are refused.
    """
    if odd := [name for name in metrics if not isinstance(name, str)]:
        raise ValueError(f"on_stage_end returned a metric named {odd[0]!r}; allowed: a text")
    own: dict[str, Any] = map_leaves(plain_number, dict(metrics))
    for each, value in leaves(own):
        if isinstance(value, Tensor) or hasattr(value, "__array__"):
            raise ValueError(
                f"on_stage_end returned {each!r} of shape {tuple(value.shape)}; allowed: a number, "
                "or a tensor or array of one element"
            )
    if distributed.world_size() == 1:
        return own
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
    """Advance the schedules that count epochs, by the losses and metrics of the epoch."""
    for update in updates:
        schedule = update.schedule
        if schedule is None or schedule.every != "epoch":
            continue
        if getattr(schedule, "needs_metric", isinstance(schedule, ReduceLROnPlateau)):
            update.advance_schedule(_pick(metrics, getattr(schedule, "metric", "loss"), "schedule"))
        else:
            with warnings.catch_warnings():
                # torch warns if the optimizer has not stepped in this process, which is normal
                # right after a resume, or if fp16 overflowed for a whole epoch.
                message = "Detected call of `lr_scheduler.step"
                warnings.filterwarnings("ignore", message, UserWarning)
                update.advance_schedule()


def should_stop(early_stopping: Any, metrics: Mapping[str, Any], epoch: int | None) -> bool:
    """Return True if a `trainer.schedules.EarlyStopping`, or None, ends the training now."""
    if early_stopping is None:
        return False
    stopped = bool(early_stopping.update(_pick(metrics, early_stopping.metric, "early_stopping")))
    if stopped:
        logger.info("stopping early: %s", _describe_stop(early_stopping, epoch))
    return stopped


def _describe_stop(early_stopping: Any, epoch: int | None) -> str:
    """Describe the metric with its best value and epoch, if the object knows them."""
    text = f"{early_stopping.metric} has not improved"
    best, waited = getattr(early_stopping, "best", None), getattr(early_stopping, "waited", None)
    if not isinstance(waited, int):  # An object of another class.
        return text
    text += f" for {waited} epoch{'s' * (waited != 1)}"
    if best is None:
        return f"{text}: it has never been finite"
    text += f": the best is {best:.4g}"
    # Otherwise an earlier `fit`, with its own count of epochs, had the best.
    return f"{text}, of epoch {epoch - waited}" if epoch is not None and epoch > waited else text


def still_stopped(early_stopping: Any) -> bool:
    """Return True if early stopping still ends a stopped run with the present patience."""
    return early_stopping is not None and bool(getattr(early_stopping, "is_exhausted", True))


def _pick(metrics: Mapping[str, Any], name: str, asker: str) -> float:
    if name not in metrics:
        raise ValueError(
            f"{asker} watches the metric {name!r}, which the stage did not give; it gave "
            f"{', '.join(metrics)}: log it with self.log, or return it from on_stage_end"
        )
    value = metrics[name]
    if not isinstance(value, (int, float, NoneType)):
        raise ValueError(f"{asker} watches the metric {name!r}, which is {value!r} and no number")
    return float("nan") if value is None else float(value)
