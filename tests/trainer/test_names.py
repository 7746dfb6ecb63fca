"""The public names of a Brain are one list in the docs, and no other name collides with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.small import Regressor, batches, everything, make, same
from trainer import Brain
from trainer.brain import ATTRIBUTES, FIXED, METHODS

DOCS = Path(__file__).parents[2] / "docs" / "public-names.md"
# Names that users of Brain-style trainers set, and some that look like internals.
USERS = (
    "patience", "statistics", "average", "monitor", "journal", "profiler",
    "framework", "keeper", "forensics", "attributes", "weight_average", "eval_precision",
    "last_batch", "metrics", "ema", "guard", "state", "saver", "tracer", "stage", "batch",
    "depth", "has_valid", "loss", "scaler", "logger", "loggers", "strategy", "train_stats",
    "_stage", "_batch", "_guard", "_joint", "_last", "_weight", "_reports", "_fit_train",
    "_train", "_evaluate", "_state",
)  # fmt: skip


def public_names() -> set[str]:
    return {name for name in dir(Brain) if not name.startswith("_")} | ATTRIBUTES


def test_the_public_names_are_those_of_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    table = text[text.index("## Brain") :]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    assert listed == public_names()


@pytest.mark.parametrize("when", ["before", "in the constructor", "in a hook"])
def test_any_other_attribute_belongs_to_the_user(when: str) -> None:
    def spoil(brain: Any) -> None:
        for name in USERS:
            setattr(brain, name, {"of": name})

    class Mine(Regressor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if when == "before":
                spoil(self)
            super().__init__(*args, **kwargs)
            if when == "in the constructor":
                spoil(self)

        def on_stage_start(self, *args: Any) -> None:
            if when == "in a hook":
                spoil(self)

    options = {"ema_decay": 0.9, "grad_accumulation_factor": 2, "norm": True}
    mine, plain = make(Mine, **options), make(Regressor, **options)
    for brain in (mine, plain):
        brain.fit([1, 2], batches(5), batches(2))
        brain.evaluate(batches(1))
    assert not public_names() & set(USERS)
    assert same(everything(mine), everything(plain))
    assert all(getattr(mine, name) == {"of": name} for name in USERS)


@pytest.mark.parametrize("name", sorted(FIXED))
def test_setting_a_name_that_is_fixed_gets_a_sentence(name: str) -> None:
    brain = make()
    with pytest.raises(
        AttributeError, match=f"{name} cannot be set: {re.escape(FIXED[name][:20])}"
    ):
        setattr(brain, name, 3)


def test_a_driver_that_cannot_be_called_is_refused() -> None:
    brain = make()
    with pytest.raises(AttributeError, match="driver is called in place of .*; 'taxi' cannot be"):
        brain.driver = "taxi"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_exchanged_by_a_function_and_by_nothing_else(name: str) -> None:
    brain = make()
    with pytest.raises(AttributeError, match=f"{name} is a method of Brain; 3 would replace it"):
        setattr(brain, name, 3)
    setattr(brain, name, getattr(brain, name))


def test_every_name_of_the_list_can_be_set_or_says_why_not() -> None:
    fixed, methods, counters, plain = set(FIXED), set(METHODS), set(), set()
    for name in sorted(public_names() - fixed - methods):
        brain = make()
        if isinstance(getattr(Brain, name, None), property):
            setattr(brain, name, 7)
            assert getattr(brain, name) == 7
            counters.add(name)
        else:
            setattr(brain, name, getattr(brain, name, None))
            plain.add(name)
        brain.fit([1], batches(2))
    assert counters == {"epoch", "step", "optimizer_step", "nonfinite_count"}
    assert fixed | methods | counters | plain == public_names()
