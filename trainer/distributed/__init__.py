"""Process group: ranks, collectives, and work that succeeds or fails on all ranks together.

``torchrun --nproc_per_node=N train.py …`` launches the processes. In a run of one
process, no function of this module communicates.
"""

from __future__ import annotations

import atexit
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from trainer.distributed import hang_watch

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
# Environment variables that torchrun sets.
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RENDEZVOUS = timedelta(seconds=60)  # Time for all processes to join.
_timeout = TIMEOUT
_store: Any = None  # torch's store, shared by the processes of one start of a run.
_gradient_group: tuple[Any, Any] = None, None  # The default group at its creation; the group.


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the index of this process among all, from 0."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _active() else 1


def local_rank() -> int:
    """Return the index of this process on its machine, from 0: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _active() else 0


def is_main() -> bool:
    """Return True on rank 0, which writes files and messages."""
    return rank() == 0


def launched() -> bool:
    """Return True if torchrun started this process, according to its environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarts() -> int:
    """Return the number of times that torchrun has restarted this run after a process died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if launched() else 0


def start(device: str, timeout: timedelta = TIMEOUT) -> None:
    """Join the process group of the processes that torchrun launched.

    Every rank must call it. It does nothing in a process that torchrun did not launch or that has
    joined already.

    Args:
        device: device of the run, such as "cpu" or "cuda"; CUDA uses NCCL, all else Gloo.
        timeout: time after which a collective that a rank does not call raises an error.

    Raises:
        ValueError: processes that the environment names do not exist.
    """
    if not launched() or _active():
        return
    given = {name: os.environ.get(name, "") for name in LAUNCHER}
    missing = next((name for name, value in given.items() if not value), None)
    place = ", ".join(f"{name}={value}" for name, value in given.items() if value)
    numbers = (given["RANK"] + given["WORLD_SIZE"]).isdigit()
    if missing or not numbers or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        raise ValueError(
            f"the environment has {place}, as torchrun sets them, "
            f"{f'but no {missing}' if missing else 'which do not fit'}: unset RANK and WORLD_SIZE "
            "for a run of one process, or start with torchrun"
        )
    import torch.distributed.nn  # Imported later, its default arguments would keep the group.
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    global _store, _timeout
    _timeout = timeout
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        shared, rank, ranks = next(rendezvous("env://", timeout=RENDEZVOUS))
    except dist.DistError as error:
        raise ValueError(
            f"the processes of this run did not come together within {RENDEZVOUS.seconds} s "
            f"({place}): start all of them, as torchrun does, or unset RANK and WORLD_SIZE for a "
            f"run of one process ({str(error).partition(chr(10))[0]})"
        ) from error
    shared.set_timeout(RENDEZVOUS)
    # torchrun's store outlives the processes: entries of an earlier start, such as addresses of
    # dead processes, must not be read as present ones.
    _store = PrefixStore(f"restart-{restarts()}", shared)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=ranks, timeout=timeout)


def join(device: str) -> None:
    """Join the processes that torchrun launched, if the program has not done so; see `start`.

    Every rank must call it. The process leaves the group when it ends.

    Args:
        device: as in `start`.

    Raises:
        ValueError: as in `start`.
    """
    if launched() and os.environ["WORLD_SIZE"] != "1" and not _active():
        start(device)
        atexit.register(stop)


def stop() -> None:
    """Leave the process group, if there is one, and end its threads. Every rank must call it.

    Only this module may keep references to the groups: otherwise their threads would run on, and
    abort the process at the end of the interpreter.
    """
    global _gradient_group, _store
    if _active():
        _gradient_group, _store = (None, None), None
        dist.destroy_process_group()


def open_gradient_group() -> None:
    """Open the group of `begin_sum` and `begin_max`, once. Every rank must call it.

    Only its own messages are ordered: collectives of the default group may come between them, at
    different places on each rank.
    """
    global _gradient_group
    world = dist.group.WORLD
    if _gradient_group[0] is not world:
        barrier()  # Fails if a rank has died; the next line would wait for its address.
        _gradient_group = world, dist.new_group(timeout=_timeout)


def device() -> torch.device:
    """Return the device of the tensors that the backend can send."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


# Collectives


