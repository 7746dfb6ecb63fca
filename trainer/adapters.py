"""Adapters, such as LoRA, that peft puts into modules.

    adapters:
      encoder: {r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}

A key names a module of the Brain, or a part of one (`model.encoder`); its value has the arguments
of `peft.LoraConfig`, or is a configuration of peft. The module keeps its class and its methods. Its
own parameters are frozen, except layers in ``modules_to_save`` and the biases that ``bias`` names;
modules without an adapter train as before.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
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
from trainer.texts import first_names

KINDS = ("HRA", "IA3", "LOHA", "LOKR", "LORA")  # kinds that share no weights among layers
# Values of init_lora_weights that compute an adapter from the weights of its layer.
DERIVED = ("corda", "loftq", "lora_ga", "mica", "olora", "pissa")
MAX_SHOWN = 8  # names in a message
MAX_MESSAGE = 400  # characters of a message of peft, which may show whole modules
MAX_EFFORT = 30.0  # log2 of the number of ways to match all names by a regular expression


def apply_adapters(modules: nn.Module, adapters: Any) -> None:
    """Put adapters into modules, in place.

    Args:
        modules: all modules of a Brain.
        adapters: arguments of `peft.LoraConfig`, or a configuration of peft, by name of a module;
            None for no adapters.

    Raises:
        ValueError: a module, a layer or an argument does not exist or cannot be used.
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
    """Import and return peft, which takes seconds.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"adapters need peft ({error}): pip install 'cortex-speech[hf]'"
        ) from error
    return peft


def _inject(name: str, module: nn.Module, given: Any) -> None:
    """Put an adapter into a module, in place."""
    peft, where = import_peft(), f"adapters.{name}"
    config = _config(peft, where, given)
    asked = config.to_dict()
    before = getattr(module, "peft_config", {}).get("default")
    if before is not None and vars(module).get("adapted_by") == asked:
        return  # Another Brain has put the same adapters into these modules.
    if before is not None or any(map(_is_adapted, module.modules())):
        raise ValueError(f"{where}: the module has adapters already, which would be lost")
    for key in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save",
                "layers_pattern", "rank_pattern", "alpha_pattern"):  # fmt: skip
        _check_effort(where, key, getattr(config, key, None), module)
    found = _check_layers(where, "target_modules", config.target_modules, module)
    _check_layers(where, "modules_to_save", getattr(config, "modules_to_save", None), module)
    uncalled = [
        f"{each}.out_proj" if each else "out_proj"
        for each, layer in module.named_modules()
        if isinstance(layer, nn.MultiheadAttention)
    ]
    if config.target_modules == "all-linear" and uncalled and not config.exclude_modules:
        config.exclude_modules = uncalled
    try:
        with _plain_weights(found):
            peft.inject_adapter_in_model(config, module)
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{where}: {textwrap.shorten(str(error), MAX_MESSAGE)}") from error
    # In vars(), since nn.Module's own attributes are parameters, buffers and modules.
    vars(module)["adapted_by"] = asked
    _mend_layers(module)


def _mend_layers(module: nn.Module) -> None:
    """Correct adapted layers, and layers of torch that would not call them."""
    layers: list[Any] = [*module.modules()]
    for layer in layers:
        if _is_adapted(layer):
            base = layer.get_base_layer()
            for part in getattr(layer, "lora_A", {}).values() if hasattr(base, "dilation") else ():
                part.dilation = base.dilation  # peft does not copy it.
            if type(layer).__name__ == "MultiheadAttention":
                layer.register_forward_pre_hook(_keep_weights)
                layer.register_forward_hook(_put_weights_back, always_call=True)
        elif isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerEncoder) and any(
            map(_is_adapted, layer.modules())
        ):
            # In evaluation torch's fast path reads the weights of the parts without calling them,
            # so that adapters would have no effect. A part with a forward hook is called.
            if isinstance(layer, nn.TransformerEncoder):
                layer.use_nested_tensor = False
            else:
                layer.norm1.register_forward_hook(_do_nothing)


def _config(peft: Any, where: str, given: Any) -> Any:
    """Return the configuration of an adapter: built from arguments, or a copy of the given one."""
    if isinstance(given, Mapping):
        from trainer.config.pretrained import BOUND  # Programs without a YAML start faster.

        known = [
            each.name
            for each in dataclasses.fields(peft.LoraConfig)
            if each.init and each.name != "peft_type"
        ]
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


def _check_effort(where: str, key: str, patterns: Any, module: nn.Module) -> None:
    """Refuse a regular expression that may take very long; a run folder may come from elsewhere."""
    names = [name for name, _ in module.named_modules()]
    for each in (patterns,) if isinstance(patterns, str) else patterns or ():
        # peft matches a text of a list at the end of a name.
        pattern = str(each) if isinstance(patterns, str) else rf"(.*\.)?({each})"
        if _effort(pattern, max(map(len, names))) + math.log2(len(names)) > MAX_EFFORT:
            raise ValueError(
                f"{where}: {key} has {str(each)[:100]!r}, a regular expression that may take very "
                "long: no group may be repeated, and few parts of any length may follow each other;"
                " write fewer, or a list of names"
            )


def _effort(pattern: str, length: int) -> float:
    """Return log2 of an upper bound of the ways in which a regular expression may match a text."""
    plain = re.sub(r"\\.|\[\^?\]?[^]]*\]", "x", pattern, flags=re.DOTALL)
    plain = re.sub(r"\(\?[:=!]", "(", plain)
    if re.search(r"\)[*+{]|\(\?", plain):  # A repeated group, or one of a rare kind.
        return math.inf
    parts, repeats = plain.count("(") + 1, len(re.findall("[*+{]", plain))
    alternatives = parts * math.log2(plain.count("|") / parts + 1)
    return alternatives + plain.count("?") + math.log2(math.comb(length + repeats, repeats))


def _check_layers(where: str, key: str, wanted: Any, module: nn.Module) -> list[nn.Module]:
    """Return the layers that a configuration names; refuse those that it cannot adapt."""
    layers = {name: layer for name, layer in module.named_modules() if name}
    found: set[str] = set()
    missing: list[str] = []
    if isinstance(wanted, str) and key == "modules_to_save":  # peft would take it by letters.
        raise ValueError(f"{where}: {key} is {wanted!r}; allowed: a list of names of layers")
    if wanted is None or wanted == "all-linear":
        pass
    elif isinstance(wanted, str):
        try:
            found = {name for name in layers if re.fullmatch(wanted, name)}
        except re.error as error:
            raise ValueError(
                f"{where}: {key} {wanted!r} is no regular expression: {error}"
            ) from None
        missing = [] if found else [wanted]
    else:
        for end in sorted(map(str, wanted)):
            matches = {name for name in layers if f".{name}".endswith(f".{end}")}
            found |= matches
            missing += [] if matches else [end]
    if missing:
        ends = list(dict.fromkeys(
            name.rpartition(".")[2] for name, layer in layers.items()
            if not any(True for _ in layer.children()) and any(True for _ in layer.parameters())
        ))  # fmt: skip
        raise ValueError(
            f"{where}: {key} has {missing[0]!r}, which matches no layer of the "
            f"{type(module).__name__}{nearest(missing[0], [*ends, *layers])}; its layers end in "
            f"{first_names(ends, MAX_SHOWN) or 'nothing: it is one layer'}"
        )
    for name in sorted(found) if key == "target_modules" else ():
        if (mode := getattr(layers[name], "padding_mode", "zeros")) != "zeros":
            raise ValueError(
                f"{where}: {key} has {name!r}, whose padding is {mode}, and adapters of peft pad "
                "with zeros: name other layers"
            )
        parent = name.rpartition(".")[0]
        if isinstance(layers.get(parent, module), nn.MultiheadAttention):
            raise ValueError(
                f"{where}: {key} has {name!r}, whose adapter would have no effect, since "
                f"torch.nn.MultiheadAttention does not call it: name {parent!r}"
            )
    return [layers[name] for name in sorted(found)]


@contextmanager
def _plain_weights(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager in which layers have plain weights, without weight norm and the like.

    peft makes layers of the class of a convolution, and a parametrized layer has a class of its own
    that it cannot make.
    """
    removed: list[tuple[Any, list[nn.Module], list[Tensor]]] = []
    for layer in cast(Iterable[Any], layers):
        if is_parametrized(layer, "weight"):
            behind = layer.parametrizations["weight"].parameters(recurse=False)
            tensors = [p.detach().clone() for p in behind]
            removed.append((layer, _remove_computation(layer), tensors))
    try:
        yield
    finally:
        for layer, steps, tensors in removed:
            for step in steps:
                register_parametrization(layer, "weight", step)
            owned = layer.parametrizations["weight"].parameters(recurse=False)
            for own, tensor in zip(owned, tensors, strict=True):
                own.data.copy_(tensor)


