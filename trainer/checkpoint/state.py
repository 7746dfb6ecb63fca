"""State dicts as files and back, without pickle's powers: tensors and plain values only."""

from __future__ import annotations

import io
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.manifest import RANK_FILE, BrokenCheckpoint, Checkpoint, read_verified

NAME = re.compile(r"(?!rank-)[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", re.ASCII)
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", re.ASCII)
SCALARS = (int, float, str, bool, type(None), torch.Size, torch.dtype, torch.device)
SEQUENCES = (list, tuple)
MAPPINGS = (dict, OrderedDict, Counter)
TENSORS = (Tensor, torch.nn.Parameter)


def plain(value: Any, where: str = "meta") -> Any:
    """`value` as JSON holds it: one-element tensors as numbers, NaN and infinities as None."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # torch's, or NumPy's
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(
        f"{where} of a checkpoint is a {type(value).__name__}; it can hold numbers, strings, "
        "booleans, None, and lists and mappings of these"
    )


def check(state: Any, where: str) -> None:
    """ValueError names what a checkpoint cannot hold: it could not be read back safely."""
    kind = type(state)  # Exactly: NumPy's float64 is a float as well, and comes back as pickle.
    if kind in MAPPINGS:
        for key, value in state.items():
            check(key, f"{where}: the key {key!r}")
            check(value, f"{where}.{key}")
    elif kind in SEQUENCES:
        for index, value in enumerate(state):
            check(value, f"{where}[{index}]")
    elif kind not in SCALARS + TENSORS:
        raise ValueError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; "
            "a state is made of dict, list, tuple, tensor, int, float, str, bool and None"
        )


def has_tensor(state: Any) -> bool:
    """Whether there is a tensor anywhere inside."""
    if isinstance(state, Mapping):
        return any(map(has_tensor, state.values()))
    return isinstance(state, Tensor) or (
        isinstance(state, SEQUENCES) and any(map(has_tensor, state))
    )


def pieces(name: str, state: Any) -> Iterator[tuple[str, Any]]:
    """The files of a state: one for each top-level key with tensors deeper in, one for the rest.

    A module's state stays whole: it is an OrderedDict that carries versions as an attribute.
    """
    large = (
        [key for key, value in state.items() if _is_large(key, value)]
        if type(state) is dict
        else []
    )
    for key in large:
        yield f"{name}.{key}.pt", state[key]
    rest = {key: state[key] for key in state if key not in large} if large else state
    yield f"{name}.pt", rest


def _is_large(key: Any, value: Any) -> bool:
    deep = isinstance(value, (Mapping, *SEQUENCES)) and has_tensor(value)
    return deep and type(key) is str and KEY.fullmatch(key) is not None


def load_file(checkpoint: Checkpoint, name: str) -> Any:
    """The content of a tensor file, verified first; nothing in it can run."""
    data = read_verified(checkpoint, name)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # Whatever an unpickler meets in bytes that somebody else sealed.
        reason = re.search(r"WeightsUnpickler error: (.{1,200})", str(error))
        raise BrokenCheckpoint(
            f"{checkpoint.path / name} is refused: it does not read as tensors and plain values "
            f"({reason[1] if reason else type(error).__name__})"
        ) from error


def names(checkpoint: Checkpoint) -> set[str]:
    """The recoverables in a checkpoint."""
    return {file.split(".")[0] for file in checkpoint.files if not RANK_FILE.fullmatch(file)}


def load_state(checkpoint: Checkpoint, name: str) -> Any:
    """The state of the recoverable `name`, put together from its files."""
    if f"{name}.pt" not in checkpoint.files:
        known = ", ".join(sorted(names(checkpoint))) or "nothing"
        raise ValueError(f"{checkpoint.path} holds no {name}.pt; it holds {known}")
    whole = load_file(checkpoint, f"{name}.pt")
    for file in checkpoint.files:
        if file.startswith(f"{name}.") and file != f"{name}.pt":
            if type(whole) is not dict:
                raise BrokenCheckpoint(f"{checkpoint.path / name}.pt is refused: it is no dict")
            whole[file[len(name) + 1 : -len(".pt")]] = load_file(checkpoint, file)
    return whole


def load_part(checkpoint: Checkpoint, name: str, path: Sequence[str]) -> Any:
    """What is at `path` inside the state of `name`, reading no more files than that takes."""
    if path and f"{name}.{path[0]}.pt" in checkpoint.files:
        part, rest = load_file(checkpoint, f"{name}.{path[0]}.pt"), path[1:]
    else:
        part, rest = load_state(checkpoint, name), path
    for key in rest:
        if not isinstance(part, Mapping) or key not in part:
            raise ValueError(f"{checkpoint.path} has no {'.'.join((name, *path))} (no {key!r})")
        part = part[key]
    return part


def load_all(checkpoint: Checkpoint) -> dict[str, Any]:
    """The states of all recoverables, by name."""
    return {name: load_state(checkpoint, name) for name in sorted(names(checkpoint))}


def load_local(checkpoint: Checkpoint, rank: int, ranks: int) -> dict[str, Any]:
    """The local states of this `rank`, by name; none when another number of ranks has saved.

    Verifies the rank's share of all local files, so that together the ranks verify each of them.
    """
    local: dict[str, Any] = {}
    for file in checkpoint.files:
        match = RANK_FILE.fullmatch(file)
        if match and int(match[1]) % ranks == rank:
            content = load_file(checkpoint, file)
            if type(content) is not dict:
                raise BrokenCheckpoint(f"{checkpoint.path / file} is refused: it is no dict")
            local = content if checkpoint.processes == ranks else {}
    return local


def tensors(state: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state with its dotted place."""
    if isinstance(state, Tensor):
        yield where, state
    elif isinstance(state, (Mapping, *SEQUENCES)):
        keys = state if isinstance(state, Mapping) else range(len(state))
        for key in keys:
            yield from tensors(state[key], f"{where}.{key}" if where else str(key))


def mean_into(newest: Any, older: Iterator[tuple[Checkpoint, Any]]) -> None:
    """Turn `newest` into the mean of itself and `older`, tensor by tensor, in float64.

    Integer and boolean tensors (counters, masks) have no mean and stay the newest's.
    """
    targets = {
        place: tensor
        for place, tensor in tensors(newest)
        if tensor.is_floating_point() or tensor.is_complex()
    }
    totals = {
        place: tensor.to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)
        for place, tensor in targets.items()
    }
    count = 1
    for checkpoint, state in older:
        count += 1
        given = dict(tensors(state))
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
