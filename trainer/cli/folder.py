"""Run folders: the record of a run, used by one command at a time.

    results/asr/demo/1234/
        hyperparams.yaml    the YAML with base and overrides merged in; it runs alone
        command.txt         each command that ran here, with its time, and what it changed
        environment.json    versions, git revision and machine of the last start
        state.json          how the last training ended, or that it has begun
        train.log           messages; metrics.jsonl: the same for programs
        checkpoints/        states from which the run resumes
        nonfinite/          skipped steps: reports and batches

Nothing is ever deleted unless `overwrite` asks for it, and then only what `RUN_FILES` lists, and
checkpoints in folders of other names, such as save/.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.checkpoint import storage
from trainer.config.changes import Change, Settings
from trainer.config.reading import read
from trainer.config.run_folder import LAUNCH_HEADER
from trainer.loggers.files import readable_errors, replace_file, temporary
from trainer.signals import Interrupted

logger = logging.getLogger("trainer")

HYPERPARAMS = "hyperparams.yaml"
AS_STARTED = ".hyperparams.yaml"  # Copy of it, by which edits by hand are recognised.
RECORDS = (AS_STARTED, HYPERPARAMS)
LOCK = ".lock"
STATE = "state.json"
RUN_FILES = (
    HYPERPARAMS,
    AS_STARTED,
    "command.txt",
    "environment.json",
    "state.json",
    "train.log",
    "metrics.jsonl",
    "report.html",
    "find_clip.html",
    "find_clip.json",
    "find_lr.html",
    "find_lr.json",
    "nonfinite",
    "checkpoints",
    "prepared",
    "tensorboard",
    "csv",
    "wandb",
    "mlflow.db",
    "mlartifacts",
    "loggers",
    "profile",
    "samples",
)
HEADER = "# The resolved hyperparameters of a run; this file runs alone."
MARK = "a run folder"  # Last line of the lock file in a folder that was accepted.
NOTHING: tuple[int, list[tuple[str, int]]] = (0, [])  # `trained` before a training
MAX_LOCK = 1000  # bytes of the lock file
MAX_ERROR = 500  # characters of an error in state.json
HEADERS = (HEADER, LAUNCH_HEADER)


class RunFolder:
    """Run folder, locked from `open` until `close` or the end of the process.

    Args:
        path: the folder, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._before: dict[str, bytes] = {}  # both records before this start, if it has trained
        self._trained = NOTHING

    def open(self, overwrite: bool = False, patience: float = 0.0) -> None:
        """Make the folder if there is none, lock it, and empty it if `overwrite`.

        Args:
            overwrite: delete what an earlier run left.
            patience: seconds to wait for a process that is about to release the folder.

        Raises:
            ValueError: another command is using the folder, or it is not a run folder.
            OSError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock(patience)
        except OSError as error:
            files = [str(each) for each in (self.path, *self.path.parents) if each.is_file()]
            reason = f"{files[0]} is a file" if files else error.strerror or str(error)
            raise OSError(
                f"the run folder {self.path} cannot be written: {reason}; "
                "choose another output_folder"
            ) from error
        found = [name for name in RUN_FILES if os.path.lexists(self.path / name)]
        if found and not self._is_run_folder() and not all(map(self._is_blank, found)):
            self.close()
            raise ValueError(
                f"{self.path} is not a run folder, but holds {', '.join(found)}: nothing was "
                "changed there; choose another output_folder"
            )
        self._mark()
        self._remove_temporaries()
        if overwrite:
            for name in RUN_FILES:
                _remove(self.path / name)
            self._remove_checkpoints()

    def _remove_temporaries(self) -> None:
        """Delete what killed processes left half-written; nobody else is writing here."""
        for name in RUN_FILES:
            _remove(temporary(self.path / name))
        for path in list((self.path / "nonfinite").glob(f"**/{temporary(Path('*')).name}")):
            _remove(path)

    def _remove_checkpoints(self) -> None:
        """Delete the checkpoints that are left: the new run would resume from them."""
        for manifest in list(self.path.rglob(storage.MANIFEST)):
            with contextlib.suppress(storage.BrokenCheckpoint):
                storage.read_manifest(manifest.parent)
                storage.delete(manifest.parent)

    def _is_run_folder(self) -> bool:
        """Return True if a run was started here: its YAML says so, or the lock of an earlier one.

        The YAML may be missing, empty or cut, as after a power cut.
        """
        assert self._lock is not None
        path = self.path / HYPERPARAMS
        if not os.path.lexists(path) or self._is_blank(HYPERPARAMS):
            return os.pread(self._lock, MAX_LOCK, 0).endswith(f"{MARK}\n".encode())
        try:
            with path.open("rb") as file:
                return file.readline(200).decode(errors="replace").strip() in HEADERS
        except OSError:
            return False

    def _is_blank(self, name: str) -> bool:
        """Return True if a file or folder has nothing in it but what a killed start leaves."""
        path = self.path / name
        if path.is_symlink():
            return False
        if path.is_dir():
            return all(storage.TEMPORARY_NAME.fullmatch(each) for each in os.listdir(path))
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(200).strip(b"\0")  # Zeros are what a power cut may leave.
        cut = name in RECORDS and any(h.encode().startswith(start) for h in HEADERS)
        return not start or cut

    def _mark(self) -> None:
        """Name the owner in the lock file, and mark the folder as that of a run."""
        assert self._lock is not None
        text = f"process {os.getpid()} on {platform.node()}\n{MARK}\n".encode()
        with readable_errors(self.path / LOCK, "lock file"):
            os.pwrite(self._lock, text, 0)
            os.ftruncate(self._lock, len(text))

    def _take_lock(self, patience: float) -> None:
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        end = time.monotonic() + patience
        try:
            while True:
                try:
                    # Not flock: forked workers would hold that one on after this process is killed.
                    fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except (BlockingIOError, PermissionError):  # Systems differ in which it is.
                    if time.monotonic() >= end:
                        raise
                time.sleep(0.1)
        except (BlockingIOError, PermissionError):
            said = os.pread(self._lock, MAX_LOCK, 0).decode(errors="replace").splitlines()
            owner = said[0] if said else "another run"
            self.close()
            raise ValueError(
                f"the run folder {self.path} is in use by {owner}; wait until it is over, or "
                "choose another output_folder"
            ) from None

    def close(self) -> None:
        """Release the lock; closing twice is harmless."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def changes(self, now: Settings) -> list[Change]:
        """Return what differs from the hyperparameters of the last start.

        Args:
            now: the hyperparameters of this start.

        Returns:
            The changes; none if nothing was trained here yet.

        Raises:
            ValueError: the hyperparameters of the last start cannot be read.
        """
        records = [self.path / name for name in RECORDS]
        written = [each for each in records if each.exists() and not self._is_blank(each.name)]
        if not written or self.trained() == NOTHING:
            return []
        path = written[0]
        if not path.read_bytes().endswith(b"\n"):
            raise ValueError(f"{path} is cut: it does not end with a line break")
        found = now.changes(Settings(read(path, alone=True)[0], now.registry))
        step, epoch = self.progress()
        note = f", but step {step} of epoch {epoch:g} is trained already"
        return [
            replace(each, kind="training", note=note) if _ends_before(each, step, epoch) else each
            for each in found
        ]

    def was_edited(self) -> bool:
        """Return True if hyperparams.yaml is not as the last start has written it."""
        records = [self.path / name for name in RECORDS]
        return all(map(Path.exists, records)) and len({each.read_bytes() for each in records}) > 1

    def trained(self) -> tuple[int, list[tuple[str, int]]]:
        """Return the size of metrics.jsonl in bytes, and path and time (ns) of each manifest.

        It changes with every checkpoint and every line of metrics.jsonl.
        """
        metrics = self.path / "metrics.jsonl"
        manifests = [(str(each), each.lstat().st_mtime_ns) for each in self._manifests()]
        return metrics.stat().st_size if metrics.exists() else 0, sorted(manifests)

    def progress(self) -> tuple[int, float]:
        """Return optimizer step and epoch of the latest checkpoint; 0 without one."""
        places: list[tuple[int, float]] = [(0, 0)]
        for manifest in self._manifests():
            with contextlib.suppress(storage.BrokenCheckpoint):
                saved = storage.read_manifest(manifest.parent)
                epoch = saved.meta.get("epoch")
                places.append((saved.step or 0, epoch if isinstance(epoch, (int, float)) else 0))
        return max(places)

    def _manifests(self) -> list[Path]:
        """Return the manifests of the checkpoints; a program may keep these in any folder."""
        above = ("*/", "*/*/", "*/*/*/")
        return [each for place in above for each in self.path.glob(place + storage.MANIFEST)]

    def record(
        self,
        hyperparams: str,
        command: Sequence[str],
        where: dict[str, Any],
        header: str = HEADER,
        changes: Sequence[Change] = (),
    ) -> None:
        """Record the start of a run: text and first line of its YAML, command, and environment.

        Args:
            hyperparams: the YAML.
            command: program and arguments.
            where: versions and machine.
            header: first line of hyperparams.yaml.
            changes: what differs from the last start; command.txt gets it with the step.
        """
        text = f"{json.dumps(where, indent=1)}\n"
        records = [self.path / name for name in RECORDS]
        step, _ = self.progress() if changes else (0, 0)
        self._trained = self.trained()
        if self._trained != NOTHING:
            self._before = {each.name: each.read_bytes() for each in records if each.exists()}
        for each in records:
            replace_file(each, [f"{header}\n{hyperparams}".encode()], HYPERPARAMS)
        replace_file(self.path / "environment.json", [text.encode()], "environment.json")
        self.add_command(command)
        for change in changes:
            self._add_line(f"# from optimizer step {step} on: {change}")

    @contextmanager
    def undone_if_nothing_is_trained(self) -> Iterator[None]:
        """Context manager around a run, which keeps hyperparams.yaml true.

        A start that fails before it has trained leaves the hyperparameters of the start before.
        """
        try:
            yield
        except BaseException:
            if self._before and self.trained() == self._trained:
                first, *_ = self._before.values()
                for name in RECORDS:
                    replace_file(self.path / name, [self._before.get(name, first)], HYPERPARAMS)
                self._add_line("# failed before it trained: hyperparams.yaml is as before")
            raise

    @contextmanager
    def state_recorded(self, trains: bool) -> Iterator[None]:
        """Context manager around a run, which records in state.json how a training ends.

        A process that is killed leaves "running" there, and no lock.

        Args:
            trains: False for a test or a search, which leave the record as it is.
        """
        if not trains:
            yield
            return
        self._record("running")
        try:
            yield
        except BaseException as error:
            asked = isinstance(error, (Interrupted, KeyboardInterrupt))
            done = isinstance(error, SystemExit) and not error.code
            if asked or done:
                self._record("stopped" if asked else "finished")
            else:
                text = f"{type(error).__name__}: {error}".splitlines()[0][:MAX_ERROR]
                self._record("crashed", error=text)
            raise
        self._record("finished")

    def _record(self, state: str, **facts: Any) -> None:
        record = {"state": state, "time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        try:
            replace_file(self.path / STATE, [f"{json.dumps(record)}\n".encode()], STATE)
        except OSError as error:  # The run itself does not need the record.
            logger.warning("%s", error)

    def has_record(self) -> bool:
        """Return True if a run has been started here before."""
        return (self.path / HYPERPARAMS).exists()

    def add_command(self, command: Sequence[str]) -> None:
        """Add a command to command.txt."""
        self._add_line(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}")

    def _add_line(self, line: str) -> None:
        """Add a line to command.txt."""
        path, line = self.path / "command.txt", f"{line}\n"
        with readable_errors(path, path.name), path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # A killed process may have left half a line.
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(line.encode(errors="backslashreplace"))


def _ends_before(change: Change, step: int, epoch: float) -> bool:
    """Return True for a new limit of steps or epochs below what a run has trained already.

    Args:
        change: a change of a hyperparameter.
        step: optimizer step of the latest checkpoint.
        epoch: its epoch.
    """
    key, old, new = change.key, change.old, change.new
    if change.kind != "extending" or not isinstance(new, (int, float)):
        return False
    if "patience" in key or "bad" in key or (isinstance(old, (int, float)) and new >= old):
        return False
    return new < (step if "step" in key else epoch if re.search("epoch|limit", key) else -math.inf)


def _remove(path: Path) -> None:
    """Delete a file, a folder, or a link (never its target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