def _remove_computation(layer: Any) -> list[nn.Module]:
    """Make a plain parameter of a parametrized weight; return its parametrizations."""
    steps = layer.parametrizations["weight"]
    steps.requires_grad_(True)  # Without gradients torch would make a buffer of it.
    with torch.enable_grad():
        remove_parametrizations(layer, "weight")
    return list(steps)


def _is_adapted(layer: nn.Module) -> bool:
    """Return True for a layer of peft around a layer of the model."""
    return hasattr(type(layer), "get_base_layer")


def _keep_weights(layer: Any, _: Any) -> None:
    """Forward pre-hook that keeps the weights of an attention.

    peft adds the adapter to them for a call and subtracts it afterwards: rounding would change the
    frozen weights with every batch.
    """
    base = layer.get_base_layer()
    vars(layer)["own_weights"] = [
        (owner, name, getattr(owner, name))
        for owner, name in ((base, "in_proj_weight"), (base.out_proj.get_base_layer(), "weight"))
    ]


def _put_weights_back(layer: Any, *_: Any) -> None:
    """Forward hook that restores the weights of an attention."""
    for owner, name, weight in vars(layer).pop("own_weights", ()):
        delattr(owner, name)
        owner.register_parameter(name, weight)


def _do_nothing(*_: Any) -> None:
    """Forward hook without effect: a layer that has one is called, not replaced by a fast path."""


