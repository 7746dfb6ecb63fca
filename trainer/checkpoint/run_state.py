"""State of a run: what it consists of, snapshots of it, and resuming from a checkpoint.

State has two sources: a `Progress`, and the entries that `Brain.stateful` lists. Checkpoints, a
`fit` inside a hook of another `fit`, the trials of the tuner and the replay of a batch all iterate
these two, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from trainer import checks, distributed
from trainer.progress import Progress
from trainer.tree import map_leaves

logger = logging.getLogger("trainer")

OBJECTS = "the stateful objects of this Brain"


class Stateful(Protocol):
    """Anything with a state that can be saved and restored."""

    def state_dict(self) -> Any:
        """Return the state: tensors, plain values, and containers of these."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Restore a saved state."""


@dataclass(frozen=True)
class StateEntry:
    """One part of a run's state.

    Args:
        part: the object that holds the state.
        scope: "shared": equal on all ranks; rank 0's is saved and every rank loads it. "rank":
            each rank saves and loads its own. "both": rank 0's is saved as the shared one, and each
            other rank saves its own, too, which a resume with as many ranks loads.
        trained: True for weights and optimizers. What `Brain.on_fit_start` of a resumed run does to
            them stays; what it does to anything else is undone.
        of_fit: True if it belongs to one `fit`: a nested `fit` leaves it as it was.
        restart: called on loading a checkpoint that lacks the entry; None leaves it as it is.
        snapshot: returns the state for a `Snapshot`, which may hold more than a checkpoint; None
            for ``part.state_dict``. The part loads either.
    """

    part: Any
    scope: Literal["shared", "rank", "both"] = "rank"
    trained: bool = False
    of_fit: bool = False
    restart: Callable[[], None] | None = None
    snapshot: Callable[[], Any] | None = None


Entries = Mapping[str, StateEntry]


def copied(state: Any) -> Any:
    """Return a copy of a state whose tensors are in CPU memory and share none."""

    def copy(leaf: Any) -> Any:
        return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf

    return map_leaves(copy, state)


class Snapshot:
    """Copy of the state of a run, to return to any number of times.

    Args:
        progress: the progress that is kept.
        stateful: lists the entries; called anew at each restore.
        of_fit: keep only what belongs to one `fit`.
    """

    def __init__(
        self, progress: Progress, stateful: Callable[[], Entries], of_fit: bool = False
    ) -> None:
        self._progress, self._stateful, self._of_fit = progress, stateful, of_fit
        self._place = copied(progress.state_dict())
        self._states = {
            name: copied((entry.snapshot or entry.part.state_dict)())
            for name, entry in stateful().items()
            if entry.of_fit or not of_fit
        }

    def restore(self) -> None:
        """Put everything back; entries that have appeared since stay as they are."""
        for name, entry in self._stateful().items():
            if name in self._states:
                # A copy, since optimizers take over the tensors that they are given.
                entry.part.load_state_dict(copied(self._states[name]))
        self._progress.load_state_dict(copied(self._place), of_run=not self._of_fit)

    @contextmanager
    def restored_after(self, kind: type[BaseException]) -> Iterator[None]:
        """Context manager that restores the state if an exception of a kind leaves it."""
        try:
            yield
        except kind:
            self.restore()
            raise


