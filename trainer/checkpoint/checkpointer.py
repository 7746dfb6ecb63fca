"""The Checkpointer: save, find, restore and average the states of a run, and delete old ones."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from trainer import distributed, json_files, tree
from trainer.checkpoint import storage, user_state
from trainer.checkpoint.storage import (
    FORMAT,
    BrokenCheckpoint,
    Checkpoint,
    FileEntry,
    FolderLock,
    MissingCheckpoint,
)
from trainer.distributed import run_on_all, run_on_main
from trainer.epochs import EpochCounter

T = TypeVar("T")
Key = Callable[[Checkpoint], Any]
Predicate = Callable[[Checkpoint], bool]

logger = logging.getLogger("trainer")

LOCK_SECONDS = 2.0  # of waiting for a process that is ending, or cleaning up
MAX_RETRIES = 100  # of a search while another process replaces checkpoints


class Best(NamedTuple):
    """Rule that keeps the ``n`` best checkpoints by a metric, as ``keep_best`` describes it.

    ``every_epoch`` is False for a metric that only some epochs give.
    """

    metric: str
    mode: str
    n: int = 1
    weights_only: bool = False
    every_epoch: bool = True


@dataclass(frozen=True)
class Retention:
    """Rules for which checkpoints stay.

    Args:
        last: number of the newest checkpoints that stay.
        best: rules for the best ones by metrics.
        keys: pairs of a function of a checkpoint and a number; so many checkpoints with the largest
            values stay.
        predicate: returns True for checkpoints that may be deleted.
    """

    last: int
    best: tuple[Best, ...] = ()
    keys: tuple[tuple[Key, int], ...] = ()
    predicate: Predicate = lambda _: True

    def select(self, checkpoints: Sequence[Checkpoint]) -> tuple[set[Checkpoint], set[Checkpoint]]:
        """Return the checkpoints that stay, and those to cut to weights; given newest first.

        The first set has at least one complete checkpoint, if there is any.
        """
        complete = [each for each in checkpoints if each.complete]
        kept = set(complete[: self.last])
        weights: set[Checkpoint] = set()
        for rule in self.best:
            best = ranked(checkpoints, rule.metric, rule.mode)[: rule.n]
            (weights if rule.weights_only else kept).update(best)
        for key, n in self.keys:
            kept.update(sorted(checkpoints, key=key, reverse=True)[:n])
        if not any(each.complete for each in kept):
            kept.update((complete or checkpoints)[:1])
        return kept, weights - kept


def _best_rules(keep_best: Any) -> tuple[Best, ...]:
    """Return the rules in the argument ``keep_best``, or raise ValueError."""
    if not isinstance(keep_best, Mapping):
        raise ValueError(f"keep_best is {keep_best!r}; it must map metrics to min or max")
    allowed: dict[str, Callable[[Any], bool]] = {
        "mode": lambda value: value in ("min", "max"),
        "n": lambda value: type(tree.plain_number(value)) is int and value >= 1,
        "weights_only": lambda value: type(value) is bool,
    }
    rules = []
    for metric, rule in keep_best.items():
        given = rule if isinstance(rule, Mapping) else {"mode": rule}
        wrong = [f"{k} is {given[k]!r}" for k in given if k in allowed and not allowed[k](given[k])]
        wrong += [f"{key!r} is unknown" for key in given if key not in allowed]
        wrong += ["mode is missing"] if "mode" not in given else []
        wrong += ["the metric's name is no text"] if not isinstance(metric, str) else []
        if wrong:
            raise ValueError(
                f"keep_best has {metric!r}: {rule!r}, where {' and '.join(wrong)}; a metric's rule "
                "is min, max, or a mapping like {mode: min, n: 3, weights_only: true}"
            )
        rules.append(Best(metric, **given))
    return tuple(rules)


def _rules_by_keys(n: int, low: Iterable[str], high: Iterable[str]) -> tuple[Best, ...]:
    return (*(Best(key, "min", n) for key in low), *(Best(key, "max", n) for key in high))


def ranked(checkpoints: Sequence[Checkpoint], metric: str, mode: str) -> list[Checkpoint]:
    """Sort the checkpoints that have a finite value of ``metric``, the best first; stable."""

    def has_value(checkpoint: Checkpoint) -> bool:
        value = checkpoint.meta.get(metric)
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))

    sign = 1 if mode == "min" else -1
    return sorted(filter(has_value, checkpoints), key=lambda each: sign * each.meta[metric])


@dataclass(frozen=True)
class SaveRequest:
    """Arguments of a save, which may have to wait for `Checkpointer.release`."""

    meta: dict[str, Any]
    end_of_epoch: bool
    label: str | None
    retention: Retention | None  # None: delete nothing


def retry_missing(work: Callable[[], T]) -> T:
    """Call a function that finds and reads checkpoints; retry if one is deleted meanwhile."""
    for _ in range(MAX_RETRIES):
        with contextlib.suppress(MissingCheckpoint):
            return work()
    return work()


class Checkpointer:
    """Save, find and restore the states of a run.

    Saves are atomic: a process that is killed at any moment leaves the previous checkpoints intact.
    Every file is verified when it is loaded, and loading runs no code.

    Only one process may save in a folder: from its first save on, others are refused while this
    object lives. Any number of processes may read there at the same time.

    Checkpoints at the end of an epoch and those within epochs are counted separately, so that
    neither kind displaces the other.

    Args:
        folder: folder of the checkpoints; made at the first save.
        keep_last: number of the newest checkpoints that `save_and_keep_only` keeps, at least 1. A
            mapping of objects is taken as ``recoverables``, SpeechBrain's second argument.
        keep_best: metrics by which the best checkpoints are kept, too: names in ``meta``, mapped to
            "min" or "max", or to ``{mode: min, n: 3, weights_only: true}``. ``n`` is their number;
            ``weights_only`` cuts them to their weights once they are not among the newest: a run
            cannot resume from them, but they can be tested and used.
        recoverables: objects to save and restore, by name. Each has ``state_dict`` and
            ``load_state_dict``. One that has ``local_state_dict`` and ``load_local_state_dict`` as
            well has a part of its state that differs between ranks.
        checkpoints_dir: another name for ``folder``.
        allow_partial_load: restore a checkpoint that lacks some of the recoverables, which stay as
            they are.

    Attributes:
        enabled: False lets every save do nothing.

    Raises:
        ValueError: an argument is invalid, or ``folder`` is a file.

    Example::

        checkpointer = Checkpointer("checkpoints", keep_last=2, keep_best={"wer": "min"})
        checkpointer.add_recoverable("model", model)
        checkpointer.recover_if_possible()
        checkpointer.save_and_keep_only({"epoch": 1, "wer": 12.3})
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        keep_last: int | Mapping[str, Any] = 1,
        keep_best: Mapping[str, Any] | None = None,
        recoverables: Mapping[str, Any] | None = None,
        *,
        checkpoints_dir: str | Path | None = None,
        allow_partial_load: bool = False,
    ) -> None:
        if isinstance(keep_last, Mapping) and not any(
            user_state.as_stateful(obj) is None for obj in keep_last.values()
        ):  # SpeechBrain's second argument.
            recoverables, keep_last = keep_last, 1
        if (folder is None) == (checkpoints_dir is None):
            raise ValueError("a Checkpointer needs a folder (also called checkpoints_dir), once")
        self.folder = Path(os.path.expanduser(str(checkpoints_dir if folder is None else folder)))
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoints cannot be saved in {self.folder}: it is not a folder")
        keep_last = tree.plain_number(keep_last)
        if type(keep_last) is not int or keep_last < 1:
            raise ValueError(f"keep_last is {keep_last!r}; it must be a whole number of at least 1")
        self.retention = Retention(keep_last, _best_rules({} if keep_best is None else keep_best))
        self.enabled, self.allow_partial_load = True, allow_partial_load
        self.recoverables: dict[str, Any] = {}
        self._modules: set[str] = set()  # Names of the recoverables that are modules.
        self._optional: set[str] = set()
        self.add_recoverables(recoverables or {})
        self._held = False
        self._waiting: list[SaveRequest] = []
        self._missed: set[str] = set()  # Metrics to keep by that were warned of.
        self._broken: dict[str, str] = {}  # Broken ones, not read again: reasons by name.
        self._lock: FolderLock | None = None

    def add_recoverable(
        self,
        name: str,
        obj: Any,
        custom_load_hook: Callable[[Any, Path, bool], Any] | None = None,
        custom_save_hook: Callable[[Any, Path], Any] | None = None,
        optional_load: bool = False,
    ) -> None:
        """Save and restore an object from now on.

        Args:
            name: name of the object in every checkpoint: letters, digits, - and _.
            obj: object with ``state_dict`` and ``load_state_dict``, or with methods that save and
                load a file (`trainer.checkpoint.user_state`).
            custom_load_hook: restores the object from a file, in place of `load_state_dict`; called
                with the object, the path and True.
            custom_save_hook: writes its state to a file, in place of `state_dict`; called with the
                object and the path.
            optional_load: also restore a checkpoint that lacks the object.

        Raises:
            ValueError: the name has other characters, or the object has no such methods.
        """
        if not storage.RECOVERABLE_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a recoverable: it becomes a file name, made of letters, "
                "digits, - and _, and not beginning with rank-"
            )
        is_module = isinstance(obj, nn.Module)
        if custom_load_hook is not None or custom_save_hook is not None:
            save, load = custom_save_hook or _save, custom_load_hook or _load
            obj = user_state.FileState(obj, partial(save, obj), partial(load, obj))
        part = user_state.as_stateful(obj)
        if part is None:
            raise ValueError(
                f"the recoverable {name!r} is a {type(obj).__name__}, which has no state_dict and "
                "load_state_dict"
            )
        self.recoverables[name] = part
        for names, belongs in ((self._optional, optional_load), (self._modules, is_module)):
            names.discard(name)
            names.update([name] if belongs else [])

    def add_recoverables(self, recoverables: Mapping[str, Any]) -> None:
        """Add several objects by name, as `add_recoverable` does."""
        for name, obj in recoverables.items():
            self.add_recoverable(name, obj)

    def _weights_of(self, checkpoint: Checkpoint) -> list[str]:
        """Return the files of a checkpoint that hold weights, of modules and of a Brain."""
        names = {f"{name}.pt" for name in self._modules}
        for name, obj in self.recoverables.items():
            for key in getattr(obj, "weight_keys", ()):
                names |= {f"{name}.pt", f"{name}.{key}.pt"}
        return [file for file in checkpoint.files if file in names]

    def keep_best(self, rules: Mapping[str, Any], every_epoch: bool = True) -> None:
        """Keep the best checkpoints by further metrics, too.

        Args:
            rules: as ``keep_best`` of the constructor, such as ``{"wer": "min"}``.
            every_epoch: False for metrics that only some epochs give; otherwise an epoch without
                one gets a warning.

        Raises:
            ValueError: a rule is invalid.
        """
        best = [rule._replace(every_epoch=every_epoch) for rule in _best_rules(rules)]
        self.retention = Retention(self.retention.last, (*self.retention.best, *best))

    # Saving

    def save_checkpoint(
        self,
        meta: Mapping[str, Any] = {},
        end_of_epoch: bool = True,
        name: str | None = None,
        verbosity: int | None = None,
    ) -> Checkpoint | None:
        """Save every recoverable, and delete no other checkpoint. Every rank must call it.

        Args:
            meta: epoch, metrics and other plain values, by which checkpoints can be found later.
            end_of_epoch: False for a save within an epoch.
            name: name of the checkpoint. It then stays until it is deleted by hand or saved again
                under this name. By default it is named by the ``optimizer_step`` in ``meta``.
            verbosity: not used.

        Returns:
            The checkpoint, or None while saves are held or disabled.

        Raises:
            ValueError: the name, ``meta`` or a state cannot be saved, or the folder is not
                writable.
            OSError: a file could not be written; the save leaves nothing behind.
            RuntimeError: another rank failed.
        """
        return self._request(meta, end_of_epoch, name, None)

    def save_and_keep_only(
        self,
        meta: Mapping[str, Any] = {},
        end_of_epoch: bool = True,
        name: str | None = None,
        num_to_keep: int = 1,
        keep_recent: bool = True,
        importance_keys: Iterable[Key] = (),
        max_keys: Iterable[str] = (),
        min_keys: Iterable[str] = (),
        ckpt_predicate: Predicate | None = None,
        verbosity: int | None = None,
    ) -> Checkpoint | None:
        """Save every recoverable, then delete the checkpoints that no rule keeps.

        Rules come from the constructor and from these arguments. Every rank must call it.

        Args:
            meta: as in `save_checkpoint`.
            end_of_epoch: as in `save_checkpoint`; only checkpoints of the same kind are deleted.
            name: as in `save_checkpoint`, but the checkpoint can be deleted by later saves.
            num_to_keep: number of checkpoints to keep, newest and best by each key; at least 1.
            keep_recent: False to keep the best ones only.
            importance_keys: functions of a checkpoint; those with the largest values are kept.
            max_keys: metrics in ``meta`` to keep the highest of.
            min_keys: metrics in ``meta`` to keep the lowest of.
            ckpt_predicate: True for the checkpoints that may be deleted; None for all.
            verbosity: not used.

        Returns:
            The checkpoint, or None while saves are held or disabled.

        Raises:
            ValueError, OSError, RuntimeError: as in `save_checkpoint`.
        """
        if num_to_keep < 1:
            raise ValueError(f"num_to_keep is {num_to_keep}; at least 1 checkpoint must be kept")
        rules = _rules_by_keys(num_to_keep, min_keys, max_keys)
        last = max(self.retention.last, num_to_keep) if keep_recent else 0
        keys = tuple((key, num_to_keep) for key in importance_keys)
        may_go = ckpt_predicate or Retention.predicate
        retention = Retention(last, (*self.retention.best, *rules), keys, may_go)
        alone = [rule.metric for rule in retention.best if rule.weights_only]
        have_keys = any(hasattr(obj, "weight_keys") for obj in self.recoverables.values())
        if alone and not self._modules and not have_keys:
            raise ValueError(
                f"keep_best is to keep weights alone by {alone[0]!r}, and none of the recoverables "
                f"({', '.join(self.recoverables) or 'none'}) is a module"
            )
        return self._request(meta, end_of_epoch, name, retention)

    def _warn_of_missing(self, retention: Retention, meta: Mapping[str, Any]) -> None:
        """Warn, once each, of metrics in a rule that an epoch's save lacks."""
        given = ", ".join(name for name in meta if name not in ("epoch", "optimizer_step"))
        for metric in sorted({rule.metric for rule in retention.best if rule.every_epoch}):
            if metric not in meta and metric not in self._missed:
                self._missed.add(metric)
                own = any(rule.metric == metric for rule in self.retention.best)
                logger.warning(
                    "%s the metric %r, which the epoch did not give; it gave %s: no checkpoint can "
                    "be the best by it", "keep_best names" if own else "a save is to keep by",
                    metric, given or "none",
                )  # fmt: skip

    @property
    def waits(self) -> bool:
        """True if a save was deferred."""
        return bool(self._waiting)

    def hold(self) -> None:
        """Defer saves until `release`, since the state is incomplete at the moment."""
        self._held = True

    def release(self) -> list[SaveRequest]:
        """Stop deferring saves.

        Returns:
            The saves that were deferred, for `save`.
        """
        waiting, self._held, self._waiting = self._waiting, False, []
        return waiting

    def prepare(self) -> None:
        """Make the folder, remove remains of killed processes, and check the states.

        Every save does this first. Call it before training, while there is nothing to lose.
        Every rank must call it.

        Raises:
            ValueError: the folder cannot be made or is not writable, another process saves in it,
                or a state holds something that cannot be saved.
            RuntimeError: another rank failed.
        """
        run_on_main(self._prepare)
        run_on_all(self._check_states)

    def _check_states(self) -> None:
        for name, obj in self.recoverables.items():
            storage.writable(obj.state_dict(), name)
        storage.writable(self._local_states(), "the local state")

    def _local_states(self) -> dict[str, Any]:
        return {
            name: obj.local_state_dict()
            for name, obj in self.recoverables.items()
            if hasattr(obj, "local_state_dict")
        }

    def _prepare(self) -> None:
        storage.make_folder(self.folder)
        last = time.monotonic() + LOCK_SECONDS
        while (lock := storage.lock_folder(self.folder)) is None and time.monotonic() < last:
            time.sleep(0.05)
        self._lock = lock
        if lock is None:
            raise ValueError(
                f"checkpoints cannot be saved in {self.folder}: another process, which is still "
                "alive, saves there; end it, or choose another folder"
            )
        storage.remove_stale(self.folder)

    def _request(
        self,
        meta: Mapping[str, Any],
        end_of_epoch: bool,
        name: str | None,
        retention: Retention | None,
    ) -> Checkpoint | None:
        if name is not None and not (storage.CHECKPOINT_NAME.fullmatch(name) and len(name) <= 80):
            raise ValueError(
                f"{name[:100]!r} cannot name a checkpoint: it becomes a folder's name, made of at "
                "most 80 letters, digits and _ . = , -"
            )
        request = SaveRequest(_readable(meta), end_of_epoch, name, retention)
        if self.enabled and end_of_epoch and retention is not None and distributed.is_main():
            self._warn_of_missing(retention, meta)
        if self._held and self.enabled:
            self._waiting.append(request)
        return self.save(request) if self.enabled and not self._held else None

    def save(self, request: SaveRequest) -> Checkpoint:
        """Do a deferred save. Every rank must call it.

        Returns:
            The checkpoint.

        Raises:
            ValueError, OSError, RuntimeError: as in `save_checkpoint`.
        """
        name, fields = run_on_main(self._plan, request)
        planned = Checkpoint(self.folder / name, **fields)
        with _naming_failure(f"the checkpoint {planned.path} could not be saved"):
            saved = self._write(planned)
        with _naming_failure(
            f"{saved.path} is saved, but an earlier checkpoint could not be deleted or cut"
        ):
            run_on_main(self._delete_others, saved, request.retention)
        return saved

    def _plan(self, request: SaveRequest) -> tuple[str, dict[str, Any]]:
        """Choose the name of a new checkpoint, and return its fields without the files."""
        self._prepare()
        number = 1 + max((each.number for each in self.list_checkpoints()), default=0)
        step = request.meta.get("optimizer_step", request.meta.get("step"))
        step = step if type(step) is int else None
        wanted = request.label or (f"save-{number:08d}" if step is None else f"step-{step:08d}")
        names = (wanted if n == 1 else f"{wanted}-{n}" for n in itertools.count(1))
        return next(each for each in names if not os.path.lexists(self.folder / each)), {
            "number": number,
            "time": datetime.now(UTC).isoformat(),
            "step": step,
            "label": request.label,
            "pinned": request.label is not None and request.retention is None,
            "end_of_epoch": request.end_of_epoch,
            "processes": distributed.world_size(),
            "meta": request.meta,
        }

    def _write(self, planned: Checkpoint) -> Checkpoint:
        """Write a checkpoint on all ranks; a failure on any of them leaves nothing."""
        # Only rank 0 knows the name of the temporary folder, which has its process id.
        temporary = self.folder / run_on_main(storage.make_temporary, planned.path)
        try:
            by_rank = distributed.all_gather_json(run_on_all(self._write_states, temporary))
            entries = {n: FileEntry(*entry) for files in by_rank for n, entry in files.items()}
            base = getattr(self.recoverables.get("brain"), "base_of_save", lambda: None)
            saved = replace(planned, files=entries, base=run_on_main(base))
            run_on_main(storage.publish, temporary, saved)
        except BaseException:
            if distributed.is_main():
                # The next start removes what is left; the error matters more.
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return saved

    def _write_states(self, folder: Path) -> dict[str, FileEntry]:
        """Write this rank's files: the shared states on rank 0, and its local states."""
        rank = distributed.rank()
        written: dict[str, FileEntry] = {}
        for name, obj in self.recoverables.items() if rank == 0 else ():
            written |= storage.write_state(folder, name, obj.state_dict())
        return written | storage.write_local(folder, rank, self._local_states())

    def _delete_others(self, saved: Checkpoint, retention: Retention | None) -> None:
        """Delete the checkpoint that ``saved`` replaces by label, and those that no rule keeps."""
        others = [each for each in self.list_checkpoints() if each.name != saved.name]
        unwanted = {each for each in others if saved.label and each.label == saved.label}
        if retention is not None:
            kind = [
                each
                for each in (saved, *others)
                if each.end_of_epoch == saved.end_of_epoch and not each.pinned
            ]
            kept, weights = retention.select([e for e in kind if e not in unwanted])
            for each in filter(retention.predicate, weights):
                if each.complete and each.format == FORMAT and (files := self._weights_of(each)):
                    storage.cut_to_weights(each, files)
            unwanted.update(filter(retention.predicate, {*kind} - kept - weights))
        for checkpoint in unwanted:
            storage.delete(checkpoint.path)

    def delete_checkpoints(
        self,
        *,
        num_to_keep: int = 1,
        min_keys: Iterable[str] | None = None,
        max_keys: Iterable[str] | None = None,
        importance_keys: Iterable[Key] | None = None,
        ckpt_predicate: Predicate | None = None,
        verbosity: int | None = None,
    ) -> None:
        """Delete all checkpoints but the newest and the best ones. Every rank must call it.

        Args:
            num_to_keep: number to keep by each criterion; 0 deletes all.
            min_keys: metrics in ``meta`` to keep the lowest of.
            max_keys: metrics in ``meta`` to keep the highest of.
            importance_keys: functions of a checkpoint; those with the largest values are kept,
                instead of the newest.
            ckpt_predicate: True for the checkpoints that may be deleted; None for all.
            verbosity: not used.

        Raises:
            ValueError: ``num_to_keep`` is below 0, or another process saves in the folder.
        """
        if num_to_keep < 0:
            raise ValueError(f"num_to_keep is {num_to_keep}; it must be 0 or more")
        rules = _rules_by_keys(num_to_keep, min_keys or (), max_keys or ())
        keys = tuple((key, num_to_keep) for key in importance_keys or ())
        last = num_to_keep if importance_keys is None else 0

        def delete() -> None:
            self._prepare()
            found = self.list_checkpoints()
            kept = Retention(last, rules, keys).select(found)[0] if num_to_keep else set()
            for each in found:
                if each not in kept and (ckpt_predicate is None or ckpt_predicate(each)):
                    storage.delete(each.path)

        run_on_main(delete)

    # Finding

    @property
    def checkpoints_dir(self) -> Path:
        """The folder."""
        return self.folder

    def list_checkpoints(self) -> list[Checkpoint]:
        """List the checkpoints in the folder, newest first, by their manifests alone.

        A broken one is left out, with a warning that names it.

        Returns:
            The checkpoints; none if there is no folder.
        """
        found: list[Checkpoint] = []
        for _ in range(MAX_RETRIES):
            before, (found, settled) = found, self._scan()
            # The newest is saved complete. If it is cut to weights by now, this scan may have
            # missed a newer one.
            if settled and (found == before or all(each.complete for each in found[:1])):
                break
        return found

    def _scan(self) -> tuple[list[Checkpoint], bool]:
        """Return the checkpoints in the folder, and False if the scan may have missed some."""
        found, complete, saving = [], True, False
        try:
            entries = list(os.scandir(self.folder))
        except FileNotFoundError:
            return [], True
        for entry in entries:
            saving |= storage.TEMPORARY_NAME.fullmatch(entry.name) is not None
            # A link is not followed: it would be a second name, or lead outside.
            fits = storage.CHECKPOINT_NAME.fullmatch(entry.name)
            if fits and entry.is_dir(follow_symlinks=False) and entry.name not in self._broken:
                try:
                    found.append(storage.read_manifest(Path(entry.path)))
                except MissingCheckpoint:  # Deleted for a newer one, maybe missed here.
                    complete = False
                except BrokenCheckpoint as error:
                    if storage.looks_like_checkpoint(Path(entry.path)):
                        self._mark_broken(entry.name, error)
        found.sort(key=lambda each: (each.number, each.time), reverse=True)
        return found, complete and bool(found or not saving)

    def find(
        self, min_key: str | None = None, max_key: str | None = None, n: int | None = 1
    ) -> list[Checkpoint]:
        """Find the newest checkpoints, or the best ones by a metric; only manifests are read.

        Args:
            min_key: metric in ``meta`` to minimise. A checkpoint without a finite value of it is
                no candidate.
            max_key: metric to maximise.
            n: number of checkpoints; None for all.

        Returns:
            At most ``n`` checkpoints, the best or newest first.

        Raises:
            ValueError: both ``min_key`` and ``max_key`` are given.
        """
        if min_key and max_key:
            raise ValueError(f"give min_key ({min_key!r}) or max_key ({max_key!r}), not both")
        found = self.list_checkpoints()
        key = min_key or max_key
        if key is None:
            return found[:n]
        best = ranked(found, key, "min" if min_key else "max")
        if found and not best:
            known = ", ".join(sorted(set().union(*(each.meta for each in found)))) or "nothing"
            warnings.warn(
                f"no checkpoint in {self.folder} has a finite {key!r}; they have {known}",
                stacklevel=2,
            )
        return best[:n]

    def find_checkpoint(
        self,
        max_key: str | None = None,
        min_key: str | None = None,
        importance_key: Key | None = None,
        ckpt_predicate: Predicate | None = None,
    ) -> Checkpoint | None:
        """Find the best checkpoint, or the newest.

        Args:
            max_key: metric in ``meta`` to maximise.
            min_key: metric to minimise.
            importance_key: function of a checkpoint to maximise, in place of a metric.
            ckpt_predicate: True for the checkpoints that may be found; None for all.

        Returns:
            The checkpoint, or None if there is none.
        """
        found = self.find_checkpoints(max_key, min_key, 1, importance_key, ckpt_predicate)
        return next(iter(found), None)

    def find_checkpoints(
        self,
        max_key: str | None = None,
        min_key: str | None = None,
        max_num_checkpoints: int | None = None,
        importance_key: Key | None = None,
        ckpt_predicate: Predicate | None = None,
    ) -> list[Checkpoint]:
        """Find checkpoints, as `find` does, all unless limited.

        Args:
            max_key: metric in ``meta`` to maximise.
            min_key: metric to minimise.
            max_num_checkpoints: number of checkpoints; None for all.
            importance_key: function of a checkpoint to maximise, in place of a metric.
            ckpt_predicate: True for the checkpoints that may be found; None for all.

        Returns:
            The checkpoints, the best or newest first.

        Raises:
            ValueError: both ``max_key`` and ``min_key`` are given.
        """
        found = self.find(min_key, max_key, None)
        if ckpt_predicate is not None:
            found = [each for each in found if ckpt_predicate(each)]
        if importance_key is not None:
            found.sort(key=importance_key, reverse=True)
        return found[:max_num_checkpoints]

    # Restoring

    def recover_if_possible(
        self,
        max_key: str | None = None,
        min_key: str | None = None,
        importance_key: Key | None = None,
        ckpt_predicate: Predicate | None = None,
        device: Any = None,
    ) -> Checkpoint | None:
        """Restore every recoverable from the newest or best checkpoint. Every rank must call it.

        Everything is loaded and verified before anything is restored. A broken checkpoint is named
        in a warning, and the next one is used; so is one with weights alone. Another process may
        save in the folder meanwhile; if none does, remains of killed processes are removed, unless
        there is nothing to restore.

        Args:
            max_key: metric in ``meta`` to maximise.
            min_key: metric to minimise.
            importance_key: function of a checkpoint to maximise, in place of a metric.
            ckpt_predicate: True for the checkpoints that may be restored; None for all.
            device: not used: each object takes its state to its own device.

        Returns:
            The checkpoint, or None if there is none.

        Raises:
            BrokenCheckpoint: there are checkpoints, and all are broken or have weights alone: a run
                must not start over unasked.
            ValueError: the checkpoint is another model's, or of other recoverables; or both
                ``max_key`` and ``min_key`` are given.
            RuntimeError: another rank failed.
        """
        if self.recoverables:
            run_on_main(self._clean)
        wanted = (max_key, min_key, None, importance_key, ckpt_predicate)
        find = partial(self.find_checkpoints, *wanted)
        return retry_missing(partial(self._recover, find))

    def _recover(self, find: Callable[[], list[Checkpoint]]) -> Checkpoint | None:
        names = run_on_main(self._candidates, find, shared=BrokenCheckpoint)
        for name in names:
            try:
                return self._restore(self.folder / name)
            except MissingCheckpoint:
                raise
            except BrokenCheckpoint as error:
                self._mark_broken(name, error)
        if names:
            raise self._all_broken()
        return None

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Restore every recoverable from one checkpoint. Every rank must call it.

        Args:
            checkpoint: as `find` or `list_checkpoints` returned it.

        Raises:
            BrokenCheckpoint: a file is damaged, the checkpoint has weights alone, or it does not
                exist any more; nothing has been restored.
            ValueError: the checkpoint is another model's, or of other recoverables.
            RuntimeError: another rank failed.
        """
        self._restore(checkpoint.path)

    def read(self, checkpoint: Checkpoint, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Load states that all ranks share, verified and on the CPU, without restoring them.

        Args:
            checkpoint: as `find` or `list_checkpoints` returned it.
            names: names of recoverables; all by default.

        Returns:
            The states by name.

        Raises:
            BrokenCheckpoint: a file is damaged.
            ValueError: the checkpoint has no recoverable of such a name.
        """
        wanted = storage.recoverable_names(checkpoint) if names is None else names
        return {name: storage.load_state(checkpoint, name) for name in wanted}

    def average(
        self,
        checkpoints: Sequence[Checkpoint],
        name: str = "brain",
        path: Sequence[str] = ("modules",),
        complete: Callable[[Any], Any] = lambda part: part,
    ) -> Any:
        """Average a part of a state over several checkpoints. Every rank must call it.

        Float tensors are averaged in float64 and cast back; everything else is taken from the
        newest. A broken checkpoint is left out, with a warning that names it.

        Args:
            checkpoints: checkpoints of one model.
            name: name of the recoverable.
            path: keys that lead to the part in its state.
            complete: adds to the part of a checkpoint the weights that the checkpoint left out.

        Returns:
            The average, on the CPU.

        Raises:
            BrokenCheckpoint: no checkpoint could be used, or one of them does not exist any more.
            ValueError: there is nothing at ``path``, or the tensors have other shapes.
            RuntimeError: another rank failed.
        """
        newest, totals, count = None, dict[str, Tensor](), 0
        for each in sorted(checkpoints, key=lambda each: each.number, reverse=True):
            load, place = storage.load_part, (each, name, path)
            try:
                part = complete(self._read_on_all(each.path, each.complete, load, *place))
            except MissingCheckpoint:
                raise
            except BrokenCheckpoint as error:
                self._mark_broken(each.name, error)
                continue
            tensors = {key: leaf for key, leaf in tree.leaves(part) if isinstance(leaf, Tensor)}
            if count:
                _add(totals, tensors, each)
            else:
                newest, totals = part, _in_double(tensors)
            count += 1
        if not count:
            raise BrokenCheckpoint(f"no checkpoint to average in {self.folder} is sound")
        for key, leaf in tree.leaves(newest):
            if key in totals:
                leaf.copy_(totals[key] / count)
        return newest

    def _clean(self) -> None:
        """Remove remains of killed processes, if no process saves here."""
        if os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            lock = storage.lock_folder(self.folder)
            if lock is not None:
                storage.remove_stale(self.folder)
                for each in self.list_checkpoints():
                    if not each.complete:
                        storage.remove_unlisted(each)

    def _candidates(self, find: Callable[[], list[Checkpoint]]) -> list[str]:
        found = find()
        if self._broken and not found and not self.list_checkpoints():
            raise self._all_broken()
        complete = [each.name for each in found if each.complete]
        if found and not found[0].complete:
            if not complete:
                raise BrokenCheckpoint(
                    f"{self.folder} has nothing to go on from: of the checkpoints that could be "
                    f"used, all have weights alone (the first is {found[0].name}); test with them "
                    "by evaluate or trainer.load, start a run in another folder from them by "
                    "init_from, or move them away to start over"
                )
            warnings.warn(
                f"{found[0].path} is not restored, since it has weights alone: {complete[0]} is; "
                "evaluate and trainer.load test with such a checkpoint",
                stacklevel=3,
            )
        return complete

    def _restore(self, path: Path) -> Checkpoint:
        """Restore on all ranks or on none: load and verify, then check, then apply."""
        checkpoint, states, local = self._read_on_all(path, True, self._load_all, path)
        run_on_all(self._check_fit, checkpoint, states, local)
        run_on_all(self._apply, checkpoint, states, local)
        return checkpoint

    def _read_on_all(self, path: Path, complete: bool, load: Callable[..., T], *args: Any) -> T:
        """Read something of the checkpoint at ``path`` on all ranks, or raise alike on all.

        One that was listed as ``complete`` and has been cut since counts as missing.
        """
        try:
            return run_on_all(load, *args, shared=BrokenCheckpoint)
        except BrokenCheckpoint as error:
            if run_on_main(storage.still_there, path, complete):
                raise
            raise MissingCheckpoint(str(error)) from error

    def _load_all(self, path: Path) -> tuple[Checkpoint, dict[str, Any], dict[str, Any]]:
        checkpoint = storage.read_manifest(path)
        if not checkpoint.complete:
            raise MissingCheckpoint(
                f"{path} has weights alone, and no run resumes from it: use it with evaluate, "
                "trainer.load or init_from"
            )
        rank, ranks = distributed.rank(), distributed.world_size()
        return checkpoint, self.read(checkpoint), storage.load_local(checkpoint, rank, ranks)

    def _check_fit(
        self, checkpoint: Checkpoint, states: Mapping[str, Any], local: Mapping[str, Any]
    ) -> None:
        """Raise ValueError if a checkpoint has other recoverables than this run."""
        divided = {n for n, o in self.recoverables.items() if hasattr(o, "load_local_state_dict")}
        optional = self.recoverables if self.allow_partial_load else self._optional
        needed = {n for n in self.recoverables if n in states or n not in optional}
        _check_names(checkpoint, "states", set(states), needed)
        if checkpoint.processes == distributed.world_size():
            _check_names(checkpoint, "local states", set(local), divided)
        elif divided and distributed.is_main():
            warnings.warn(
                f"{checkpoint.path} was saved by {checkpoint.processes} processes and is restored "
                f"by {distributed.world_size()}: what differs per process (random generators, "
                "gradients of an unfinished accumulation window) starts over",
                stacklevel=5,
            )

    def _apply(
        self, checkpoint: Checkpoint, states: Mapping[str, Any], local: Mapping[str, Any]
    ) -> None:
        for name, obj in self.recoverables.items():
            if name not in states:  # `_check_fit` has found that it may be missing.
                continue
            try:
                obj.load_state_dict(states[name])
                if name in local:
                    obj.load_local_state_dict(local[name])
                within = not checkpoint.end_of_epoch and "brain" not in self.recoverables
                if isinstance(obj, EpochCounter) and within:  # A Brain sets it by itself.
                    obj.current = max(obj.current - 1, 0)
            except Exception as error:
                why = f"it has no {error}" if type(error) is KeyError else error
                raise ValueError(
                    f"{checkpoint.path}: {name!r} ({type(obj).__name__}) cannot take its state: "
                    f"{why}"
                ) from error

    def _mark_broken(self, name: str, error: BrokenCheckpoint) -> None:
        self._broken[name] = str(error)
        if distributed.is_main():
            warnings.warn(f"the checkpoint {name} is left out: {error}", stacklevel=3)

    def _all_broken(self) -> BrokenCheckpoint:
        return BrokenCheckpoint(
            f"every checkpoint in {self.folder} that could be used is broken: "
            f"{'; '.join(self._broken.values())}; move them away to start over"
        )


