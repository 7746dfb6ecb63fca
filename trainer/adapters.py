"""Adapters, such as LoRA, that peft puts into modules.

    adapters:
      encoder: {r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}

A key names a module of the Brain, or a part of one (`model.encoder`); its value is the arguments
of `peft.LoraConfig`, or a configuration of peft. The module keeps its class and its methods. Its
own parameters are frozen, but for the layers in ``modules_to_save`` and the biases that ``bias``
names; modules without an adapter train as before.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)

from trainer.optim.groups import clean_name
from trainer.options import nearest

KINDS = ("HRA", "IA3", "LOHA", "LOKR", "LORA")  # each layer of which has its own weights
MAX_SHOWN = 8  # names in a message


def apply_adapters(modules: nn.Module, adapters: Any) -> None:
    """Put adapters into modules, in place.

    Args:
        modules: all modules of a Brain.
        adapters: arguments of `peft.LoraConfig`, or a configuration of peft, by name of a module;
            None for no adapters.

    Raises:
        ValueError: for a module, a layer or an argument that does not exist; names it.
        ImportError: peft is not installed.
    """
    if adapters is None:
        return
    if not isinstance(adapters, Mapping):
        raise ValueError(
            f"adapters is a {type(adapters).__name__}; allowed: a mapping from names of modules to "
            "arguments of peft.LoraConfig, such as {encoder: {r: 8, target_modules: [q_proj]}}"
        )
    known = {name: module for name, module in modules.named_modules() if name}
    for name, given in adapters.items():
        if name not in known:
            raise ValueError(
                f"adapters names {name!r}, which is not among the modules "
                f"{', '.join(each for each, _ in modules.named_children())}{nearest(name, known)}"
            )
        _inject(name, known[name], given)


def import_peft() -> Any:
    """Import peft, which takes seconds."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"adapters need peft ({error}): pip install 'cortex-speech[hf]'"
        ) from error
    return peft


def _inject(name: str, module: nn.Module, given: Any) -> None:
    peft, where = import_peft(), f"adapters.{name}"
    config = _config(peft, where, given)
    before = getattr(module, "peft_config", {}).get("default")
    if before is not None and vars(module).get("adapted_by") == config.to_dict():
        return  # Another Brain has the same modules.
    if before is not None or any(map(_is_adapted, module.modules())):
        raise ValueError(f"{where}: the module has adapters already, which would be lost")
    found = _check_layers(where, "target_modules", config.target_modules, module)
    _check_layers(where, "modules_to_save", getattr(config, "modules_to_save", None), module)
    uncalled = [
        f"{each}.out_proj" if each else "out_proj"
        for each, layer in module.named_modules()
        if isinstance(layer, nn.MultiheadAttention)
    ]
    if config.target_modules == "all-linear" and uncalled and not config.exclude_modules:
        config.exclude_modules = uncalled
    asked = config.to_dict()
    try:
        with _plain_weights(found):
            peft.inject_adapter_in_model(config, module)
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    # Not as an attribute of a module, which would look for it among its parameters.
    vars(module)["adapted_by"] = asked
    for layer in module.modules():
        if type(layer).__name__ == "MultiheadAttention" and _is_adapted(layer):
            layer.register_forward_pre_hook(_keep_weights)
            layer.register_forward_hook(_put_weights_back, always_call=True)
    for layer in module.modules():
        # In evaluation torch computes these from the weights of their parts, whose adapters would
        # have no effect; layers with a hook it calls.
        if isinstance(layer, nn.TransformerEncoderLayer) and any(map(_is_adapted, layer.modules())):
            layer.norm1.register_forward_hook(_do_nothing)
        if isinstance(layer, nn.TransformerEncoder) and any(map(_is_adapted, layer.modules())):
            layer.use_nested_tensor = False


def _config(peft: Any, where: str, given: Any) -> Any:
    """Return the configuration of an adapter."""
    if isinstance(given, Mapping):
        from trainer.config.pretrained import BOUND  # Programs without a YAML start faster.

        known = [each.name for each in dataclasses.fields(peft.LoraConfig) if each.init]
        for key, value in given.items():
            if key not in known:
                raise ValueError(
                    f"{where}: {key!r} is no argument of peft.LoraConfig{nearest(key, known)}"
                )
            if key in BOUND and value not in BOUND[key]:
                allowed = " or ".join(map(repr, BOUND[key]))
                raise ValueError(f"{where}: {key} must be {allowed}, not {value!r}")
        try:
            given = peft.LoraConfig(**given)
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    if not isinstance(given, peft.PeftConfig) or given.peft_type not in KINDS:
        kind = getattr(given, "peft_type", type(given).__name__)
        raise ValueError(
            f"{where} is a {getattr(kind, 'value', kind)}; allowed: arguments of peft.LoraConfig, "
            f"or a configuration of peft of one of the kinds {', '.join(KINDS)}"
        )
    return copy.deepcopy(given)  # peft changes it.


