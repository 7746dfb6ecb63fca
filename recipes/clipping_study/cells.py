"""A cell: one training of the study, told by plain values, so that any process can do it.

Each experiment has a function that turns a cell into a `Lesson`. What is measured is that lesson's
loss (or accuracy) on data that was not trained on; which of it counts, the experiment says.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

import trainer.clipping
from recipes.clipping_study import tasks
from recipes.clipping_study.learner import ADAM, SGD, Lesson, learn
from recipes.clipping_study.models import Classifier, Recaller, RecurrentWriter, Writer
from trainer import seed as seeding
from trainer.schedules import WarmupDecay

FRESH = 10**6  # seeds of data that nobody trains on begin here
SCALE = 65536.0  # of the loss, at the start of a training in fp16


@dataclass(frozen=True)
class Cell:
    """One training: of which experiment, under which condition, with what, and by which seed.

    ``arm`` is the condition within the experiment, ``kind`` the clipping, ``setting`` the values
    that were tuned: ``lr``, and the arguments of the clipper.
    """

    experiment: str
    arm: str
    kind: str
    setting: Mapping[str, float]
    seed: int
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Return the key under which a finished cell is found again."""
        return json.dumps(asdict(self), sort_keys=True)


def clipper(kind: str, setting: Mapping[str, float]) -> Any:
    """The clipper of a kind, such as "NormClip" or "none", with a setting's values."""
    if kind == "none":
        return None
    values = {name: value for name, value in setting.items() if name != "lr"}
    return getattr(trainer.clipping, kind)(**values)


def recurrent(cell: Cell) -> Lesson:
    """A plain recurrent network must remember over as many steps as the arm says."""
    length, steps = int(cell.arm), cell.sizes["steps"]
    return learn(
        Recaller(tasks.CLASSES, tasks.CLASSES),
        tasks.recall(length, steps, cell.seed),
        tasks.recall(length, 8, FRESH),
        partial(SGD, lr=cell.setting["lr"]),
        clipper(cell.kind, cell.setting),
    )


def warmup(cell: Cell) -> Lesson:
    """A post-LN transformer, with a warm-up of as many steps as the arm says, then linear decay."""
    steps, length = cell.sizes["steps"], 16
    schedule = partial(WarmupDecay, warmup_steps=int(cell.arm), total_steps=steps)
    return learn(
        Writer(tasks.WORDS, length, layers=cell.sizes["layers"]),
        tasks.language(length, steps, cell.seed),
        tasks.language(length, 16, FRESH),
        partial(ADAM, lr=cell.setting["lr"]),
        clipper(cell.kind, cell.setting),
        schedule,
    )


def speed(cell: Cell) -> Lesson:
    """A task, a network and an optimizer, as the arm says, with its rate constant or decaying."""
    task, network, optimizer, schedule = cell.arm.split(", ")
    steps, model = cell.sizes["steps"], _model(task, network)
    length = 30 if task == "recall" else 16
    make = tasks.recall if task == "recall" else tasks.language
    return learn(
        model,
        make(length, steps, cell.seed),
        make(length, 16, FRESH),
        partial(SGD if optimizer == "SGD" else ADAM, lr=cell.setting["lr"]),
        clipper(cell.kind, cell.setting),
        partial(WarmupDecay, warmup_steps=0, total_steps=steps) if schedule == "decay" else None,
    )


def _model(task: str, network: str) -> torch.nn.Module:
    if task == "recall":
        return Recaller(tasks.CLASSES, tasks.CLASSES)
    return (
        RecurrentWriter(tasks.WORDS)
        if network == "recurrent"
        else Writer(tasks.WORDS, 16, layers=2)
    )


def spikes(cell: Cell) -> Lesson:
    """A classifier to which broken batches come at known steps (or none in the arm "clean")."""
    steps = cell.sizes["steps"]
    train = tasks.groups(steps, cell.seed)
    if cell.arm != "clean":
        train = tasks.spoilt(train, cell.sizes["at"], cell.sizes["factor"], cell.seed)
    optimizer = ADAM if "Adam" in cell.arm else SGD
    return learn(
        Classifier(tasks.INPUTS, tasks.GROUPS),
        train,
        tasks.groups(32, FRESH),
        partial(optimizer, lr=cell.setting["lr"]),
        clipper(cell.kind, cell.setting),
    )


def half(cell: Cell) -> Lesson:
    """A classifier in fp32, in fp16 with loss scaling, or clipped before the scale is taken out."""
    setting = dict(cell.setting)
    if cell.arm == "fp16, scaled gradients clipped":
        # To clip gradients that are still scaled by s at c is to clip them at c/s.
        setting["limit"] /= SCALE
    steps = cell.sizes["steps"]
    return learn(
        Classifier(tasks.INPUTS, tasks.GROUPS),
        tasks.groups(steps, cell.seed),
        tasks.groups(32, FRESH),
        partial(SGD, lr=cell.setting["lr"]),
        clipper(cell.kind, setting),
        precision="fp32" if cell.arm == "fp32" else "fp16",
        eval_precision="fp32",
    )


def scales(cell: Cell) -> Lesson:
    """A classifier in whose middle layer gradients are a hundred times those of the others."""
    optimizer, ratio = cell.arm.split(", ")
    wide = 100.0 if ratio == "1:100" else 1.0
    return learn(
        Classifier(tasks.INPUTS, tasks.GROUPS, scales=(1.0, wide, 1.0)),
        tasks.groups(cell.sizes["steps"], cell.seed),
        tasks.groups(32, FRESH),
        partial(ADAM if optimizer == "Adam" else SGD, lr=cell.setting["lr"]),
        clipper(cell.kind, cell.setting),
    )


TRAININGS: dict[str, Callable[[Cell], Lesson]] = {
    "recurrent": recurrent,
    "warmup": warmup,
    "speed": speed,
    "spikes": spikes,
    "half": half,
    "scales": scales,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Within it nothing is warned of: failing is what some cells are for."""
    loggers = [logging.getLogger(name) for name in ("trainer", "py.warnings")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def finish(cell: Cell) -> dict[str, Any]:
    """Do a cell; what it gave as JSON has it, with the cell itself and its seconds of CPU."""
    torch.set_num_threads(1)
    began = time.process_time()
    seeding.seed_everything(cell.seed)
    with quiet():
        lesson = TRAININGS[cell.experiment](cell)
    facts = lesson.facts()
    if cell.experiment == "spikes":
        facts |= about_spikes(lesson, cell.sizes["at"])
    if cell.experiment == "speed":
        facts["losses"] = lesson.losses
    facts["seconds"] = time.process_time() - began
    return {"cell": asdict(cell), **facts}


def about_spikes(lesson: Lesson, at: list[int]) -> dict[str, float]:
    """Summarise the effect of broken batches on a training.

    ``caught``: the share of them that were clipped (or refused); ``disturbed``: the share of all
    other steps that were clipped; ``hurt``: by how much the mean loss of the 5 steps after one is
    above that of the 5 before.
    """
    if lesson.skipped or not lesson.losses or len(lesson.losses) <= max(at):
        return {"caught": 0.0, "disturbed": 0.0, "hurt": float("inf")}
    others = [clip for step, clip in enumerate(lesson.clipped) if step not in at]
    hurt = [
        sum(lesson.losses[step + 1 : step + 6]) / len(lesson.losses[step + 1 : step + 6])
        - sum(lesson.losses[step - 5 : step]) / 5
        for step in at
    ]
    return {
        "caught": sum(lesson.clipped[step] for step in at) / len(at),
        "disturbed": sum(others) / len(others),
        "hurt": sum(hurt) / len(hurt),
    }
