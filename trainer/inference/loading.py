"""Trained models from run folders.

    model = trainer.load("results/kws/demo/1234")
    model.transcribe("x.wav")

A run folder is treated as data: it builds only what installed recipes list for it (see
`trainer.config.run_folder`), reads no file outside the folder, and changes none.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, cast, overload
from weakref import WeakKeyDictionary

import torch
from ruamel.yaml.nodes import MappingNode
from torch import nn

from trainer.adapters import import_peft
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.frozen import completed
from trainer.checkpoint.run_state import check_weights
from trainer.checkpoint.user_state import keep_in_state_dict
from trainer.config.hyperparameters import Configuration
from trainer.config.reading import NULL, get, items, nodes, object_name, plain, tag
from trainer.config.registry import recipe_packages
from trainer.devices import pick_device
from trainer.evaluation import load_weights, rng_kept_alone
from trainer.inference.initialise import (
    WEIGHTS,
    initialise,
    is_export,
    read_export,
)
from trainer.inference.model import Model
from trainer.options import RunOptions
from trainer.run_files import CHECKPOINTS, HYPERPARAMS
from trainer.seed import seed_everything
from trainer.texts import cause
from trainer.untrusted import (
    confined,
    memory_in_proportion,
    no_modules_from,
    printable,
    sources_confined,
)

if TYPE_CHECKING:
    from trainer.brain import Brain

RECIPE = "recipe"  # Key of an exported YAML: package of the recipe.

# Run options read from a run folder to use its model, and to replay its steps.
OF_THE_MODEL = ("seed", "precision", "eval_precision", "ema_decay", "average_checkpoints")
OF_THE_TRAINING = (
    "grad_accumulation_factor", "schedule_every", "max_grad_norm", "clip", "nonfinite_patience",
    "skip_nonfinite_grads",
)  # fmt: skip

B = TypeVar("B", bound="Brain")
M = TypeVar("M", bound=Model)


@dataclass
class OpenRun:
    """Content of a run folder.

    Attributes:
        folder: the run folder.
        configuration: its YAML, not built yet.
        checkpointer: its checkpoints, to be read only.
        named: texts among the overrides, which may name sources outside the folder.
    """

    folder: Path
    configuration: Configuration
    checkpointer: Checkpointer
    named: set[str]

    def override(self, values: Mapping[str, Any]) -> None:
        """Set keys of the YAML.

        Args:
            values: new values by key. They come from the caller, and so may name files outside the
                folder.
        """
        self.named |= _texts(values)
        self.configuration.override(values)

    def options(self, *names: str, **given: Any) -> RunOptions:
        """Return run options for a model or Brain that records nothing.

        Args:
            names: options to take from the run; others have their defaults.
            given: further options by name, which take precedence.
        """
        of_run = self.configuration.options()
        chosen = {name: value for name, value in of_run.items() if name in names}
        if of_run.get("threads") is not None:
            chosen["threads"] = min(of_run["threads"], os.cpu_count() or 1)
        quiet = {"progressbar": False, "monitor_every": 0, "drift_check_every": 0}
        return RunOptions(**{**quiet, **chosen, **given})

    def build(
        self, modules: Mapping[str, nn.Module] | None = None, uses: Collection[str] = ()
    ) -> dict[str, Any]:
        """Build the hyperparameters.

        Args:
            modules: networks by name, instead of those of the YAML.
            uses: names of the modules to build; empty for all.

        Returns:
            The values by key, objects built.

        Raises:
            ValueError: the YAML builds something that is not allowed, or no modules.
        """
        if uses:
            self._leave_out(uses)
        hparams = self.configuration.build()
        if modules is not None:
            hparams["modules"] = modules
        if not isinstance(hparams.get("modules"), Mapping):
            raise ValueError(
                f"{self.folder / HYPERPARAMS} builds no modules: give load(run, model=…, "
                "modules={…}) those that the program of the run makes"
            )
        if uses:
            built = hparams["modules"]
            if missing := [name for name in uses if built.get(name) is None]:
                raise ValueError(
                    f"{self.folder} has no module {missing[0]!r}, which its model needs; it has "
                    f"{', '.join(map(str, built)) or 'none'}"
                )
            hparams["modules"] = {name: built[name] for name in uses}
        hparams["output_folder"] = None  # Evaluating a loaded model writes nothing.
        return hparams

    def _leave_out(self, uses: Collection[str]) -> None:
        """Set other modules to None: a discriminator may be larger than all the rest."""
        for name, node in items(get(self.configuration.root, "modules") or MappingNode("", [])):
            if name not in uses:
                key = re.fullmatch("<([^<>.]+)>", str(node.value)) if tag(node) == "!ref" else None
                made = get(self.configuration.root, key[1]) if key else None
                network = made is not None and tag(made).startswith("!new:")
                change = {key[1]: None} if key and network else {"modules": {name: None}}
                self.configuration.override(change)

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Context manager for building, with memory limited in proportion to the folder.

        Modules that the objects need are imported before, since imports may take any memory.
        """
        self.configuration.checked()
        if get(self.configuration.root, "adapters") is not None:
            import_peft()
        base = next((each.base for each in self.checkpointer.find() if each.base), {})
        size = base.get("bytes", 0)
        with memory_in_proportion(self.folder, size if type(size) is int else 0):
            yield

    def names(self) -> set[str]:
        """Return the names of the objects that the YAML builds."""
        return {object_name(each) for each in nodes(self.configuration.root)}

    def recipes(self) -> list[str]:
        """Return the packages of the installed recipes whose objects the YAML builds.

        A recipe that gives only objects for training counts only if there is no other; if some such
        recipes map these objects to Brains, only those count. An exported YAML names the package.
        """
        named = get(self.configuration.root, RECIPE)
        if named is not None and named.value in recipe_packages():
            return [str(named.value)]
        names = self.names()
        only_trains = self.configuration.registry.is_for_training_only
        found = _recipes_of({n for n in names if not only_trains(n)}) or _recipes_of(names)
        mapped = [
            package
            for package, brain in found.items()
            if isinstance(brain, Mapping) and any(f"{package}.{each}" in names for each in brain)
        ]
        return mapped or [*found]

    def check_class(self, kind: type[Brain] | type[Model]) -> None:
        """Raise ValueError for a class of an installed recipe other than that of the run."""
        own = kind.__module__.rpartition(".")[0]
        found = self.recipes()
        if found and own in recipe_packages() and own not in found:
            tasks: list[str] = []
            for package in found:
                with suppress(ValueError, ImportError):
                    tasks += recipe_class(package, "MODEL", self.names()).tasks()
            able = f": its model can {' and '.join(tasks)}" if tasks else ""
            raise ValueError(f"{self.folder} is a run of {' and '.join(found)}, not of {own}{able}")

    def best_checkpoint(self, kind: type[Brain] | type[Model]) -> Mapping[str, str | None]:
        """Return the attribute ``best_checkpoint`` of a class, before it is built.

        A property gets the plain values of the YAML as hyperparameters.

        Raises:
            ValueError: the property needs more than plain values.
        """
        found = getattr(kind, "best_checkpoint", {})
        if not isinstance(found, property):
            return dict(found)
        self.configuration.checked()
        own = kind.__new__(kind)
        own.hparams = SimpleNamespace()
        for key, node in self.configuration.root.value:
            with suppress(ValueError):  # Objects are left out.
                setattr(own.hparams, str(key.value), plain(node))
        try:
            return dict(own.best_checkpoint)  # type: ignore[union-attr]
        except AttributeError as error:
            raise ValueError(
                f"{self.folder} does not say in plain values which checkpoint it is tested with: "
                "name the folder that `cortex export` makes of it"
            ) from error

    def brain_class(self) -> type[Brain]:
        """Return the Brain of the installed recipe whose objects the YAML builds.

        Raises:
            ValueError: there is none, or more than one.
        """
        return cast("type[Brain]", self._class("BRAIN"))

    def model_class(self) -> type[Model]:
        """Return the `Model` of the installed recipe whose objects the YAML builds.

        Raises:
            ValueError: there is none, or more than one.
        """
        return cast(type[Model], self._class("MODEL"))

    def _class(self, attribute: str) -> Any:
        found = self.recipes()
        if len(found) != 1:
            raise ValueError(
                f"{self.folder} is a run of {' and '.join(found) or 'no installed recipe'}: name "
                "its class, as in trainer.load(run, model=YourModel, allow=['your_package']), or "
                "brain=YourBrain to evaluate it"
            )
        return recipe_class(found[0], attribute, self.names())


