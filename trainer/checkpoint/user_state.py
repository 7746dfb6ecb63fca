"""State of users' objects: stateful objects, and plain attributes of a Brain and its hparams.

An object may also save itself to a file, by methods that its class marks with SpeechBrain's
decorators ``@mark_as_saver`` and ``@mark_as_loader``. The file becomes a part of the run's state.
The loader may not unpickle objects: the first class, or other name, that a pickle looks up is an
error.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
import tempfile
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import (
    Callable,
    Collection,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sized,
)
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from trainer import seed
from trainer.tree import leaves, map_leaves

logger = logging.getLogger("trainer")

MAX_ENTRIES = 100  # Longer containers are data, and are not searched for stateful objects.
HPARAMS = "hparams."
SCALARS = (int, float, str, bool, type(None))
DICTS = (dict, OrderedDict, Counter)
CONTAINERS = (MutableMapping, MutableSequence, MutableSet)

KEY = "saved_by_hooks"  # last part of the names of such states among weights
# Events of Python's audit hooks that a loader of a state may not cause.
COMMANDS = ("os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen")
_loading = threading.local()


def find_stateful(
    named: Mapping[str, Any], known: Collection[int], modules: nn.Module
) -> dict[str, Any]:
    """Find the stateful objects among attributes, also in lists and dicts.

    These are objects with ``state_dict`` and ``load_state_dict`` or with methods that save and load
    a file, and random generators. Samplers and loaders are left out, since `Progress` has their
    position, as are objects that are saved elsewhere.

    Args:
        named: attributes by name.
        known: ``id`` of each object that is saved elsewhere.
        modules: modules that are saved elsewhere, also under another module's name.

    Returns:
        The objects by dotted name, such as "metrics.b.0"; wrapped if they lack ``state_dict``.
    """
    seen = set(known)
    tensors = {id(t) for t in (*modules.parameters(), *modules.buffers())}
    found = {}
    for name, value in _flat(named):
        part = as_stateful(value)
        part = seed.as_stateful(value) if part is None else part
        if part is None or isinstance(value, (type, Sampler, DataLoader)) or id(value) in seen:
            continue
        if isinstance(part, nn.Module):
            own = part.state_dict(keep_vars=True).values()
            if {id(t) for t in own if isinstance(t, Tensor)} <= tensors:
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


# Plain attributes


class Owner(Protocol):
    """Part of a Brain that `UserAttributes` needs."""

    hparams: SimpleNamespace
    device: torch.device


class UserAttributes:
    """Plain attributes of a Brain as a part of its state.

    Numbers, texts, tensors, arrays and containers of these are saved if they have changed since the
    first `fit` began; of hparams, only numbers and texts. An unchanged value counts as a setting,
    which a resumed run may change.

    Args:
        owner: the Brain.
        own: returns the user's attributes by name.
    """

    def __init__(self, owner: Owner, own: Callable[[], Mapping[str, Any]]) -> None:
        self._owner, self._own = owner, own
        self._start: dict[str, Any] = {}
        # Initial id and length of containers that cannot be saved; None after a warning.
        self._unsaved: dict[str, tuple[int, int] | None] = {}

    def begin(self) -> None:
        """Take the present values as the initial ones."""
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
        """Return the state for use within this process.

        It also has what a checkpoint cannot hold: objects and the entries of containers. Loading it
        removes attributes that were added later.
        """
        own = self._own()
        kept = {name: _keep(value) for name, value in self._values()[1].items()}
        containers = {name: _keep(value) for name, value in own.items() if _is_refilled(value)}
        return {**self.state_dict(), "kept": kept, "containers": containers, "names": list(own)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Set every attribute to its saved or else its initial value."""
        own, kept = self._own(), saved.get("kept", {})
        for name in set(own).difference(saved.get("names", own)):
            delattr(self._owner, name)
        for name, restored in {**kept, **saved.get("containers", {})}.items():
            setattr(self._owner, name, restored())
        start = {name: _copy(value) for name, value in self._start.items() if name not in kept}
        for name, value in {**start, **saved["values"]}.items():
            if name in saved["on_device"]:
                value = map_leaves(self._to_device, value)
            owner = self._owner.hparams if name.startswith(HPARAMS) else self._owner
            name = name.removeprefix(HPARAMS)
            current = inspect.getattr_static(owner, name, None)
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
        hparams = vars(self._owner.hparams).items()
        values = {HPARAMS + name: value for name, value in hparams if type(value) in SCALARS}
        others = {}
        for name, value in self._own().items():
            try:
                values[name] = _copy(value)
            except TypeError:
                others[name] = value
        return values, others


def _is_shown(value: Any) -> bool:
    """Return True for rows of `Brain.show`, which each stage collects anew."""
    if isinstance(value, CONTAINERS):
        return any(map(_is_shown, value.values() if isinstance(value, Mapping) else value))
    from trainer.samples import CELLS  # A model in use has no need of them.

    return isinstance(value, CELLS)


def _is_refilled(value: Any) -> bool:
    """Return True for a container that is saved as a dict or list and refilled from it."""
    if isinstance(value, MutableMapping):
        return type(value) not in DICTS
    return isinstance(value, (deque, set))


def _keep(value: Any) -> Callable[[], Any]:
    """Return a function that returns an object with its present entries."""
    # A copy of a container of another library may share its entries.
    if isinstance(value, (list, dict, set, deque)):
        return functools.partial(_filled, value, copy.copy(value))
    return lambda: value


