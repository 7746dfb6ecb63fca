"""Building the optimizers of a Brain: `Update`s with their clippers and schedules."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from trainer.checks import Stateful, by_name
from trainer.clipping import Clipper, NormClip, ValueClip
from trainer.clipping.gradients import limit_of
from trainer.distributed.strategy import Strategy
from trainer.optim.groups import ParameterGroups, check_schedule
from trainer.optim.precision import Precision
from trainer.optim.step import Update
from trainer.options import RunOptions

CLIP_KINDS = {"norm": NormClip, "value": ValueClip}
# Attributes of torch's schedules that hold their length, in steps of the schedule.
LENGTHS = ("total_steps", "T_max", "total_iters", "total_size", "T_0", "step_size")

logger = logging.getLogger("trainer")


def make_updates(
    optimizers: Mapping[str, torch.optim.Optimizer],
    modules: nn.Module,
    options: RunOptions,
    precision: Precision,
    schedules: Any,
    strategy: Strategy,
    on_hand_step: Callable[[Update], None],
    groups: ParameterGroups | None,
    kept: Mapping[str, Update] = {},
) -> dict[str, Update]:
    """Build an `Update` for every optimizer.

    Args:
        optimizers: by name.
        modules: all modules, for names of parameters and sparse embeddings.
        options: clipping, accumulation and guard.
        precision: gives each optimizer its loss scaler.
        schedules: a function from an optimizer to a schedule, a mapping of these by optimizer, or
            None.
        strategy: communication of gradients between processes.
        on_hand_step: called before a step that a recipe takes without `Brain.optimize`.
        groups: divides the optimizers into parameter groups, if given.
        kept: updates that exist already, by name.

    Returns:
        The updates by name, in the order of ``optimizers``.

    Raises:
        ValueError: for a setting of clipping, schedules or groups that cannot be used.
    """
    names = list(optimizers)
    if groups is not None:
        groups.regroup(optimizers, modules, kept)
    parameters: dict[Tensor, str] = {p: name for name, p in modules.named_parameters()}
    sparse: set[Tensor] = {
        p
        for module in modules.modules()
        if getattr(module, "sparse", False) is True
        for p in module.parameters(recurse=False)
    }
    clips = _make_clippers(options, optimizers, parameters)
    updates: dict[str, Update] = {}
    for name, optimizer in optimizers.items():
        if name in kept:
            updates[name] = kept[name]
            continue
        rates = [float(group.get("lr") or 0.0) for group in optimizer.param_groups]
        schedule = _schedule(by_name(schedules, name, names, "schedule"), optimizer, options)
        if groups is not None:
            check_schedule(name, optimizer, rates)
        updates[name] = Update(
            name, optimizer, precision.scaler(), clips[name], schedule,
            options.grad_accumulation_factor, options.skip_nonfinite_grads, strategy,
        )  # fmt: skip
        updates[name].watch(on_hand_step)
    connect(list(updates.values()), parameters)
    strategy.register({n: u.all_params for n, u in updates.items()}, parameters, sparse)
    return updates


def connect(updates: Sequence[Update], parameters: Mapping[Tensor, str]) -> None:
    """Set the ``others``, ``sharing``, ``untrained`` and ``names`` of all optimizers of a Brain."""
    owned = [set(update.all_params) for update in updates]
    trained = set().union(*owned)
    untrained = {name: p for p, name in parameters.items() if p not in trained and p.requires_grad}
    for update, own in zip(updates, owned, strict=True):
        update.others = [other for other in updates if other is not update]
        update.sharing = [other for other in update.others if not own.isdisjoint(other.all_params)]
        update.untrained, update.names = untrained, parameters


def _make_clippers(
    options: RunOptions,
    optimizers: Mapping[str, torch.optim.Optimizer],
    names: Mapping[Tensor, str],
) -> dict[str, Clipper]:
    """Build the clipper of each optimizer, and bind it.

    A clipper that is given for several optimizers is copied, so that each has its own history.
    """
    found: dict[str, Clipper] = {}
    known, default = list(optimizers), RunOptions.max_grad_norm
    for name in optimizers:
        own = by_name(options.clip, name, known, "clip", "norm")
        limit = limit_of(by_name(options.max_grad_norm, name, known, "max_grad_norm", default))
        clip = _make_clipper(own, limit)
        if clip is own and limit not in (default, math.inf):
            warnings.warn(
                f"max_grad_norm {limit:g} is not used for the optimizer {name!r}: its clipper, "
                f"{type(clip).__name__}, has limits of its own",
                stacklevel=2,
            )
        found[name] = copy.deepcopy(clip) if any(clip is each for each in found.values()) else clip
    for name, optimizer in optimizers.items():  # After copying: a bound clipper holds parameters.
        clip = found[name]
        if hasattr(clip, "bind"):
            own_names = {
                param: names.get(param, f"group {number}, parameter {place}")
                for number, group in enumerate(optimizer.param_groups)
                for place, param in enumerate(group["params"])
            }
            clip.bind(name, own_names, optimizer)
    return found


def _make_clipper(setting: Any, limit: float) -> Clipper:
    """Build a clipper from one optimizer's part of the run option ``clip``."""
    if setting is None:
        return NormClip(None)
    if isinstance(setting, str) and setting in CLIP_KINDS:
        clip: Clipper = CLIP_KINDS[setting](limit)
        return clip
    if isinstance(setting, (list, tuple)):
        raise ValueError(
            f"clip is a list of {len(setting)}, and an optimizer has one clipper; for several in "
            "order write clip: !new:trainer.clipping.MixedClip {clips: […]}"
        )
    if callable(setting) and hasattr(setting, "limit") and not isinstance(setting, type):
        return setting  # type: ignore[no-any-return]
    raise ValueError(
        f"clip is {setting!r}; allowed: norm or value (max_grad_norm is their limit), null, a "
        "clipper such as !new:trainer.clipping.AutoClip {percentile: 10}, or a mapping of these by "
        "optimizer"
    )


