"""State of a run: its entries, snapshots, saving and resuming.

State has two sources: a `Progress`, and the entries that `Brain.stateful` lists. Checkpoints, a
`fit` inside a hook of another `fit`, the trials of the tuner and the replay of a batch all iterate
these two, and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer import checks, distributed, signals
from trainer.checkpoint.checkpointer import Checkpointer, SaveRequest
from trainer.checkpoint.frozen import FrozenBase, completed
from trainer.checkpoint.migrate import complete
from trainer.checkpoint.storage import Checkpoint
from trainer.checkpoint.user_state import KEY
from trainer.distributed import run_on_main
from trainer.options import RunOptions
from trainer.progress import Progress
from trainer.seed import StatefulGenerator
from trainer.tree import map_leaves

NUMBER = "number"  # Key among names of parameters, which have a dot.
MAX_FAILED_SAVES = 3  # failures in a row; the last of them ends the run

logger = logging.getLogger("trainer")


@dataclass(frozen=True)
class StateEntry:
    """One part of a run's state.

    Args:
        part: the object that holds the state, by ``state_dict`` and ``load_state_dict``.
        scope: "shared": equal on all ranks; rank 0's is saved and every rank loads it. "rank":
            each rank saves and loads its own. "both": as "shared", but each other rank saves its
            own, too, and loads it when as many ranks resume. "memory": kept in snapshots alone; no
            checkpoint holds it.
        trained: True for weights and optimizers. A resumed run keeps what `Brain.on_fit_start`
            changes in them, and undoes its changes to everything else.
        of_fit: True if it belongs to one `fit`, and is restored after a nested `fit`.
        restart: called on loading a checkpoint that lacks the entry; None leaves it as it is.
        snapshot: returns the state for a `Snapshot`, which may hold more than that for a
            checkpoint; ``part`` loads both. None for ``part.state_dict``.
    """

    part: Any
    scope: Literal["shared", "rank", "both", "memory"] = "rank"
    trained: bool = False
    of_fit: bool = False
    restart: Callable[[], None] | None = None
    snapshot: Callable[[], Any] | None = None


Entries = Mapping[str, StateEntry]
SHARED = ("shared", "both")  # Scopes that rank 0 saves for every rank.


def copied(state: Any) -> Any:
    """Return a copy of a state whose tensors are in CPU memory and share none."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().to("cpu", copy=True)
        return leaf.copy() if type(leaf).__module__ == "numpy" and hasattr(leaf, "copy") else leaf

    return map_leaves(copy, state)


class Snapshot:
    """Copy of the state of a run, or of the part that belongs to one `fit`.

    The function ``stateful`` returns the entries by name; it is called again at each restore.
    """

    def __init__(
        self, progress: Progress, stateful: Callable[[], Entries], of_fit: bool = False
    ) -> None:
        self._progress, self._stateful, self._of_fit = progress, stateful, of_fit
        self._values = copied(vars(progress))
        self._states = {
            name: copied(_state(name, entry) if entry.snapshot is None else entry.snapshot())
            for name, entry in stateful().items()
            if entry.of_fit or not of_fit
        }

    def restore(self) -> None:
        """Restore every entry; entries that are new since stay as they are."""
        for name, entry in self._stateful().items():
            if name in self._states:
                # A copy, since optimizers take over the tensors that they are given.
                _load(name, entry, copied(self._states[name]))
        self._progress.load_state_dict(copied(self._values), of_run=not self._of_fit)

    @contextmanager
    def restored_after(self, kind: type[BaseException]) -> Iterator[None]:
        """Context manager that restores the state if an exception of a kind leaves it."""
        try:
            yield
        except kind:
            self.restore()
            raise


