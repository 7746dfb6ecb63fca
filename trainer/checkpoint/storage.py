"""Checkpoint folders on disk: states as files that run no code, each verified by a manifest.

A checkpoint is written to a temporary folder, hashed on the way, synced, and renamed when it is
complete. A process that saves holds the lock of the folder, and removes temporary folders, which
killed processes left. Readers change nothing.

The manifest lists every file with its size and hash. It contains a hash of itself and must be, byte
for byte, what `encode_manifest` writes, so that a flipped bit in it is detected, too. Functions
that load raise `BrokenCheckpoint` for a file that is damaged or unsafe.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from operator import is_
from pathlib import Path
from typing import IO, Any, NamedTuple
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

from trainer import json_files
from trainer.checkpoint.frozen import BASE, described, sha256_of
from trainer.checkpoint.migrate import migrate
from trainer.untrusted import printable

RUN, WEIGHTS = "run", "weights"  # Contents of a checkpoint
FORMAT = 2  # of the checkpoints that are written; those of all earlier formats are read
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = json_files.MAX_BYTES  # a usual one has a few thousand
CHUNK_BYTES = 1 << 20  # smaller writes are gathered up to this
HOST = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:40]

CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=,-]{0,99}", re.ASCII)
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.pt", re.ASCII)
RANK_FILE = re.compile(r"rank-(\d{1,6})\.pt", re.ASCII)
TEMPORARY_NAME = re.compile(r"\.(?:saving|deleting)-\d{1,9}@[A-Za-z0-9]*-.+", re.ASCII)

RECOVERABLE_NAME = re.compile(r"(?!rank-)[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", re.ASCII)
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", re.ASCII)
SCALARS = (int, float, str, bool, type(None), torch.Size, torch.dtype, torch.device)
MAPPINGS = (dict, OrderedDict, Counter)
ARRAY = "numpy.ndarray"  # Key of a tensor that was a NumPy array, which torch would pickle.


class BrokenCheckpoint(ValueError):
    """Error for a checkpoint that must not be used; names the file and the damage."""


class UnwritableFolder(OSError, ValueError):
    """Error for a folder in which checkpoints cannot be saved."""


class MissingCheckpoint(BrokenCheckpoint):
    """Error for a checkpoint that the saving run has deleted, or cut to its weights."""


class FileEntry(NamedTuple):
    """Entry of the manifest for one file: its size in bytes and its SHA-256."""

    size: int
    sha256: str


class Meta(dict[str, Any]):
    """Values that the caller passed to a save.

    The keys "unixtime" and "end-of-epoch", which SpeechBrain's checkpoints have, can be read too.
    """

    def __init__(self, values: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        super().__init__(values)
        self._checkpoint = checkpoint

    def __missing__(self, key: str) -> Any:
        if key == "unixtime":
            return datetime.fromisoformat(self._checkpoint.time).timestamp()
        if key == "end-of-epoch":
            return self._checkpoint.end_of_epoch
        raise KeyError(key)


@dataclass(frozen=True)
class Checkpoint:
    """Saved state of a run, as its manifest describes it.

    Attributes:
        path: the folder.
        number: running number of the save; the newer of two checkpoints has the higher one,
            independent of clocks.
        time: time of the save, UTC, ISO 8601.
        step: optimizer step, if ``meta`` has it.
        label: name given by the caller.
        pinned: True if it is kept until it is deleted by hand.
        end_of_epoch: False for a save within an epoch.
        processes: number of processes that saved it.
        meta: epoch, metrics and other values of the caller.
        files: size and hash of each file, by its name.
        format: format version of the folder.
        contents: "run" for the whole state of a run, "weights" for its weights alone.
        base: name and hash of the model that the weights are relative to, if any.
        shards: number of parts of the states, if they are divided.
    """

    path: Path
    number: int
    time: str
    step: int | None = None
    label: str | None = None
    pinned: bool = False
    end_of_epoch: bool = True
    processes: int = 1
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    files: dict[str, FileEntry] = field(default_factory=dict, hash=False)
    format: int = FORMAT
    contents: str = RUN
    base: dict[str, Any] | None = field(default=None, hash=False)
    shards: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.meta, dict):  # The manifest is not checked yet.
            object.__setattr__(self, "meta", Meta(self.meta, self))

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def complete(self) -> bool:
        """True if a run can resume from it; False if it has weights alone."""
        return self.contents == RUN

    @property
    def paramfiles(self) -> dict[str, Path]:
        """Files of the recoverables by name; `torch.load` reads them (``weights_only=True``)."""
        return {name: self.path / f"{name}.pt" for name in recoverable_names(self)}


FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "number": (int,),
    "time": (str,),
    "step": (int, type(None)),
    "label": (str, type(None)),
    "pinned": (bool,),
    "end_of_epoch": (bool,),
    "processes": (int,),
    "meta": (Meta,),
    "contents": (str,),
    "base": (dict, type(None)),
    "shards": (int, type(None)),
}


# Manifests


def encode_manifest(content: Mapping[str, Any]) -> bytes:
    """Encode a manifest as bytes that contain a hash of its content."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    plain = json.dumps(body, sort_keys=True, allow_nan=False).encode()
    signed = {**body, "sha256": hashlib.sha256(plain).hexdigest()}
    return (json.dumps(signed, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def manifest_content(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of a checkpoint's manifest: every field but the path."""
    fields = {key: value for key, value in vars(checkpoint).items() if key != "path"}
    files = {name: entry._asdict() for name, entry in sorted(checkpoint.files.items())}
    return {"format": checkpoint.format, **fields, "files": files}


def read_manifest(path: Path) -> Checkpoint:
    """Read the checkpoint in a folder by its manifest alone; raise BrokenCheckpoint if damaged."""
    data = read_file(path, MANIFEST)
    try:
        fields = json_files.parse(data)
        if not isinstance(fields, dict) or fields.get("format") not in range(1, FORMAT + 1):
            raise ValueError(f"it is not a manifest of format 1 to {FORMAT}")
        if encode_manifest(fields) != data:
            raise ValueError("its content does not match its own hash")
        files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
        del fields["sha256"]
        checkpoint = Checkpoint(path=path, files=files, **fields)
        _check_fields(checkpoint)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenCheckpoint(f"{path / MANIFEST} is broken: {error}") from error
    return checkpoint


def _check_fields(checkpoint: Checkpoint) -> None:
    """Raise ValueError if a manifest has invalid fields; its hash does not prove who wrote it."""
    for key, types in FIELD_TYPES.items():
        if type(getattr(checkpoint, key)) not in types:
            raise ValueError(f"its {key!r} is not of type {types[0].__name__}")
    if checkpoint.contents not in (RUN, WEIGHTS):
        raise ValueError(f"its 'contents' are neither {RUN} nor {WEIGHTS}")
    for name, entry in checkpoint.files.items():
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"it lists {name[:80]!r}, which is not a plain name of a .pt file")
        if type(entry.size) is not int or type(entry.sha256) is not str:
            raise ValueError(f"the entry of {name!r} is not a size and a hash")


def still_there(path: Path, complete: bool) -> bool:
    """Return True if there is a checkpoint, broken or not; a complete one if asked for."""
    with suppress(BrokenCheckpoint):
        return read_manifest(path).complete or not complete
    return os.path.lexists(path)


def looks_like_checkpoint(path: Path) -> bool:
    """Return True if a folder has files of a checkpoint, though its manifest may be damaged."""
    try:
        return any(name == MANIFEST or name.endswith(".pt") for name in os.listdir(path))
    except FileNotFoundError:
        return False
    except OSError:  # It exists and cannot be read.
        return True


# States


def writable(state: Any, where: str) -> Any:
    """Return a state ready to write: NumPy's numbers as Python's, its arrays as marked tensors.

    A value that could not be loaded safely raises ValueError, which names its place.
    """
    kind = type(state)  # Not isinstance: NumPy's float64 is a float, and torch would pickle it.
    if kind in MAPPINGS:
        keys = [writable(key, f"{where}: the key {key!r}") for key in state]
        values = [writable(value, f"{where}.{key}") for key, value in state.items()]
        if all(map(is_, keys, state)) and all(map(is_, values, state.values())):
            return state
        state = copy.copy(state)  # Keeps the attribute `_metadata` of a module's state.
        state.clear()
        for key, value in zip(keys, values, strict=True):
            state[key] = value
        return state
    if kind in (list, tuple):
        return kind(writable(value, f"{where}[{index}]") for index, value in enumerate(state))
    if kind in (*SCALARS, Tensor, torch.nn.Parameter):
        return state
    if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
        with suppress(TypeError, ValueError):  # Arrays of texts, objects or dates are refused.
            return {ARRAY: torch.from_numpy(state.astype(state.dtype.newbyteorder("=")))}
    elif kind.__module__ == "numpy" and getattr(state, "ndim", None) == 0:
        number = state.item()
        if type(number) in SCALARS:
            return number
    raise ValueError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; "
        "a state is made of dict, list, tuple, tensor, int, float, str, bool, None, and "
        "NumPy's numbers and arrays of numbers"
    )


def _to_numpy(value: Any) -> Any:
    """Return a loaded value with marked tensors converted back to NumPy arrays."""
    kind = type(value)
    if kind is dict and value.keys() == {ARRAY} and isinstance(value[ARRAY], Tensor):
        return value[ARRAY].numpy()
    if kind in MAPPINGS:
        for key, part in value.items():
            value[key] = _to_numpy(part)
    elif kind is list:
        value[:] = map(_to_numpy, value)
    elif kind is tuple:
        return tuple(map(_to_numpy, value))
    return value


def write_state(folder: Path, name: str, state: Any) -> dict[str, FileEntry]:
    """Write a state: a file for each top-level key with tensors in it, and one for the rest."""
    state = writable(state, name)
    # A module's state is never split: it is an OrderedDict that carries versions as an attribute.
    contents = {}
    for key, part in list(state.items()) if type(state) is dict else ():
        names_file = type(key) is str and KEY.fullmatch(key)
        if names_file and not isinstance(part, Tensor) and _has_tensor(part):
            contents[f"{name}.{key}.pt"] = part
            state = {k: v for k, v in state.items() if k != key}
    contents[f"{name}.pt"] = state
    return {file: write_file(folder / file, partial(torch.save, x)) for file, x in contents.items()}


def write_local(folder: Path, rank: int, states: dict[str, Any]) -> dict[str, FileEntry]:
    """Write the local states of a rank, by name."""
    states = writable(states, f"the local state of rank {rank}")
    file = f"rank-{rank}.pt"
    return {file: write_file(folder / file, partial(torch.save, states))} if states else {}


def _has_tensor(state: Any) -> bool:
    if isinstance(state, (dict, list, tuple)):
        return any(map(_has_tensor, state.values() if isinstance(state, dict) else state))
    return isinstance(state, Tensor)


def recoverable_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the recoverables in a checkpoint, sorted."""
    files = (file for file in checkpoint.files if not RANK_FILE.fullmatch(file))
    return sorted({file.split(".")[0] for file in files})


def load_state(checkpoint: Checkpoint, name: str) -> Any:
    """Load the state of the recoverable ``name``, verified and on the CPU."""
    state = _load_whole(checkpoint, name)
    if isinstance(state, Mapping):
        _check_base(checkpoint, state.get("modules"))
    if checkpoint.format < FORMAT and name == "brain":
        state = _migrate(checkpoint, state, load_plain(checkpoint, "rank-0").get(name, {}))[0]
    return state


def load_plain(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Load the top-level values without tensors of a state; an empty dict if there is none."""
    return _load_dict(checkpoint, f"{name}.pt") if f"{name}.pt" in checkpoint.files else {}


def load_part(checkpoint: Checkpoint, name: str, path: Sequence[str]) -> Any:
    """Load the value at ``path`` in the state of ``name``, from as few files as possible."""
    file = f"{name}.{path[0]}.pt" if path else ""
    own = file in checkpoint.files
    part = _load_file(checkpoint, file) if own else load_state(checkpoint, name)
    for key in path[own:]:
        if not isinstance(part, Mapping) or key not in part:
            raise ValueError(f"{checkpoint.path} has no {'.'.join((name, *path))} (no {key!r})")
        part = part[key]
    if tuple(path) == ("modules",):
        _check_base(checkpoint, part)
    return part


def _check_base(checkpoint: Checkpoint, weights: Any) -> None:
    """Raise BrokenCheckpoint unless the manifest names the base that the weights were saved for."""
    if isinstance(weights, Mapping) and BASE in weights:
        try:
            if sha256_of(described(weights[BASE])[1]) != (checkpoint.base or {}).get("sha256"):
                raise ValueError("its weights are relative to another base than its manifest says")
        except ValueError as error:
            raise BrokenCheckpoint(f"{checkpoint.path} is refused: {error}") from None


def load_local(checkpoint: Checkpoint, rank: int, ranks: int) -> dict[str, Any]:
    """Load the local states of a rank, by name; empty if another number of ranks saved them.

    Each rank verifies a share of all local files, so that together they verify every file.
    """
    local: dict[str, Any] = {}
    for file in checkpoint.files:
        match = RANK_FILE.fullmatch(file)
        if match and int(match[1]) % ranks == rank:
            local = _load_dict(checkpoint, file)
    if checkpoint.processes != ranks:
        return {}
    if checkpoint.format < FORMAT and "brain" in local:
        shared = _load_whole(checkpoint, "brain")
        local["brain"] = _migrate(checkpoint, shared, local["brain"])[1]
    return local


def _migrate(checkpoint: Checkpoint, shared: Any, local: Any) -> tuple[Any, Any]:
    try:
        return migrate(checkpoint.format, shared, local)
    except (KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(
            f"{checkpoint.path} is refused: its state 'brain' is not of format {checkpoint.format}"
        ) from error


def _load_whole(checkpoint: Checkpoint, name: str) -> Any:
    """Load the state of ``name`` from all of its files, in the layout of its format."""
    if f"{name}.pt" not in checkpoint.files:
        known = ", ".join(recoverable_names(checkpoint)) or "nothing"
        raise ValueError(f"{checkpoint.path} holds no {name}.pt; it holds {known}")
    parts = [f for f in checkpoint.files if f.startswith(f"{name}.") and f != f"{name}.pt"]
    whole = (_load_dict if parts else _load_file)(checkpoint, f"{name}.pt")
    for file in parts:
        whole[file[len(name) + 1 : -len(".pt")]] = _load_file(checkpoint, file)
    return whole


def _load_dict(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    content = _load_file(checkpoint, name)
    if type(content) is not dict:
        raise BrokenCheckpoint(f"{checkpoint.path / name} is refused: it is no dict")
    return content


def _load_file(checkpoint: Checkpoint, name: str) -> Any:
    """Load a file of tensors and plain values, verified first; nothing in it can run."""
    data = read_verified(checkpoint, name)
    try:
        return _to_numpy(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except MemoryError:
        raise
    except Exception as error:  # A hostile file can make the unpickler raise anything.
        reason = re.search(r"WeightsUnpickler error: (.{1,200})", str(error))
        raise BrokenCheckpoint(
            f"{checkpoint.path / name} is refused: it does not read as tensors and plain values "
            f"({printable(reason[1]) if reason else type(error).__name__})"
        ) from error


# Files


def read_file(folder: Path, name: str) -> bytes:
    """Read a regular file directly in a folder; raise BrokenCheckpoint if it is anything else."""
    path = folder / name
    try:
        # Checked before opening: a pipe would block for ever, a link would lead outside.
        info = os.lstat(path)
        if not stat.S_ISREG(info.st_mode):
            raise BrokenCheckpoint(f"{path} is broken: it is not a regular file")
        if name == MANIFEST and info.st_size > MAX_MANIFEST_BYTES:
            raise BrokenCheckpoint(
                f"{path} is broken: it has {info.st_size} bytes, more than {MAX_MANIFEST_BYTES}"
            )
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        exists = os.path.lexists(folder)
        if exists and (name == MANIFEST or name in read_manifest(folder).files):
            raise BrokenCheckpoint(f"{path} is missing") from error
        raise MissingCheckpoint(
            f"{path if exists else folder} does not exist any more: the run that saves there has "
            "deleted it since it was listed"
        ) from error
    except OSError as error:
        raise BrokenCheckpoint(f"{path} cannot be read: {error.strerror}") from error


def read_verified(checkpoint: Checkpoint, name: str) -> bytes:
    """Read a file that the manifest lists; raise BrokenCheckpoint if size or hash differ."""
    data, expected = read_file(checkpoint.path, name), checkpoint.files[name]
    path = checkpoint.path / name
    if len(data) != expected.size:
        raise BrokenCheckpoint(
            f"{path} is broken: it has {len(data)} bytes, the manifest says {expected.size}"
        )
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        raise BrokenCheckpoint(f"{path} is broken: its SHA-256 is not the manifest's")
    return data


class HashingFile(io.RawIOBase):
    """New file that hashes its content, and raises its first error only in `entry`.

    torch's zip writer calls `write` from C++, which would turn an exception into another one. After
    an error the size is still counted, so that the message can tell the bytes needed.
    """

    def __init__(self, path: Path) -> None:
        self.size = self.stored = 0
        self._error: BaseException | None = None
        self._hash = hashlib.sha256()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.size += len(data)
        self._hash.update(data)
        self._keep_error(self._put, data)
        return len(data)

    def entry(self) -> FileEntry:
        """Sync the file to the disk, close it and return its entry, or raise the first error."""
        self._keep_error(os.fsync, self._file)
        os.close(self._file)
        if self._error is not None:
            raise self._error
        return FileEntry(self.size, self._hash.hexdigest())

    def _keep_error(self, work: Callable[[Any], None], given: Any) -> None:
        if self._error is None:
            try:
                work(given)
            except BaseException as error:
                self._error = error

    def _put(self, data: memoryview) -> None:
        while data:
            count = os.write(self._file, data)
            self.stored += count
            data = data[count:]


def write_file(path: Path, fill: Callable[[IO[bytes]], object]) -> FileEntry:
    """Write a new file by calling ``fill``; an OSError tells the bytes needed."""
    file = HashingFile(path)
    try:
        try:
            with io.BufferedWriter(file, CHUNK_BYTES) as buffer:
                fill(buffer)
        finally:
            entry = file.entry()
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path.name} needs {file.size} bytes, {file.stored} of them were stored, "
            f"{shutil.disk_usage(path.parent).free} are free on the disk "
            f"({error.strerror or error})",
        ) from error
    return entry


# Folders


def publish(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the manifest, then rename the temporary folder: from then on it is a checkpoint."""
    _write_manifest(folder, checkpoint)
    _sync_folder(folder)
    os.rename(folder, checkpoint.path)
    _sync_folder(checkpoint.path.parent)


def _write_manifest(folder: Path, checkpoint: Checkpoint) -> None:
    data = encode_manifest(manifest_content(checkpoint))
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(
            f"the meta of {checkpoint.path} is too large: its manifest has {len(data)} bytes, at "
            f"most {MAX_MANIFEST_BYTES} are allowed"
        )
    write_file(folder / MANIFEST, lambda file: file.write(data))


def cut_to_weights(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Cut a checkpoint to some of its files: a smaller manifest replaces its own, atomically.

    Files of weights are not rewritten, so that no space is needed. A process killed meanwhile
    leaves the whole checkpoint, or the smaller one with files to remove.
    """
    files = {name: checkpoint.files[name] for name in names}
    smaller = replace(checkpoint, files=files, contents=WEIGHTS)
    temporary = checkpoint.path.parent / make_temporary(checkpoint.path)
    try:
        _write_manifest(temporary, smaller)
        os.rename(temporary / MANIFEST, checkpoint.path / MANIFEST)
        _sync_folder(checkpoint.path)  # Before files of the former manifest are deleted.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    remove_unlisted(smaller)


def remove_unlisted(checkpoint: Checkpoint) -> None:
    """Remove files that the manifest of a cut checkpoint lists no longer; the lock is needed."""
    for name in os.listdir(checkpoint.path):
        if FILE_NAME.fullmatch(name) and name not in checkpoint.files:
            os.unlink(checkpoint.path / name)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create the folder of all checkpoints; raise UnwritableFolder if that cannot be done."""
    try:
        if not folder.is_dir():
            os.makedirs(folder, exist_ok=True)
            _sync_folder(folder.parent)
    except OSError as error:
        raise UnwritableFolder(
            f"checkpoints cannot be saved in {folder}: it does not exist and cannot be made "
            f"({error.strerror}); choose another place, or make it writable"
        ) from error
    for mode, what in ((os.W_OK | os.X_OK, "writable"), (os.R_OK, "readable")):
        if not os.access(folder, mode):
            raise UnwritableFolder(f"checkpoints cannot be saved in {folder}: it is not {what}")


def make_temporary(path: Path) -> str:
    """Make the temporary folder for writing the checkpoint at ``path``; return its name."""
    temporary = _temporary(path, "saving")
    os.mkdir(temporary)
    return temporary.name


def delete(path: Path) -> None:
    """Delete a checkpoint; a partly deleted one never has its name."""
    temporary = _temporary(path, "deleting")
    os.rename(path, temporary)
    shutil.rmtree(temporary)


def _temporary(path: Path, verb: str) -> Path:
    return path.parent / f".{verb}-{os.getpid()}@{HOST}-{path.name}"


def remove_stale(folder: Path) -> None:
    """Remove temporary folders; the lock of the folder is needed."""
    for entry in list(os.scandir(folder)):
        if TEMPORARY_NAME.fullmatch(entry.name):
            try:
                shutil.rmtree(entry.path)
            except OSError as error:
                warnings.warn(
                    f"{entry.path} is of no use and cannot be removed: {error}", stacklevel=2
                )


class FolderLock:
    """Exclusive lock of a folder, held by this process while the object lives.

    It leaves no file, and ends with the process, even a killed one. A forked process shares the
    lock of its parent and may save, too, but loses it when its parent ends. On a file system
    without locks every process gets it.
    """

    # Locks of this process, by device and inode of the folder.
    held: WeakValueDictionary[tuple[int, int], FolderLock] = WeakValueDictionary()

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.forget = finalize(
            self, os.close, handle
        )  # Released by the last process that closes it.
        self.forget.atexit = False


def _forget_locks() -> None:
    for lock in FolderLock.held.values():
        lock.forget()


os.register_at_fork(after_in_child=_forget_locks)


def lock_folder(folder: Path) -> FolderLock | None:
    """Take the lock of a folder, or share it within this process; None if another one has it."""
    info = os.stat(folder)
    lock = FolderLock.held.get((info.st_dev, info.st_ino))
    if lock is not None:
        return lock
    lock = FolderLock(os.open(folder, os.O_RDONLY))
    try:
        fcntl.flock(lock.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:  # The file system cannot lock folders; a run folder has its own lock.
        pass
    FolderLock.held[info.st_dev, info.st_ino] = lock
    return lock
