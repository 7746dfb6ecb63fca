"""Run options: settings of a run that a YAML or a command line may change.

Each option is a field of `RunOptions` with its default, its type and one line of help; the command
line, `--help` and the Brain all read it from there. Precedence: default < YAML < command line.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from trainer.checks import as_number
from trainer.other_options import IGNORED, NAMES, REFUSED, RENAMED, SIMILAR, UNSET
from trainer.tree import plain_number

# Former names of options, accepted in a YAML, on the command line and as attributes.
ALIASES = {"on_bad_audio": "on_bad_item", "max_bad_audio": "max_bad_item"}

logger = logging.getLogger("trainer")


def current_name(name: str) -> str:
    """Return the current name of an option; the first use of a former name is logged."""
    if name in ALIASES:
        _note(f"the option {name} is now called {ALIASES[name]}")
    return ALIASES.get(name, name)


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the current names of options; raise ValueError for one under two names."""
    for old, new in ALIASES.items():
        if old in values and new in values:
            raise ValueError(f"{old} is the former name of {new}, which is given too; remove one")
    return {current_name(name): value for name, value in values.items()}


@functools.cache
def _note(text: str) -> None:
    """Warn, once for each text."""
    logger.warning("%s", text)


def translate(name: str, value: Any) -> dict[str, Any]:
    """Translate an option of another toolkit, with its typed value, to the option and value here.

    The mapping is empty for an ignored option, with a warning if its value is not the default, and
    for any other name. An option that would change the run raises ValueError.
    """
    if name in REFUSED and value not in (REFUSED[name][0], None):
        raise ValueError(f"there is no option {name} here: {REFUSED[name][1]}")
    if name in IGNORED and value not in (IGNORED[name][0], None):
        _note(f"the option {name} is ignored: {IGNORED[name][1]}")
    if name not in RENAMED:
        return {}
    option, default, meanings = RENAMED[name]
    meaning = next((here for there, here in meanings.items() if there == value), value)
    if meaning is UNSET:
        return {}
    if value != default:
        _note(f"{name} {value} means {option} {meaning} here")
    return {option: meaning}


def translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the current names of options, with options of other toolkits translated."""
    own = current_names(values)
    others: dict[str, Any] = {}
    for name, value in values.items():
        for option, meaning in translate(name, value).items():
            if option in own and own[option] != meaning:
                _note(f"{name} has no effect: {option} is given too")
            others[option] = meaning
    return others | own


@dataclass(frozen=True)
class Metadata:
    """Help and limits of an option."""

    help: str
    choices: tuple[str, ...] = ()  # allowed texts; none: any
    at_least: float = -math.inf
    at_most: float = math.inf
    section: str = ""  # heading of `--help` that begins with this option
    transient: bool = False  # It belongs to one command, and is not written to hyperparams.yaml.
    # Effect of another value when a run is resumed: see `trainer.config.changes`.
    kind: Literal["extending", "neutral", "training"] = "training"


def _option(default: Any, help: str, **limits: Any) -> Any:
    """Make a field with its default and its `Metadata`."""
    return field(default=default, metadata={"option": Metadata(help, **limits)})


_neutral = functools.partial(_option, kind="neutral")
_extending = functools.partial(_option, kind="extending")
_transient = functools.partial(_option, transient=True)


@dataclass
class RunOptions:
    """Behaviour of a run, independent of its model: device, precision, guards, logging, saving.

    The help of each field documents it, its type, its choices and its limits.

    Args:
        **options: any of the fields by name.

    Raises:
        ValueError: a value has the wrong type, is not among the choices or is out of range; the
            message names the option, the value and what is allowed.
    """

    device: str = _neutral(
        "auto",
        "compute device: auto (CUDA if there is one), cpu, cuda, cuda:1, …",
        section="Training",
    )
    threads: int | None = _neutral(
        None,
        "number of CPU threads for torch (null: torch's default, often slow for small models)",
        at_least=1,
    )
    seed: int = _option(1234, "random seed", at_least=0, at_most=2**63 - 1)
    output_folder: str | None = _neutral(
        None, "run folder (null: results/<task>/<name>/<seed> in the current folder)"
    )
    overwrite: bool = _transient(False, "restart in a run folder that is not empty")
    change_hparams: bool = _transient(False, "resuming with changed hyperparameters")
    test_only: bool = _transient(False, "test of the best checkpoint without training")
    grad_accumulation_factor: int = _option(1, "batches per optimizer step", at_least=1)
    optimizer_step_limit: int | None = _extending(
        None, "number of optimizer steps after which training ends (null: no limit)", at_least=1
    )
    max_hours: float | None = _transient(
        None,
        "hours since the process started after which the run saves and ends with exit code 75, "
        "before a scheduler kills it (null: no limit)",
        at_least=0,
    )
    schedule_every: str = _option(
        "epoch", "interval at which torch's learning-rate schedules step", choices=("step", "epoch")
    )
    schedule_metric: str = _option("loss", "metric that torch's ReduceLROnPlateau watches")
    ema_decay: float | None | dict[str, float | None] = _option(
        None,
        "decay of an exponential moving average of the weights, used for evaluation, e.g. 0.999, "
        "or one per optimizer name (null: none)",
        at_least=0,
        at_most=1,
    )
    init_from: str | None = _option(
        None,
        "weights to start a new run from: a run folder, a file or folder of weights, or a name on "
        "the hub (null: none)",
    )
    init_map: dict[str, str | None] | None = _option(
        None,
        "names in init_from by patterns of this model's names, such as {encoder.*: "
        "wav2vec2.encoder.*, head.*: null}; null leaves weights new (null: the same names)",
    )
    hang_timeout: float = _neutral(
        600.0,
        "seconds without progress in training after which a rank counts as hung and all ranks "
        "end (0: never)",
        at_least=0,
    )
    drift_check_every: int = _neutral(
        100, "batches between two comparisons of the ranks' weights (0: never)", at_least=0
    )

    precision: str = _option(
        "fp32",
        "precision of the forward pass in training",
        choices=("fp32", "fp16", "bf16"),
        section="Precision and compilation",
    )
    eval_precision: str | None = _neutral(
        None,
        "precision for validation and test (null: same as training)",
        choices=("fp32", "fp16", "bf16"),
    )
    compile: bool = _neutral(False, "compilation of the modules by torch.compile")
    compile_mode: str | None = _neutral(
        None,
        "mode of torch.compile (null: default)",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    compile_modules: list[str] | None = _neutral(None, "modules to compile (null: all)")

    max_grad_norm: float | None | dict[str, float | None] = _option(
        5.0,
        "gradient clipping limit, or one per optimizer name (null, inf or 0: no clipping)",
        section="Clipping and non-finite steps",
    )
    clip: str | Any = _option(
        "norm",
        "clip kind: norm scales the whole gradient, value cuts each element; a YAML may hold "
        "any object of trainer.clipping",
        choices=("norm", "value"),
    )
    expected_clip_rate: float | dict[str, float] = _neutral(
        0.95,
        "fraction of steps, or one per optimizer name, that clipping may change before a warning "
        "(1: no warning, for a limit that is meant to be always reached)",
        at_least=0,
        at_most=1,
    )
    nonfinite_patience: int = _extending(
        3, "non-finite losses or gradients tolerated per epoch", at_least=0
    )
    nonfinite_reports: int = _neutral(
        5, "skipped steps per run that are diagnosed and kept for replay", at_least=0
    )
    oom_patience: int = _extending(
        10, "batches in a row that may be skipped for lack of memory", at_least=0
    )
    skip_nonfinite_grads: bool = _option(
        False, "steps that leave out only the parameters with non-finite gradients"
    )

    checkpoint_every_steps: int | None = _neutral(
        None,
        "optimizer steps between checkpoints within an epoch (null: none)",
        at_least=1,
        section="Checkpoints",
    )
    checkpoint_every_minutes: float | None = _neutral(
        None, "minutes between checkpoints within an epoch (null: none)", at_least=0
    )
    save: str = _neutral(
        "all",
        "content of checkpoints: all, or trainable, which leaves out frozen parameters and "
        "verifies them when the run resumes",
        choices=("all", "trainable"),
    )
    average_checkpoints: int = _neutral(
        1, "number of checkpoints to average for the test", at_least=1
    )

    log_interval: int = _neutral(
        50, "steps between two lines of metrics.jsonl", at_least=1, section="Logging"
    )
    progressbar: bool = _transient(True, "progress bar on the terminal")
    logger: list[str] | Any | None = _neutral(
        None,
        "loggers beside metrics.jsonl, one or a list of tensorboard, wandb, mlflow and csv; a YAML "
        "may hold objects of trainer.loggers (null: none)",
    )
    run_name: str | None = _neutral(
        None, "name of the run in its loggers (null: from the run folder)"
    )
    tensorboard: bool = _neutral(False, "same as tensorboard in logger")
    monitor_every: int = _neutral(
        50, "optimizer steps between two measurements of the layers (0: never)", at_least=0
    )

    on_bad_item: str = _extending(
        "skip", "action for an item that cannot be used", choices=("skip", "raise"), section="Data"
    )
    max_bad_item: float = _extending(
        0.05, "fraction of items that may be skipped before the run stops", at_least=0, at_most=1
    )

    item_timeout: float = _neutral(
        300.0,
        "seconds to wait for data before an error that names item and worker (a warning without "
        "workers; 0: no limit)",
        at_least=0,
    )

    find_clip: bool = _transient(
        False,
        "search for the clipping limit of each optimizer, instead of training",
        section="Tuning",
    )
    find_lr: bool = _transient(
        False, "search for the learning rate of each optimizer, instead of training"
    )
    find_steps: int = _transient(
        60, "optimizer steps per trial (find_lr: twice as many)", at_least=10
    )
    find_trials: int = _transient(12, "maximum number of trials per clipping limit", at_least=4)

    debug: bool = _transient(
        False, "trial run of a few batches per stage in a temporary folder", section="Debugging"
    )
    debug_batches: int = _neutral(2, "batches per stage with --debug", at_least=1)
    debug_epochs: int = _neutral(2, "epochs with --debug", at_least=1)
    overfit_batches: int = _option(
        0, "number of batches to train on, always the same first ones (0: all)", at_least=0
    )
    replay: str | None = _transient(
        None,
        "folder of a skipped step (RUN/nonfinite/STEP) to replay instead of training; see "
        "cortex replay",
    )
    profile_training: bool = _transient(False, "torch.profiler trace of a few training steps")
    profile_warmup: int = _neutral(5, "steps before the trace", at_least=0)
    profile_steps: int = _neutral(5, "steps in the trace", at_least=1)

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            setattr(self, name, checked(name, value))
        if self.searching and self.test_only:
            raise ValueError("find_clip and find_lr train for a while: leave out test_only")
        if self.overwrite and self.change_hparams:
            raise ValueError("overwrite starts anew and change_hparams goes on: leave out one")
        if self.overwrite and self.test_only:
            raise ValueError("overwrite deletes the checkpoint that test_only tests: leave out one")

    if not TYPE_CHECKING:  # mypy is to refuse former names

        def __getattr__(self, name: str) -> Any:
            """Return the option with the former name `name`."""
            if name in ALIASES:
                return getattr(self, ALIASES[name])
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def searching(self) -> bool:
        """True if `fit` searches for settings in place of training."""
        return self.find_clip or self.find_lr

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all options, in the order of the help."""
        return [each.name for each in fields(cls)]

    @classmethod
    def build(
        cls, hparams: Mapping[str, Any], run_opts: Mapping[str, Any] | RunOptions | None = None
    ) -> RunOptions:
        """Combine defaults, hyperparameters and explicit options.

        Args:
            hparams: keys that are run options replace the defaults; others are the recipe's own.
            run_opts: options that replace those of `hparams`. A `RunOptions` is taken as it is,
                except that objects in `hparams`, built since then, replace the defaults of `clip`
                and `logger`.

        Returns:
            The options in force.

        Raises:
            ValueError: `run_opts` has an unknown key, or a value is not allowed.
        """
        if isinstance(run_opts, RunOptions):
            built = {
                name: hparams[name]
                for name, default in (("clip", "norm"), ("logger", None))
                if not isinstance(hparams.get(name, ""), str) and getattr(run_opts, name) == default
            }
            return replace(run_opts, **built) if built else run_opts
        known = cls.names()
        given, own = translated(given_options(run_opts or {})), translated(hparams)
        for name in given:
            if name not in (*known, *NAMES):
                meant = SIMILAR.get(name, name)
                raise ValueError(f"{name!r} is not a run option{nearest(meant, known)}")
        both = own | given
        return cls(**{name: both[name] for name in known if name in both})