class RunState:
    """The state of a run as the `Checkpointer` saves it and a resumed run restores it.

    A checkpoint is restored in three steps, since a resumed run calls its hooks again. Loading
    restores every shared entry that exists by then. `on_fit_start` may then change weights and
    optimizers, whose state is kept. After the stage's hook, or at once if the run stopped between
    stages, everything else is restored.

    Attributes:
        resumed_fit: number of the `fit` in which the loaded checkpoint was saved; 0 without one.
        weights_of_run: weights to resume with, while the modules have other ones for a test; None
            otherwise.
        base: the frozen weights that checkpoints leave out; None if they leave out none.
        weight_keys: entries of the state that a checkpoint with weights alone has.
    """

    weight_keys = ("modules", "ema")

    def __init__(self, progress: Progress, stateful: Callable[[], Entries]) -> None:
        self.progress, self._stateful = progress, stateful
        self.resumed_fit = 0
        self.weights_of_run: Mapping[str, Any] | None = None
        self.base: FrozenBase | None = None
        self._shared: Mapping[str, Any] | None = None  # None once everything is restored.
        self._local: Mapping[str, Any] = {}
        self._trained: Mapping[str, Any] = {}

    # The Checkpointer's protocol

    def state_dict(self) -> dict[str, Any]:
        """Return the state that all ranks share."""
        entries = self._stateful()
        shared = {n: _state(n, e) for n, e in entries.items() if e.scope in SHARED}
        if self.weights_of_run is not None:
            shared["weights_of_run"] = self.weights_of_run
        state = {"progress": dict(vars(self.progress)), **shared}
        return state if self.base is None else self.base.leave_out(state)

    def weights(self) -> Mapping[str, Any]:
        """Return the present weights of the modules, by name."""
        weights: Mapping[str, Any] = self._stateful()["modules"].part.state_dict()
        return weights

    def base_of_save(self) -> dict[str, Any] | None:
        """Return the base of the last `state_dict`, for the manifest."""
        return None if self.base is None else self.base.summary

    def local_state_dict(self) -> dict[str, Any]:
        """Return this rank's own state."""
        scopes = ("rank",) if distributed.is_main() else ("rank", "both")
        entries = self._stateful()
        return {n: _state(n, e) for n, e in entries.items() if e.scope in scopes}

    def load_state_dict(self, shared: Mapping[str, Any]) -> None:
        """Restore weights, optimizers, progress and the objects that exist by now.

        The state of another model raises ValueError, and changes nothing.
        """
        entries = self._stateful()
        modules = entries["modules"].part
        weights = completed(shared.get("weights_of_run", shared["modules"]), modules)
        shared = {**shared, "modules": weights}
        if "ema" in shared:
            average = completed(shared["ema"]["average"], modules)
            shared["ema"] = {**shared["ema"], "average": average}
        check_weights(modules, weights)
        fitting = True
        try:
            _check_optimizers(shared, entries)
        except ValueError:
            if shared["progress"].get("fits", 0) <= self.progress.fits:
                raise
            # Saved in a later `fit`, before which the recipe replaces optimizers: see
            # `load_optimizers`.
            fitting = False
        # Earlier versions did not save all kinds of generators.
        needed = [n for n, e in entries.items() if n in shared or not _is_generator(e)]
        _check_names("stateful objects", "objects.", [n for n in shared if n in entries], needed)
        for name, entry in entries.items():
            if name not in shared and entry.restart is not None:
                entry.restart()
            elif name in shared and entry.scope in SHARED and (fitting or not _optimizes(name)):
                # An object may keep the tensors it loads, and loads them again after the hooks.
                state = shared[name] if entry.trained else copied(shared[name])
                _load(name, entry, state)
        self._load_progress(shared)
        self._shared, self._local, self._trained = shared, {}, {}

    def load_local_state_dict(self, local: Mapping[str, Any]) -> None:
        """Keep this rank's own state until the hooks have run."""
        self._local = complete(local)

    # Resuming

    @property
    def restoring(self) -> bool:
        """True from loading a checkpoint until everything is restored."""
        return self._shared is not None

    def load_optimizers(self) -> None:
        """Restore the optimizers of the resumed `fit`, if it is not the first one."""
        if self._shared is not None and self.resumed_fit > 1:
            entries = self._stateful()
            _check_optimizers(self._shared, entries)
            for name in filter(_optimizes, entries):
                _load(name, entries[name], self._shared[name])

    def fit_started(self) -> bool:
        """Restore more after `on_fit_start` has run; return True if everything is restored now."""
        if self._shared is None:
            return False
        if self.progress.phase != "train":
            self._restore(self._shared)
            return True
        # The hook of the stage runs first.
        trained = {n: _state(n, e) for n, e in self._stateful().items() if e.trained}
        self._trained = copied(trained)
        return False

    def training_started(self) -> bool:
        """Restore the rest after the stage's hook has run; return True if there was any.

        A saved object that does not exist by now raises ValueError.
        """
        if self._shared is None:
            return False
        entries, saved = self._stateful(), self._shared
        _check_names("stateful objects", "objects.", saved, [n for n in entries if n in saved])
        for name, state in self._trained.items():
            _load(name, entries[name], state)
        self._load_progress(saved)
        self._restore(saved)
        return True

    def enter_epoch(self, epoch: int, length: int | None) -> None:
        """Record the length of an epoch on this rank, and find the batch from which to resume it.

        With fewer ranks an epoch has more batches on each. If the number of batches has changed,
        the same share of the epoch is skipped.
        """
        progress, ranks = self.progress, distributed.world_size()
        step, batches, processes = progress.step, progress.epoch_batches, progress.processes
        progress.epoch_batches, progress.processes = length, ranks
        progress.step = step * processes // ranks
        if not step or length is None or not batches:
            return
        if abs(length * ranks - batches * processes) >= max(ranks, processes):
            progress.step = step * length // batches
            logger.warning(
                "epoch %d has %d batches now, and had %d when it was left after %d: going on after "
                "%d", epoch, length, batches, step, progress.step,
            )  # fmt: skip

    def _load_progress(self, shared: Mapping[str, Any]) -> None:
        fits = self.progress.fits
        self.progress.load_state_dict(shared["progress"])
        self.resumed_fit, self.progress.fits = self.progress.fits, fits

    def _restore(self, shared: Mapping[str, Any]) -> None:
        """Restore every entry that is not trained."""
        saved = {**shared, **self._local}
        for name, entry in self._stateful().items():
            if not entry.trained and name in saved:
                _load(name, entry, saved[name])
        self._shared, self._local, self._trained = None, {}, {}


