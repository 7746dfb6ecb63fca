"""The demo: an encoder that was pretrained, beside the same network from scratch.

Parts are run folders of recipes/finetune/train.py, each by a process of its own. What a part gave
is in ``parts.json`` of the demo's folder once it has ended; the demo does the parts that are not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import trainer
from recipes.common import speech_cache
from trainer import json_files
from trainer.loggers.files import replace_file
from trainer.report.history import measures_of, read_history

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
# Beside `recipes` in a checkout, within it in a wheel.
YAMLS = next(
    (each for each in (HERE.parents[1] / "hparams", HERE.parent / "hparams") if each.is_dir()),
    HERE.parents[1] / "hparams",
)
ARMS = ("pretrained", "scratch")
MEASURES = ("wer", "cer")
MAX_WAIT = 10  # seconds for a part to save and end

Metrics = dict[str, dict[str, float]]  # by stage: {"valid": {"wer": …}, "test": …}


class Part(NamedTuple):
    """A run: its folder within the demo's, its YAML, and values of keys of this."""

    name: str
    yaml: str
    values: dict[str, Any]


class Parts:
    """The parts that are done, and how the others are.

    Args:
        folder: folder of the demo.
        start: does a part in a folder, for as long as it takes.
        anew: do all parts again.
    """

    def __init__(
        self, folder: Path, start: Callable[[Part, Path], None], anew: bool = False
    ) -> None:
        self.folder, self.start = folder, start
        self.path = folder / "parts.json"
        self.done: dict[str, Metrics] = {}
        if self.path.exists() and not anew:
            self.done = json_files.read(self.path)

    def do(self, part: Part) -> Metrics:
        """Return what a part gave, after it is done."""
        if part.name not in self.done:
            logger.info("%s …", part.name)
            self.start(part, self.folder / part.name)
        return last_metrics(self.folder / part.name / "metrics.jsonl")

    def keep(self, part: Part, found: Metrics) -> None:
        """Write down what a part gave. Of one thread alone."""
        self.done[part.name] = found
        replace_file(self.path, [json.dumps(self.done, indent=1).encode()], "results")


def last_metrics(path: Path) -> Metrics:
    """Return the best metrics of valid and the last of test, by a run's metrics.jsonl."""
    found: Metrics = {}
    for record in read_history(path).stages:
        stage, measured = record["stage"], measures_of(record)
        values = {n: v for n, v in measured if n in (*MEASURES, "accuracy") and v is not None}
        better = values.get("cer", 0) <= found.get(stage, values).get("cer", 0)
        if stage == "test" or (stage == "valid" and better):
            found[stage] = values
    return found


def run(given: trainer.Run) -> dict[str, float]:
    """Do the parts that are not done, print the table, and return the errors of test."""
    hparams, folder = given.hparams, given.folder
    processes: list[subprocess.Popen[bytes]] = []
    anew = given.options.overwrite

    def start(part: Part, place: Path) -> None:
        trains = anew and not part.values.get("test_only")
        values = {**part.values, "overwrite": True} if trains else part.values
        _start(part._replace(values=values), place, processes)

    parts = Parts(folder, start, anew)
    study = Study(hparams, folder)
    try:
        work(parts, study, hparams["workers"])
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:  # They still save in the folder.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(MAX_WAIT)
    table, errors = study.table(parts.done)
    print(table, flush=True)
    replace_file(folder / "table.txt", [table.encode(), b"\n"], "table")
    return errors