HINTS = typing.get_type_hints(RunOptions)
METADATA: dict[str, Metadata] = {each.name: each.metadata["option"] for each in fields(RunOptions)}
TRANSIENT_OPTIONS = tuple(name for name in METADATA if METADATA[name].transient)
# Hyperparameters that a Brain reads beside run options: keys of any YAML.
BRAIN_KEYS = ("adapters", "callbacks", "early_stopping", "param_groups", "schedule")
TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[str]: "a list of texts",
    dict[str, float]: "a mapping of names to numbers",
    dict[str, float | None]: "a mapping of names to numbers",
    dict[str, str | None]: "a mapping of names to names or null",
    Any: "an object",
}


def checked(name: str, value: Any) -> Any:
    """Convert the value of option `name` to its type and check it.

    Integers become floats where a float is expected, the texts "inf" and "-inf" too (YAML's own
    spelling is `.inf`), paths and torch devices become text, and `~` becomes the home folder.

    Raises:
        ValueError: the value is not allowed; the message says what is.
    """
    if isinstance(value, (os.PathLike, torch.device)):
        value = str(value)
    value = at_home(value) if isinstance(value, str) else value
    limits = METADATA[name]
    try:
        if isinstance(value, str) and (not value or "\0" in value):
            raise TypeError
        value = _fit(value, HINTS[name])
        simple = isinstance(value, (str, int, float))
        numbers = value.values() if isinstance(value, dict) else [value]
        if (simple and limits.choices and value not in limits.choices) or any(
            not limits.at_least <= each <= limits.at_most
            for each in numbers
            if isinstance(each, (int, float))
        ):
            raise TypeError
    except (TypeError, OverflowError):  # An int may be too large for a float.
        raise ValueError(f"{name} must be {allowed(name)}, not {value!r}") from None
    return value


