"""Choice of the device, and preparation of the modules of a Brain or a trained model on it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from trainer import distributed
from trainer.checkpoint.user_state import keep_in_state_dict
from trainer.options import RunOptions, nearest
from trainer.texts import first_line


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
        device = None
    if device is None or (device.type == "cpu" and device.index):
        raise ValueError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:0, mps …")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        index = device.index if device.index is not None else distributed.local_rank()
        if index >= found:
            raise ValueError(
                f"device {name!r} asks for GPU {index}, but this machine has "
                f"{found or 'no'} GPU{'s' if found != 1 else ''} that torch can use; "
                "use --device cpu or auto"
            )
        return torch.device("cuda", index)
    try:
        torch.ones(1, device=device).item()  # A meta tensor cannot be read.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error).partition(". ")[0]  # A list of backends may follow.
        raise ValueError(
            f"device {name!r} cannot be used on this machine ({reason}); use --device cpu or auto"
        ) from None
    return device


def prepare_modules(
    modules: Mapping[str, nn.Module], options: RunOptions, device: torch.device
) -> nn.ModuleDict:
    """Return the modules by name on a device, compiled in place where the options ask for it.

    Args:
        modules: modules by name.
        options: ``compile``, ``compile_modules`` and ``compile_mode``.
        device: device that the modules are moved to.

    Raises:
        ValueError: if ``modules`` is no mapping of modules or has lazy modules without shapes, or
            if compile_modules has an unknown name.
    """
    if not isinstance(modules, (Mapping, nn.ModuleDict)):
        raise ValueError(
            f"modules is a {type(modules).__name__}; allowed: a mapping from names to modules, "
            "such as {'model': net}"
        )
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"modules[{name!r}] is a {type(module).__name__}; allowed: a torch.nn.Module"
            )
        tensors = (*module.named_parameters(str(name)), *module.named_buffers(str(name)))
        if unknown := [name for name, tensor in tensors if is_lazy(tensor)]:
            raise ValueError(
                f"the shape of {unknown[0]}, of a lazy module, is not known yet: run a "
                "batch through the network, under torch.no_grad(), before you make the Brain"
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
    try:
        prepared = nn.ModuleDict(modules).to(device)
    except (KeyError, TypeError) as error:
        raise ValueError(f"modules has a name that cannot be one: {error.args[0]}") from None
    for module in prepared.modules():
        if type(module).to is not nn.Module.to:  # It may move tensors that are no buffers.
            module.to(device)
    keep_in_state_dict(prepared)
    return prepared
