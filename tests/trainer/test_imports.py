"""`import trainer` costs about what `import torch` does, since it brings in nothing else."""

import sys

from tests.benchmarks.import_cost import modules

ALLOWED = {"trainer", *sys.stdlib_module_names}
LAZY = {"trainer.cli", "trainer.config", "trainer.report", "trainer.tuner"}


def test_importing_the_trainer_brings_in_no_package_but_torch() -> None:
    added = modules("trainer") - modules("torch")
    assert {name.partition(".")[0] for name in added} <= ALLOWED
    assert "trainer.brain" in added


def test_command_line_and_reports_are_imported_when_they_are_used() -> None:
    assert not modules("trainer") & LAZY