class RunState:
    """The state of a run as the `Checkpointer` saves it, and a resumed run on its way back to it.

    A checkpoint is restored in three moments, since hooks run once more on the way. When it is
    loaded, weights, optimizers and existing objects are restored. After `on_fit_start`, which may
    change weights and optimizers, their state is kept. When the stage's hook has run as well, or at
    once if the run stopped between stages, everything is restored.

    Args:
        progress: progress of the run.
        stateful: lists the entries of the state.
    """

    def __init__(self, progress: Progress, stateful: Callable[[], Entries]) -> None:
        self.progress, self._stateful = progress, stateful
        self.resumed_fit = 0  # Number of the `fit` that the checkpoint was saved in.
        self._shared: Mapping[str, Any] | None = None
        self._local: Mapping[str, Any] | None = None
        self._trained: Mapping[str, Any] | None = None
        self._place: tuple[int, int | None, int] | None = None
        self._missing: list[str] = []  # Entries that hooks must have made by the next stage.
        self._entered = True

    # The Checkpointer's protocol

    def state_dict(self) -> dict[str, Any]:
        """Return what all ranks share."""
        self.progress.processes = distributed.world_size()
        entries = self._stateful()
        shared = {n: e.part.state_dict() for n, e in entries.items() if e.scope != "rank"}
        return {"progress": self.progress.state_dict(), **shared}

    def local_state_dict(self) -> dict[str, Any]:
        """Return this rank's own part."""
        main = distributed.is_main()
        return {
            name: entry.part.state_dict()
            for name, entry in self._stateful().items()
            if entry.scope == "rank" or (entry.scope == "both" and not main)
        }

    def load_state_dict(self, shared: Mapping[str, Any]) -> None:
        """Restore weights, optimizers, progress and the objects that exist by now.

        Raises:
            ValueError: if the state is another model's; nothing is changed then.
        """
        entries = self._stateful()
        own = [n for n in entries if n.startswith("objects.")]
        names = [n for n in entries if n.startswith("optimizers.")]
        entries["modules"].part.check_state_dict(shared["modules"])
        _check_names("the optimizers of this Brain", "optimizers.", shared, names)
        for name in names:
            entries[name].part.check_state_dict(shared[name])
        _check_names(OBJECTS, "objects.", {n: 0 for n in own if n in shared}, own)
        for name, entry in entries.items():
            if entry.trained and name not in shared and entry.restart is not None:
                entry.restart()
            elif entry.scope != "rank" and name in shared and name != "trainable":
                entry.part.load_state_dict(shared[name])
        self._load_progress(shared)
        self._shared, self._entered = shared, False

    def load_local_state_dict(self, local: Mapping[str, Any]) -> None:
        """Keep this rank's own part until the run has come to where it was saved."""
        self._local = local

    # The way back

    def enter_epochs(self) -> bool:
        """Return True at the first call after a checkpoint was loaded."""
        entered, self._entered = self._entered, True
        return not entered

    def fit_started(self) -> bool:
        """Go on after `on_fit_start` has run; return True if everything is restored now."""
        if self._shared is None:
            return False
        if self.progress.phase == "train":  # The hook of the stage runs first.
            entries = self._stateful()
            trained = {n: e.part.state_dict() for n, e in entries.items() if e.trained}
            self._trained = copied(trained)
            return False
        self._restore(strict=False)
        return True

    def training_started(self) -> bool:
        """Go on after the stage's hook has run; return True if everything is restored now.

        Raises:
            ValueError: if an object that was saved does not exist by now.
        """
        if self._shared is not None:
            entries = self._stateful()
            for name, state in (self._trained or {}).items():
                entries[name].part.load_state_dict(state)
            self._load_progress(self._shared)
            self._restore(strict=True)
            return True
        if self._missing:
            entries = self._stateful()
            _check_names(
                OBJECTS, "objects.", self._missing, [n for n in self._missing if n in entries]
            )
            self._missing = []
        return False

    def epoch_begun(self, epoch: int, length: int | None) -> None:
        """Skip the same share of an epoch that has another number of batches than when it was left.

        Args:
            epoch: number of the epoch.
            length: its batches on this rank; None where unknown.
        """
        place, self._place = self._place, None
        step, batches, processes = place or (0, None, 1)
        if length is None or not batches:
            return
        ranks = distributed.world_size()
        if abs(length * ranks - batches * processes) >= max(ranks, processes):
            self.progress.step = step * length // batches
            logger.warning(
                "epoch %d has %d batches now, and had %d when it was left after %d: going on after "
                "%d", epoch, length, batches, step, self.progress.step,
            )  # fmt: skip

    def _load_progress(self, shared: Mapping[str, Any]) -> None:
        progress, fits = self.progress, self.progress.fits
        progress.load_state_dict(shared["progress"])
        self.resumed_fit, progress.fits = progress.fits, fits
        if progress.phase == "train":
            self._place = progress.step, progress.epoch_batches, progress.processes
            # With fewer ranks an epoch has more batches on each.
            progress.step = progress.step * progress.processes // distributed.world_size()

    def _restore(self, strict: bool) -> None:
        """Restore everything but what is trained.

        Args:
            strict: every saved entry must exist by now. Otherwise the hook of the next stage may
                make those that do not.
        """
        shared, local = self._shared or {}, self._local or {}
        entries = self._stateful()
        objects = [name for name in shared if name.startswith("objects.")]
        self._missing = [name for name in objects if name not in entries]
        if strict:
            found = [name for name in objects if name in entries]
            _check_names(OBJECTS, "objects.", objects, found)
        for name, entry in entries.items():
            if entry.trained:
                continue
            if name in local:
                entry.part.load_state_dict(local[name])
            elif name in shared:
                entry.part.load_state_dict(shared[name])
        self._shared = self._local = self._trained = None