def _check_layers(where: str, key: str, wanted: Any, module: nn.Module) -> list[nn.Module]:
    """Return the layers that a configuration names.

    Raises:
        ValueError: for a name that matches none, or one whose adapter would have no effect.
    """
    layers = {name: layer for name, layer in module.named_modules() if name}
    parents = {name: layers.get(name.rpartition(".")[0], module) for name in layers}
    by_regex = isinstance(wanted, str)
    if wanted is None or wanted == "all-linear":
        found, missing = set(), []
    elif by_regex:
        try:
            found = {name for name in layers if re.fullmatch(wanted, name)}
        except re.error as error:
            raise ValueError(
                f"{where}: {key} {wanted!r} is no regular expression: {error}"
            ) from None
        missing = [] if found else [wanted]
    else:
        matches = {each: _ending(layers, str(each)) for each in sorted(wanted, key=str)}
        found = {name for names in matches.values() for name in names}
        missing = [str(each) for each, names in matches.items() if not names]
    if missing:
        ends = list(dict.fromkeys(
            name.rpartition(".")[2] for name, layer in layers.items()
            if not any(True for _ in layer.children()) and any(True for _ in layer.parameters())
        ))  # fmt: skip
        raise ValueError(
            f"{where}: {key} has {missing[0]!r}, which matches no layer of the "
            f"{type(module).__name__}{nearest(missing[0], [*ends, *layers])}; its layers end in "
            f"{', '.join(ends[:MAX_SHOWN]) or 'nothing: it is one layer'}"
            f"{', …' if len(ends) > MAX_SHOWN else ''}"
        )
    for name in sorted(found) if key == "target_modules" else ():
        if isinstance(parents[name], nn.MultiheadAttention):
            parent = name.rpartition(".")[0]
            raise ValueError(
                f"{where}: {key} has {name!r}, whose adapter would have no effect, since "
                f"torch.nn.MultiheadAttention does not call it: name {parent!r}"
            )
    return [layers[name] for name in sorted(found)]


