"""State of users' own objects: stateful objects and plain attributes of a Brain and its hparams."""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import (
    Callable,
    Collection,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
)
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from trainer import seed
from trainer.checkpoint import saver_hooks as hooks
from trainer.samples import CELLS
from trainer.tree import leaves, map_leaves

logger = logging.getLogger("trainer")

MAX_ENTRIES = 100  # A longer container is data, in which no stateful objects are looked for.
HPARAMS = "hparams."
SCALARS = (int, float, str, bool, type(None))
DICTS = (dict, OrderedDict, Counter)
CONTAINERS = (MutableMapping, MutableSequence, MutableSet)


def find_stateful(
    named: Mapping[str, Any], known: Collection[int], modules: nn.Module
) -> dict[str, Any]:
    """Find the stateful objects among attributes, also in lists and dicts.

    These are objects with ``state_dict`` and ``load_state_dict`` or with methods that save and load
    a file (`trainer.checkpoint.saver_hooks`), and random generators. Left out are samplers and
    loaders, since `Progress` has their position, and what is saved elsewhere.

    Args:
        named: attributes by name.
        known: ``id`` of each object that is saved elsewhere.
        modules: modules that are saved elsewhere; a module all of whose tensors are in them is left
            out.

    Returns:
        The objects by dotted name, such as "metrics.b.0"; wrapped if they lack ``state_dict``.
    """
    seen = set(known)
    tensors = {id(t) for t in (*modules.parameters(), *modules.buffers())}
    found = {}
    for name, value in _flat(named):
        part = hooks.as_stateful(value) or seed.as_stateful(value) or value
        stateful = hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
        if not stateful or isinstance(value, (type, Sampler, DataLoader)) or id(value) in seen:
            continue
        if isinstance(part, nn.Module) and all(
            id(t) in tensors
            for t in part.state_dict(keep_vars=True).values()
            if isinstance(t, Tensor)
        ):
            continue
        seen.add(id(value))
        found[name] = part
    return found


