"""Parameter groups by patterns of parameter names, for the optimizers of any recipe.

    param_groups:
      "encoder.*": {lr: 1e-5, layer_decay: 0.9, freeze_until: 1000}
      "*.bias|*norm*": {weight_decay: 0}
      "*": {lr: 1e-3}

Every pattern that matches a parameter applies to it; for each key the first pattern that sets it
wins: biases of the encoder have its rate and no weight decay.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trainer import checks, distributed
from trainer.clipping.gradients import limit_of
from trainer.options import nearest

if TYPE_CHECKING:
    from trainer.optim.step import Update

# Settings that are logged at the start of a run.
SHOWN = ("weight_decay", "lr_factor", "max_grad_norm")
# Settings besides those of the optimizer.
OWN = ("layer_decay", "lr_factor", "max_grad_norm", "freeze_until", "eval")
# Keys of torch's groups that are no settings, or belong to the optimizer as a whole.
WHOLE = ("params", "param_names", "capturable", "differentiable", "foreach", "fused")
# Parts of names that torch.compile and peft insert.
WRAPPED = re.compile(r"(^|\.)(?:_orig_mod|base_model\.model|base_layer)(?=\.|$)")
# Names of layers in transformers, torch and torchaudio, without convolutional front ends. If a
# network has none of these, any number in a name counts as that of a layer.
LAYER = re.compile(r"(?:^|\.)(?:(?!conv_)\w*(?:layers?|blocks?)|h)\.\d+(?=\.|$)")
NUMBER = re.compile(r"(?:^|\.)\d+(?=\.|$)")

Patterns = Mapping[str, Mapping[str, Any]]
# For each parameter and key, the pattern that sets it and the value.
Chosen = dict[Tensor, dict[str, tuple[str, Any]]]

logger = logging.getLogger("trainer")


def clean_name(name: str) -> str:
    """Return the name of a parameter or module without the parts that peft and torch.compile add.

    >>> clean_name("encoder.base_model.model.layers.0.query.base_layer.weight")
    'encoder.layers.0.query.weight'
    """
    return WRAPPED.sub("", name).lstrip(".")


class ParameterGroups:
    """The hyperparameter ``param_groups``: divides optimizers, and freezes parameters for a time.

    Parameters keep the settings of the group that the recipe made, except those that patterns set:
    settings of the optimizer (``lr``, ``weight_decay``, ``betas`` …), and:

    - ``layer_decay``: multiplies ``lr`` by layer_decay^d, where d is the number of layers between
      the parameter and the top of what the pattern matches. Layers are counted in the order of the
      modules; a parameter without a number belongs to the layer before it, or to a layer below the
      first one. Clark et al. 2020 (ELECTRA, arXiv 2003.10555) and Bao et al. 2022 (BEiT, arXiv
      2106.08254), who count the head as one more layer.
    - ``lr_factor``: multiplies the learning rate that the schedule gives, in each step.
    - ``max_grad_norm``: clip limit of all gradients of the pattern together.
    - ``freeze_until``: number of optimizer steps after which the parameters train. Parameters that
      the recipe has frozen stay frozen.
    - ``eval``: True if modules stay in evaluation mode while none of their parameters trains.

    Args:
        setting: a mapping from patterns of parameter names to keys and values, or these by
            optimizer. Patterns have ``*``, ``?`` and ``[…]`` as in file names, and ``|`` between
            alternatives.
    """

    def __init__(self, setting: Any) -> None:
        self._setting = setting
        self._until: dict[Tensor, float] = {}  # Number of steps that a parameter is frozen for.
        # Name of the optimizer, number of steps, and parameters frozen for these.
        self._frozen: list[tuple[str, float, list[Tensor]]] = []
        self._modules = nn.Module()
        self._evaluated: dict[Tensor, str] = {}  # Parameters with `eval`, and its pattern.

    def regroup(
        self, optimizers: Mapping[str, Optimizer], modules: nn.Module, kept: Iterable[str] = ()
    ) -> None:
        """Divide the groups of optimizers by the patterns, and log the result.

        Args:
            optimizers: by name.
            modules: all modules, for the names of parameters.
            kept: names of optimizers that are divided already.
        """
        self._modules, self._frozen, self._evaluated = modules, [], {}
        names = _names(optimizers, modules)
        for patterns, divided in _scopes(self._setting, optimizers):
            owned = {p for optimizer in divided.values() for p in _params(optimizer)}
            others = {p for each in optimizers.values() for p in _params(each)} - owned
            names_here = {p: own for p, own in names.items() if p not in others}
            matched = {
                pattern: _match(pattern, keys, names_here, owned)
                for pattern, keys in patterns.items()
            }
            self._evaluated |= _evaluated(patterns, matched)
            used: set[tuple[str, str]] = set()
            for name, optimizer in divided.items():
                chosen = _choose(name, optimizer, patterns, matched)
                used |= {(each[0], key) for own in chosen.values() for key, each in own.items()}
                self._freeze(name, chosen)
                if name not in kept:
                    _divide(name, optimizer, chosen, matched)
                    if distributed.is_main():
                        self._log(name, optimizer)
            for pattern, keys in patterns.items():
                late = [key for key in keys if (pattern, key) not in used and key != "eval"]
                if late and pattern != "*":  # "*" stands for the rest.
                    logger.warning(
                        "param_groups: %r comes too late for %s, which earlier patterns set for "
                        "every parameter that it matches", pattern, ", ".join(late),
                    )  # fmt: skip
        resting = {
            self._evaluated[p]
            for part in self._resting(lambda p: p in self._until or not p.requires_grad)
            for p in part.parameters()
        }
        for pattern in dict.fromkeys(self._evaluated.values()):
            if pattern not in resting:
                logger.warning(
                    "param_groups: eval of %r has no effect, since no module has all of its "
                    "parameters both there and frozen", pattern,
                )  # fmt: skip

    def _freeze(self, name: str, chosen: Chosen) -> None:
        """Record the number of steps for which parameters of an optimizer are frozen."""
        trained = [p for p in chosen if p.requires_grad or p in self._until]
        steps: dict[float, list[Tensor]] = {}
        for p in trained:
            if "freeze_until" in chosen[p] and (until := chosen[p]["freeze_until"][1]):
                self._until[p] = until
                steps.setdefault(until, []).append(p)
        if trained and sum(map(len, steps.values())) == len(trained):
            raise ValueError(
                f"param_groups: freeze_until freezes every parameter of the optimizer {name!r}, "
                "which then has no first step to take: leave out a part, such as the last layer"
            )
        self._frozen += [(name, until, params) for until, params in sorted(steps.items())]

    def begin_window(self, updates: Mapping[str, Update], step: int) -> bool:
        """Freeze and unfreeze parameters of optimizers whose accumulation window is empty.

        Returns:
            True if more parameters train than before, after ``step`` optimizer steps.
        """
        unfrozen = 0
        for name, until, params in self._frozen:
            trains = step >= until
            if params[0].requires_grad != trains and not updates[name].window.count:
                for p in params:
                    p.requires_grad_(trains)
                unfrozen += trains * len(params)
        if unfrozen and distributed.is_main():
            logger.info("after optimizer step %d: %d more tensors train", step, unfrozen)
        return unfrozen > 0

    def rest(self) -> None:
        """Put modules with ``eval`` into evaluation mode if none of their parameters trains."""
        for part in self._resting(lambda p: not p.requires_grad):
            part.eval()

    def _resting(self, frozen: Callable[[Tensor], bool]) -> Iterator[nn.Module]:
        """Yield the largest modules whose parameters all have ``eval`` and are frozen."""
        modules = [self._modules]
        for module in modules:  # The list grows in the loop.
            params = list(module.parameters())
            if params and all(p in self._evaluated and frozen(p) for p in params):
                yield module
            else:
                modules += module.children()

    def _log(self, name: str, optimizer: Optimizer) -> None:
        """Log the groups of an optimizer with their sizes, in aligned lines."""
        parts: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for group in optimizer.param_groups:  # The layers of a layer_decay are one line.
            label = group.get("patterns", "").partition(" @ ")[0] or "no pattern"
            texts = [f"{k} {group[k]:g}" for k in SHOWN if group.get(k) is not None]
            parts.setdefault((label, *texts), []).append(group)
        rows = []
        for (label, *texts), groups in parts.items():
            params = [p for group in groups for p in group["params"]]
            rates = sorted({float(g["lr"]) for g in groups if g.get("lr") is not None})
            ends = " to ".join(f"{rate:.3g}" for rate in dict.fromkeys([*rates[:1], *rates[-1:]]))
            until = sorted({step for p in params if (step := self._until.get(p))})
            texts += [f"frozen until step {step:g}" for step in until]
            if frozen := sum(not p.requires_grad for p in params):
                texts.append(f"{frozen} frozen")
            rows.append([
                label, f"{len(params)} tensor{'s' * (len(params) != 1)}",
                f"{sum(p.numel() for p in params):,} parameters", f"lr {ends or None}",
                ", ".join(texts),
            ])  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        logger.info("parameter groups of the optimizer %r:", name)
        for row in rows:
            cells = [f"{c:{side}{w}}" for c, side, w in zip(row, "<>><<", widths, strict=True)]
            logger.info("  %s", "  ".join(cells).rstrip())


def check_schedule(name: str, optimizer: Optimizer, before: Sequence[float]) -> None:
    """Check that a schedule keeps the different learning rates of groups.

    Args:
        name: name of the optimizer, for messages.
        optimizer: the optimizer, with its schedule.
        before: learning rates of its groups before the schedule was made.

    Raises:
        ValueError: the rates differed, and the schedule has set one for all groups.
    """
    rates = {float(group.get("lr") or 0.0) for group in optimizer.param_groups}
    if len(set(before)) > 1 and len(rates) == 1 and rates != {0.0}:
        raise ValueError(
            f"param_groups gives the optimizer {name!r} several learning rates, and its "
            "schedule sets one for all, as OneCycleLR and CyclicLR do: use lr_factor in place "
            "of lr and layer_decay, or give the schedule a list of rates"
        )


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _names(optimizers: Mapping[str, Optimizer], modules: nn.Module) -> dict[Tensor, list[str]]:
    """Return the names of all parameters; a shared parameter has several."""
    names: dict[Tensor, list[str]] = {}
    for name, param in modules.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(clean_name(name))
    for optimizer in optimizers.values():
        for place, p in enumerate(_params(optimizer)):
            names.setdefault(p, [f"parameter {place}"])
    return names


def _scopes(
    setting: Any, optimizers: Mapping[str, Optimizer]
) -> list[tuple[Patterns, Mapping[str, Optimizer]]]:
    """Return pairs of patterns and the optimizers that they apply to."""
    if not isinstance(setting, Mapping) or not setting:
        raise ValueError(
            f"param_groups is {setting!r}; allowed: a mapping from patterns of parameter names to "
            'settings, such as {"encoder.*": {lr: 1e-5}}, or these by optimizer'
        )
    if not optimizers:
        raise ValueError("param_groups is set, and this Brain has no optimizer")
    for key, value in setting.items():
        if not isinstance(value, Mapping) or not value:
            raise ValueError(
                f"param_groups: {key!r} has {value!r}; allowed: a mapping from settings to values, "
                "such as {lr: 1e-5, weight_decay: 0}"
            )
    nested = [all(isinstance(v, Mapping) for v in keys.values()) for keys in setting.values()]
    if not any(nested):
        return [(setting, optimizers)]
    unknown = [name for name in setting if name not in optimizers]
    if unknown:
        raise ValueError(
            f"param_groups names the optimizer {unknown[0]!r}, which does not exist; this Brain "
            f"has {', '.join(map(repr, optimizers))}{nearest(str(unknown[0]), optimizers)}"
        )
    return [
        scope
        for name, patterns in setting.items()
        for scope in _scopes(patterns, {name: optimizers[name]})
    ]


def _match(
    pattern: str, keys: Mapping[str, Any], names: Mapping[Tensor, Sequence[str]], owned: set[Tensor]
) -> dict[Tensor, str]:
    """Return the parameters that a pattern matches, each with its first name that does.

    A pattern whose only key is ``eval`` may match parameters that no optimizer has; any other must
    match one that is ``owned`` by its optimizers.
    """
    parts = str(pattern).split("|")
    found: dict[Tensor, str] = {}
    for p, own in names.items():
        hits = [name for name in own if any(fnmatch.fnmatchcase(name, part) for part in parts)]
        if hits:
            found[p] = hits[0]
    counted = found.keys() if keys.keys() <= {"eval"} else found.keys() & owned
    known = [name for p, own in names.items() if p in owned or p in counted for name in own]
    for part in parts:
        if not any(fnmatch.fnmatchcase(name, part) for name in known):
            near = ", ".join(difflib.get_close_matches(part, known, n=3, cutoff=0.0))
            message = (
                f"param_groups: {part!r} matches no parameter that the optimizer has; the nearest "
                f"names are {near}"
            )
            if not counted:
                raise ValueError(message)
            logger.warning("%s", message)
    return found


def _evaluated(
    patterns: Patterns, matched: Mapping[str, Mapping[Tensor, str]]
) -> dict[Tensor, str]:
    """Return the parameters whose first pattern with ``eval`` has True, with the pattern."""
    found: dict[Tensor, str] = {}
    for pattern, keys in patterns.items():
        if "eval" in keys:
            value = _checked(pattern, "eval", keys["eval"], {})
            for p in matched[pattern]:
                found.setdefault(p, pattern if value else "")
    return {p: pattern for p, pattern in found.items() if pattern}


def _choose(
    name: str, optimizer: Optimizer, patterns: Patterns,
    matched: Mapping[str, Mapping[Tensor, str]],
) -> Chosen:  # fmt: skip
    """Return the settings from patterns for each parameter of an optimizer."""
    chosen: Chosen = {p: {} for p in _params(optimizer)}
    first, defaults = optimizer.param_groups[0], getattr(optimizer, "defaults", {})
    known = {k: v for k, v in {**first, **defaults}.items() if k not in WHOLE}
    for pattern, keys in patterns.items():
        mine = [p for p in matched[pattern] if p in chosen]
        for key, value in keys.items() if mine else ():
            if key not in known and key not in OWN:
                raise ValueError(
                    f"param_groups: {pattern!r} sets {key!r}, which {type(optimizer).__name__} of "
                    f"the optimizer {name!r} does not have; allowed: "
                    f"{', '.join([*known, *OWN])}{nearest(str(key), [*known, *OWN])}"
                )
            if key in ("layer_decay", "lr_factor") and first.get("lr") is None:
                raise ValueError(
                    f"param_groups: {pattern!r} sets {key!r}, and the optimizer {name!r} has no "
                    "learning rate (lr is None)"
                )
            value = _checked(pattern, key, value, known)
            for p in mine:
                chosen[p].setdefault(key, (pattern, value))
    return chosen


def _checked(pattern: str, key: str, value: Any, known: Mapping[str, Any]) -> Any:
    """Return the value of a key, converted to the type that the optimizer takes."""
    owner, default = f"param_groups: {pattern!r}", known.get(key)
    if key == "max_grad_norm":
        return limit_of(value, f"{owner}: max_grad_norm")
    if key == "freeze_until":
        return value if value == math.inf else checks.whole(owner, key, value, 0)
    if key == "layer_decay":
        return checks.within(owner, key, value, 0.0, 1.0, "(]")
    if value is None and key in known and default is None:
        return None
    allowed = ""
    if key == "eval" or isinstance(default, bool):
        allowed = "" if isinstance(value, bool) else "true or false"
    elif isinstance(default, str):
        allowed = "" if isinstance(value, str) else f"a text, such as {default!r}"
    elif isinstance(default, (tuple, list)):
        if isinstance(value, (tuple, list)) and len(value) == len(default):
            high = 1.0 if key == "betas" else math.inf
            return tuple(checks.within(owner, key, each, 0.0, high, "[)") for each in value)
        allowed = f"{len(default)} numbers, such as {list(default)}"
    elif isinstance(default, (int, float)) and default < 0:
        return checks.within(owner, key, value, -math.inf, 0.0, "(]")
    else:
        return checks.within(owner, key, value, 0.0, math.inf, "[)")
    if allowed:
        raise ValueError(f"{owner}: {key} must be {allowed}; got {value!r}")
    return value


def _divide(
    name: str, optimizer: Optimizer, chosen: Chosen, matched: Mapping[str, Mapping[Tensor, str]]
) -> None:
    """Replace the groups of an optimizer by groups of equal settings."""
    made: list[dict[str, Any]] = []
    depths: dict[str, dict[Tensor, int]] = {}
    for number, source in enumerate(optimizer.param_groups):
        if "initial_lr" in source:
            raise ValueError(
                f"param_groups cannot divide the optimizer {name!r}, which has a schedule already: "
                "give the schedule as the hyperparameter schedule, which makes it later"
            )
        if not source["params"]:
            made.append(source)
        parts: dict[str, dict[str, Any]] = {}
        for place, p in enumerate(source["params"]):
            label, depth = " + ".join(dict.fromkeys(each[0] for each in chosen[p].values())), 0
            if "layer_decay" in chosen[p]:
                pattern, _ = chosen[p]["layer_decay"]
                if pattern not in depths:
                    depths[pattern] = _depths(pattern, matched[pattern])
                depth = depths[pattern][p]
                label += f" @ {depth}"
            if label not in parts:
                parts[label] = _group(number, source, label, chosen[p], depth)
            part = parts[label]
            part["params"].append(p)
            if "param_names" in source:
                part["param_names"].append(source["param_names"][place])
        made += parts.values()
    optimizer.param_groups[:] = made
    if any("lr_factor" in group for group in made):
        _scale_rates(optimizer)


def _group(
    number: int, source: Mapping[str, Any], label: str, own: Mapping[str, tuple[str, Any]],
    depth: int,
) -> dict[str, Any]:  # fmt: skip
    """Return a group without parameters: the recipe's own with the settings from patterns."""
    values = {key: value for key, (_, value) in own.items() if key != "eval"}
    group = {k: v.clone() if isinstance(v, Tensor) else v for k, v in source.items()}
    for key, value in values.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        else:
            group[key] = value
    if "layer_decay" in values:
        group["lr"] = group["lr"] * values["layer_decay"] ** depth
    if "max_grad_norm" in group:  # Groups of one pattern are clipped by their joint norm.
        pattern, _ = own.get("max_grad_norm", (f"group {number}", None))
        group["clipped_with"] = pattern
    group["params"], group["patterns"] = [], label
    if "param_names" in source:
        group["param_names"] = []
    return group


