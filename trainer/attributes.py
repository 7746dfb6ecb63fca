"""What hooks keep as plain attributes of a Brain (``self.train_stats``), as a part of its state."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, MutableMapping, MutableSequence, MutableSet
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("trainer")

SCALARS = (int, float, str, bool, type(None))
HPARAMS = "hparams."
DICTS = (dict, OrderedDict, Counter)


class Attributes:
    """Those attributes of a Brain that are state: numbers, texts, tensors and containers of these
    that have changed since its first ``fit`` began. Numbers and texts among its hparams, too.

    What nothing has changed is a setting, of which a resumed run may have another. So it is with
    which parameters require gradients: ``trainable`` says it for the beginning.
    """

    def __init__(self, brain: Any) -> None:
        self._brain = brain
        self._start: dict[str, Any] = {}
        self.trainable: dict[str, bool] = {}
        # Which containers cannot be saved, and their lengths; None once that has been told.
        self._unsaved: dict[str, tuple[int, int] | None] = {}

    def begin(self) -> None:
        """What the attributes are now, they are without any state restored."""
        self._start = self._all(tell=False)
        self.trainable = {n: p.requires_grad for n, p in self._brain.modules.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        """The changed ones; those among them that are not on the CPU are named beside."""
        now, start = self._all(), self._start
        changed = {
            name: value
            for name, value in now.items()
            if name not in start or not _equal(value, start[name])
        }
        away = [name for name, value in changed.items() if not _on_cpu(value)]
        return {"values": changed, "on_device": away}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Make every attribute what it was: as saved, or as it was when the run began."""
        values = {**{name: _copy(value) for name, value in self._start.items()}, **saved["values"]}
        for name, value in values.items():
            if name in saved["on_device"]:
                value = _moved(value, self._brain.device)
            owner = self._brain.hparams if name.startswith(HPARAMS) else self._brain
            name = name.removeprefix(HPARAMS)
            setattr(owner, name, _refill(getattr(owner, name, None), value))

    def _all(self, tell: bool = True) -> dict[str, Any]:
        """Copies of all that can be saved; tells of containers that change and cannot."""
        numbers = vars(self._brain.hparams).items()
        found: dict[str, Any] = {
            HPARAMS + name: value for name, value in numbers if type(value) in SCALARS
        }
        for name, value in vars(self._brain).items():
            if name in self._brain.framework:
                continue
            try:
                found[name] = _copy(value)
            except TypeError:
                if isinstance(value, (Mapping, MutableSequence, MutableSet)):
                    self._leave_out(name, value, tell)
        return found

    def _leave_out(self, name: str, value: Any, tell: bool) -> None:
        content = id(value), len(value)
        if tell and self._unsaved.get(name, ()) not in (content, None):
            logger.warning(
                "%s.%s changes in training and holds what a checkpoint cannot: a resumed run will "
                "not have it (numbers, texts, tensors, and containers of these are saved)",
                type(self._brain).__name__, name,
            )  # fmt: skip
            self._unsaved[name] = None  # Once is enough.
        elif not tell:
            self._unsaved[name] = content


def _copy(value: Any) -> Any:
    """A value as a checkpoint holds it, with tensors of its own; TypeError where it cannot."""
    kind = type(value)
    if kind in SCALARS:
        return value
    if kind in (Tensor, torch.nn.Parameter):
        return value.detach().clone()
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # A number of NumPy's.
        return value.item()
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


def _refill(current: Any, value: Any) -> Any:
    """The value, in the container that is there if that is of a kind which checkpoints lack."""
    if isinstance(current, MutableMapping) and type(current) not in DICTS:
        current.clear()
        current.update(value)
        return current
    if isinstance(current, (deque, set)):
        current.clear()
        (current.extend if isinstance(current, deque) else current.update)(value)
        return current
    return value


def _equal(a: Any, b: Any) -> bool:
    """Whether two copies are the same, to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and _same(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if _is_row(a):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return type(value)({key: _moved(part, device) for key, part in value.items()})
    return type(value)(_moved(part, device) for part in value) if _is_row(value) else value


def _is_row(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _on_cpu(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.device.type == "cpu"
    if isinstance(value, dict):
        return all(map(_on_cpu, value.values()))
    return not _is_row(value) or all(map(_on_cpu, value))