@dataclass(frozen=True)
class Origin:
    """Source of a loaded model, which its export needs."""

    run: OpenRun
    max_key: str | None  # metric that chose the checkpoint
    min_key: str | None
    weights: Mapping[str, Any]  # by their names in the run, before the model was prepared for use


# Sources of the models that `load` has made.
_origins: WeakKeyDictionary[Model | Brain, Origin] = WeakKeyDictionary()


def origin_of(model: Model | Brain) -> Origin | None:
    """Return the source of a model that `load` made; None for any other."""
    return _origins.get(model)


def _recipes_of(names: Collection[str]) -> dict[str, Any]:
    """Return ``BRAIN`` by package, of installed recipes with objects among ``names``."""
    return {
        package: brain
        for package in recipe_packages()
        if (brain := getattr(sys.modules[package], "BRAIN", None)) is not None
        and any(name.startswith(f"{package}.") for name in names)
    }


def _texts(value: Any) -> set[str]:
    """Return the texts in nested mappings."""
    if isinstance(value, Mapping):
        return set().union(*map(_texts, value.values()))
    return {value} if isinstance(value, str) else set()


def recipe_class(package: str, attribute: str, names: Collection[str]) -> Any:
    """Return the class that a recipe's package names, such as "train.Recogniser".

    Args:
        package: a recipe.
        attribute: ``BRAIN`` or ``MODEL`` of the package: a class, or a mapping from objects that a
            YAML builds to classes.
        names: objects that the YAML builds.

    Raises:
        ValueError: the YAML builds none of the mapping's objects, or of two classes.
    """
    named = getattr(sys.modules[package], attribute, None)
    if isinstance(named, Mapping):
        classes = {kind for each, kind in named.items() if f"{package}.{each}" in names}
        if len(classes) != 1:
            raise ValueError(f"a run of {package} builds one of {', '.join(named)}")
        (named,) = classes
    if named is None:
        raise ValueError(
            f"{package} names no {attribute}: give a class as {attribute.lower()}=… to "
            f"trainer.load, or name it in {package.replace('.', '/')}/__init__.py"
        )
    module, _, name = str(named).rpartition(".")
    return getattr(importlib.import_module(f"{package}.{module}"), name)