def find_optimizers(
    optimizers_dict: Any, attributes: Mapping[str, Any], precision: Precision
) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers of ``init_optimizers`` by name; refuse those that cannot train here.

    Args:
        optimizers_dict: the Brain's ``optimizers_dict``, or None.
        attributes: the Brain's attributes, which are searched if ``optimizers_dict`` is None.
        precision: training precision.
    """
    found = optimizers_dict
    if not isinstance(found, (Mapping, NoneType)):
        raise ValueError(
            f"optimizers_dict is a {type(found).__name__}; allowed: a mapping from names to "
            "optimizers"
        )
    if found is None:
        found = {}
        for name, value in attributes.items():  # Several attributes may hold one optimizer.
            if isinstance(value, torch.optim.Optimizer) and value not in found.values():
                found[name] = value
        if list(found) == ["optimizer"]:
            found = {"main": found["optimizer"]}
    if len({id(optimizer) for optimizer in found.values()}) < len(found):
        raise ValueError(
            f"optimizers_dict has the same optimizer twice among {', '.join(found)}; allowed: "
            "one name for each"
        )
    for name, optimizer in found.items():
        _check_optimizer(name, optimizer, precision)
    return dict(found)


def _check_optimizer(name: str, optimizer: Any, precision: Precision) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizers_dict[{name!r}] is {optimizer!r}; allowed: a torch.optim.Optimizer, "
            "made by calling its class with the parameters"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"the optimizer {name!r} is {type(optimizer).__name__}, which computes its loss "
            "several times a step; allowed: one that steps with gradients, such as Adam or SGD"
        )
    for group in optimizer.param_groups:
        limit_of(group.get("max_grad_norm"))
        dtypes = {p.dtype for p in group["params"]} if precision.name == "fp16" else set()
        if torch.float16 in dtypes:
            raise ValueError(
                f"the optimizer {name!r} has weights in float16; precision fp16 computes in "
                "float16 and needs weights in float32: leave out .half()"
            )
        if any(dtype.is_complex for dtype in dtypes):
            raise ValueError(
                f"the optimizer {name!r} has complex weights; precision fp16 scales losses by "
                "torch.amp.GradScaler, which cannot unscale their gradients: use fp32 or bf16"
            )


def _schedule(factory: Any, optimizer: torch.optim.Optimizer, options: RunOptions) -> Any:
    if factory is None:
        return None
    if not callable(factory):
        raise ValueError(
            f"schedule is a {type(factory).__name__}; allowed: a function of an optimizer, "
            "such as !name:trainer.schedules.WarmupDecay {…}, or a mapping of these by optimizer"
        )
    schedule = factory(optimizer)
    if not (hasattr(schedule, "step") and hasattr(schedule, "state_dict")):
        raise ValueError(
            f"schedule has made a {type(schedule).__name__}; allowed: a schedule, such as one of "
            "torch.optim.lr_scheduler, which the run option schedule_every moves by step or epoch"
        )
    by_metric = isinstance(schedule, ReduceLROnPlateau)
    if not hasattr(schedule, "every"):  # One of torch's own.
        schedule.every = "epoch" if by_metric else options.schedule_every
    if by_metric and not hasattr(schedule, "metric"):
        schedule.metric = options.schedule_metric
        if schedule.mode == "max" and schedule.metric == "loss":
            logger.warning(
                "ReduceLROnPlateau(mode='max') watches the metric 'loss', and lowers the learning "
                "rate while the loss falls; name another one by the run option schedule_metric"
            )
    return schedule


def warn_of_totals(
    updates: Iterable[Update], epochs: int | None, batches: int | None, limit: int | None = None
) -> None:
    """Warn of torch schedules, not yet advanced, whose length does not fit the run.

    Args:
        updates: the optimizers with their schedules.
        epochs: number of epochs; None where unknown.
        batches: number of batches in an epoch; None where unknown.
        limit: number of steps after which the run ends; None for no limit.
    """
    for update in updates:
        schedule, every = update.schedule, getattr(update.schedule, "every", None)
        key = next((key for key in LENGTHS if hasattr(schedule, key)), None)
        if key is None or not isinstance(schedule, LRScheduler) or isinstance(schedule, Stateful):
            continue
        by_epoch, total = every == "epoch", getattr(schedule, key)
        if schedule.last_epoch or not epochs or (batches is None and not by_epoch):
            continue
        moves = epochs if by_epoch else epochs * math.ceil((batches or 0) / update.size)
        if limit is not None and not by_epoch:
            moves = min(moves, limit)
        ends = isinstance(schedule, OneCycleLR) and total < moves
        if ends or (by_epoch and total > moves):
            logger.warning(
                "%s of the optimizer %r has %s=%g, and moves once %s, of which this fit has %d%s: "
                "see the run option schedule_every (now %s)", type(schedule).__name__, update.name,
                key, total, "an epoch" if by_epoch else "a step", moves,
                ", the last ones at the last rate" if ends else "", every,
            )  # fmt: skip


def check_early_stopping(early_stopping: Any) -> None:
    """Raise ValueError for an ``early_stopping`` that cannot stop, such as the text "None"."""
    if early_stopping is not None and not (
        callable(getattr(early_stopping, "update", None)) and hasattr(early_stopping, "metric")
    ):
        raise ValueError(
            f"early_stopping is {early_stopping!r}; allowed: null, or an object such as "
            "!new:trainer.schedules.EarlyStopping {metric: loss, patience: 3}"
        )
