"""Upkeep of run folders: delete unneeded checkpoints, and average checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from ruamel.yaml.nodes import MappingNode

from trainer.checkpoint import storage
from trainer.checkpoint.checkpointer import Best, Checkpointer, ranked
from trainer.checkpoint.storage import Checkpoint
from trainer.cli.folder import RunFolder
from trainer.config.hyperparameters import Configuration
from trainer.config.reading import get, nodes, plain
from trainer.evaluation import load_weights
from trainer.loggers.files import replace_file, temporary
from trainer.options import RunOptions
from trainer.run_files import CHECKPOINTS, HYPERPARAMS, checkpoint_folders
from trainer.untrusted import bytes_on_disk, confined, memory_in_proportion, printable

PLACES = ("epoch", "optimizer_step", "step")  # in the meta of a checkpoint; not metrics


@dataclass(frozen=True)
class Removable:
    """Folder in a run that may be deleted."""

    run: Path
    path: Path
    bytes: int  # on the disk
    why: str


def removable(run: Path) -> tuple[list[Removable], list[str]]:
    """Return the folders in a run that may be deleted, and sentences about others.

    These are the remains of killed saves, and checkpoints that are neither the newest, nor the
    newest of an epoch's end, nor among the best by a metric, nor named by the program.
    """
    found: list[Removable] = []
    notes: list[str] = []
    for folder in checkpoint_folders(run):
        checkpoints = []
        for entry in sorted(os.scandir(folder), key=lambda each: each.name):
            path = Path(entry.path)
            if not entry.is_dir(follow_symlinks=False):
                continue
            if storage.TEMPORARY_NAME.fullmatch(entry.name):
                why = "left by a save that was killed"
                found.append(Removable(run, path, bytes_on_disk(path), why))
            elif storage.CHECKPOINT_NAME.fullmatch(entry.name):
                try:
                    checkpoints.append(storage.read_manifest(path))
                except storage.BrokenCheckpoint as error:
                    if storage.looks_like_checkpoint(path):
                        notes.append(f"{printable(str(error))}: it is left alone")
        for each in sorted({*checkpoints} - _kept(checkpoints, run), key=lambda each: each.number):
            others = {*os.listdir(each.path)} - {*each.files, storage.MANIFEST}
            if not each.complete:  # Files that a killed process left.
                others = {name for name in others if not storage.FILE_NAME.fullmatch(name)}
            if others:
                strange = printable(min(others))
                notes.append(f"{each.path} is left alone: no save has written {strange!r} in it")
            else:
                why = "neither the newest nor the best checkpoint"
                found.append(Removable(run, each.path, bytes_on_disk(each.path), why))
    return found, notes


def remove(items: Sequence[Removable]) -> tuple[int, list[str]]:
    """Delete folders of `removable` that are still unneeded; lock each run meanwhile.

    Returns the freed bytes, and sentences about problems.
    """
    freed, problems = 0, []
    for run in dict.fromkeys(each.run for each in items):
        folder = RunFolder(run)
        try:
            folder.open()
            for place in {each.path.parent for each in items if each.run == run}:
                lock = storage.lock_folder(place)
                if lock is None:
                    raise ValueError(f"another process saves in {place}: nothing was deleted there")
                still = {each.path for each in removable(run)[0]}
                for each in items:
                    if each.path.parent == place and each.path in still:
                        stale = storage.TEMPORARY_NAME.fullmatch(each.path.name)
                        (shutil.rmtree if stale else storage.delete)(each.path)
                        freed += each.bytes
        except (ValueError, OSError) as error:
            problems.append(printable(str(error)))
        finally:
            folder.close()
    return freed, problems


def _kept(checkpoints: Sequence[Checkpoint], run: Path) -> set[Checkpoint]:
    """Return the checkpoints of a folder that must stay.

    For a metric without a rule in the run's YAML, those with its lowest and highest value stay.
    """
    newest = sorted(checkpoints, key=lambda each: each.number, reverse=True)
    kept = {each for each in newest if each.pinned or each.label}
    complete = [each for each in newest if each.complete]
    kept.update((complete or newest)[:1], [each for each in complete if each.end_of_epoch][:1])
    rules, number = _rules(run)
    known = {rule.metric for rule in rules}
    others = {name for each in newest for name in each.meta if name not in (*known, *PLACES)}
    rules += [Best(name, "min") for name in others]
    rules += [Best(name, "max") for name in others if name != "loss"]
    for rule in rules:
        kept.update(ranked(newest, rule.metric, rule.mode)[: max(rule.n, number)])
    return kept


def _rules(run: Path) -> tuple[list[Best], int]:
    """Return ``keep_best`` rules and ``average_checkpoints`` of a YAML, if it can be read."""
    rules: list[Best] = []
    try:
        configuration = Configuration(run / HYPERPARAMS, run_folder=True)
        for node in nodes(configuration.root):
            given = get(node, "keep_best") if isinstance(node, MappingNode) else None
            if isinstance(given, MappingNode):
                rules += Checkpointer(run, keep_best=plain(given)).retention.best
        return rules, configuration.options().get("average_checkpoints", 1)
    except (ValueError, OSError):
        return [], 1


# ------------------------------------------------------------------------------------- averaging


def average(
    run: Path,
    output: Path,
    number: int | None = None,
    min_key: str | None = None,
    max_key: str | None = None,
) -> list[Checkpoint]:
    """Write a run folder whose checkpoint has the mean weights of others; return those.

    For a run with ``ema_decay`` the moving averages are averaged. The new folder is for
    `trainer.load` and for tests; training cannot resume from it. ``number`` limits it to the newest
    checkpoints, or to the best by a metric; None for all.
    """
    if os.path.lexists(output):
        raise ValueError(f"{output} exists already: name another folder by --output")
    checkpointer = Checkpointer(confined(run, run / CHECKPOINTS))
    if min_key and max_key:
        raise ValueError(f"give --min ({min_key}) or --max ({max_key}), not both")
    found = checkpointer.list_checkpoints()
    if key := min_key or max_key:
        found = ranked(found, key, "min" if min_key else "max")
    name, wanted = printable(str(run)), number or 1
    if not found and not key:
        raise ValueError(f"{name} has no sound checkpoint")
    if len(found) < wanted:
        by = f" with a finite {key!r}" if key else ""
        raise ValueError(
            f"{name} has {len(found)} checkpoints{by} and not {wanted}: a run keeps more of them "
            "by keep_last and keep_best of its Checkpointer"
        )
    chosen = found[:number]
    configuration = Configuration(run / HYPERPARAMS, run_folder=True)
    given = configuration.options()
    options = RunOptions(average_checkpoints=len(chosen), ema_decay=given.get("ema_decay"))
    with memory_in_proportion(run):
        weights = load_weights(checkpointer, options, max_key, min_key)
    if weights is None:
        raise ValueError(f"{name} has no sound checkpoint")
    sound = {each.name for each in checkpointer.list_checkpoints()}
    chosen = [each for each in chosen if each.name in sound]  # A broken one was left out.
    alone = {"average_checkpoints": 1, "ema_decay": None}
    changes = {key: value for key, value in alone.items() if key in given}
    configuration.override({**changes, "output_folder": str(output)})
    new = temporary(output)
    shutil.rmtree(new, ignore_errors=True)
    try:
        meta = {**chosen[0].meta, "average_of": [each.name for each in chosen]}
        # The state of a Brain, only with weights.
        brain = SimpleNamespace(state_dict=lambda: {"modules": weights}, load_state_dict=None)
        saver = Checkpointer(new / CHECKPOINTS, recoverables={"brain": brain})
        if saved := saver.save_checkpoint(meta):
            storage.cut_to_weights(saved, saved.files)
        with (run / HYPERPARAMS).open(encoding="utf-8") as file:
            header = file.readline(200).strip()
        text = f"{header}\n{configuration.dump()}".encode()
        replace_file(new / HYPERPARAMS, [text], HYPERPARAMS)
        os.rename(new, output)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return chosen