def plain_name(name: str) -> str:
    """Return the name that a tensor has in a model without adapters.

    Weights of the adapters themselves keep ``lora_A`` and the like, as peft saves them.
    """
    plain = re.sub(r"\.(original_module|modules_to_save\.[^.]+)\.", ".", clean_name(name))
    return re.sub(r"(\.lora_\w+)\.default(?=\.|$)", r"\1", plain)


def is_replaced(name: str) -> bool:
    """Return True for a tensor of an original layer that a copy in ``modules_to_save`` replaces."""
    return ".original_module." in name


def base_parameters(modules: nn.Module, adapters: Collection[str]) -> dict[str, Tensor]:
    """Return the parameters, by name, that adapters have frozen.

    Args:
        modules: all modules of a Brain.
        adapters: names of the modules with adapters.
    """
    inside = tuple(f"{name}." for name in adapters)
    return {
        name: p
        for name, p in modules.named_parameters()
        if name.startswith(inside) and not p.requires_grad
    }


def drop_base(
    optimizers: Iterable[torch.optim.Optimizer], modules: nn.Module, adapters: Collection[str]
) -> None:
    """Take the parameters that adapters have frozen out of optimizers.

    Args:
        optimizers: optimizers that have not stepped yet.
        modules: all modules of a Brain.
        adapters: names of the modules with adapters.
    """
    inside = tuple(f"{name}." for name in adapters)
    # Some layers of peft make new objects of the parameters inside, with the same memory.
    outside = {p for name, p in modules.named_parameters() if not name.startswith(inside)}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [p for p in group["params"] if p.requires_grad or p in outside]
            for gone in {*group["params"]} - {*kept}:
                optimizer.state.pop(gone, None)
            group["params"] = kept


def derive_adapters(modules: nn.Module, loaded: Collection[str]) -> None:
    """Recompute adapters that depend on the weights of their layers, after these were loaded.

    These are magnitudes of DoRA, and initial values such as PiSSA's. Loaded adapters stay as they
    are.

    Args:
        modules: all modules of a Brain, before optimizers are built.
        loaded: names of the tensors that were loaded.
    """
    based, adapted, scaled = (
        {name.rpartition(part)[0] for name in loaded}
        for part in (".base_layer.", ".lora_", ".lora_magnitude_vector.")
    )
    configs: dict[str, Any] = {}
    for name, layer in list(modules.named_modules()):
        if "peft_config" in vars(layer):
            configs[f"{name}."] = vars(layer)["peft_config"]["default"]
        if name not in based or not hasattr(layer, "lora_variant"):
            continue
        # The last match: adapters are not nested.
        config = next(configs[each] for each in reversed(configs) if f"{name}.".startswith(each))
        if str(config.init_lora_weights).startswith(DERIVED):
            if name not in adapted:
                r, alpha = layer.r["default"], layer.lora_alpha["default"]
                layer.update_layer("default", r=r, lora_alpha=alpha, config=config)
        elif layer.lora_variant and name not in scaled:
            layer.lora_variant["default"].init(layer, adapter_name="default", config=config)


def merge_adapters(modules: nn.Module) -> None:
    """Merge adapters into the weights that they adapt, in place, so that plain layers remain.

    Args:
        modules: all modules of a Brain.

    Raises:
        ValueError: the merged weights would not be finite, or a layer cannot be merged, such as a
            convolution with groups.
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
            try:
                plain = _merged(layer)
            except (NotImplementedError, AttributeError) as error:
                raise ValueError(f"the adapter of {name} cannot be merged: {error}") from error
        else:
            for key in ("peft_config", "adapted_by"):
                vars(layer).pop(key, None)
            continue
        parent, _, last = name.rpartition(".")
        setattr(modules.get_submodule(parent), last, plain)
        within += (f"{name}.",)


def _merged(layer: Any) -> nn.Module:
    """Return the plain layer of an adapted one, with the adapter merged into its weight."""
    plain = layer.get_base_layer()
    # peft would add to a computed weight, which the next call computes anew.
    computed = _remove_computation(plain) if is_parametrized(plain, "weight") else []
    layer.merge(safe_merge=True)
    weight = plain.get_parameter("weight").detach().clone()
    for each in computed:
        register_parametrization(plain, "weight", each)
    # Weight norm can represent any weight; spectral norm cannot, and is then removed.
    if computed and not torch.allclose(plain.weight, weight, 1e-5, 1e-7):
        _remove_computation(plain)
        plain.get_parameter("weight").data = weight
    return cast(nn.Module, plain)