def _check_names(owner: str, prefix: str, saved: Iterable[str], own: Iterable[str]) -> None:
    """Raise ValueError where the entries of one kind are not those that were saved."""
    names = [name.removeprefix(prefix) for name in saved if name.startswith(prefix)]
    checks.same_keys(owner, dict.fromkeys(names), [name.removeprefix(prefix) for name in own])


class ModuleState:
    """The parameters and buffers of the modules."""

    def __init__(self, modules: nn.Module) -> None:
        self._modules = modules

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the modules."""
        return self._modules.state_dict()

    def snapshot(self) -> dict[str, Any]:
        """Return the state with the buffers that are not persistent, which no checkpoint holds."""
        state = self._modules.state_dict()
        buffers = {n: b for n, b in self._modules.named_buffers() if n not in state}
        return {"weights": state, "buffers": buffers}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that saved weights fit.

        Raises:
            ValueError: with the first difference.
        """
        check_weights(self._modules, state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore saved weights, or a snapshot."""
        if "weights" in state:  # The names of weights begin with that of their module, and a dot.
            BufferState(self._modules).load_state_dict(state["buffers"])
            state = state["weights"]
        self._modules.load_state_dict(state)


class BufferState:
    """The buffers of the modules, of which each rank has its own until an epoch ends."""

    def __init__(self, modules: nn.Module) -> None:
        self._modules = modules

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers by name."""
        return dict(self._modules.named_buffers())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore saved buffers."""
        for name, buffer in self._modules.named_buffers():
            if name in state and buffer.shape == state[name].shape:
                buffer.copy_(state[name])
            elif name in state:  # One that grows with its input, such as a table of positions.
                buffer.data = state[name].to(buffer.device)


class TrainableState:
    """Flags ``requires_grad`` that hooks have changed since the first `fit` began.

    Those that nothing has changed are a setting, of which a resumed run may have another.
    """

    def __init__(self, modules: nn.Module) -> None:
        self._modules = modules
        self._start: dict[str, bool] = {}

    def begin(self) -> None:
        """Take the present flags as those of the beginning."""
        self._start = {n: p.requires_grad for n, p in self._modules.named_parameters()}

    def state_dict(self) -> dict[str, bool]:
        """Return the flags that differ from the beginning, by name."""
        return {
            name: p.requires_grad
            for name, p in self._modules.named_parameters()
            if p.requires_grad != self._start.get(name)
        }

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        """Freeze and unfreeze parameters as saved."""
        flags = {**self._start, **state}
        for name, p in self._modules.named_parameters():
            p.requires_grad_(flags.get(name, p.requires_grad))


def check_weights(modules: nn.Module, state: Mapping[str, Any]) -> None:
    """Check that saved weights fit modules.

    Raises:
        ValueError: for a name that is missing or unexpected, and for another shape.
    """
    own = modules.state_dict()
    checks.same_keys("the modules of this Brain", state, own)
    for name, tensor in own.items():
        if isinstance(tensor, Tensor) and tensor.shape != state[name].shape:
            raise ValueError(
                f"the saved parameter {name!r} has shape {tuple(state[name].shape)}, this Brain's "
                f"has {tuple(tensor.shape)}: the checkpoint was made with other settings"
            )
