"""Imports of `trainer`: names are found without torch, and bring in what they need alone."""

import sys

import pytest

import trainer
from tests.benchmarks.import_cost import BRAIN, TORCH, modules, steps

ALLOWED = {"trainer", *sys.stdlib_module_names}
LAZY = {"trainer.cli", "trainer.config", "trainer.report", "trainer.tuner"}
# What trains, and what a model in use has no need of.
LOOP = {
    "trainer.brain", "trainer.data", "trainer.distributed.strategy", "trainer.optim.build",
    "trainer.optim.guard", "trainer.optim.step", "lhotse",
}  # fmt: skip
# What a run folder is read with.
READING = (
    "adapters", "checkpoint.checkpointer", "config.hyperparameters", "devices", "evaluation",
    "optim.precision", "seed", "untrusted",
)  # fmt: skip


def test_importing_the_trainer_imports_the_standard_library_alone() -> None:
    added = modules("import trainer") - modules("pass")
    assert {name.partition(".")[0] for name in added} <= ALLOWED
    assert "trainer" in added


def test_importing_a_brain_brings_in_no_package_but_torch() -> None:
    parts = (TORCH, BRAIN, "import trainer; trainer.clipping.NormClip; trainer.loggers.JsonlLogger")
    torch, brain, loggers = steps(*parts)
    assert {name.partition(".")[0] for name in brain - torch} <= ALLOWED
    assert "trainer.brain" in brain
    assert not brain & LAZY  # Command line and reports are imported when they are used.
    assert "trainer.loggers" in loggers - brain  # Modules are found as attributes.


def test_a_run_folder_is_read_without_the_training_loop() -> None:
    found = modules("import " + ", ".join(f"trainer.{each}" for each in READING))
    assert not found & LOOP
    assert "trainer.evaluation" in found


def test_every_public_name_is_found() -> None:
    assert {name for name in trainer.__all__ if not hasattr(trainer, name)} == set()
    assert set(trainer.__all__) <= set(dir(trainer))
    with pytest.raises(AttributeError, match="'trainer' has no attribute 'Brian'"):
        _ = trainer.Brian