def _state(name: str, entry: StateEntry) -> Any:
    with _named(name):
        return entry.part.state_dict()


def _load(name: str, entry: StateEntry, state: Any) -> None:
    with _named(name):
        entry.part.load_state_dict(state)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Context manager that adds the name of an entry to an exception of a user's object."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by the state {name!r}")
        raise


def _optimizes(name: str) -> bool:
    return name.startswith("optimizers.")


def _check_optimizers(shared: Mapping[str, Any], entries: Entries) -> None:
    """Raise ValueError if a checkpoint has other optimizers than this run."""
    _check_names("optimizers", "optimizers.", shared, entries)
    for name in filter(_optimizes, entries):
        entries[name].part.check_state_dict(shared[name])


def _check_names(kind: str, prefix: str, saved: Iterable[str], own: Iterable[str]) -> None:
    """Raise ValueError if the names that begin with ``prefix`` are not the saved ones."""
    has, needs = (
        {name.removeprefix(prefix): 0 for name in names if name.startswith(prefix)}
        for names in (saved, own)
    )
    checks.same_keys(f"the {kind} of this Brain", has, needs)


def _is_generator(entry: StateEntry) -> bool:
    return isinstance(entry.part, StatefulGenerator)


class Saver:
    """Saves a run when its state is complete.

    Saves that hooks ask for wait until then: after a batch, after a stage, at the end of an epoch.
    Every rank passes each checkpoint to ``on_saved``. Without a checkpointer nothing is saved. The
    state becomes its recoverable "brain".

    A save that fails on the disk is logged as an error, and the run goes on; the third failure in a
    row ends it. When a run ends, the last failed saves are tried once more; another failure is
    raised.
    """

    def __init__(
        self,
        checkpointer: Checkpointer | None,
        state: RunState,
        options: RunOptions,
        on_saved: Callable[[Checkpoint], None],
    ) -> None:
        if not isinstance(checkpointer, (Checkpointer, NoneType)):
            raise ValueError(
                f"checkpointer is a {type(checkpointer).__name__}; allowed: a trainer.Checkpointer "
                "or None"
            )
        # A disabled checkpointer stands for none, so that no method has to check.
        self._checkpointer = Checkpointer(".") if checkpointer is None else checkpointer
        if checkpointer is None or options.debug:
            self._checkpointer.enabled = False
        self._checkpointer.add_recoverable("brain", state)
        self._progress, self._options, self._on_saved = state.progress, options, on_saved
        self._weights = state.weights
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._failures = 0  # Calls of `release` in a row in which a save failed.
        self._unsaved: list[SaveRequest] = []  # Saves whose last try failed.

    def recover(self) -> Checkpoint | None:
        """Load the newest sound checkpoint, if there is one, and return it. Collective."""
        if not self._checkpointer.enabled:
            return None
        self._checkpointer.prepare()
        retention, wanted = self._checkpointer.retention, self._options.average_checkpoints
        kept = retention.last + sum(rule.n for rule in retention.best)
        if wanted > kept:
            logger.warning(
                "average_checkpoints is %d, but the checkpointer keeps %d at most (keep_last is "
                "%d): the average is of fewer, unless the recipe keeps more by its own saves; "
                "allowed: keep_last=%d", wanted, kept, retention.last, wanted,
            )  # fmt: skip
        found, folder = self._checkpointer.recover_if_possible(), self._checkpointer.folder
        if found is not None:
            self._saved_step = self._progress.optimizer_step
            if distributed.is_main():
                checks.warn_of_nonfinite(found.path, self._weights())
        elif others := sorted(path.parent for path in folder.glob("CKPT+*/CKPT.yaml")):
            logger.warning(
                "%s has %d checkpoints of SpeechBrain's (the last is %s), of which nothing is "
                "read: this run begins anew. Its weights are read by module.load_state_dict("
                "torch.load('%s/model.ckpt', weights_only=True)) before fit",
                folder, len(others), others[-1].name, others[-1],
            )  # fmt: skip
        return found

    def is_fresh(self) -> bool:
        """Return True if there is no checkpoint to resume from. Collective."""
        enabled = self._checkpointer.enabled
        return not (enabled and run_on_main(lambda: bool(self._checkpointer.list_checkpoints())))

    def pending(self) -> bool:
        """Return True if a save within the epoch is due by steps, or a hook has asked for one."""
        return self._checkpointer.waits or self.due_by_steps()

    def due_by_steps(self) -> bool:
        """Return True if a save within the epoch is due, on all ranks alike."""
        most = self._options.checkpoint_every_steps
        return most is not None and self._progress.optimizer_step - self._saved_step >= most

    def due_by_time(self) -> bool:
        """Return True if a save within the epoch is due by this rank's clock."""
        minutes = self._options.checkpoint_every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, metrics: Mapping[str, Any], end_of_epoch: bool) -> None:
        """Save the run as it is now, and delete what no rule keeps. Collective."""
        place = {"epoch": self._progress.epoch, "optimizer_step": self._progress.optimizer_step}
        self._checkpointer.save_and_keep_only({**place, **metrics}, end_of_epoch=end_of_epoch)
        self.release()

    def release(self) -> bool:
        """Do the saves that waited; return True if there were any. Collective."""
        requests = self._checkpointer.release()
        self._checkpointer.hold()
        if requests:
            self._saved_at, self._saved_step = time.monotonic(), self._progress.optimizer_step
            failure = self._save_all(requests)
            self._failures = self._failures + 1 if failure else 0
            if failure and self._failures >= MAX_FAILED_SAVES:
                raise failure
            if failure and distributed.is_main():
                logger.error(
                    "%s. The run goes on and tries again at its next save; it ends where %d fail "
                    "in a row", failure.strerror or failure, MAX_FAILED_SAVES,
                )  # fmt: skip
        return bool(requests)

    def _save_all(self, requests: Iterable[SaveRequest]) -> OSError | None:
        """Do each save; return the last error of a disk, if any, of one kind on all ranks."""
        self._unsaved, failure = [], None
        for request in requests:
            try:
                saved = self._checkpointer.save(request)
            except Exception as error:
                failure = self._failure_of_a_disk(error)
                self._unsaved.append(request)
            else:
                self._on_saved(saved)
        return failure

    def _failure_of_a_disk(self, error: Exception) -> OSError:
        """Return the error of a save if a disk of some rank caused it; raise any other.

        Every rank gets an OSError, so that all go on or all end. Collective.
        """
        disk, elsewhere = isinstance(error, OSError), distributed.failed_elsewhere(error)
        on_a_disk, otherwise = distributed.any_rank(disk, not (disk or elsewhere))
        if otherwise or not on_a_disk:
            raise error
        if isinstance(error, OSError):
            return error
        folder = self._checkpointer.folder
        return OSError(f"a checkpoint in {folder} could not be saved: {error}; free some space")

    def _save_finally(self) -> None:
        """Try the last failed saves once more at the end of the run; raise another failure."""
        if self._unsaved and (failure := self._save_all(self._unsaved)):
            raise failure

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Context manager in which saves wait, and which saves the run when it is asked to stop."""
        self._checkpointer.hold()
        try:
            yield
            self._save_finally()
        except signals.Interrupted as stop:
            self.save_stopped(stop)
            raise
        finally:
            self._checkpointer.release()

    def save_stopped(self, stop: signals.Interrupted) -> None:
        """Save a run that was asked to stop, if its state is complete. Collective."""
        if not self._checkpointer.enabled:
            return
        said = "stopping (%s) without a new checkpoint; the same command resumes from the last"
        if stop.saves:
            self.save({}, end_of_epoch=False)
            self._save_finally()
            said = "saved and stopping (%s); the same command resumes from here"
        logger.info(said, stop.signal)

    @contextmanager
    def testing(self, trained: bool) -> Iterator[None]:
        """Context manager in which saves wait, since the weights are not those of the run.

        A run that has not trained drops them, with a warning.
        """
        self._checkpointer.hold()
        try:
            yield
            if trained:
                self.release()
                self._save_finally()
        finally:
            if self._checkpointer.release():
                logger.warning("a save within a test was left out: this Brain has not trained")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context manager in which every save does nothing."""
        before, self._checkpointer.enabled = self._checkpointer.enabled, False
        try:
            yield
        finally:
            self._checkpointer.enabled = before


