"""A Brain-style trainer for speech: one loop, one place that moves weights, on every path.

from trainer import Brain, Stage, main
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import defaults
from trainer.brain import Brain
from trainer.callbacks import Callback
from trainer.checkpoint import Checkpointer
from trainer.compat import old_paths
from trainer.conventions import Conventions
from trainer.epochs import EpochCounter
from trainer.metrics import StageReport, StepReport
from trainer.optim.guard import NonFiniteError, Tracer
from trainer.options import RunOptions
from trainer.progress import Stage

if TYPE_CHECKING:
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
    from trainer.inference import Model, export, load

    __version__: str

__all__ = [
    "Brain",
    "Callback",
    "Checkpointer",
    "EpochCounter",
    "Model",
    "NonFiniteError",
    "Run",
    "RunOptions",
    "Stage",
    "StageReport",
    "StepReport",
    "create_experiment_directory",
    "ddp_init_group",
    "dump_hyperpyyaml",
    "export",
    "if_main_process",
    "launch",
    "load",
    "load_hparams",
    "load_hyperpyyaml",
    "main",
    "parse_arguments",
    "run_on_main",
]

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
# A run folder seeds and logs nothing.
YAML_NAMES = (
    *RUN_NAMES, "compat.toolkit.set_seed", "loggers.MlflowLogger", "loggers.WandbLogger",
    "loggers.mlflow.MlflowLogger", "loggers.wandb.WandbLogger",
)  # fmt: skip

# YAML and command line are imported on first use: programs that only subclass Brain start faster.
_LAZY = {
    "Model": "trainer.inference",
    "Run": "trainer.cli",
    "launch": "trainer.cli",
    "export": "trainer.inference",
    "load": "trainer.inference",
    "main": "trainer.cli",
    "load_hparams": "trainer.config.hyperparameters",
    "create_experiment_directory": "trainer.compat.speechbrain",
    "ddp_init_group": "trainer.compat.speechbrain",
    "dump_hyperpyyaml": "trainer.compat.speechbrain",
    "if_main_process": "trainer.compat.speechbrain",
    "load_hyperpyyaml": "trainer.compat.speechbrain",
    "parse_arguments": "trainer.compat.speechbrain",
    "run_on_main": "trainer.compat.speechbrain",
}


def _initialise(*arguments: Any) -> None:
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
        from trainer.report import ReportLogger

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

    # The layer monitor writes a record when the state is saved, before the loggers count theirs;
    # the times of a step become a part of the loggers' records.
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
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
