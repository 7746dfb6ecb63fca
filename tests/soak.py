"""Soak: train two processes among random faults, and compare the end with a run without them.

    python -m tests.soak [--minutes 10] [--seed 1] [--every 5 15] [--keep]

Starts `tests.soak_program` under torchrun. Some seconds after it has come back from a fault of its
processes, a random one follows: SIGKILL of a rank or of the launcher, SIGTERM to either, a disk
that takes no more, a loader worker that hangs. The first ones are one of each kind. Faults of the
data come by themselves in each epoch. At the time's end the run is brought to the end of an epoch,
and so is a reference with the same faults of the data and no others.

The last line is what was seen; the exit code is 0 if every fault was survived and both runs are
equal to the bit, and 1 if not. No process and no folder is left, also after Ctrl-C. ``--keep``
keeps the folder, for a look at what went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.processes import alive
from trainer.cli.folder import AS_STARTED, LOCK

ROOT = Path(__file__).parents[1]
RANKS = range(2)
ITEMS, BATCH = 1280, 4  # Items of an epoch, and of a batch on one rank.
EPOCH_BATCHES = ITEMS // (BATCH * len(RANKS))
WINDOW, SAVE_EVERY = 2, 10  # Batches per optimizer step, and steps between checkpoints.
ITEM_TIMEOUT, HANG_TIMEOUT = 8.0, 30.0  # Run options, in seconds.
DATA_FAULTS = ("NaN", "OOM in forward", "OOM in backward", "bad file")
MARK = "SOAK_FOLDER"  # Environment variable by which the processes of a soak are found.

GONE = 10.0  # Seconds in which processes that are asked to stop, or lose their launcher, are gone.
BACK = 20.0  # Seconds in which a run comes back.
# Batches that a kill may cost: the save it was in and the one before, and what faults skip.
LOST = 2 * (SAVE_EVERY + len(DATA_FAULTS)) * WINDOW
GROWTH = 10e6  # Bytes that a rank may grow by, from a quarter of the reference on.
TIMES = ("seconds", "examples_per_second", "times", "memory", "padding", "time")
PACE = 0.05  # Seconds that a batch takes at least, among faults.


class SoakFailed(Exception):
    """Something that must not happen among faults."""


def data_faults(seed: int, epoch: int) -> dict[int, str]:
    """Return the faults of an epoch's items, one of each kind, by item."""
    items = random.Random(f"{seed} {epoch}").sample(range(ITEMS), len(DATA_FAULTS))
    return dict(zip(items, DATA_FAULTS, strict=True))


def marked(folder: Path) -> set[int]:
    """Return the processes that were started for a folder, and their children."""
    mark, found = f"{MARK}={folder}\0".encode(), set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.add(int(entry.name))
        except OSError:  # It has ended, or is another user's.
            continue
    return {pid for pid in found if alive(pid)}


def wait_for(what: Callable[[], Any], seconds: float, failure: str) -> float:
    """Return the seconds until something is true; raise `SoakFailed` if it takes longer."""
    start = time.monotonic()
    while not what():
        if time.monotonic() - start > seconds:
            raise SoakFailed(f"{failure} within {seconds:.0f} s")
        time.sleep(0.05)
    return time.monotonic() - start