def _depths(pattern: str, matched: Mapping[Tensor, str]) -> dict[Tensor, int]:
    """Return the number of layers above each parameter, among those that a pattern matches."""
    for number in (LAYER, NUMBER):
        layers: dict[str, int] = {}
        found: dict[Tensor, int] = {}
        for p, name in matched.items():
            hit = number.search(name)
            found[p] = layers.setdefault(name[: hit.end()], len(layers) + 1) if hit else len(layers)
        if layers:
            return {p: len(layers) - layer for p, layer in found.items()}
    raise ValueError(
        f"param_groups: {pattern!r} sets layer_decay, and no parameter that it matches has a layer "
        f"number in its name, as encoder.layers.0.weight has; the first one is "
        f"{next(iter(matched.values()))}"
    )


def _scale_rates(optimizer: Optimizer) -> None:
    """Multiply learning rates by `lr_factor`, only within a step, so that no schedule sees it."""
    own: list[tuple[dict[str, Any], Any]] = []

    def put_back(*_: object) -> None:
        while own:
            group, rate = own.pop()
            group["lr"] = rate

    def scale(*_: object) -> None:
        put_back()  # An error may have interrupted the last step.
        for group in optimizer.param_groups:
            if "lr_factor" in group:
                own.append((group, group["lr"]))
                group["lr"] = group["lr"] * group["lr_factor"]

    try:
        optimizer.register_step_pre_hook(scale)
        optimizer.register_step_post_hook(put_back)
    except AttributeError:
        raise ValueError(
            f"param_groups sets lr_factor, and {type(optimizer).__name__} has no step hooks, since "
            "its constructor leaves out torch's: use lr"
        ) from None