def barrier() -> None:
    """Wait until every rank is here. Every rank must call it."""
    if world_size() > 1:
        dist.barrier()


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Combine flags over ranks by logical or. Every rank must call it, with equally many flags.

    Args:
        *flags: this rank's flags.

    Returns:
        Each flag, True where it is True on any rank; equal on all ranks.
    """
    if world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=device())
    return tuple(bool(vote) for vote in all_reduce_max_(votes).tolist())


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over ranks, in place. Every rank must call it.

    Args:
        tensor: of the same shape and dtype on all ranks.

    Returns:
        The tensor itself.
    """
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def begin_sum(tensor: Tensor) -> dist.Work:
    """Begin to sum a tensor over ranks, in place, in the group of gradients.

    Every rank must call it.

    Args:
        tensor: of the same shape and dtype on all ranks; not to be read before the end.

    Returns:
        The message, whose ``wait()`` waits for the sum.
    """
    return dist.all_reduce(tensor, group=_gradient_group[1], async_op=True)


def begin_max(tensor: Tensor) -> dist.Work:
    """Begin to take the maximum over ranks of each element, in place, like `begin_sum`.

    Every rank must call it.

    Args:
        tensor: of the same shape and dtype on all ranks; not to be read before the end.

    Returns:
        The message, whose ``wait()`` waits for the result.
    """
    return dist.all_reduce(tensor, dist.ReduceOp.MAX, _gradient_group[1], async_op=True)


