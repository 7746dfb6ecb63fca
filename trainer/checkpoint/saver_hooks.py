"""State of objects that save themselves to a file, by methods that SpeechBrain's decorators mark.

A class marks one method by ``@mark_as_saver`` and one by ``@mark_as_loader``; the decorators leave
an attribute on the methods, by which this module finds them. What the saver writes is kept as a
part of the run's state. The loader may not unpickle objects: the first class, or other name, that a
pickle looks up while it runs is an error.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

logger = logging.getLogger("trainer")

KEY = "saved_by_hooks"
# Events of Python's audit hooks that a method which loads a state has no reason for.
COMMANDS = ("os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen")
_loading = threading.local()
_warned: set[type] = set()


class FileState:
    """State of an object with marked methods, as what they write to a file.

    Args:
        obj: the object.
        save: writes its state to the file of a path.
        load: restores it from the file of a path; called with the path and ``end_of_epoch``.
    """

    def __init__(
        self, obj: Any, save: Callable[[Path], Any], load: Callable[[Path, bool], Any]
    ) -> None:
        self._obj, self._save, self._load = obj, save, load

    def state_dict(self) -> dict[str, str | None]:
        """Return the bytes of the file, as text of which each character is a byte."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "state.ckpt")
            self._save(path)
            data = path.read_bytes() if path.exists() else None  # It may have nothing to save.
            return {"file": None if data is None else data.decode("latin-1")}

    def load_state_dict(self, state: dict[str, str | None]) -> None:
        """Restore a state.

        Raises:
            ValueError: ``load`` unpickles objects or runs a command.
        """
        text = state["file"]
        if text is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "state.ckpt")
            path.write_bytes(text.encode("latin-1"))
            with no_unpickling(f"the state of a {type(self._obj).__name__}"):
                # True also within an epoch: some loaders count back an epoch for False, which `fit`
                # does by itself.
                self._load(path, True)


def as_stateful(obj: Any) -> FileState | None:
    """Return the state of an object with marked methods, or None for any other object.

    Data loaders are left out: `Progress` has their position.
    """
    kind: type = type(obj)
    save, load = _marked(kind)
    if not save or isinstance(obj, type) or (isinstance(obj, Iterator) and isinstance(obj, Sized)):
        return None
    if load:
        return FileState(obj, getattr(obj, save), getattr(obj, load))
    if type(obj) not in _warned:
        _warned.add(type(obj))
        logger.warning(
            "a %s has a method that saves its state and none that loads it: a resumed run has it "
            "as new", type(obj).__name__,
        )  # fmt: skip
    return None


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
    """Have the state of modules with marked methods in the ``state_dict`` of the outermost one.

    A normaliser that has neither parameters nor buffers is then saved, evaluated and loaded with
    the weights. The ``state_dict`` of each module itself stays as it is.

    Args:
        modules: a module, with whatever modules are in it.
    """

    def add(owner: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name, part in _parts(owner):
            state[f"{prefix}{name}{KEY}"] = part.state_dict()["file"]

    def take(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, part in _parts(owner):
            text = state.pop(f"{prefix}{name}{KEY}", None)
            if text is not None:
                part.load_state_dict({"file": text})

    modules.register_state_dict_post_hook(add)
    modules.register_load_state_dict_pre_hook(take)


def _parts(modules: nn.Module) -> Iterator[tuple[str, FileState]]:
    for name, module in modules.named_modules():
        part = as_stateful(module)
        if part is not None:
            yield f"{name}." if name else "", part


@contextmanager
def no_unpickling(what: str) -> Iterator[None]:
    """Context manager in which this thread unpickles no objects and runs no command.

    Numbers, texts and containers of them are no objects in this sense, and torch's loader with
    ``weights_only=True`` reads tensors by other means.

    Args:
        what: name of what is read, for the message.

    Raises:
        ValueError: on the first name that a pickle looks up, and on a command.
    """
    _watch()
    outer = getattr(_loading, "what", None)  # A method that loads may load further objects.
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