def _save(obj: Any, path: Path) -> None:
    torch.save(obj.state_dict(), path)


def _load(obj: Any, path: Path, _: bool) -> None:
    obj.load_state_dict(torch.load(path, weights_only=True))


@contextlib.contextmanager
def _naming_failure(what: str) -> Iterator[None]:
    """Context manager that adds ``what`` and advice to the message of an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{what}: {error.strerror or error}; free some space or choose another folder",
        ) from error


def _check_names(checkpoint: Checkpoint, what: str, has: set[str], needs: set[str]) -> None:
    if has != needs:
        missing, unknown = ", ".join(sorted(needs - has)), ", ".join(sorted(has - needs))
        raise ValueError(
            f"{checkpoint.path} does not fit this run: of the {what}, it lacks {missing or 'none'} "
            f"and this run does not know {unknown or 'none'}"
        )


def _readable(meta: Mapping[str, Any]) -> Any:
    """Return the meta of a checkpoint as its manifest will give it, or raise ValueError.

    Meta that cannot be read back would break the whole checkpoint.
    """
    try:
        found = _to_json(meta)
    except RecursionError:
        raise ValueError(
            f"meta of a checkpoint is nested too deeply; allowed are {json_files.MAX_DEPTH} levels"
        ) from None
    try:
        json_files.parse(storage.encode_manifest({"checkpoint": {"meta": found}}))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"meta of a checkpoint cannot be read back: {error}") from error
    return found


def _to_json(value: Any, where: str = "meta") -> Any:
    """Convert tensors and arrays of one element to numbers, and non-finite numbers to None.

    Raises:
        ValueError: ``value`` holds something that JSON cannot represent; names its place.
    """
    if isinstance(value, Mapping):
        if len({str(key) for key in value}) < len(value):
            raise ValueError(
                f"{where} of a checkpoint has keys that are equal as text: {list(value)}"
            )
        return {str(key): _to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if (number := tree.plain_number(value)) is not value:
        return _to_json(number, where)
    raise ValueError(
        f"{where} of a checkpoint is a {type(value).__name__}; it can hold numbers, strings, "
        "booleans, None, and lists and mappings of these"
    )


def _in_double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in float64; integer and boolean tensors (counters, masks) have no mean."""
    return {
        key: tensor.to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)
        for key, tensor in tensors.items()
        if tensor.is_floating_point() or tensor.is_complex()
    }


def _add(totals: dict[str, Tensor], tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    for key, total in totals.items():
        if key not in tensors or tensors[key].shape != total.shape:
            raise ValueError(
                f"{key} has shape {list(total.shape)} in the newest checkpoint and "
                f"{list(tensors[key].shape) if key in tensors else 'does not exist'} in "
                f"{checkpoint.path}; only checkpoints of one model can be averaged"
            )
        total += tensors[key]