class Study:
    """Order of the parts of a demo, and their results."""

    def __init__(self, hparams: Mapping[str, Any], folder: Path) -> None:
        self.values = hparams["study"]
        self.rates, self.seeds = list(hparams["rates"]), list(hparams["seeds"])
        self.encoder = cached_encoder(self.values["pretrain"])
        self.pretraining = Part("pretrain", "pretrain.yaml", dict(self.values["pretrain"]))

    def part(self, arm: str, rate: float, seed: int, tested: bool) -> Part:
        """Return a fine-tuning."""
        values = {
            **self.values["few"],
            "seed": seed,
            "opt_class.lr": rate,
            "tested": tested,
        }
        if arm == "pretrained":
            values["source"] = str(self.encoder)
        return Part(f"{arm}-{rate:g}-seed{seed}", "few.yaml", values)

    def waiting(self, done: Mapping[str, Metrics]) -> list[Part]:
        """Return the parts that can begin, those first on which others wait."""
        if not self.encoder.is_dir():
            arms, first = ["scratch"], [self.pretraining]
        else:
            arms, first = list(ARMS), []
        found = first
        for arm in arms:
            choosing = [self.part(arm, rate, self.seeds[0], False) for rate in self.rates]
            found += choosing
            if all(each.name in done for each in choosing):
                rate = self.chosen(arm, done)
                found += [self.part(arm, rate, seed, True) for seed in self.seeds[1:]]
                found.append(self.final(arm, rate))
        return [each for each in found if each.name not in done]

    def final(self, arm: str, rate: float) -> Part:
        """Return the test of the fine-tuning that chose the rate, in its own folder."""
        part = self.part(arm, rate, self.seeds[0], True)
        return part._replace(name=f"{part.name}/", values={**part.values, "test_only": True})

    def chosen(self, arm: str, done: Mapping[str, Metrics]) -> float:
        """Return the rate with the lowest error of valid; the first of equal ones."""

        def error(rate: float) -> float:
            return done[self.part(arm, rate, self.seeds[0], False).name]["valid"]["cer"]

        return min(self.rates, key=error)

    def table(self, done: Mapping[str, Metrics]) -> tuple[str, dict[str, float]]:
        """Return the table of the test errors, and their means by arm."""
        rows = [f"{'start':<12}{'rate':>7}  {'test WER % by seed':<24}{'mean':>7}   "
                f"{'test CER % by seed':<24}{'mean':>7}"]  # fmt: skip
        errors = {}
        for arm in ARMS:
            rate = self.chosen(arm, done)
            first, *others = self.seeds
            tests = [done[self.final(arm, rate).name]["test"]]
            tests += [done[self.part(arm, rate, seed, True).name]["test"] for seed in others]
            cells = [f"{arm:<12}{rate:>7g}"]
            for measure in MEASURES:
                values = [each[measure] for each in tests]
                errors[f"{arm}_{measure}"] = mean(values)
                cells.append(
                    f"{'  '.join(f'{each:6.2f}' for each in values):<24}{mean(values):7.2f}"
                )
            rows.append("  ".join(cells))
        return "\n".join(rows), errors


def work(parts: Parts, study: Study, workers: int) -> None:
    """Do all parts, so many at a time, each as soon as it can begin."""
    pool = ThreadPoolExecutor(workers)
    running: dict[Future[Metrics], Part] = {}
    try:
        while True:
            busy = {part.name.rstrip("/") for part in running.values()}
            for part in study.waiting(parts.done):
                if len(running) < workers and part.name.rstrip("/") not in busy:
                    running[pool.submit(parts.do, part)] = part
                    busy.add(part.name.rstrip("/"))
            if not running:
                return
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                part, found = running.pop(future), future.result()
                if part == study.pretraining:
                    publish(parts.folder / part.name / "encoder", study.encoder)
                parts.keep(part, found)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def cached_encoder(values: Mapping[str, Any]) -> Path:
    """Return the folder of the cache for the encoder that pretrain.yaml gives with these values."""
    text = (YAMLS / "finetune" / "pretrain.yaml").read_bytes() + json.dumps(dict(values)).encode()
    return speech_cache.folder() / "encoders" / hashlib.blake2b(text, digest_size=16).hexdigest()


def publish(made: Path, cached: Path) -> None:
    """Copy an encoder into the cache, whole or not at all."""
    new = cached.with_name(f".{cached.name}.{os.getpid()}")
    cached.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(made, new, dirs_exist_ok=True)
    try:
        new.rename(cached)
    except OSError:  # Another process was first.
        shutil.rmtree(new)


def _start(part: Part, folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """Run a part in a process of its own.

    Raises:
        ValueError: it failed; the message has its last words.
    """
    values = {**part.values, "output_folder": str(folder).rstrip("/"), "ends_with_parent": True}
    command = [sys.executable, str(HERE / "train.py"), str(YAMLS / "finetune" / part.yaml)]
    for key, value in values.items():
        command.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path])}
    process = subprocess.Popen(
        [*command, "--no-progressbar"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    processes.append(process)
    _, said = process.communicate()
    if process.returncode:
        lines: Sequence[str] = said.decode(errors="replace").strip().splitlines()
        last = next((line for line in reversed(lines) if line.startswith("error")), lines[-1:])
        raise ValueError(f"the part {folder} ended with code {process.returncode}: {last}")
