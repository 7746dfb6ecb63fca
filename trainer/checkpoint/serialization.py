"""State dicts as files of tensors and plain values, whose loading runs no code."""

from __future__ import annotations

import io
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import tree
from trainer.checkpoint import storage
from trainer.checkpoint.migrate import LAYOUT, migrate
from trainer.checkpoint.storage import RANK_FILE, BrokenCheckpoint, Checkpoint, HashingFile

RECOVERABLE_NAME = re.compile(r"(?!rank-)[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", re.ASCII)
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", re.ASCII)
SCALARS = (int, float, str, bool, type(None), torch.Size, torch.dtype, torch.device)
SEQUENCES = (list, tuple)
MAPPINGS = (dict, OrderedDict, Counter)
TENSORS = (Tensor, torch.nn.Parameter)


def to_json(value: Any, where: str = "meta") -> Any:
    """Convert one-element tensors to numbers and non-finite numbers to None, as JSON allows.

    Raises:
        ValueError: ``value`` holds something that JSON cannot; names its place.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # torch's, or NumPy's
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(
        f"{where} of a checkpoint is a {type(value).__name__}; it can hold numbers, strings, "
        "booleans, None, and lists and mappings of these"
    )


# Saving


def check_state(state: Any, where: str) -> None:
    """Raise ValueError if a state holds something that could not be loaded safely; name it."""
    kind = type(state)  # Exactly: NumPy's float64 is a float as well, and is saved as a pickle.
    if kind in MAPPINGS:
        for key, value in state.items():
            check_state(key, f"{where}: the key {key!r}")
            check_state(value, f"{where}.{key}")
    elif kind in SEQUENCES:
        for index, value in enumerate(state):
            check_state(value, f"{where}[{index}]")
    elif kind not in SCALARS + TENSORS:
        raise ValueError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; "
            "a state is made of dict, list, tuple, tensor, int, float, str, bool and None"
        )


def write_state(folder: Path, name: str, state: Any) -> list[tuple[str, int, str]]:
    """Write a state: a file for each top-level key with tensors in it, and one for the rest.

    Returns:
        Name, size and hash of each file.
    """
    check_state(state, name)
    # A module's state is never split: it is an OrderedDict that carries versions as an attribute.
    large = [k for k, v in state.items() if _is_large(k, v)] if type(state) is dict else []
    rest = {k: v for k, v in state.items() if k not in large} if large else state
    written = [_write(folder, f"{name}.{key}.pt", state[key]) for key in large]
    return [*written, _write(folder, f"{name}.pt", rest)]


def write_local(folder: Path, rank: int, states: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Write the local states of a rank, by name; returns what `write_state` does."""
    check_state(states, f"the local state of rank {rank}")
    return [_write(folder, f"rank-{rank}.pt", states)] if states else []


def _is_large(key: Any, value: Any) -> bool:
    """Return True if a key can name a file, and a container with tensors belongs to it."""
    if type(key) is not str or not KEY.fullmatch(key) or isinstance(value, Tensor):
        return False
    return any(isinstance(leaf, Tensor) for _, leaf in tree.leaves(value))


def _write(folder: Path, name: str, content: Any) -> tuple[str, int, str]:
    def fill(file: HashingFile) -> None:
        torch.save(content, file)  # type: ignore[arg-type]  # it needs write and flush only

    return (name, *storage.write_file(folder / name, fill))


# Loading


