"""A Brain's double, whose `fit_batch` can be run without a trace in the Brain.

The double shares networks, data and settings. Everything else that a hook may change is its own:
attributes and hparams with the objects in them, buffers and plain attributes of the modules,
gradients, random generators. Its optimizers do not step, its checkpointer does not save. What a
hook does outside of Python objects (a line in a file, a message) happens once more.
"""

from __future__ import annotations

import copy
import enum
import functools
import io
import random
import socket
import threading
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from trainer import seed

CONTAINERS = (dict, list, tuple, set, deque, OrderedDict, Counter, defaultdict)
LONGEST = 1000  # entries of a container that are looked into; of a longer one they are shared
MOST = 100_000  # objects in all
LARGEST = 1 << 24  # elements of a tensor; a larger one is data
HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made
SHARED = (nn.Module, nn.Parameter, Dataset, DataLoader, Sampler, type, enum.Enum)
# A copy of something that holds one of these could wait for a thread that it does not have.
BOUND = (
    threading.Thread, io.IOBase, socket.socket, type(threading.Lock()), type(threading.RLock()),
)  # fmt: skip
OF_MODULES = frozenset(vars(nn.Module())) - {"training"}


class Copier:
    """Copies what a hook may change, each object once, and remembers the modules that it meets."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}
        self.modules: dict[int, nn.Module] = {}
        self._alive: list[Any] = []  # An id is one object's as long as that lives.

    def __call__(self, value: Any) -> Any:
        """A copy of ``value``, or ``value`` itself where it is shared."""
        key = id(value)
        if key in self.known:
            return self.known[key]
        if len(self.known) >= MOST or value is None or isinstance(value, (int, float, str, bytes)):
            return value
        self._alive.append(value)
        self.known[key] = value
        kind = type(value)
        if isinstance(value, SHARED):
            if isinstance(value, nn.Module):
                self.modules.update((id(each), each) for each in value.modules())
            return value
        if isinstance(value, Tensor):
            self.known[key] = _tensor(value)
        elif isinstance(value, torch.optim.Optimizer):
            self.known[key] = disarmed(value)
        elif isinstance(value, torch.Generator):
            self.known[key] = torch.Generator(value.device).set_state(value.get_state())
        elif isinstance(value, types.MethodType):
            self.known[key] = types.MethodType(value.__func__, self(value.__self__))
        elif kind is functools.partial:
            named = {name: self(each) for name, each in value.keywords.items()}
            self.known[key] = kind(self(value.func), *map(self, value.args), **named)
        elif kind in CONTAINERS or (isinstance(value, tuple) and hasattr(value, "_fields")):
            self._container(value)
        elif isinstance(value, random.Random) or kind.__module__.partition(".")[0] == "numpy":
            self.known[key] = copy.deepcopy(value)
        elif _made_by_python(kind) or isinstance(value, SimpleNamespace):
            self._instance(value)
        return self.known[key]

    def _container(self, value: Any) -> None:
        long = len(value) > LONGEST
        new = value if isinstance(value, tuple) else copy.copy(value)
        self.known[id(value)] = new
        if long:
            return
        if isinstance(new, dict):
            for name in new:
                new[name] = self(new[name])
        elif isinstance(new, (list, deque)):
            for index, each in enumerate(value):
                new[index] = self(each)
        elif isinstance(new, tuple):
            parts = [self(each) for each in value]
            made = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            self.known[id(value)] = made

    def _instance(self, value: Any) -> None:
        state = vars(value)
        if any(isinstance(each, BOUND) for each in state.values()):
            return
        new = object.__new__(type(value)) if _made_by_python(type(value)) else type(value)()
        self.known[id(value)] = new
        vars(new).update((name, self(each)) for name, each in state.items())


def _made_by_python(kind: type) -> bool:
    """Whether an object of this class is its ``__dict__`` and nothing more."""
    return all(
        each.__flags__ & HEAP and not vars(each).get("__slots__") for each in kind.__mro__[:-1]
    ) and not kind.__module__.startswith(("threading", "queue", "multiprocessing", "logging"))


def _tensor(value: Tensor) -> Tensor:
    if value.requires_grad or value.numel() > LARGEST:
        return value
    return value.detach().clone()


def disarmed(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer with rates of its own and a step that does nothing."""
    new: Any = object.__new__(type(optimizer))
    vars(new).update(vars(optimizer))
    new.param_groups = [dict(group) for group in optimizer.param_groups]
    new.step = lambda closure=None: None
    return new  # type: ignore[no-any-return]


def double(brain: Any, copier: Copier, optimize: Callable[..., Any]) -> Any:
    """The Brain's double; its losses go to ``optimize`` (see `Training._optimize`)."""
    kept = {id(part) for part in (brain.options, brain.precision, brain.eval_precision)}
    kept |= {id(getattr(brain, name)) for name in ("journal", "keeper", "attributes", "statistics")}
    kept |= {id(getattr(brain, name)) for name in ("monitor", "forensics", "profiler")}
    copier.known |= {key: part for part in vars(brain).values() if (key := id(part)) in kept}
    new: Any = object.__new__(type(brain))
    copier.known[id(brain)] = new
    if brain.checkpointer is not None:
        copier.known[id(brain.checkpointer)] = saver = copy.copy(brain.checkpointer)
        saver.enabled = False
    updates = {}
    for name, update in brain.updates.items():
        copier.known[id(update)] = updates[name] = copy.copy(update)
        updates[name].optimizer = copier(update.optimizer)
        updates[name].window = type(update.window)()
    copier.known[id(brain.updates)] = updates
    for name, value in vars(brain).items():
        vars(new)[name] = copier(value)
    new._joint, new._optimize, new.zero_grad = None, optimize, lambda set_to_none=True: None
    return new


@contextmanager
def untouched(brain: Any, copier: Copier) -> Iterator[None]:
    """After it, modules, gradients and random generators are as if it had never been entered."""
    params = list(brain.modules.parameters())
    params += [p for update in brain.updates.values() for p in update._all_params()]
    grads = [(p, p.grad, p.requires_grad) for p in dict.fromkeys(params)]
    with ExitStack() as stack:
        stack.callback(seed.set_rng_state, seed.rng_state())
        stack.callback(_give_back, grads)
        for p, _, _ in grads:
            p.grad = None
        done: set[int] = set()
        while rest := [each for key, each in copier.modules.items() if key not in done]:
            for module in rest:  # Copying what one holds may lead to others.
                done.add(id(module))
                if not isinstance(module, torch.jit.ScriptModule):
                    stack.callback(_put_back, module, dict(vars(module)), dict(module._buffers))
                    _set_apart(module, copier)
        yield


def _set_apart(module: nn.Module, copier: Copier) -> None:
    """Let a module write into copies."""
    own = {name: value for name, value in vars(module).items() if name not in OF_MODULES}
    vars(module).update((name, copier(value)) for name, value in own.items())
    for name, buffer in module._buffers.items():
        # Others' graphs may hold the buffer itself.
        module._buffers[name] = None if buffer is None else buffer.detach().clone()


def _put_back(module: nn.Module, attributes: dict[str, Any], buffers: dict[str, Any]) -> None:
    vars(module).clear()
    vars(module).update(attributes)
    module._buffers.update(buffers)


def _give_back(grads: list[tuple[Tensor, Tensor | None, bool]]) -> None:
    for p, grad, wanted in grads:
        p.grad = grad
        if p.requires_grad != wanted:
            p.requires_grad_(wanted)