@contextmanager
def _plain_weights(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager in which no weight is computed, as by weight norm.

    peft makes layers of the class of a convolution, which cannot be that of one with such a weight.
    """
    computed: list[Any] = [layer for layer in layers if is_parametrized(layer, "weight")]
    before = [_computation(layer) for layer in computed]
    for layer in computed:
        _remove_computation(layer)
    try:
        yield
    finally:
        for layer, (steps, tensors) in zip(computed, before, strict=True):
            for step in steps:
                register_parametrization(layer, "weight", step)
            owned = layer.parametrizations["weight"].parameters(recurse=False)
            for own, tensor in zip(owned, tensors, strict=True):
                own.data.copy_(tensor)


def _computation(layer: Any) -> tuple[list[nn.Module], list[Tensor]]:
    """Return the steps by which the weight of a layer is computed, and what it is computed from."""
    steps = layer.parametrizations["weight"]
    return list(steps), [p.detach().clone() for p in steps.parameters(recurse=False)]


def _remove_computation(layer: Any) -> None:
    # Else torch makes a buffer of the weight.
    layer.parametrizations["weight"].requires_grad_(True)
    with torch.enable_grad():
        remove_parametrizations(layer, "weight")


def _ending(names: Iterable[str], end: str) -> list[str]:
    return [name for name in names if f".{name}".endswith(f".{end}")]


def _is_adapted(layer: nn.Module) -> bool:
    """Return True for a layer of peft around a layer of the model."""
    return hasattr(type(layer), "get_base_layer")


# peft computes an attention of torch with changed weights, and takes the change back by
# subtraction: rounding would move the frozen weights with every batch.


def _keep_weights(layer: Any, _: Any) -> None:
    base = layer.get_base_layer()
    vars(layer)["own_weights"] = [
        (owner, name, getattr(owner, name))
        for owner, name in ((base, "in_proj_weight"), (base.out_proj.get_base_layer(), "weight"))
    ]


def _put_weights_back(layer: Any, *_: Any) -> None:
    for owner, name, weight in vars(layer).pop("own_weights", ()):
        delattr(owner, name)
        owner.register_parameter(name, weight)


def _do_nothing(*_: Any) -> None:
    """Forward hook that is there to be one."""


def plain_name(name: str) -> str:
    """Return the name that a tensor has in a model without adapters.

    Weights of the adapters themselves keep ``lora_A`` and the like, as peft saves them.
    """
    plain = re.sub(r"\.(original_module|modules_to_save\.[^.]+)\.", ".", clean_name(name))
    return re.sub(r"(\.lora_\w+)\.default(?=\.|$)", r"\1", plain)


def is_replaced(name: str) -> bool:
    """Return True for a tensor of a layer of which ``modules_to_save`` has a trained copy."""
    return ".original_module." in name


def base_parameters(modules: nn.Module, adapters: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return the parameters, by name, that adapters have frozen; they never train."""
    inside = tuple(f"{name}." for name in adapters or ())
    return {
        name: p
        for name, p in modules.named_parameters()
        if name.startswith(inside) and not p.requires_grad
    } if inside else {}  # fmt: skip


def drop_base(
    optimizers: Iterable[torch.optim.Optimizer],
    modules: nn.Module,
    adapters: Mapping[str, Any] | None,
) -> None:
    """Take the parameters that adapters have frozen out of optimizers.

    Args:
        optimizers: optimizers that have not stepped yet.
        modules: all modules of a Brain.
        adapters: adapters by name of a module.
    """
    inside = tuple(f"{name}." for name in adapters or ())
    # Some layers of peft make new objects of the parameters inside, with the same memory.
    outside = {p for name, p in modules.named_parameters() if not name.startswith(inside)}
    for optimizer in optimizers if inside else ():
        for group in optimizer.param_groups:
            gone = [p for p in group["params"] if not (p.requires_grad or p in outside)]
            group["params"] = [p for p in group["params"] if p.requires_grad or p in outside]
            for p in gone:
                optimizer.state.pop(p, None)


def merge_adapters(modules: nn.Module) -> None:
    """Merge adapters into the weights that they adapt, in place: plain layers are left.

    Raises:
        ValueError: the merged weights would not be finite.
    """
    within: tuple[str, ...] = ()
    for name, layer in list(modules.named_modules()):
        if within and name.startswith(within):
            continue
        if hasattr(layer, "unload_and_optionally_merge_module"):
            plain = layer.unload_and_optionally_merge_module(
                merge=True, safe_merge=True, adapter_names=None
            )
        elif _is_adapted(layer):
            plain = _merged(layer)
        else:
            for key in ("peft_config", "adapted_by"):
                vars(layer).pop(key, None)
            continue
        parent, _, last = name.rpartition(".")
        setattr(modules.get_submodule(parent), last, plain)
        within += (f"{name}.",)


def _merged(layer: Any) -> nn.Module:
    """Return the plain layer of an adapted one, with the adapter in its weight."""
    plain = layer.get_base_layer()
    computed = _computation(plain)[0] if is_parametrized(plain, "weight") else []
    if computed:  # peft would change what is computed, and not what it is computed from.
        _remove_computation(plain)
    layer.merge(safe_merge=True)
    weight = plain.get_parameter("weight").detach().clone()
    for each in computed:
        register_parametrization(plain, "weight", each)
    # Weight norm can give any weight; spectral norm cannot, and is left out then.
    if computed and not torch.allclose(plain.weight, weight, 1e-5, 1e-7):
        _remove_computation(plain)
        plain.get_parameter("weight").data = weight
    return cast(nn.Module, plain)


def describe_trainable(modules: nn.Module, trained: Iterable[Tensor]) -> str:
    """Return how many of how many parameters train, in all and by module.

    Args:
        modules: all modules of a Brain.
        trained: parameters of the optimizers.
    """
    owned = {p for p in trained if p.requires_grad}

    def counted(module: nn.Module) -> tuple[int, int]:
        params = list(module.parameters())
        return sum(p.numel() for p in params if p in owned), sum(p.numel() for p in params)

    count, total = counted(modules)
    text = f"trainable: {count:,} of {total:,} parameters ({count / max(total, 1):.2%})"
    parts = {name: counted(module) for name, module in modules.named_children()}
    if len(parts) > 1:
        text += ": " + ", ".join(
            f"{name} {own:,} of {all_:,}" for name, (own, all_) in parts.items()
        )
    return text.replace("%)", " %)")
