"""Processes that die while they save, for `test_checkpoint_kills.py`.

    echo '["kills", "FOLDER", 60]' | python tests/trainer/checkpoint_torture.py

Each line is a command with its arguments, each answer a line of JSON. torch is imported once, and
the processes are forked from here: this script has one thread, which pytest cannot promise.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.checkpoint import Checkpointer
from trainer.checkpoint.checkpointer import retry_missing

OPERATIONS = ("open", "write", "fsync", "rename", "unlink", "rmdir", "mkdir")


WEIGHTS_ALONE = {"wer": {"mode": "min", "n": 2, "weights_only": True}}


class Uniform:
    """A recoverable whose every number is `value`: a mixture of two saves would show."""

    weight_keys = ("modules",)

    def __init__(self, value: int = 0, size: int = 64) -> None:
        self.value, self.size = value, size
        self.loaded: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        def full() -> torch.Tensor:
            return torch.full((self.size,), float(self.value))

        modules = {"weight": full(), "bias": full()}
        return {"modules": modules, "updates": [full(), full()], "epoch": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        modules, updates = state["modules"], state["updates"]
        for tensor in (modules["weight"], modules["bias"], *updates):
            if len(tensor) != self.size or not (tensor == state["epoch"]).all():
                raise ValueError(f"mixed: {tensor} and {state['epoch']}")
        self.value = state["epoch"]
        self.loaded.append(self.value)

    def local_state_dict(self) -> dict[str, Any]:
        return {"rng": torch.full((self.size,), self.value), "rank": distributed.rank()}

    def load_local_state_dict(self, state: dict[str, Any]) -> None:
        if not (state["rng"] == self.value).all() or state["rank"] != distributed.rank():
            raise ValueError(f"mixed: local {state} and {self.value}")


def save(checkpointer: Checkpointer, thing: Uniform, value: int) -> None:
    thing.value = value
    checkpointer.save_and_keep_only({"optimizer_step": value, "wer": -value})


def leftovers(folder: Path, complete: bool = True) -> list[str]:
    """Files that no manifest lists; every listed one is verified, and one is complete."""
    checkpointer = Checkpointer(folder)
    found = checkpointer.list_checkpoints()
    assert any(each.complete for each in found) == complete, found
    for each in found:
        checkpointer.read(each)
        checkpointer.average([each])
    return [
        name for e in found for name in sorted({*os.listdir(e.path)} - {*e.files, "manifest.json"})
    ]


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Fork a process for `work`; returns its id and the reading end of the pipe it reports to."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    status = 70
    try:
        os.close(reading)
        work(writing)
        status = 0
    finally:
        os._exit(status)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def temporaries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")] if folder.exists() else []


def kills(folder: Path, count: int, weights_alone: int = 0) -> dict[str, Any]:
    """Kill processes at random instants of a loop of saves; each next one resumes first."""
    best = WEIGHTS_ALONE if weights_alone else None
    size = (8 << 20) // (4 * 4)  # four float32 tensors of 8 MB together, in two files

    def loop(report: int) -> None:
        thing = Uniform(0, size)
        checkpointer = Checkpointer(folder, keep_best=best, recoverables={"brain": thing})
        checkpointer.recover_if_possible()
        while True:  # The first number reported is what was recovered, then each finished save.
            os.write(report, thing.value.to_bytes(4, "big"))
            save(checkpointer, thing, thing.value + 1)

    thing = Uniform(0, size)
    checkpointer = Checkpointer(folder, keep_best=best, recoverables={"brain": thing})
    durations = [timed(lambda value=value: save(checkpointer, thing, value)) for value in (1, 2, 3)]
    checkpointer.recover_if_possible()  # What torch imports for it, every child inherits.
    random_instant = random.Random(count)
    finished, resumed, lost, during_a_save = thing.value, 0, 0, 0
    for _ in range(count):
        process, reading = in_child(loop)
        first = os.read(reading, 4)
        recovered = int.from_bytes(first, "big") if first else None
        if recovered is not None and finished <= recovered <= finished + 1:
            resumed += 1
        lost = max(lost, finished - (recovered or 0))
        time.sleep(random_instant.uniform(0, 2.5 * sorted(durations)[1]))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        rest = os.read(reading, 1 << 16)
        os.close(reading)
        finished = int.from_bytes(rest[-4:], "big") if rest else (recovered or 0)
        during_a_save += bool(temporaries(folder))
        leftovers(folder)
    before = temporaries(folder)
    thing = Uniform(0, size)
    Checkpointer(folder, recoverables={"brain": thing}).recover_if_possible()
    return {
        "resumed": resumed,
        "lost": lost,
        "during_a_save": during_a_save,
        "saves": thing.value,
        "stale_before": len(before),
        "stale_after": len(temporaries(folder)) + len(leftovers(folder)),
        "complete": [each.complete for each in Checkpointer(folder).list_checkpoints()],
    }


def readers(folder: Path, count: int) -> dict[str, Any]:
    """Find and restore checkpoints while another process saves and deletes them."""

    def loop(report: int) -> None:
        thing = Uniform()
        checkpointer = Checkpointer(folder, keep_best=WEIGHTS_ALONE, recoverables={"brain": thing})
        while True:
            save(checkpointer, thing, thing.value + 1)

    thing = Uniform()
    save(Checkpointer(folder, recoverables={"brain": thing}), thing, 0)
    process, reading = in_child(loop)
    values = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                reader = Checkpointer(folder, recoverables={"brain": thing})
                assert reader.find_checkpoint() is not None
                assert reader.recover_if_possible() is not None
                mean = retry_missing(lambda c=reader: c.average(c.find(), path=("modules",)))
                assert mean["weight"].min() >= thing.value
                mean = retry_missing(lambda c=reader: c.average(c.find(min_key="wer", n=None)))
                assert mean["weight"].min() >= thing.value - 2
                values.append(thing.value)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reading)
    return {
        "read": len(values),
        "values": len(set(values)),
        "ascending": values == sorted(values),
        "warnings": [str(each.message) for each in caught],
    }


@contextmanager
def fault(at: int, strike: Callable[[str], None]) -> Iterator[list[str]]:
    """Call `strike` before the file operation number `at`; yields the operations seen."""
    seen: list[str] = []

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) - 1 == at:
                strike(name)
            return original(*arguments, **options)

        return operation

    originals = [(os, name, getattr(os, name)) for name in OPERATIONS]
    originals.append((shutil, "rmtree", shutil.rmtree))
    for module, name, original in originals:
        setattr(module, name, wrapped(name, original))
    try:
        yield seen
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def two_checkpoints(
    folder: Path, keep_last: int = 2, keep_best: Any = None
) -> tuple[Checkpointer, Uniform]:
    """Make saves 1 and 2, both kept; the next save has one to delete."""
    thing = Uniform()
    checkpointer = Checkpointer(folder, keep_last, keep_best, {"brain": thing})
    for value in (1, 2):
        save(checkpointer, thing, value)
    return checkpointer, thing


def exits(folder: Path, weights_alone: int = 0) -> dict[str, Any]:
    """Exit hard before each file operation of a save and of the deletion after it."""
    syncing, os.fsync = os.fsync, lambda handle: None  # No process survives a power cut to see it.
    try:
        return _exits(folder, (1, WEIGHTS_ALONE) if weights_alone else (2, None))
    finally:
        os.fsync = syncing


def _exits(folder: Path, kept: tuple[int, Any]) -> dict[str, Any]:
    with fault(-1, lambda name: None) as operations:
        checkpointer, thing = two_checkpoints(folder / "count", *kept)
        before = len(operations)
        save(checkpointer, thing, 3)
    recovered, left = [], []
    for at in range(len(operations) - before):
        place = folder / str(at)
        checkpointer, thing = two_checkpoints(place, *kept)

        def dying(report: int, at: int = at, c: Any = checkpointer, t: Any = thing) -> None:
            with fault(at, lambda name: os._exit(9)):
                save(c, t, 3)

        process, reading = in_child(dying)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.close(reading)
        fresh = Uniform()
        again = Checkpointer(place, *kept, {"brain": fresh})
        again.recover_if_possible()
        stale = temporaries(place) + leftovers(place)
        recovered.append((status, fresh.value, stale))
        save(again, fresh, 4)
        left.append({each.name: each.complete for each in again.list_checkpoints()})
        assert sorted(os.listdir(place)) == sorted(left[-1])
    return {"operations": operations[before:], "recovered": recovered, "left": left}


def limits(folder: Path) -> dict[str, Any]:
    """Limit the size of files, as a full disk does."""
    results = []
    for limit in (0, 5000, 100_000, 600_000):
        place = folder / str(limit)
        thing = Uniform(0, 1 << 16)
        checkpointer = Checkpointer(place, recoverables={"brain": thing})
        save(checkpointer, thing, 1)

        def full(report: int, limit: int = limit, c: Any = checkpointer, t: Any = thing) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save(c, t, 2)
            except OSError as error:
                os.write(report, str(error).encode())

        process, reading = in_child(full)
        os.waitpid(process, 0)
        sentence = os.read(reading, 1 << 16).decode()
        os.close(reading)
        fresh = Uniform(0, 1 << 16)
        left = sorted(os.listdir(place))
        Checkpointer(place, recoverables={"brain": fresh}).recover_if_possible()
        results.append({"sentence": sentence, "value": fresh.value, "left": left})
    return {"results": results}


def ranks(folder: Path) -> dict[str, Any]:
    """Let two processes save, fail and fall back together."""

    def rank_of_two(rank: int) -> Callable[[int], None]:
        def work(report: int) -> None:
            warnings.simplefilter("ignore")
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=2,
                timeout=timedelta(seconds=60),
            )
            os.write(report, json.dumps(together(folder / "checkpoints")).encode())
            distributed.stop()

        return work

    children = [in_child(rank_of_two(rank)) for rank in (0, 1)]
    reports = []
    for process, reading in children:
        os.waitpid(process, 0)
        reports.append(json.loads(os.read(reading, 1 << 16)))
        os.close(reading)
    return {"reports": reports, "left": sorted(os.listdir(folder / "checkpoints"))}


def together(folder: Path) -> dict[str, Any]:
    """Save, fail and fall back as one rank of two."""
    thing, rank = Uniform(), distributed.rank()
    checkpointer = Checkpointer(folder, keep_last=2, recoverables={"brain": thing})
    for value in (1, 2):
        save(checkpointer, thing, value)
    report: dict[str, Any] = {"files": sorted(os.listdir(folder / "step-00000002"))}

    def sentence(work: Callable[[], Any]) -> str:
        try:
            work()
        except (OSError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    for failing in (0, 1):  # A disk that fails under one rank only.
        with fault(1 if rank == failing else -1, _full_disk):
            report[f"failing_{failing}"] = sentence(lambda: save(checkpointer, thing, 3))
        distributed.barrier()
        report[f"left_{failing}"] = sorted(os.listdir(folder))
    recovered = checkpointer.recover_if_possible()
    report["recovered"] = [recovered.name if recovered else None, thing.value]
    distributed.barrier()
    if rank == 0:  # Rank 1's file breaks, which only rank 1 reads.
        (folder / "step-00000002" / "rank-1.pt").write_bytes(b"")
    distributed.barrier()
    fresh = Uniform()
    again = Checkpointer(folder, keep_last=2, recoverables={"brain": fresh})
    recovered = again.recover_if_possible()
    report["fallback"] = [recovered.name if recovered else None, fresh.value, fresh.loaded]
    mean = again.average(again.find(n=2), path=("modules",))
    report["average"] = mean["weight"].unique().tolist()
    return report


def _full_disk(name: str) -> None:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    torch.set_num_threads(1)
    commands = {"kills": kills, "exits": exits, "limits": limits, "ranks": ranks}
    commands["readers"] = readers
    for line in sys.stdin:
        command, target, *numbers = json.loads(line)
        print(json.dumps(commands[command](Path(target), *numbers)), flush=True)
