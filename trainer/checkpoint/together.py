"""Work that may fail on one rank alone: then it fails on all, and no rank waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from trainer import distributed
from trainer.checkpoint.manifest import BrokenCheckpoint

T = TypeVar("T")


def everywhere(work: Callable[..., T], *arguments: Any) -> T:
    """This rank's result of `work`, once it has succeeded on every rank; else an error on each.

    A rank raises its own error if it has one. A BrokenCheckpoint is the same error on all ranks, so
    that they fall back together, unless another rank has met something worse.
    """
    error: BaseException | None = None
    try:
        result = work(*arguments)
    except BaseException as caught:
        error = caught
    broken = isinstance(error, BrokenCheckpoint)
    failures = distributed.gather(error and [broken, f"{type(error).__name__}: {error}"])
    for rank, failure in enumerate(failures):
        if failure and not failure[0] and (error is None or broken):
            raise RuntimeError(f"rank {rank} failed ({failure[1]})") from error
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure:
            raise BrokenCheckpoint(f"on rank {rank}: {failure[1]}")
    return result


def on_main(work: Callable[..., T], *arguments: Any) -> T:
    """Rank 0's result of `work` on every rank, as JSON; an error there is one on each."""
    result = everywhere(lambda: work(*arguments) if distributed.is_main() else None)
    shared: T = distributed.broadcast_object(result)
    return shared
