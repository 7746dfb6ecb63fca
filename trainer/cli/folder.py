"""Run folders: the record of a run, used by one command at a time.

    results/kws/demo/1234/
        hyperparams.yaml    the YAML with base and overrides merged in; it runs alone
        command.txt         each command that ran here, with its time and its changes
        environment.json    versions, git revision and machine of the last start
        state.json          end of the last training, or "running"
        train.log           messages; metrics.jsonl: the same for programs
        checkpoints/        states from which the run resumes
        nonfinite/          skipped steps: reports and batches

Only `overwrite` deletes anything: the files in `RUN_FILES`, and checkpoints in folders of other
names, such as save/.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
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
from trainer.loggers.files import readable_errors, replace_file, temporary
from trainer.run_files import HEADER, HEADERS, HYPERPARAMS, is_run, manifests
from trainer.signals import Interrupted
from trainer.texts import cause

logger = logging.getLogger("trainer")

AS_STARTED = ".hyperparams.yaml"  # Copy that reveals edits by hand.
RECORDS = (AS_STARTED, HYPERPARAMS)
LOCK = ".lock"
STATE = "state.json"
RUN_FILES = (
    HYPERPARAMS, AS_STARTED, "command.txt", "environment.json", STATE, "train.log", "metrics.jsonl",
    "report.html", "find_clip.html", "find_clip.json", "find_lr.html", "find_lr.json", "nonfinite",
    "checkpoints", "prepared", "tensorboard", "csv", "wandb", "mlflow.db", "mlartifacts", "loggers",
    "profile", "samples",
)  # fmt: skip
MARK = "a run folder"  # Last line of the lock file of an accepted folder.
NOTHING: tuple[int, list[tuple[str, int]]] = (0, [])  # `trained` before a training
MAX_LOCK = 1000  # bytes of the lock file


# Process, device and inode of locks of this process. Such a lock ends when the process closes any
# handle of its file: a locked file must not be opened again.
_held: set[tuple[int, int, int]] = set()


def _identity(info: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), info.st_dev, info.st_ino


def holds_lock(folder: Path) -> bool:
    """Return True if this process holds the lock of a run folder."""
    try:
        return _identity(os.stat(folder / LOCK)) in _held
    except OSError:
        return False


class RunFolder:
    """Run folder, locked from `open` until `close` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._before: dict[str, bytes] = {}  # both records before this start, if it has trained
        self._trained = NOTHING

    def open(self, overwrite: bool = False, patience: float = 0.0) -> None:
        """Make the folder if there is none, lock it, and delete remains of killed processes.

        With ``overwrite`` an earlier run is deleted. Waits ``patience`` seconds for a process that
        is about to release the folder.

        Raises:
            ValueError: another command is using the folder, or it is not a run folder.
            OSError: the folder cannot be written.
        """
        if holds_lock(self.path):
            raise self._in_use("this process")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            self._take_lock(self._lock, patience)
        except OSError as error:
            files = [str(each) for each in (self.path, *self.path.parents) if each.is_file()]
            reason = f"{files[0]} is a file" if files else error.strerror or str(error)
            raise OSError(
                f"the run folder {self.path} cannot be written: {reason}; "
                "choose another output_folder"
            ) from error
        found = [name for name in RUN_FILES if os.path.lexists(self.path / name)]
        if found and not self._was_run(self._lock) and not all(map(self._is_blank, found)):
            self.close()
            raise ValueError(
                f"{self.path} is not a run folder, but holds {', '.join(found)}: nothing was "
                "changed there; choose another output_folder"
            )
        text = f"process {os.getpid()} on {platform.node()}\n{MARK}\n".encode()
        with readable_errors(self.path / LOCK, "lock file"):
            os.pwrite(self._lock, text, 0)
            os.ftruncate(self._lock, len(text))
        for name in RUN_FILES:
            _remove(temporary(self.path / name))
        for path in list(self.path.glob(f"nonfinite/**/{temporary(Path('*')).name}")):
            _remove(path)
        if overwrite:
            for name in RUN_FILES:
                _remove(self.path / name)
            # The new run would resume from checkpoints in other folders.
            for manifest in manifests(self.path):
                with contextlib.suppress(storage.BrokenCheckpoint):
                    storage.read_manifest(manifest.parent)
                    storage.delete(manifest.parent)

    def _take_lock(self, lock: int, patience: float) -> None:
        end = time.monotonic() + patience
        while True:
            try:
                # Not flock, which forked workers would hold after this process is killed.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _held.add(_identity(os.fstat(lock)))
                return
            except (BlockingIOError, PermissionError):  # Depends on the system.
                if time.monotonic() >= end:
                    break
            time.sleep(0.1)
        said = os.pread(lock, MAX_LOCK, 0).decode(errors="replace").splitlines()
        self.close()
        raise self._in_use(said[0] if said else "another run")

    def _in_use(self, user: str) -> ValueError:
        return ValueError(
            f"the run folder {self.path} is in use by {user}; wait until it is over, or choose "
            "another output_folder"
        )

    def _was_run(self, lock: int) -> bool:
        """Return True if a run was started here, according to its YAML or an earlier lock file.

        The YAML may be missing, empty or cut, as after a power cut.
        """
        if not os.path.lexists(self.path / HYPERPARAMS) or self._is_blank(HYPERPARAMS):
            return os.pread(lock, MAX_LOCK, 0).endswith(f"{MARK}\n".encode())
        return is_run(self.path)

    def _is_blank(self, name: str) -> bool:
        """Return True if a file or folder is empty, or holds only remains of a killed start."""
        path = self.path / name
        if path.is_symlink():
            return False
        if path.is_dir():
            return all(map(storage.TEMPORARY_NAME.fullmatch, os.listdir(path)))
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(200).strip(b"\0")  # A power cut may leave zeros.
        cut = name in RECORDS and any(h.encode().startswith(start) for h in HEADERS)
        return not start or cut

    def close(self) -> None:
        """Release the lock; closing twice is harmless."""
        if self._lock is not None:
            _held.discard(_identity(os.fstat(self._lock)))
            os.close(self._lock)
            self._lock = None

    def changes(self, now: Settings) -> list[Change]:
        """Return the changes since the hyperparameters of the last start that trained."""
        path = next((each for each in self._records() if not self._is_blank(each.name)), None)
        if path is None or self.trained() == NOTHING:
            return []
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
        """Return True if hyperparams.yaml differs from the file that the last start wrote."""
        texts = [each.read_bytes() for each in self._records()]
        return len(texts) == len(RECORDS) and len({*texts}) > 1

    def _records(self) -> list[Path]:
        return [self.path / name for name in RECORDS if (self.path / name).exists()]

    def trained(self) -> tuple[int, list[tuple[str, int]]]:
        """Return the size of metrics.jsonl in bytes, and path and time (ns) of each manifest.

        It changes with every checkpoint and every line of metrics.jsonl.
        """
        metrics = self.path / "metrics.jsonl"
        found = [(str(each), each.lstat().st_mtime_ns) for each in manifests(self.path, links=True)]
        return metrics.stat().st_size if metrics.exists() else 0, sorted(found)

    def progress(self) -> tuple[int, float]:
        """Return optimizer step and epoch of the latest checkpoint; 0 without one."""
        places: list[tuple[int, float]] = [(0, 0)]
        for manifest in manifests(self.path, links=True):
            with contextlib.suppress(storage.BrokenCheckpoint):
                saved = storage.read_manifest(manifest.parent)
                epoch = saved.meta.get("epoch")
                places.append((saved.step or 0, epoch if isinstance(epoch, (int, float)) else 0))
        return max(places)

    def record(
        self,
        hyperparams: str,
        command: Sequence[str],
        where: dict[str, Any],
        header: str = HEADER,
        changes: Sequence[Change] = (),
    ) -> None:
        """Record the start of a run: text and first line of its YAML, command and environment.

        Changes since the last start go to command.txt, with the step.
        """
        step, _ = self.progress() if changes else (0, 0)
        self._trained = self.trained()
        if self._trained != NOTHING:
            self._before = {each.name: each.read_bytes() for each in self._records()}
        for name in RECORDS:
            self._write(name, f"{header}\n{hyperparams}".encode(), HYPERPARAMS)
        self._write("environment.json", f"{json.dumps(where, indent=1)}\n".encode())
        self.add_command(command)
        for change in changes:
            self._add_line(f"# from optimizer step {step} on: {change}")

    @contextmanager
    def end_recorded(self, trains: bool) -> Iterator[None]:
        """Context manager that records the end of a run.

        The end of a training is written to state.json; a killed process leaves "running" there, and
        no lock. A start that fails before it trains restores the hyperparameters of the start
        before.

        Args:
            trains: False for a test or a search, which leave state.json as it is.
        """

        def record(state: str, **facts: str) -> None:
            if trains:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                try:
                    text = json.dumps({"state": state, "time": now, **facts})
                    self._write(STATE, f"{text}\n".encode())
                except OSError as error:  # The run does not need the record.
                    logger.warning("%s", error)

        record("running")
        try:
            yield
        except BaseException as error:
            if isinstance(error, (Interrupted, KeyboardInterrupt)):
                record("stopped")
            elif isinstance(error, SystemExit) and not error.code:
                record("finished")
            else:
                record("crashed", error=cause(error))
            if self._before and self.trained() == self._trained:
                first, *_ = self._before.values()
                for name in RECORDS:
                    self._write(name, self._before.get(name, first), HYPERPARAMS)
                self._add_line("# failed before it trained: hyperparams.yaml is as before")
            raise
        record("finished")

    def _write(self, name: str, content: bytes, what: str = "") -> None:
        replace_file(self.path / name, [content], what or name)

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
    """Return True for a new limit that the run has passed already."""
    key, old, new = change.key, change.old, change.new
    if change.kind != "extending" or not isinstance(new, (int, float)):
        return False
    if re.search("patience|bad", key) or (isinstance(old, (int, float)) and new >= old):
        return False
    return new < step if "step" in key else bool(re.search("epoch|limit", key)) and new < epoch


def _remove(path: Path) -> None:
    """Delete a file, a folder, or a link (never its target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
