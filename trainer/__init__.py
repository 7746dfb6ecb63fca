"""Brain-style trainer for speech: one training loop, and one method that steps optimizers.

from trainer import Brain, Stage, main
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import defaults
from trainer.compat import old_paths

if TYPE_CHECKING:
    from trainer.brain import Brain
    from trainer.callbacks import Callback
    from trainer.checkpoint import Checkpointer
    from trainer.cli import Run, launch, main
    from trainer.compat.speechbrain import (
        create_experiment_directory,
        ddp_init_group,
        dump_hyperpyyaml,
        if_main_process,
        load_hyperpyyaml,
        parse_arguments,
        run_on_main,
    )
    from trainer.config.hyperparameters import load_hparams
    from trainer.conventions import Conventions
    from trainer.epochs import EpochCounter
    from trainer.inference import Model, export, load
    from trainer.metrics import StageReport, StepReport
    from trainer.optim.guard import NonFiniteError, Tracer
    from trainer.options import RunOptions
    from trainer.progress import Stage

    __version__: str

__all__ = [
    "Brain", "Callback", "Checkpointer", "EpochCounter", "Model", "NonFiniteError", "Run",
    "RunOptions", "Stage", "StageReport", "StepReport", "create_experiment_directory",
    "ddp_init_group", "dump_hyperpyyaml", "export", "if_main_process", "launch", "load",
    "load_hparams", "load_hyperpyyaml", "main", "parse_arguments", "run_on_main",
]  # fmt: skip

# Names of this package that a YAML may build, and the hyperparams.yaml of a run folder too.
RUN_NAMES = (
    "Checkpointer", "EpochCounter", "checkpoint.Checkpointer",
    "checkpoint.checkpointer.Checkpointer", "clipping.AGC", "clipping.AdaGC", "clipping.AutoClip",
    "clipping.GradualClip", "clipping.LayerClip", "clipping.MedianClip", "clipping.MixedClip",
    "clipping.NormClip", "clipping.PatternClip", "clipping.SPAM", "clipping.ValueClip",
    "clipping.ZClip", "data.DistributedBatchSampler", "data.collate", "data.pad",
    "epochs.EpochCounter", "metrics.Mean", "optim.ema.WeightAverage", "schedules.EarlyStopping",
    "schedules.NewBob", "schedules.Noam", "schedules.Plateau", "schedules.WarmupDecay",
)  # fmt: skip
# Names that a YAML may build, but not the hyperparams.yaml of a run folder: they seed and log.
YAML_NAMES = (
    *RUN_NAMES, "compat.toolkit.set_seed", "loggers.MlflowLogger", "loggers.WandbLogger",
    "loggers.mlflow.MlflowLogger", "loggers.wandb.WandbLogger",
)  # fmt: skip

# Modules of the public names, which are imported on first use: `import trainer` imports no torch.
_MODULES = {
    name: module
    for module, names in {
        "trainer.brain": "Brain",
        "trainer.callbacks": "Callback",
        "trainer.checkpoint": "Checkpointer",
        "trainer.epochs": "EpochCounter",
        "trainer.inference": "Model export load",
        "trainer.optim.guard": "NonFiniteError",
        "trainer.cli": "Run launch main",
        "trainer.options": "RunOptions",
        "trainer.progress": "Stage",
        "trainer.metrics": "StageReport StepReport",
        "trainer.compat.speechbrain": (
            "create_experiment_directory ddp_init_group dump_hyperpyyaml if_main_process "
            "load_hyperpyyaml parse_arguments run_on_main"
        ),
        "trainer.config.hyperparameters": "load_hparams",
    }.items()
    for name in names.split()
}


def _initialise(*arguments: Any) -> None:
    """Load the weights of ``init_from``; import its module on first use."""
    from trainer.inference.initialise import initialise

    initialise(*arguments)


def _register_defaults() -> None:
    """Fill the registry of what every Brain has; modules are imported when a Brain is made."""

    def progress_bar(brain: Brain) -> Callback | None:
        from trainer.loggers.progress_bar import ProgressBar

        return ProgressBar(brain.options.progressbar)

    def loggers(brain: Brain) -> Callback | None:
        from trainer.loggers import JsonlLogger, LoggerCallback, SampleLogger
        from trainer.loggers.choice import chosen_loggers
        from trainer.loggers.files import ReportLogger

        options, hparams = brain.options, vars(brain.hparams)
        usual = [JsonlLogger, SampleLogger, ReportLogger]
        return LoggerCallback(options, usual, chosen_loggers(options), hparams)

    def nonfinite_tracer(brain: Brain) -> Tracer | None:
        from trainer.diagnostics.nonfinite.tracer import make_nonfinite_tracer

        return make_nonfinite_tracer(brain)

    def search(brain: Brain) -> defaults.Driver | None:
        if not brain.options.searching:
            return None
        from trainer import tuner

        return tuner.search

    def replay(brain: Brain) -> defaults.Driver | None:
        if brain.options.replay is None:
            return None
        from trainer.diagnostics.replay import make_replay_driver

        return make_replay_driver(Path(brain.options.replay))

    def conventions(brain: Brain) -> Conventions:
        from trainer.compat.conventions import SpeechBrainConventions

        return SpeechBrainConventions(type(brain))

    def diagnostic(name: str) -> defaults.CallbackFactory:
        def make(brain: Brain) -> Callback | None:
            module = importlib.import_module(f"trainer.diagnostics.{name}")
            made: Callback | None = getattr(module, f"make_{name}")(brain)
            return made

        return make

    # Order matters: the layer monitor writes a record when a checkpoint is saved, before the
    # loggers save how many records they have; step times are fields of the loggers' records.
    monitor, times, check, profiler = map(
        diagnostic, ("layer_monitor", "step_times", "replica_check", "profiler")
    )
    defaults.callbacks += [progress_bar, monitor, times, loggers, check, profiler]
    defaults.tracers.append(nonfinite_tracer)
    defaults.drivers += [search, replay]
    defaults.initialisers.append(_initialise)
    defaults.conventions.append(conventions)


_register_defaults()


old_paths.install(__path__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("cortex-speech")
        except PackageNotFoundError:  # a checkout that is not installed
            return "0+unknown"
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