def all_reduce_max_(tensor: Tensor) -> Tensor:
    """Take the maximum over ranks of each element, in place. Every rank must call it.

    Args:
        tensor: of the same shape and dtype on all ranks.

    Returns:
        The tensor itself.
    """
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_(tensors: list[Tensor]) -> None:
    """Overwrite tensors with those of rank 0. Every rank must call it.

    Args:
        tensors: of the same number, shapes and dtypes on all ranks.
    """
    if world_size() > 1:
        for tensor in tensors:
            # Backends send raw memory, whose layout may differ between ranks and have gaps.
            sent = tensor.contiguous()
            dist.broadcast(sent, 0)
            if sent is not tensor:
                tensor.copy_(sent)


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate tensors of all ranks along their rows. Every rank must call it.

    Args:
        tensor: rows (N, …); N may differ between ranks.

    Returns:
        All rows (ΣN, …), in the order of ranks.
    """
    return tensor if world_size() == 1 else torch.cat(_all_gather(tensor))


def all_gather_json(item: Any) -> list[Any]:
    """Gather one item per rank, sent as JSON, which runs no code. Every rank must call it.

    Args:
        item: numbers, strings, booleans, None, and lists and dicts of these.

    Returns:
        Every rank's item, in the order of ranks. In a run of one process, the item as it is.
    """
    if world_size() == 1:
        return [item]
    payload = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8)
    return [json.loads(bytes(row.tolist())) for row in _all_gather(payload.to(device()))]


def broadcast_json(item: Any) -> Any:
    """Return rank 0's item on every rank, sent as JSON. Every rank must call it.

    Args:
        item: as in `all_gather_json`; used only on rank 0.
    """
    return all_gather_json(item if is_main() else None)[0]


def _all_gather(tensor: Tensor) -> list[Tensor]:
    """Gather tensors (n, …) whose number of rows n may differ between ranks."""
    size = torch.tensor([len(tensor)], device=tensor.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    counts = torch.cat(sizes).tolist()  # Waits for the device.
    if not any(counts):
        return [tensor for _ in counts]
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    rows = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(rows, padded)
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


# Work that succeeds or fails on all ranks together


def run_on_all(work: Callable[..., T], *args: Any, shared: type[Exception] | None = None) -> T:
    """Call a function on every rank; an error on one rank becomes an error on all of them.

    So no rank waits in a later collective for one that has failed. Every rank must call it.

    Args:
        work: function that may fail on some of the ranks.
        *args: its arguments, which may differ between ranks.
        shared: type of exception that is raised on all ranks, so that all can handle it alike;
            constructed from a message.

    Returns:
        This rank's result.

    Raises:
        BaseException: this rank's own error, if it has one.
        shared: on every rank, if no other type was raised.
        RuntimeError: another rank failed with another type of error.
    """
    if world_size() == 1:
        return work(*args)
    error: BaseException | None = None
    failure: tuple[bool, str] | None = None
    with pause():
        try:
            result = work(*args)
        except BaseException as caught:
            error = caught
            failure = isinstance(caught, shared or ()), f"{type(caught).__name__}: {caught}"
        answers = all_gather_json(failure)
    failures = [(r, *each) for r, each in enumerate(answers) if each is not None]
    if failure is None or failure[0]:
        for failed_rank, is_shared, message in failures:
            if not is_shared:
                raise RuntimeError(f"rank {failed_rank} failed ({message})") from error
    if error is not None:
        raise error
    if failures and shared is not None:
        raise shared(f"on rank {failures[0][0]}: {failures[0][2]}")
    return result


def failed_elsewhere(error: Exception) -> bool:
    """Return True for the error of `run_on_all` about a failure of another rank."""
    return type(error) is RuntimeError and re.match(r"rank \d+ failed \(", str(error)) is not None


def run_on_main(work: Callable[..., T], *args: Any, shared: type[Exception] | None = None) -> T:
    """Call a function on rank 0 and return its result on every rank. Every rank must call it.

    Args:
        work: function whose result `all_gather_json` can send.
        *args: its arguments, used only on rank 0.
        shared: as in `run_on_all`.

    Returns:
        Rank 0's result.

    Raises:
        BaseException: as in `run_on_all`; an error on rank 0 is raised on every rank.
    """
    result = run_on_all(lambda: work(*args) if is_main() else None, shared=shared)
    on_every_rank: T = broadcast_json(result)
    return on_every_rank


# Outside of collectives


@contextmanager
def pause() -> Iterator[None]:
    """Context manager for work of one rank for which others may wait without a limit.

    Every rank must enter it.
    """
    hang_watch.paused += 1
    try:
        yield
    finally:
        hang_watch.paused -= 1


def watch_for_hangs(
    timeout: float, progress: Callable[[], object]
) -> AbstractContextManager[object]:
    """Return a context manager in which all ranks end if one makes no progress.

    Every rank must enter it. It does nothing in a run of one process, within another such block,
    and if `start` was not called.

    Args:
        timeout: time without progress after which a rank counts as hung, in seconds; 0 for never.
        progress: returns a new value whenever this rank has made progress.
    """
    if world_size() == 1 or _store is None or not timeout or hang_watch.HangWatch.running:
        return nullcontext()
    return hang_watch.HangWatch(timeout, _store.clone(), rank(), world_size(), progress)


def meet(name: str, seconds: float) -> bool:
    """Wait for all ranks outside collectives.

    Args:
        name: name of the meeting, equal on all ranks and used once in a run.
        seconds: time to wait for the others, in seconds.

    Returns:
        True if every rank called it within the time; False if `start` was not called.
    """
    if world_size() == 1:
        return True
    if _store is None:
        return False
    keys = [f"{name}/{each}" for each in range(world_size())]
    try:
        _store.set(keys[rank()], "")
        _store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError:  # Time is over, or the launcher has died with its store.
        return False
    return True


def depart(request: int | None = None, error: str = "") -> None:
    """Send the other ranks the reason why this one ends; the first call of any rank counts.

    Args:
        request: number of the request to stop; None for an error.
        error: the error, as one line.
    """
    if _store is not None:
        reason = json.dumps({"rank": rank(), "request": request, "error": error})
        with suppress(RuntimeError):  # The launcher has died with its store.
            _store.compare_set("departure", "", reason)


def ask(number: int) -> None:
    """Send a request to stop to the other ranks, even to those outside collectives.

    Args:
        number: number of the request, which `asked` returns on the other ranks.
    """
    if _store is not None:
        with suppress(RuntimeError):
            _store.set("asked", str(number))


def asked() -> int | None:
    """Return the request to stop that another rank sent by `ask`, or None.

    Raises:
        RuntimeError: the launcher has died with its store.
    """
    store = _store
    return int(store.get("asked")) if store is not None and store.check(["asked"]) else None


def departure() -> dict[str, Any] | None:
    """Return the reason why another rank ended, after a collective failed.

    Returns:
        Its ``rank``, and ``request`` and ``error`` as passed to `depart`; None if no rank did.
    """
    with suppress(RuntimeError):
        if _store is not None and _store.check(["departure"]):
            reason: dict[str, Any] = json.loads(_store.get("departure"))
            return reason if reason["rank"] != rank() else None
    return None


# The name that SpeechBrain-style recipes and messages use.
gather = all_gather_json