@contextmanager
def open_run(
    run: str | Path,
    overrides: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
) -> Iterator[OpenRun]:
    """Context manager for reading a run folder and building objects from it.

    Within it no module is imported from the folder.

    Args:
        run: the run folder.
        overrides: new values of keys of its YAML.
        allow: packages, modules or objects by dotted name that the YAML may build, in addition to
            those of installed recipes.

    Raises:
        ValueError: the folder is no run folder or cannot be used, or building an object raised
            another error.
        ImportError: a package that a recipe needs is missing.
    """
    folder = Path(os.path.expanduser(run))
    if not (folder / HYPERPARAMS).is_file():
        raise ValueError(f"{run} is no run folder: it has no {HYPERPARAMS}")
    with no_modules_from(folder), sources_confined() as named:
        try:
            configuration = Configuration(folder / HYPERPARAMS, allow, run_folder=True)
            checkpoints = Checkpointer(confined(folder, folder / CHECKPOINTS))
            opened = OpenRun(folder, configuration, checkpoints, named)
            opened.override({"output_folder": str(folder), **(overrides or {})})
            yield opened
        except (ValueError, OSError, ImportError) as error:
            if isinstance(error, ValueError) and not str(error).isprintable():
                raise ValueError(printable(str(error))) from error
            raise
        except Exception as error:  # A YAML from elsewhere may have any value.
            memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
            reason = (
                "it needs far more memory than its checkpoints account for"
                if memory
                else cause(error)
            )
            nulls = [key for key, node in items(configuration.root) if tag(node) == NULL]
            if "NoneType" in reason and nulls:
                reason += f"; its {HYPERPARAMS} has null for {', '.join(map(printable, nulls))}"
            raise ValueError(f"{folder} cannot be used: {reason}") from error


class _Given(TypedDict, total=False):
    """Further arguments of `load`."""

    modules: Mapping[str, nn.Module] | None
    overrides: Mapping[str, Any] | None
    allow: Sequence[str]
    max_key: str | None
    min_key: str | None


@overload
def load(
    run: str | Path, device: str = "auto", *, brain: type[B], **given: Unpack[_Given]
) -> B: ...


@overload
def load(
    run: str | Path, device: str = "auto", *, model: type[M], **given: Unpack[_Given]
) -> M: ...


@overload
def load(run: str | Path, device: str = "auto", **given: Unpack[_Given]) -> Model: ...


