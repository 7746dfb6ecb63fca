"""The options of a run: everything the framework lets a YAML or a command line decide.

Each option is a field of `RunOptions` with its default, its type and one line of help; the command
line, `--help` and the Brain all read it from there. Precedence: default < YAML < command line.
"""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> Any:
    """A field with its line of help and what its value may be beyond its type."""
    limits = {"help": help, "choices": choices, "at_least": at_least, "at_most": at_most}
    return field(default=default, metadata=limits)


@dataclass
class RunOptions:
    """How a run behaves, whatever its model: device, precision, guards, logging, saving.

    A value is checked where it enters: a wrong type, a choice that does not exist or a number out
    of range is a ValueError that names the option, the value and what is allowed.
    """

    device: str = _option("auto", "auto (CUDA where there is one), cpu, cuda, cuda:1 …")
    threads: int | None = _option(
        None,
        "of a CPU, for torch; null: as many as torch takes, too many for small models",
        at_least=1,
    )
    precision: str = _option(
        "fp32", "of the forward pass in training", choices=("fp32", "fp16", "bf16")
    )
    eval_precision: str | None = _option(
        None, "of validation and test; null: as in training", choices=("fp32", "fp16", "bf16")
    )
    max_grad_norm: float | None | dict[str, float | None] = _option(
        5.0, "largest gradient, or one a name of optimizer; null, inf, 0: measure only"
    )
    clip: str | Any = _option(
        "norm",
        "scale the whole gradient, or cut each element; a YAML may hold any trainer.clipping kind",
        choices=("norm", "value"),
    )
    nonfinite_patience: int = _option(
        3, "losses or gradients that are not finite, an epoch, before the run stops", at_least=0
    )
    nonfinite_reports: int = _option(
        5, "skipped steps of a run that are looked into, and kept to be replayed", at_least=0
    )
    skip_nonfinite_grads: bool = _option(
        False, "leave out only the parameters whose gradients are not finite"
    )
    grad_accumulation_factor: int = _option(1, "batches to one optimizer step", at_least=1)
    optimizer_step_limit: int | None = _option(
        None, "optimizer steps after which training ends", at_least=1
    )
    drift_check_every: int = _option(
        100, "batches between two comparisons of the ranks' weights; 0: never", at_least=0
    )
    seed: int = _option(1234, "of everything random", at_least=0, at_most=2**63 - 1)
    schedule_every: str = _option(
        "epoch", "when torch's own learning-rate schedules move", choices=("step", "epoch")
    )
    ema_decay: float | None = _option(
        None, "evaluate an exponential average of the weights, e.g. 0.999", at_least=0, at_most=1
    )
    log_interval: int = _option(50, "steps between two lines of metrics.jsonl", at_least=1)
    progressbar: bool = _option(True, "show progress on the terminal")
    tensorboard: bool = _option(False, "write curves for TensorBoard too")
    monitor_every: int = _option(
        50, "optimizer steps between two looks at the layers; 0: no monitors", at_least=0
    )
    checkpoint_every_steps: int | None = _option(
        None, "save inside an epoch, every so many optimizer steps", at_least=1
    )
    checkpoint_every_minutes: float | None = _option(
        None, "save inside an epoch, every so many minutes", at_least=0
    )
    average_checkpoints: int = _option(
        1, "how many checkpoints are averaged for the test", at_least=1
    )
    debug: bool = _option(False, "a few batches of each stage; nothing is kept")
    debug_batches: int = _option(2, "batches of each stage under --debug", at_least=1)
    debug_epochs: int = _option(2, "epochs under --debug", at_least=1)
    overfit_batches: int = _option(
        0, "train on the first so many batches alone; 0: on all", at_least=0
    )
    replay: str | None = _option(
        None, "a folder of nonfinite/: replay its batch, train nothing (python -m trainer replay)"
    )
    test_only: bool = _option(False, "no training: test the best checkpoint")
    find_clip: bool = _option(False, "no training: look for the clip limit of each optimizer")
    find_lr: bool = _option(False, "no training: look for the learning rate of each optimizer")
    find_steps: int = _option(
        60, "optimizer steps of a trial; --find_lr takes twice as many", at_least=10
    )
    find_trials: int = _option(12, "at most so many trials for each limit", at_least=4)
    profile_training: bool = _option(False, "write a torch.profiler trace of some steps")
    profile_warmup: int = _option(5, "steps before the trace", at_least=0)
    profile_steps: int = _option(5, "steps in the trace", at_least=1)
    compile: bool = _option(False, "torch.compile the modules")
    compile_mode: str | None = _option(
        None,
        "of torch.compile",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    compile_modules: list[str] | None = _option(None, "which modules to compile; null: all")
    output_folder: str | None = _option(
        None, "run folder; null: results/<task>/<name>/<seed> in the current folder"
    )
    overwrite: bool = _option(False, "start over in a run folder that is not empty")
    on_bad_audio: str = _option(
        "skip", "what to do with a file that cannot be used", choices=("skip", "raise")
    )
    max_bad_audio: float = _option(
        0.05, "share of files that may be skipped before the run stops", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            setattr(self, name, checked(name, value))
        if self.searching and self.test_only:
            raise ValueError("find_clip and find_lr train for a while: leave out test_only")

    @property
    def searching(self) -> bool:
        """Whether `fit` looks for settings instead of training."""
        return self.find_clip or self.find_lr

    @classmethod
    def names(cls) -> list[str]:
        """The names of all options, in the order of the help."""
        return [each.name for each in fields(cls)]

    @classmethod
    def build(
        cls, hparams: Mapping[str, Any], run_opts: Mapping[str, Any] | RunOptions | None = None
    ) -> RunOptions:
        """Defaults, beneath the keys of `hparams` that are options, beneath `run_opts`.

        A `RunOptions` is complete as it is, but for a clipper object. Unknown keys of `hparams` are
        the recipe's own; an unknown key of `run_opts` is a ValueError that names the nearest one.
        """
        if isinstance(run_opts, RunOptions):
            if not isinstance(hparams.get("clip", "norm"), str) and run_opts.clip == "norm":
                return replace(run_opts, clip=hparams["clip"])  # An object, built since.
            return run_opts
        known = cls.names()
        for name in run_opts or {}:
            if name not in known:
                raise ValueError(f"{name!r} is not a run option{nearest(name, known)}")
        values = {name: hparams[name] for name in known if name in hparams}
        return cls(**{**values, **(run_opts or {})})


HINTS: dict[str, Any] = typing.get_type_hints(RunOptions)
METADATA: dict[str, Mapping[str, Any]] = {each.name: each.metadata for each in fields(RunOptions)}


def checked(name: str, value: Any) -> Any:
    """The value of option `name` in its type, or a ValueError that says what is allowed.

    Whole numbers become floats where a float is meant, the texts "inf" and "-inf" too (YAML's own
    spelling, `.inf`, is little known), and paths and torch devices become text.
    """
    if isinstance(value, (os.PathLike, torch.device)):
        value = str(value)
    limits = METADATA[name]
    try:
        value = _fit(value, HINTS[name])
    except TypeError:
        raise ValueError(_refusal(name, value)) from None
    if not isinstance(value, (str, int, float)):
        return value
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(_refusal(name, value))
    if isinstance(value, (int, float)) and not limits["at_least"] <= value <= limits["at_most"]:
        raise ValueError(_refusal(name, value))
    return value


def _fit(value: Any, hint: Any) -> Any:
    """`value` as an instance of the type `hint`, or TypeError."""
    if hint is Any:
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for each in inner:
            try:
                return _fit(value, each)
            except TypeError:
                continue
        raise TypeError
    if origin is dict and isinstance(value, Mapping):
        return {_fit(key, inner[0]): _fit(each, inner[1]) for key, each in value.items()}
    if origin is list and isinstance(value, (list, tuple)):
        return [_fit(each, inner[0]) for each in value]
    if hint is float and not isinstance(value, bool):
        if value in ("inf", "-inf"):
            return float(value)
        if isinstance(value, (int, float)) and not math.isnan(value):
            return float(value)
    # `type() is`, since True would pass as an int.
    elif origin is None and type(value) is hint:
        return value
    raise TypeError


def _refusal(name: str, value: Any) -> str:
    return f"{name} must be {allowed(name)}, not {value!r}"


def allowed(name: str) -> str:
    """What option `name` may be, in words: "one of norm, value", "a number from 0 to 1 or null"."""
    limits, hint = METADATA[name], HINTS[name]
    parts = [each for each in typing.get_args(hint) or (hint,) if each is not type(None)]
    if typing.get_origin(hint) is list:
        parts = [hint]
    words = [_words(each) for each in parts]
    if limits["choices"]:
        words = ["one of " + ", ".join(limits["choices"])]
    low, high = limits["at_least"], limits["at_most"]
    if math.isfinite(low) and math.isfinite(high) and high < 2**31:
        words[0] += f" from {low:g} to {high:g}"
    elif math.isfinite(low):
        words[0] += f" of at least {low:g}"
    if type(None) in typing.get_args(hint):
        words.append("null")
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _words(hint: Any) -> str:
    if hint is Any:
        return "an object"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if typing.get_origin(hint) is list:
        return "a list of texts"
    if typing.get_origin(hint) is dict:
        return "a mapping of names to numbers"
    return names[hint]


def nearest(name: str, known: Iterable[str]) -> str:
    """How a message goes on after an unknown name: "; did you mean 'epochs'?", or nothing.

    >>> nearest("epoch", ["epochs", "seed"])
    "; did you mean 'epochs'?"
    """
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
