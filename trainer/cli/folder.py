"""Run folders: the record of a run, used by one command at a time.

    results/asr/demo/1234/
        hyperparams.yaml    the YAML with base and overrides merged in; it runs alone
        command.txt         each command that ran here, with its time
        environment.json    versions, git revision and machine of the last start
        train.log           messages; metrics.jsonl: the same for programs
        checkpoints/        states from which the run resumes
        nonfinite/          skipped steps: reports and batches

Nothing is ever deleted unless `overwrite` asks for it, and then only what `OWN` lists, and
checkpoints in folders of other names, such as save/.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import Node, ScalarNode

from trainer.checkpoint import storage
from trainer.config.reading import compose, items, tag

if sys.platform != "win32":
    import fcntl

HYPERPARAMS = "hyperparams.yaml"
LOCK = ".lock"
OWN = (
    HYPERPARAMS,
    "command.txt",
    "environment.json",
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
    "profile",
)
MARK = "# The resolved hyperparameters of a run; this file runs alone."
LAUNCHED = '# The hyperparameters of a run by trainer.launch; "repr: …" stands for an object.'


class RunFolder:
    """Run folder, locked from `open` until `close` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def open(self, overwrite: bool = False) -> None:
        """Make the folder if there is none, lock it, and empty it if `overwrite`.

        Raises:
            ValueError: another command is using the folder, or it is not a run's.
            OSError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            files = [str(each) for each in (self.path, *self.path.parents) if each.is_file()]
            reason = f"{files[0]} is a file" if files else error.strerror or str(error)
            raise OSError(
                f"the run folder {self.path} cannot be written: {reason}; "
                "choose another output_folder"
            ) from error
        strange = [name for name in OWN if os.path.lexists(self.path / name)]
        if strange and not self._is_a_runs():
            self.close()
            raise ValueError(
                f"{self.path} is not a run's folder, but holds {', '.join(strange)}: nothing was "
                "changed there; choose another output_folder"
            )
        if overwrite:
            for name in OWN:
                _remove(self.path / name)
            self._remove_checkpoints()

    def _remove_checkpoints(self) -> None:
        """Delete the checkpoints that are left: the new run would resume from them."""
        for manifest in list(self.path.rglob(storage.MANIFEST)):
            with contextlib.suppress(storage.BrokenCheckpoint):
                storage.read_manifest(manifest.parent)
                storage.delete(manifest.parent)

    def _is_a_runs(self) -> bool:
        try:
            with (self.path / HYPERPARAMS).open("rb") as file:
                return file.readline(200).strip() in (MARK.encode(), LAUNCHED.encode())
        except OSError:
            return False

    def _take_lock(self) -> None:
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        if sys.platform == "win32":
            return  # No locks there.
        try:
            # Not flock: forked workers would hold that one on after this process is killed.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._lock, 200, 0).decode(errors="replace").strip() or "another run"
            self.close()
            raise ValueError(
                f"the run folder {self.path} is in use by {owner}; wait until it is over, or "
                "choose another output_folder"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)

    def close(self) -> None:
        """Release the lock; closing twice is harmless."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def record(
        self, hyperparams: str, command: Sequence[str], where: dict[str, Any], mark: str = MARK
    ) -> list[str]:
        """Record the start of a run.

        Args:
            hyperparams: text of hyperparams.yaml.
            command: the command line.
            where: environment, as JSON.
            mark: first line of hyperparams.yaml.

        Returns:
            The changes of hyperparams.yaml since the last start, such as "lr: 0.1 -> 0.2".
        """
        path = self.path / HYPERPARAMS
        before = path.read_text(encoding="utf-8") if path.exists() else None
        changes = [] if before is None else differences(before, hyperparams)
        _write(path, f"{mark}\n{hyperparams}")
        _write(self.path / "environment.json", json.dumps(where, indent=1) + "\n")
        self.note(command)
        return changes

    def recorded(self) -> bool:
        """Return True if a run has been started here before."""
        return (self.path / HYPERPARAMS).exists()

    def note(self, command: Sequence[str]) -> None:
        """Add a command to command.txt."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n"
        try:
            with (self.path / "command.txt").open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise _unwritten(self.path / "command.txt", error) from error


def differences(before: str, after: str) -> list[str]:
    """List the keys whose values differ between two YAML texts: "lr: 0.1 -> 0.2"."""
    try:
        old, new = (dict(_leaves(compose(text, HYPERPARAMS))) for text in (before, after))
    except ValueError as error:
        return [f"the previous one could not be read ({error})"]
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def _leaves(node: Node, at: str = "") -> list[tuple[str, str]]:
    """Return every scalar with its dotted key, and the tag of every object."""
    special = "" if tag(node).startswith("tag:yaml.org") else f"{tag(node)} "
    if isinstance(node, ScalarNode):
        return [(at, f"{special}{node.value}")]
    found = [(at, special.strip())] if special else []
    for key, child in items(node):
        found += _leaves(child, f"{at}.{key}" if at else key)
    return found


def _remove(path: Path) -> None:
    """Delete a file, a folder, or a link (never its target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    """Write a file atomically."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> OSError:
    return OSError(
        f"{path} could not be written: {error.strerror}; free some space or choose another "
        "output_folder"
    )