class BufferState:
    """The buffers of the modules, also those that are not persistent."""

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
            elif name in state:  # A buffer that grows with its input, such as a table of positions.
                buffer.data = state[name].to(buffer.device)


class TrainableState:
    """Flags ``requires_grad`` that hooks have changed since the first `fit` began.

    Unchanged flags come from the recipe's settings, which may differ in a resumed run.
    """

    def __init__(self, modules: nn.Module) -> None:
        self._modules = modules
        self._start: dict[str, bool] = {}
        self._warned = False

    def begin(self) -> None:
        """Take the present flags as the initial ones."""
        self._start = {n: p.requires_grad for n, p in self._modules.named_parameters()}

    def state_dict(self) -> dict[str, bool | int]:
        """Return the flags that have changed, by name, and the number that train."""
        flags = {name: p.requires_grad for name, p in self._modules.named_parameters()}
        changed = {name: flag for name, flag in flags.items() if flag != self._start.get(name)}
        return {**changed, NUMBER: sum(flags.values())}

    def load_state_dict(self, state: Mapping[str, bool | int]) -> None:
        """Freeze and unfreeze parameters as saved; warn if other parameters train than before."""
        flags = {**self._start, **state}
        params = dict(self._modules.named_parameters())
        for name, p in params.items():
            p.requires_grad_(bool(flags.get(name, p.requires_grad)))
        number = sum(p.requires_grad for p in params.values())
        if state.get(NUMBER, number) != number and not self._warned and distributed.is_main():
            self._warned = True
            logger.warning(
                "%d of %d tensors of parameters train now, and %d did when the checkpoint was "
                "saved: freeze the same as then, unless this is meant",
                number, len(params), state[NUMBER],
            )  # fmt: skip


