"""The processes of a run: who I am, and how all ranks decide as one.

Launched by ``torchrun --nproc_per_node=N recipes/<task>/train.py …``; without it there is one
process, and every function here is free of communication.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process among all, from 0."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _active() else 1


def local_rank() -> int:
    """This process among those of its machine, from 0: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _active() else 0


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return rank() == 0


def launched() -> bool:
    """Whether torchrun started this process (its environment is there)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(device: str, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Join the processes that torchrun launched; nothing happens for a process on its own."""
    if not launched() or _active():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timeout)


def stop() -> None:
    """Leave the process group, if there is one."""
    if _active():
        dist.destroy_process_group()


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def agree(*flags: bool) -> tuple[bool, ...]:
    """Each flag as all ranks must see it: true when it is true on any of them."""
    if world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


def smallest(value: int) -> int:
    """The least of all ranks' values."""
    return int(min(gather(value)))


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest_(tensor: Tensor) -> Tensor:
    """The largest over ranks of each element, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_(tensors: list[Tensor]) -> None:
    """Overwrite every rank's tensors with rank 0's, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks' tensors (n, …), one after the other; each may have another n."""
    if world_size() == 1:
        return tensor
    size = torch.tensor([len(tensor)], device=tensor.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    counts = [int(each) for each in sizes]  # Waits for the device.
    if not any(counts):
        return tensor
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    rows = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(rows, padded)
    return torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])


def gather(item: Any) -> list[Any]:
    """Every rank's item, in the order of ranks. Items travel as JSON: reading one runs no code."""
    if world_size() == 1:
        return [item]
    payload = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8)
    size = torch.tensor([len(payload)], device=_device())
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(each) for each in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=_device())
    padded[: len(payload)] = payload.to(padded.device)
    rows = [torch.zeros_like(padded) for _ in range(world_size())]
    dist.all_gather(rows, padded)
    return [
        json.loads(bytes(row[: int(n)].cpu().tolist())) for row, n in zip(rows, sizes, strict=True)
    ]


def broadcast_object(item: Any) -> Any:
    """Rank 0's item on every rank (as JSON)."""
    return gather(item if is_main() else None)[0]