class Job:
    """A run of the program, whose launcher is started again where it has ended.

    Args:
        folder: where the run, and what the ranks say, lie.
        seed: seed of the run.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.temporary = folder / "tmp"  # A killed torchrun leaves files there.
        self.temporary.mkdir(parents=True)
        self.launcher: subprocess.Popen[bytes] | None = None
        self.epochs, self.pace = 10**6, PACE
        self.pids: list[int] = []  # Of the ranks that are known.
        self.launches = self.restarts = 0
        self.again = 0  # Batches that were trained again after the last restart.
        self.back_in = BACK

    def start(self) -> None:
        """Start the launcher."""
        self.launches += 1
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary),
            MARK: str(self.folder),
        }  # fmt: skip
        with open(self.folder / "output", "ab") as output:
            self.launcher = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", "--max-restarts=10000", "-m", "tests.soak_program",
                    str(self.folder), str(self.seed), str(self.epochs), str(self.pace),
                ],
                cwd=ROOT, env=environment, start_new_session=True, stdout=output, stderr=output,
            )  # fmt: skip

    def ended(self) -> int | None:
        """Return the exit code of the launcher, or None while it runs."""
        assert self.launcher is not None
        return self.launcher.poll()

    def words(self) -> list[dict[str, int]]:
        """Return what each rank has said last."""
        found = []
        for rank in RANKS:
            try:
                found.append(json.loads((self.folder / f"rank-{rank}").read_text()))
            except FileNotFoundError:
                found.append({"pid": 0, "first": 0, "batch": 0, "restarts": 0})
        return found

    def wait_until_back(self, seconds: float, loss: int = 0, starts: int = 1) -> float:
        """Wait until other ranks than the known ones have trained a batch; return the seconds.

        The launcher is started where it has ended.

        Args:
            seconds: time limit.
            loss: number of batches that may be trained again.
            starts: number of times that the ranks may be started.
        """
        before, last, launches = self.pids, self.words(), self.launches

        def came_back() -> bool:
            now = self.words()
            for rank, each in enumerate(now):
                if not before or each["pid"] == before[rank]:
                    last[rank] = each
            if self.ended() is not None:
                self.start()
            return all(
                each["pid"] not in (0, *before) and each["batch"] > each["first"] for each in now
            )

        took = wait_for(came_back, seconds, "the run did not come back")
        now = self.words()
        self.pids = [each["pid"] for each in now]
        if before:
            self.restarts += 1
            again = [a["batch"] - b["first"] + 1 for a, b in zip(last, now, strict=True)]
            self.again = max(again)
            same = launches == self.launches
            started = self.launches - launches + now[0]["restarts"] - same * last[0]["restarts"]
            if started > starts:
                raise SoakFailed(f"the ranks had to be started {started} times, where {starts} may")
            if now[0]["first"] != now[1]["first"] or not 0 <= min(again) <= max(again) <= loss:
                raise SoakFailed(
                    f"{again} batches are trained again by the ranks, where {loss} may"
                )
        return took

    def check_that_it_runs(self) -> None:
        """Raise `SoakFailed` if the run was restarted, or has ended, though nobody touched it."""
        if self.ended() is not None:
            raise SoakFailed(f"the run ended by itself, with exit code {self.ended()}")
        if (now := [each["pid"] for each in self.words()]) != self.pids:
            raise SoakFailed(f"the ranks {self.pids} were replaced by {now} without a fault")

    def wait_until_gone(self, processes: set[int]) -> None:
        """Wait for the end of processes that were asked to stop."""
        wait_for(
            lambda: not any(map(alive, processes)),
            GONE,
            f"of {len(processes)} processes some did not end",
        )

    def ranks_and_workers(self) -> set[int]:
        """Return all processes of the run but the launcher."""
        assert self.launcher is not None
        return marked(self.folder) - {self.launcher.pid}

    def log(self) -> str:
        """Return the text of train.log."""
        return (self.folder / "run" / "train.log").read_text()

    def newest_checkpoint(self) -> str:
        """Return the name of the newest checkpoint."""
        names = [path.name for path in (self.folder / "run" / "checkpoints").glob("step-*")]
        return max(names, default="")

    def finish(self, epochs: int, seconds: float) -> list[Sequence[int]]:
        """Bring the run to the end of this epoch, as fast as it can.

        Returns:
            The memory of each rank in bytes, at many batches.
        """
        self.epochs, self.pace = epochs, 0.0
        self.start()
        memory: dict[int, list[int]] = {}  # By batch.

        def ended() -> bool:
            words = self.words()
            if all(each["pid"] for each in words):
                memory[words[0]["batch"]] = [each["memory"] for each in words]
            return self.ended() is not None

        wait_for(ended, seconds, f"the end of epoch {epochs} did not come")
        if self.ended():
            raise SoakFailed(f"exit code {self.ended()} at the end of epoch {epochs}")
        return list(zip(*memory.values(), strict=True))


# Faults: each returns the seconds until the run went on.


def kill_rank(job: Job, rng: random.Random) -> float:
    """SIGKILL of one rank: torchrun starts both again."""
    os.kill(rng.choice(job.pids), signal.SIGKILL)
    return job.wait_until_back(job.back_in, LOST)


def kill_starting(job: Job, rng: random.Random) -> float:
    """SIGKILL of one rank, and of any process of the run but the launcher while it starts again."""
    start, before = time.monotonic(), job.ranks_and_workers()
    os.kill(rng.choice(job.pids), signal.SIGKILL)
    due = start + rng.uniform(0.0, job.back_in / 3)
    while time.monotonic() < due or not job.ranks_and_workers() - before:
        if any(each["pid"] not in job.pids for each in job.words()):
            break  # It has begun to train.
        if time.monotonic() > start + job.back_in:
            raise SoakFailed(f"torchrun started no rank within {job.back_in:.0f} s")
        time.sleep(0.05)
    if starting := sorted(job.ranks_and_workers() - before):
        with suppress(ProcessLookupError):
            os.kill(rng.choice(starting), signal.SIGKILL)
    job.wait_until_back(2 * job.back_in, LOST, starts=2)
    return time.monotonic() - start


def kill_launcher(job: Job, _: random.Random) -> float:
    """SIGKILL of torchrun: its processes end, and save before."""
    assert job.launcher is not None
    start, processes = time.monotonic(), job.ranks_and_workers()
    job.launcher.kill()
    job.launcher.wait()
    job.wait_until_gone(processes)
    job.wait_until_back(GONE + job.back_in)
    return time.monotonic() - start


def stop(job: Job, rng: random.Random, loss: int = 0) -> float:
    """SIGTERM to a rank or to the launcher: all save and end."""
    assert job.launcher is not None
    start, processes = time.monotonic(), job.ranks_and_workers()
    os.kill(rng.choice([job.launcher.pid, *job.pids]), signal.SIGTERM)
    job.wait_until_gone(processes)
    job.wait_until_back(GONE + job.back_in, loss)
    return time.monotonic() - start


def fill_disk(job: Job, _: random.Random) -> float:
    """Fail the write of a checkpoint: the run goes on, and saves later."""
    request, before = job.folder / "full", job.log().count("could not be saved")
    start = time.monotonic()
    request.touch()
    wait_for(
        lambda: job.log().count("could not be saved") > before, 30 + job.back_in, "no save failed"
    )
    if request.exists():
        raise SoakFailed("a save failed without a full disk")
    failed_after = job.newest_checkpoint()
    wait_for(
        lambda: job.newest_checkpoint() > failed_after,
        30 + job.back_in,
        "no checkpoint was saved after a full disk",
    )
    job.check_that_it_runs()
    return time.monotonic() - start


def hang(job: Job) -> None:
    """Make a loader worker hang in an item."""
    (job.folder / "hang").touch()
    wait_for((job.folder / "hangs").exists, 30 + job.back_in, "no worker loaded an item")
    (job.folder / "hangs").unlink()


def hang_worker(job: Job, _: random.Random) -> float:
    """Hang a loader worker: the wait for it ends with an error, and torchrun starts both again."""
    before = job.log().count("gave no batch within")
    hang(job)
    took = job.wait_until_back(ITEM_TIMEOUT + job.back_in, LOST)
    output = (job.folder / "output").read_text(errors="replace")
    if "gave no batch within" not in output and job.log().count("gave no batch within") == before:
        raise SoakFailed("the error of a worker that hung does not say so")
    return took


def stop_hung(job: Job, rng: random.Random) -> float:
    """SIGTERM while a loader worker hangs: all end.

    They save unless one of them is in the middle of the batch that the other one waits for.
    """
    hang(job)
    time.sleep(rng.uniform(0, 1.5))
    return stop(job, rng, LOST)


FAULTS = {
    "kill": kill_rank,
    "kill while starting": kill_starting,
    "TERM": stop,
    "killed launcher": kill_launcher,
    "full disk": fill_disk,
    "hung worker": hang_worker,
    "TERM while hung": stop_hung,
}


# The end: what has to be equal


def difference(ours: Any, theirs: Any, where: str = "") -> str | None:
    """Return the place of the first difference of two states, but for times; None if equal."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if other := (ours.keys() ^ theirs.keys()) - set(TIMES):  # A step of a new start has none.
            return f"{where} (the keys {sorted(map(str, other))})"
        parts = [(f"{where}.{k}", ours[k], theirs[k]) for k in ours if k not in TIMES]
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            return f"{where} (of lengths {len(ours)} and {len(theirs)})"
        parts = [(f"{where}[{n}]", a, b) for n, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    elif isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return None if same else where
    else:
        return None if ours == theirs else f"{where} ({ours!r:.80} and {theirs!r:.80})"
    return next((d for name, a, b in parts if (d := difference(a, b, name)) is not None), None)


def compare_ends(ours: Path, theirs: Path) -> None:
    """Raise `SoakFailed` unless two runs ended alike, rank by rank, in memory and on the disk."""
    ends = [torch.load(f / f"end-{r}.pt", weights_only=True) for f in (ours, theirs) for r in RANKS]
    if (found := difference(ends[0]["modules"], ends[1]["modules"])) is not None:
        raise SoakFailed(f"the ranks differ at the end in {found}")
    for rank in RANKS:
        if (found := difference(ends[rank], ends[2 + rank])) is not None:
            raise SoakFailed(f"rank {rank} does not end as in the reference: {found}")
    newest = [max((f / "run" / "checkpoints").glob("step-*")) for f in (ours, theirs)]
    files = [sorted(path.name for path in folder.glob("*.pt")) for folder in newest]
    if newest[0].name != newest[1].name or files[0] != files[1] or not files[0]:
        raise SoakFailed(
            f"the last checkpoints are {newest[0].name} and {newest[1].name}, or hold other files"
        )
    for name in files[0]:
        saved = [torch.load(folder / name, weights_only=True) for folder in newest]
        if (found := difference(*saved)) is not None:
            raise SoakFailed(f"{name} of the last checkpoint is not that of the reference: {found}")


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; the bad files since a restart alone are counted."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "bad_files"} for line in lines]


def compare_records(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Raise `SoakFailed` unless every record is there once, with the same values but for times."""
    steps = Counter(each["step"] for each in ours if each["kind"] == "step")
    if not steps or (several := [step for step, count in steps.items() if count > 1]):
        raise SoakFailed(
            f"metrics.jsonl has the steps {several[:5] if steps else []} more than once, or none"
        )
    if (found := difference(ours, theirs)) is not None:
        raise SoakFailed(f"metrics.jsonl is not that of the reference in record {found}")


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files and folders in a run folder."""
    found = (str(path.relative_to(folder)) for path in folder.rglob(".*"))
    return [name for name in found if name not in (LOCK, AS_STARTED)]


def met(folder: Path) -> set[str]:
    """Return the faults of the data that a run has met."""
    return set((folder / "met").read_text().splitlines())


def growth(memory: Sequence[int]) -> float:
    """Return the bytes by which a process has grown since the first quarter of its life."""
    part = max(1, len(memory) // 10)
    quarter = len(memory) // 4
    return statistics.median(memory[-part:]) - statistics.median(memory[quarter : quarter + part])


# The whole


class Soak:
    """One soak: a run among faults, and its reference.

    Args:
        folder: empty folder for both.
        options: the options of the command line.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options = options
        self.job, self.reference = (
            Job(folder / "run", options.seed),
            Job(folder / "reference", options.seed),
        )
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0

    def run(self) -> str:
        """Return the line of a soak that went well; raise `SoakFailed` for the first failure."""
        job, started = self.job, time.monotonic()
        job.start()
        first = job.wait_until_back(120)
        # To start is work for the processor: on a busy machine it takes longer.
        job.back_in = max(BACK, 3 * first)
        say(
            f"the ranks started in {first:.1f} s; they are to be gone within {GONE:.0f} s, "
            f"and back within {job.back_in:.0f} s"
        )
        for name in self.schedule(started):
            job.again = 0
            took = FAULTS[name](job, self.rng)
            self.counts[name] += 1
            self.slowest = max(self.slowest, took)
            say(
                f"{time.monotonic() - started:5.0f} s: {name}: back after {took:.1f} s, "
                f"{job.again} batches again"
            )
        lasted = time.monotonic() - started
        self.end()
        left = marked(job.folder) | marked(self.reference.folder)
        if left:
            raise SoakFailed(f"{len(left)} processes are left")
        self.counts.update(what.partition(",")[0] for what in met(job.folder))
        listed = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        return (
            f"{self.counts.total()} faults in {lasted:.0f} s ({listed}), {job.restarts} restarts, "
            f"slowest return {self.slowest:.1f} s, end equal, {len(left)} processes left"
        )

    def schedule(self, started: float) -> Iterator[str]:
        """Yield faults until the time is over: one of each kind first, then random ones."""
        self.rng = rng = random.Random(self.options.seed)
        first = rng.sample(list(FAULTS), len(FAULTS))
        while first or time.monotonic() - started < 60 * self.options.minutes:
            due = time.monotonic() + rng.uniform(*self.options.every)
            while time.monotonic() < due:
                self.job.check_that_it_runs()
                time.sleep(0.1)
            yield first.pop() if first else rng.choice(list(FAULTS))

    def end(self) -> None:
        """Bring the run to an end and make the reference; compare."""
        job, reference = self.job, self.reference
        processes = job.ranks_and_workers()
        assert job.launcher is not None
        job.launcher.terminate()
        job.wait_until_gone(processes)
        job.launcher.wait()
        batch = job.words()[0]["batch"]
        epochs = (batch - 1) // EPOCH_BATCHES + 2
        seconds = 120 + 0.2 * epochs * EPOCH_BATCHES
        job.finish(epochs, seconds)
        say(f"epoch {epochs} has ended; the reference starts")
        memory = reference.finish(epochs, seconds)
        compare_ends(job.folder, reference.folder)
        compare_records(records(job.folder), records(reference.folder))
        if met(job.folder) != met(reference.folder):
            raise SoakFailed(
                f"other faults of the data: {sorted(met(job.folder) ^ met(reference.folder))[:5]}"
            )
        kept = [sorted(os.listdir(each.folder / "run" / "nonfinite")) for each in (job, reference)]
        if kept[0] != kept[1]:
            raise SoakFailed(f"the reports of skipped steps are {kept[0]}, and not {kept[1]}")
        grown = max(map(growth, memory))
        say(f"the ranks of the reference grew by {grown / 1e6:.1f} MB")
        if grown > GROWTH:
            raise SoakFailed(f"a rank of the reference grew by {grown / 1e6:.1f} MB")
        for each in (job, reference):
            if names := leftovers(each.folder / "run"):
                raise SoakFailed(f"temporary files are left: {names[:5]}")
            for text in (each.log(), (each.folder / "output").read_text(errors="replace")):
                if "hang_timeout" in text:
                    raise SoakFailed("the hang watch ended a run that did not hang")


def say(what: str) -> None:
    """Write a line for whoever watches."""
    print(what, file=sys.stderr, flush=True)


def clear(folder: Path, keep: bool) -> None:
    """End all processes of a soak, and delete its folder."""
    for part in ("run", "reference"):
        while left := marked(folder / part):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
    if keep:
        say(f"kept: {folder}")
    else:
        shutil.rmtree(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="time with faults")
    parser.add_argument("--seed", type=int, default=1, help="seed of the run and of the faults")
    parser.add_argument(
        "--every", type=float, nargs=2, default=(5.0, 15.0), metavar="SECONDS",
        help="least and most time from the return of a run to its next fault",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    options = parser.parse_args(argv)

    def end(*_: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, end)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(folder, options)
    try:
        print(f"soak: {soak.run()}", flush=True)
        return 0
    except SoakFailed as failure:
        for job in (soak.job, soak.reference):
            if (output := job.folder / "output").exists():
                say(output.read_text(errors="replace")[-6000:])
        print(f"soak: FAILED (seed {options.seed}): {failure}", flush=True)
        return 1
    except KeyboardInterrupt:
        print("soak: interrupted", flush=True)
        return 130
    finally:
        clear(folder, options.keep)


if __name__ == "__main__":
    sys.exit(main())