def check_weights(modules: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise ValueError if saved weights have other names, shapes or kinds of numbers."""
    # Averages lack the states that modules save by marked methods.
    given = modules.state_dict().items()
    own = {name: each for name, each in given if name in state or not name.endswith(KEY)}
    checks.same_keys("the modules of this Brain", state, own)
    for name, tensor in own.items():
        saved = state[name]
        if isinstance(tensor, Tensor) != isinstance(saved, Tensor):
            raise ValueError(f"the saved {name!r} is a {type(saved).__name__}, and fits no tensor")
        if not isinstance(tensor, Tensor):
            continue
        if tensor.shape != saved.shape:
            raise ValueError(
                f"the saved parameter {name!r} has shape {tuple(saved.shape)}, this Brain's "
                f"has {tuple(tensor.shape)}: the checkpoint was made with other settings"
            )
        if reason := misfit(saved, tensor):
            raise ValueError(
                f"the saved parameter {name!r} is {reason}, this Brain's is {tensor.dtype}: the "
                "checkpoint was made with parameters of another type"
            )


def misfit(value: Tensor, own: Tensor) -> str:
    """Return the reason why a saved tensor cannot be copied into a model's, or an empty text.

    The text describes ``value`` and follows "is", such as "without content".
    """
    if value.is_meta:
        return "without content"
    if value.layout != torch.strided:
        return f"of layout {value.layout}"
    kinds = [(each.is_floating_point(), each.is_complex()) for each in (value, own)]
    # Floats of one byte are quantised; the tensor lacks their scale.
    codes = value.is_floating_point() and value.itemsize == 1 and value.dtype != own.dtype
    return str(value.dtype) if codes or kinds[0] != kinds[1] else ""