def _filled(container: Any, entries: Any) -> Any:
    """Return a container with these entries in place of its own."""
    container.clear()
    add = container.extend if isinstance(container, (list, deque)) else container.update
    add(entries)
    return container


def _copy(value: Any) -> Any:
    """Return a copy of a value that a checkpoint can hold, or raise TypeError."""
    kind = type(value)
    if kind in SCALARS:
        return value
    if kind in (Tensor, nn.Parameter):
        return value.detach().clone()
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # A number of NumPy's.
        return _copy(value.item())  # A date, for example, is then refused.
    if (kind.__module__, kind.__name__) == ("numpy", "ndarray") and value.dtype.kind in "biufc":
        return value.copy()
    if isinstance(value, dict):
        made = kind if kind in DICTS else dict
        return made({_copy(key): _copy(part) for key, part in value.items()})
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
        return a.dtype == b.dtype and a.shape == b.shape and bool(a.tobytes() == b.tobytes())
    return bool(a == b)


# Objects that save themselves to a file


class FileState:
    """State of an object as what ``save`` writes to the file of a path, and ``load`` reads there.

    ``load`` is called with the path and SpeechBrain's ``end_of_epoch``.
    """

    def __init__(
        self, obj: Any, save: Callable[[Path], Any], load: Callable[[Path, bool], Any]
    ) -> None:
        self._obj, self._save, self._load = obj, save, load

    def state_dict(self) -> dict[str, str | None]:
        """Return the bytes of the file, as text with a character for each byte."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "state.ckpt")
            self._save(path)
            # The object may have nothing to save.
            return {"file": path.read_bytes().decode("latin-1") if path.exists() else None}

    def load_state_dict(self, state: dict[str, str | None]) -> None:
        """Restore a state; raise ValueError if ``load`` unpickles objects or runs a command."""
        text = state["file"]
        if text is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "state.ckpt")
            path.write_bytes(text.encode("latin-1"))
            with no_unpickling(f"the state of a {type(self._obj).__name__}"):
                # True also within an epoch: for False some loaders go back an epoch, which `fit`
                # does itself.
                self._load(path, True)


def as_stateful(obj: Any) -> Any:
    """Return a `FileState` for an object with marked methods, a stateful object itself, or None.

    The marked methods of a data loader are not used: `Progress` has its position.
    """
    kind: type = type(obj)
    save, load = _marked(kind)
    is_loader = isinstance(obj, Iterator) and isinstance(obj, Sized)
    if save and load and not is_loader:
        return FileState(obj, getattr(obj, save), getattr(obj, load))
    if save and not is_loader:
        _warn_of_no_loader(kind)
    return obj if hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict") else None


@functools.cache
def _warn_of_no_loader(kind: type) -> None:
    logger.warning(
        "a %s has a method that saves its state and none that loads it: a resumed run has it as "
        "new", kind.__name__,
    )  # fmt: skip


@functools.cache
def _marked(kind: type) -> tuple[str, str]:
    """Return the names of the methods that are marked to save and to load, or empty texts."""
    found = {"_speechbrain_saver": "", "_speechbrain_loader": ""}
    for cls in reversed(kind.__mro__):
        for name, value in vars(cls).items():
            for mark in found if inspect.isfunction(value) else ():
                if hasattr(value, mark):
                    found[mark] = name
    save, load = found.values()
    return save, load


def keep_in_state_dict(modules: nn.Module) -> None:
    """Add the states of modules with marked methods to the ``state_dict`` of the outermost module.

    A normaliser without parameters and buffers is then saved and loaded with the weights. The
    ``state_dict`` of each module itself is unchanged.
    """

    def parts(owner: nn.Module, prefix: str) -> Iterator[tuple[str, FileState]]:
        for name, module in owner.named_modules():
            part = as_stateful(module)
            if isinstance(part, FileState):
                yield f"{prefix}{name}{'.' if name else ''}{KEY}", part

    def add(owner: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name, part in parts(owner, prefix):
            state[name] = part.state_dict()["file"]

    def take(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, part in parts(owner, prefix):
            part.load_state_dict({"file": state.pop(name, None)})

    modules.register_state_dict_post_hook(add)
    modules.register_load_state_dict_pre_hook(take)


@contextmanager
def no_unpickling(what: str) -> Iterator[None]:
    """Context manager in which this thread unpickles no objects and runs no command.

    The first name that a pickle looks up, or a command, raises ValueError, which names ``what``.
    Pickled numbers, texts and containers look up no names, and torch's loader with
    ``weights_only=True`` reads tensors by other means.
    """
    _watch()
    outer = getattr(_loading, "what", None)  # A loader may load further objects.
    _loading.what = what
    try:
        yield
    finally:
        _loading.what = outer


@functools.cache
def _watch() -> None:
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    unpickles = event.endswith(".find_class")
    if (unpickles or event in COMMANDS) and getattr(_loading, "what", None):
        does = f"unpickles {'.'.join(map(str, arguments[-2:]))}" if unpickles else f"calls {event}"
        raise ValueError(
            f"{_loading.what} is refused: its method that loads it {does}, and what a checkpoint "
            "holds must not run code; allowed: torch.load(path, weights_only=True), JSON and other "
            "plain text"
        )