def _flat(named: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in named.items():
        if type(value) in (list, tuple):
            value = dict(enumerate(value))
        if type(value) is not dict:
            yield f"{prefix}{name}", value
        elif len(value) <= MAX_ENTRIES:
            yield from _flat(value, f"{prefix}{name}.")


class Owner(Protocol):
    """A Brain, as far as its user's attributes go."""

    hparams: SimpleNamespace
    device: torch.device


class UserAttributes:
    """Plain attributes of a Brain as a part of its state.

    Saved are numbers, texts, tensors, arrays and containers of these that have changed since the
    first `fit` began; of the hparams, numbers and texts. A value that has not changed counts as a
    setting, and a resumed run may have another one.

    Args:
        owner: the Brain.
        own: returns the user's attributes by name.
    """

    def __init__(self, owner: Owner, own: Callable[[], Mapping[str, Any]]) -> None:
        self._owner, self._own = owner, own
        self._start: dict[str, Any] = {}
        # Id and length, at the start, of containers that cannot be saved; None once warned of.
        self._unsaved: dict[str, tuple[int, int] | None] = {}

    def begin(self) -> None:
        """Take the present values as those of the beginning."""
        self._start, others = self._values()
        self._unsaved = {n: (id(v), len(v)) for n, v in others.items() if isinstance(v, CONTAINERS)}

    def state_dict(self) -> dict[str, Any]:
        """Return the changed values, and the names of those that are not on the CPU.

        A container that has changed and cannot be saved is named in a warning.
        """
        values, others = self._values()
        for name, value in others.items():
            known = self._unsaved.get(name, ())
            moved = isinstance(value, CONTAINERS) and known not in ((id(value), len(value)), None)
            if moved and not _is_shown(value):
                self._unsaved[name] = None
                logger.warning(
                    "%s.%s changes in training and holds what a checkpoint cannot: a resumed run "
                    "will not have it (numbers, texts, tensors, and containers of these are saved)."
                    " What one stage alone needs is best dropped in on_stage_end",
                    type(self._owner).__name__, name,
                )  # fmt: skip
        changed = {
            name: value
            for name, value in values.items()
            if name not in self._start or not _equal(value, self._start[name])
        }
        away = [
            name
            for name, value in changed.items()
            if any(isinstance(t, Tensor) and t.device.type != "cpu" for _, t in leaves(value))
        ]
        return {"values": changed, "on_device": away}

    def snapshot(self) -> dict[str, Any]:
        """Return the state for as long as the process lives.

        It also has what a checkpoint cannot hold: the objects, and the entries of containers.
        Attributes that appear later are removed by loading it.
        """
        kept = {name: _keep(value) for name, value in self._values()[1].items()}
        own = self._own()
        containers = {name: _keep(value) for name, value in own.items() if _is_refilled(value)}
        return {**self.state_dict(), "kept": kept, "containers": containers, "names": list(own)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Set every attribute as saved, or else as it was in the beginning."""
        for name in set(self._own()).difference(saved.get("names", self._own())):
            delattr(self._owner, name)
        kept = saved.get("kept", {})
        for name, restored in {**kept, **saved.get("containers", {})}.items():
            setattr(self._owner, name, restored())
        start = {name: _copy(value) for name, value in self._start.items() if name not in kept}
        for name, value in {**start, **saved["values"]}.items():
            if name in saved["on_device"]:
                value = map_leaves(self._to_device, value)
            owner = self._owner.hparams if name.startswith(HPARAMS) else self._owner
            name = name.removeprefix(HPARAMS)
            current = getattr(owner, name, None)
            kind = dict if isinstance(current, MutableMapping) else list
            if _is_refilled(current) and isinstance(value, kind):
                value = _filled(current, value)
            elif isinstance(current, nn.Parameter) and current.shape == getattr(value, "shape", 0):
                with torch.no_grad():  # The same object, which an optimizer may train.
                    value = current.copy_(value)
            setattr(owner, name, value)

    def _to_device(self, leaf: Any) -> Any:
        return leaf.to(self._owner.device) if isinstance(leaf, Tensor) else leaf

    def _values(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return copies of the values that can be saved, and the attributes that cannot."""
        values: dict[str, Any] = {
            HPARAMS + name: value
            for name, value in vars(self._owner.hparams).items()
            if type(value) in SCALARS
        }
        others = {}
        for name, value in self._own().items():
            try:
                values[name] = _copy(value)
            except TypeError:
                others[name] = value
        return values, others


def _is_shown(value: Any) -> bool:
    """Return True for rows of `Brain.show`, which are of one stage and are gathered anew."""
    if isinstance(value, CONTAINERS):
        return any(map(_is_shown, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, CELLS)


def _is_refilled(value: Any) -> bool:
    """Return True for a container that is saved as a dict or a list, which then fill it again."""
    if isinstance(value, MutableMapping):
        return type(value) not in DICTS
    return isinstance(value, (deque, set))


def _keep(value: Any) -> Callable[[], Any]:
    """Return a function that returns an object, with the entries that it has now."""
    # A copy of a container that is not Python's own may share its entries.
    if isinstance(value, (list, dict, set, deque)):
        return partial(_filled, value, copy.copy(value))
    return lambda: value


def _filled(container: Any, entries: Any) -> Any:
    """Return a container with these entries in place of its own."""
    container.clear()
    add = container.extend if isinstance(container, (list, deque)) else container.update
    add(entries)
    return container


def _copy(value: Any) -> Any:
    """Return a value as a checkpoint holds it, with tensors of its own.

    Raises:
        TypeError: for what a checkpoint cannot hold.
    """
    kind = type(value)
    if kind in SCALARS:
        return value
    if kind in (Tensor, nn.Parameter):
        return value.detach().clone()
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # A number of NumPy's.
        return _copy(value.item())  # A date, for example, is then refused.
    if (kind.__module__, kind.__name__) == ("numpy", "ndarray") and value.dtype.kind in "biufc":
        return value.copy()
    if kind in DICTS:
        return kind({_copy(key): _copy(part) for key, part in value.items()})
    if isinstance(value, dict):
        return {_copy(key): _copy(part) for key, part in value.items()}
    if kind in (list, tuple):
        return kind(map(_copy, value))
    if kind is deque:
        return list(map(_copy, value))
    if kind is set:
        return sorted(map(_copy, value), key=repr)
    raise TypeError(f"a checkpoint holds no {kind.__name__}")


def _equal(a: Any, b: Any) -> bool:
    """Return True if two copies are the same, to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if type(a).__module__ == "numpy":
        same = a.dtype == b.dtype and a.shape == b.shape
        return bool(same and (a.view("u1") == b.view("u1")).all())
    return bool(a == b)