def load(
    run: str | Path,
    device: str = "auto",
    *,
    model: type[Model] | None = None,
    brain: type[Brain] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    max_key: str | None = None,
    min_key: str | None = None,
) -> Model | Brain:
    """Load a trained model from its run folder, which may have been moved or come from elsewhere.

    No code in the folder is run, and nothing is written. The model has the weights that the recipe
    tests, in evaluation mode. The training loop and the recipe's data are imported only if
    ``brain`` is given.

    Args:
        run: the run folder: its hyperparams.yaml and its checkpoints; or a folder that
            `trainer.export` wrote.
        device: auto, cpu, cuda, cuda:1 …
        model: class of the model; None for that of the installed recipe.
        brain: class of a Brain to make instead, for example to `evaluate` it on a test set. It has
            no checkpointer, and records nothing.
        modules: networks by name, for a run whose YAML builds none, as by `trainer.launch`.
        overrides: new values of keys of the run's YAML. If checkpoints leave out frozen weights
            that came from ``init_from`` or a ``source``, give that key here: nothing else is read
            from outside the folder.
        allow: dotted names of packages, modules or objects that the YAML may build, in addition to
            those listed by installed recipes, such as those of your program.
        max_key: metric to choose the best checkpoint by; larger is better.
        min_key: metric to choose the best checkpoint by; smaller is better. Without either, the
            attribute ``best_checkpoint`` of the class decides, such as ``{"min_key": "wer"}``, else
            the newest checkpoint is loaded.

    Returns:
        A `Model`, or a Brain of the class ``brain``.

    Raises:
        ValueError: the folder is no run folder, belongs to another recipe than the class, builds an
            object that is not allowed, or has no sound checkpoint.
        ImportError: a package that the recipe needs is missing.

    Example::

        model = trainer.load("results/kws/demo/1234")
        print(model.transcribe("x.wav").text)
    """
    if model is not None and brain is not None:
        raise ValueError("both model and brain are given; allowed: one of them")
    if model is not None and not (isinstance(model, type) and issubclass(model, Model)):
        raise ValueError(f"model is {model!r}; allowed: a subclass of trainer.Model")
    if brain is not None:
        base = importlib.import_module("trainer.brain").Brain
        if not (isinstance(brain, type) and issubclass(brain, base)):
            raise ValueError(f"brain is {brain!r}; allowed: a subclass of trainer.Brain")
    device = str(device)
    place = pick_device(device)
    if place.type == "cuda":  # CUDA takes memory beyond that for files.
        torch.zeros(1, device=place)
    with rng_kept_alone(), open_run(run, overrides, allow) as opened:
        if (max_key or min_key) and is_export(opened.folder):
            raise ValueError(f"{run} is an export: there is no checkpoint to choose")
        kind = brain or model or opened.model_class()
        opened.check_class(kind)
        options = opened.options(*OF_THE_MODEL, device=device)
        uses = getattr(kind, "uses", ())
        with opened.limited():
            seed_everything(options.seed)  # Frozen weights may be random and not saved.
            hparams = opened.build(modules, uses)
            made = (
                kind(hparams["modules"], hparams, options)
                if issubclass(kind, Model)
                else kind(hparams["modules"], hparams=hparams, run_opts=options)
            )
            if overrides and overrides.get("init_from"):
                given = opened.configuration.options()
                initialise(made.modules, given["init_from"], given.get("init_map"))
            if max_key is None and min_key is None:
                best: Mapping[str, str | None] = getattr(made, "best_checkpoint", {})
                max_key, min_key = best.get("max_key"), best.get("min_key")
            put_weights(made.modules, opened.checkpointer, options, max_key, min_key, uses=uses)
            made.modules.eval()
            weights = made.modules.state_dict()
            _origins[made] = Origin(opened, max_key, min_key, weights)
            if isinstance(made, Model):
                made.folder = opened.folder
                made.prepare()
    return made


def put_weights(
    modules: nn.Module,
    checkpointer: Checkpointer,
    options: RunOptions,
    max_key: str | None = None,
    min_key: str | None = None,
    prefix: str = "",
    uses: Collection[str] = (),
) -> None:
    """Load into modules the weights of the best checkpoint of a run, or the mean of several.

    Args:
        modules: modules of the run.
        checkpointer: its checkpoints.
        options: ``average_checkpoints`` and ``ema_decay``.
        max_key: metric to choose the best checkpoint by; larger is better.
        min_key: metric to choose the best checkpoint by; smaller is better.
        prefix: name of the modules among those of the run, such as "generator.".
        uses: names of the modules to load; empty for all.

    Raises:
        ValueError: there is no sound checkpoint, or it does not fit the modules.
    """
    complete = partial(completed, modules=modules, prefix=prefix)
    source, run = checkpointer.folder, checkpointer.folder.parent
    if is_export(run):
        source, found = run, read_export(run)
    else:
        found = load_weights(checkpointer, options, max_key, min_key, complete)
    if found is None and not source.exists():
        raise ValueError(f"{run} has no weights: neither checkpoints/ nor, as an export, {WEIGHTS}")
    if found is None:
        some = (max_key or min_key) and checkpointer.find(n=None)
        of = f" with {max_key or min_key!r}, the metric that chooses one" if some else ""
        raise ValueError(f"{source} has no sound checkpoint{of}")
    if not isinstance(found, Mapping):
        raise ValueError(f"{source} has weights that are no mapping of names")
    keep_in_state_dict(modules)
    found = {
        name.removeprefix(prefix): value
        for name, value in found.items()
        if name.startswith(prefix) and (not uses or name.partition(".")[0] in uses)
    }
    try:
        check_weights(modules, found)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    modules.load_state_dict(found)
