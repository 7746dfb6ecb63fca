"""Devices, modules and optimizers of a Brain."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.clipping import by_name, clippers, limit_of
from trainer.distributed.strategy import Strategy
from trainer.optim.precision import Precision
from trainer.optim.step import Update
from trainer.options import RunOptions, nearest


def pick_device(name: str) -> torch.device:
    """Return the device of this process.

    Args:
        name: "auto" (CUDA where there is one, else the CPU) or a torch device; "cuda" without an
            index is one GPU per rank.

    Raises:
        ValueError: for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:0, mps …") from None
    if device.type == "cuda":
        found = torch.cuda.device_count()
        index = device.index if device.index is not None else distributed.local_rank()
        if index >= found:
            raise ValueError(
                f"device {name!r} asks for GPU {index}, but this machine has "
                f"{found or 'no'} GPU{'s' if found != 1 else ''} that torch can use; "
                "use --device cpu, or auto to take what there is"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available on this machine; use --device cpu or auto")
    return device


def prepare_modules(modules: Mapping[str, nn.Module], options: RunOptions) -> nn.ModuleDict:
    """Return the modules by name, compiled in place where the options ask for it.

    Raises:
        ValueError: for something that is no module, and for an unknown name in compile_modules.
    """
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"modules[{name!r}] is a {type(module).__name__}; allowed: a torch.nn.Module"
            )
    chosen = options.compile_modules
    for name in chosen or ():
        if name not in modules:
            raise ValueError(
                f"compile_modules names {name!r}, which is not among the modules "
                f"{', '.join(modules)}{nearest(name, modules)}"
            )
    if options.compile or chosen:
        for name in modules if chosen is None else chosen:
            modules[name].compile(mode=options.compile_mode)
    return nn.ModuleDict(modules)


def make_updates(
    optimizers: Mapping[str, torch.optim.Optimizer],
    modules: nn.Module,
    options: RunOptions,
    precision: Precision,
    schedules: Any,
    strategy: Strategy,
    on_hand_step: Callable[[Update], None],
) -> dict[str, Update]:
    """Build an `Update` for every optimizer.

    Args:
        optimizers: by name.
        modules: all modules, for names of parameters and sparse embeddings.
        options: clipping, accumulation and guard.
        precision: gives each optimizer its loss scaler.
        schedules: a factory that takes an optimizer, a mapping of these by optimizer, or None.
        strategy: how gradients travel between processes.
        on_hand_step: called before a step that a recipe takes past `Brain.optimize`.
    """
    names = list(optimizers)
    parameters: dict[Tensor, str] = {p: name for name, p in modules.named_parameters()}
    sparse: set[Tensor] = {
        p
        for module in modules.modules()
        if getattr(module, "sparse", False) is True
        for p in module.parameters(recurse=False)
    }
    default_limit = RunOptions().max_grad_norm  # For an optimizer that a mapping leaves out.
    clips = clippers(options.clip, options.max_grad_norm, default_limit, optimizers, parameters)
    updates = {}
    for name, optimizer in optimizers.items():
        own = {p for group in optimizer.param_groups for p in group["params"]}
        updates[name] = Update(
            name,
            optimizer,
            precision.scaler(),
            clips[name],
            _schedule(by_name(schedules, name, names, "schedule"), optimizer, options),
            options.grad_accumulation_factor,
            options.skip_nonfinite_grads,
            alone=len(names) == 1 and parameters.keys() <= own,
            strategy=strategy,
        )
        updates[name].sparse = sparse & own
        updates[name].watch(on_hand_step)
    return updates


def find_optimizers(
    optimizers_dict: Any, attributes: Mapping[str, Any], precision: Precision
) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers that ``init_optimizers`` made, by name.

    Args:
        optimizers_dict: the Brain's ``optimizers_dict``, or None.
        attributes: the Brain's attributes, among which optimizers are looked for otherwise.
        precision: training precision.

    Raises:
        ValueError: for something that is no optimizer or needs a closure, for one that has two
            names, for a clip limit that is none, and for float16 weights under fp16.
    """
    found = optimizers_dict
    if found is None:
        found = {}
        for name, value in attributes.items():  # Several attributes may hold the same one.
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
            if precision.name == "fp16" and any(p.dtype is torch.float16 for p in group["params"]):
                raise ValueError(
                    f"the optimizer {name!r} has weights in float16; precision fp16 computes in "
                    "float16 and needs weights in float32: leave out .half()"
                )
    return dict(found)


def _schedule(factory: Any, optimizer: torch.optim.Optimizer, options: RunOptions) -> Any:
    if factory is None:
        return None
    if not callable(factory):
        raise ValueError(
            f"schedule is a {type(factory).__name__}; allowed: what makes one from an optimizer, "
            "such as !name:trainer.schedules.WarmupDecay {…}, or a mapping of these by optimizer"
        )
    schedule = factory(optimizer)
    if not hasattr(schedule, "every"):  # One of torch's own.
        by_metric = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        schedule.every = "epoch" if by_metric else options.schedule_every
    return schedule