def at_home(text: str) -> str:
    """Return a text with the home folder in place of a leading `~` or `~user`."""
    return os.path.expanduser(text) if re.match(r"~[\w.-]*/", text) else text


def _fit(value: Any, hint: Any) -> Any:
    """Return `value` as an instance of the type `hint`, or raise TypeError."""
    value = plain_number(value)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for each in inner:
            with contextlib.suppress(TypeError):
                return _fit(value, each)
    elif origin is dict and isinstance(value, Mapping):
        return {_fit(key, inner[0]): _fit(each, inner[1]) for key, each in value.items()}
    elif origin is list and isinstance(value, (list, tuple)):
        return [_fit(each, inner[0]) for each in value]
    elif hint is float:
        number = float(value) if str(value) in ("inf", "-inf") else as_number(value)
        if number is not None and not math.isnan(number):
            return float(number)
    elif hint is Any or type(value) is hint:  # not isinstance: True would pass as an int
        return value
    raise TypeError


def allowed(name: str) -> str:
    """Describe the allowed values of option `name`, such as "a number from 0 to 1 or null"."""
    limits, hint = METADATA[name], HINTS[name]
    kinds = typing.get_args(hint) if hint not in TYPE_NAMES else (hint,)
    words = [TYPE_NAMES[each] for each in kinds if each is not type(None)]
    if limits.choices:
        words = [f"one of {', '.join(limits.choices)}"]
    if limits.at_most < 2**31:
        words[0] += f" from {limits.at_least:g} to {limits.at_most:g}"
    elif limits.at_least > -math.inf:
        words[0] += f" of at least {limits.at_least:g}"
    text = ", ".join(words)
    return f"{text} or null" if type(None) in kinds else text


def warn_of_similar_names(hparams: Iterable[str]) -> None:
    """Warn of hyperparameters without effect whose names resemble those of options."""
    known = [*RunOptions.names(), "adapters", "param_groups"]
    for name in sorted({*hparams} - {*known, *ALIASES, *NAMES}):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
        meant = SIMILAR.get(name) or next(iter(close), None)
        if meant is not None:
            logger.warning(
                "%r is not a run option and has no effect by itself; the option is %r", name, meant
            )


def given_options(run_opts: Any) -> Any:
    """Return the explicitly given options of an object that lists them, as SpeechBrain's does.

    Anything else is returned as it is.
    """
    names = getattr(run_opts, "overridden_args", None)
    return run_opts if names is None else {name: run_opts[name] for name in names}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: "; did you mean 'epochs'?", or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def nearest_key(name: str, known: Iterable[str], dotted: Sequence[str]) -> str:
    """Return the end of a message about an unknown key: the keys that may be meant, or nothing.

    Args:
        name: the unknown key, dotted if it is nested.
        known: names that are suggested for its last part.
        dotted: all keys of the YAML; those with a similar last part are suggested.
    """
    if meant := SIMILAR.get(name) or RENAMED.get(name, [""])[0]:
        return f"; the option is {meant!r}"
    last = name.rpartition(".")[2]
    ends = {each: each.rpartition(".")[2] for each in dotted}
    parents = {each.rpartition(".")[0] for each in dotted}
    words = _words(last)
    values = [each for each in ends if each not in parents] if words else []
    found = [each for each in values if words <= _words(ends[each])]
    found = found or [each for each in values if words <= _words(each)]
    hint = nearest(last, known)
    if hint and (not found or name != last):
        return hint
    if not found:
        close = difflib.get_close_matches(last, {*ends.values()}, n=1)
        found = [each for each in ends if ends[each] in close]
    top = f"{name.partition('.')[0]}."
    found.sort(key=lambda each: (not each.startswith(top), ends[each] != last))
    return f"; did you mean {' or '.join(map(repr, found[:3]))}?" if found else ""


def _words(name: str) -> set[str]:
    """Return the words of a name, abbreviated: {"peak", "lr"} of "peak_learning_rate"."""
    name = name.replace("-", "_")
    for long, short in (("learning_rate", "lr"), ("batch_size", "bs"), ("weight_decay", "wd")):
        name = name.replace(long, short)
    fillers = {"", "max", "n", "num", "number", "of", "total"}
    return {each.rstrip("s") for each in re.split(r"[._-]", name.lower())} - fillers