def recoverable_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the recoverables in a checkpoint, sorted."""
    files = (file for file in checkpoint.files if not RANK_FILE.fullmatch(file))
    return sorted({file.split(".")[0] for file in files})


def load_state(checkpoint: Checkpoint, name: str) -> Any:
    """Load the state of the recoverable ``name``, verified and on the CPU.

    Raises:
        BrokenCheckpoint: a file of it is damaged or unsafe.
        ValueError: the checkpoint has no such recoverable.
    """
    state = _load_as_saved(checkpoint, name)
    if not _is_old(checkpoint, name):
        return state
    local = _load_rank(checkpoint, "rank-0.pt") if "rank-0.pt" in checkpoint.files else {}
    return _migrate(checkpoint, state, local.get(name, {}))[0]


def load_part(checkpoint: Checkpoint, name: str, path: Sequence[str]) -> Any:
    """Load the value at ``path`` in the state of ``name``, reading no more files than it takes.

    Raises:
        BrokenCheckpoint: a file of it is damaged or unsafe.
        ValueError: there is no such value.
    """
    if path and f"{name}.{path[0]}.pt" in checkpoint.files:
        part, rest = _load_file(checkpoint, f"{name}.{path[0]}.pt"), path[1:]
    else:
        part, rest = load_state(checkpoint, name), path
    for key in rest:
        if not isinstance(part, Mapping) or key not in part:
            raise ValueError(f"{checkpoint.path} has no {'.'.join((name, *path))} (no {key!r})")
        part = part[key]
    return part


def load_local(checkpoint: Checkpoint, rank: int, ranks: int) -> dict[str, Any]:
    """Load the local states of a rank, by name; none if another number of ranks saved them.

    Each rank verifies its share of all local files, so that together the ranks verify them all.

    Raises:
        BrokenCheckpoint: one of the files is damaged or unsafe.
    """
    local: dict[str, Any] = {}
    for file in checkpoint.files:
        match = RANK_FILE.fullmatch(file)
        if match and int(match[1]) % ranks == rank:
            content = _load_rank(checkpoint, file)
            local = content if checkpoint.processes == ranks else {}
    for name in local:
        if _is_old(checkpoint, name):
            local[name] = _migrate(checkpoint, _load_as_saved(checkpoint, name), local[name])[1]
    return local


def _is_old(checkpoint: Checkpoint, name: str) -> bool:
    return name == "brain" and checkpoint.format < LAYOUT


def _migrate(checkpoint: Checkpoint, shared: Any, local: Any) -> tuple[Any, Any]:
    try:
        return migrate(checkpoint.format, shared, local)
    except (KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(
            f"{checkpoint.path} is refused: its state 'brain' is not of format {checkpoint.format}"
        ) from error


def _load_as_saved(checkpoint: Checkpoint, name: str) -> Any:
    """Load the state of ``name`` from all of its files, in the layout of its format."""
    if f"{name}.pt" not in checkpoint.files:
        known = ", ".join(recoverable_names(checkpoint)) or "nothing"
        raise ValueError(f"{checkpoint.path} holds no {name}.pt; it holds {known}")
    whole = _load_file(checkpoint, f"{name}.pt")
    for file in checkpoint.files:
        if file.startswith(f"{name}.") and file != f"{name}.pt":
            if type(whole) is not dict:
                raise BrokenCheckpoint(f"{checkpoint.path / name}.pt is refused: it is no dict")
            whole[file[len(name) + 1 : -len(".pt")]] = _load_file(checkpoint, file)
    return whole


def _load_rank(checkpoint: Checkpoint, file: str) -> dict[str, Any]:
    """Load the local states of a rank from its file, in the layout of their format."""
    content = _load_file(checkpoint, file)
    if type(content) is not dict:
        raise BrokenCheckpoint(f"{checkpoint.path / file} is refused: it is no dict")
    return content


def _load_file(checkpoint: Checkpoint, name: str) -> Any:
    """Load a file of tensors and plain values, verified first; nothing in it can run."""
    data = storage.read_verified(checkpoint, name)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # Whatever an unpickler meets in bytes that somebody else hashed.
        reason = re.search(r"WeightsUnpickler error: (.{1,200})", str(error))
        raise BrokenCheckpoint(
            f"{checkpoint.path / name} is refused: it does not read as tensors and plain values "
            f"({reason[1] if reason else type(error).__name__})"
        ) from error


# Averaging


def average_into(newest: Any, older: Iterator[tuple[Checkpoint, Any]]) -> None:
    """Replace the float tensors of ``newest`` by their mean over all states, taken in float64.

    Integer and boolean tensors (counters, masks) have no mean and stay those of ``newest``.

    Args:
        newest: state of the newest checkpoint, changed in place.
        older: the other checkpoints with their states.

    Raises:
        ValueError: a tensor of the newest state is missing in another one, or has another shape.
    """
    targets = {
        place: tensor
        for place, tensor in _tensors(newest).items()
        if tensor.is_floating_point() or tensor.is_complex()
    }
    totals = {
        place: tensor.to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)
        for place, tensor in targets.items()
    }
    count = 1
    for checkpoint, state in older:
        count += 1
        given = _tensors(state)
        for place, total in totals.items():
            if place not in given or given[place].shape != total.shape:
                raise ValueError(
                    f"{place} has shape {list(total.shape)} in the newest checkpoint and "
                    f"{list(given[place].shape) if place in given else 'does not exist'} in "
                    f"{checkpoint.path}; only checkpoints of one model can be averaged"
                )
            total += given[place]
    for place, tensor in targets.items():
        tensor.copy_(totals[place] / count)


def _tensors(state: Any) -> dict[str, Tensor]:
    """Return every tensor of a state by its dotted path."""
    return {path: leaf for path, leaf in tree.leaves(state) if isinstance(leaf, Tensor)}
