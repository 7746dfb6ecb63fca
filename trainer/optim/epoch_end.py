"""What the metrics of an epoch decide: learning rates, and whether to go on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from trainer import distributed
from trainer.metrics import StageReport

logger = logging.getLogger("trainer")


def agreed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as rank 0 has them, so that all ranks decide by the same; warns where others differ.

    Every rank must call it.
    """
    if distributed.world_size() == 1:
        return dict(metrics)
    own = {name: v.item() if hasattr(v, "item") else v for name, v in metrics.items()}
    rows = distributed.gather(own)
    name = next((n for row in rows for n in row if repr(row[n]) != repr(rows[0].get(n))), None)
    if name is not None:
        warnings.warn(
            f"on_stage_end returned another {name!r} on each rank: every rank sees a part of the "
            "data only. Rank 0's is used; average it first, as with "
            "trainer.metrics.Mean().reduce(), or gather its parts with trainer.distributed.gather",
            stacklevel=2,
        )
    return dict(rows[0])


def judge(brain: Any, report: StageReport) -> tuple[dict[str, Any], bool]:
    """Move the schedules that go by epochs; returns the epoch's metrics, and whether to stop."""
    loss = report.loss
    metrics = {**(loss if isinstance(loss, dict) else {"loss": loss}), **report.metrics}
    for update in brain.updates.values():
        if update.schedule is not None and update.schedule.every == "epoch":
            _advance(update.schedule, metrics)
    stopping = getattr(brain.hparams, "early_stopping", None)
    if stopping is None:
        return metrics, False
    stopped = bool(stopping.update(_pick(metrics, stopping.metric, "early_stopping")))
    if stopped:
        logger.info("stopping early: %s has not improved", stopping.metric)
    return metrics, stopped


def _pick(metrics: Mapping[str, Any], name: str, asker: str) -> float:
    if name not in metrics:
        raise ValueError(
            f"{asker} watches the metric {name!r}, which the stage did not give; it gave "
            f"{', '.join(metrics)}: return it from on_stage_end"
        )
    value = metrics[name]
    return float("nan") if value is None else float(value)


def _advance(schedule: Any, metrics: Mapping[str, Any]) -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    if getattr(schedule, "needs_metric", isinstance(schedule, plateau)):
        schedule.step(_pick(metrics, getattr(schedule, "metric", "loss"), "schedule"))
    else:
        with warnings.catch_warnings():
            # Torch's own ask whether the optimizer has stepped, in this process and ever: not so
            # right after a resume, nor where fp16 overflowed for a whole epoch.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            schedule.step()
