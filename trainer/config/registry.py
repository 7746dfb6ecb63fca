"""Registry of the names that a YAML may build: an allow-list, checked before every import.

A YAML file is data that people exchange, and `!apply:os.system` would run it as a program. A name
resolves only if

1. it is plain ASCII and none of its parts begins with an underscore,
2. every module on the way to it belongs to an allowed package (checked before it is imported) and
   has that name itself, so that `torch.utils.data.os.system` ends at `os`,
3. the object found was defined in an allowed package, so that a re-export of something else does
   not pass, and is not refused there.

The lists here cover torch, lhotse and the trainer itself. Each recipe lists its own names::

    # recipes/asr/__init__.py
    RUN_NAMES = ("model.ConformerCTC",)  # what the hyperparams.yaml of a run folder may build
    YAML_NAMES = (*RUN_NAMES, "data.librispeech")  # what a YAML may build from recipes.asr

and is found by the entry-point group `cortex.recipes` of its distribution (`asr = "recipes.asr"`).
Such a package must import nothing: it is imported before any of its names is checked.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.compat.old_paths import current_path
from trainer.options import nearest

ENTRY_POINTS = "cortex.recipes"

BUILTINS = """
    abs bool dict float frozenset int len list max min range round set slice sorted str sum tuple
"""

ALLOWED = """
    collections.Counter collections.OrderedDict collections.defaultdict math
    torch.device torch.dtype torch.Size torch.Tensor torch.Generator
    torch.distributions torch.fft torch.linalg torch.nn torch.optim torch.signal torch.special
    torch.utils.data
    torchaudio.compliance torchaudio.functional torchaudio.models torchaudio.transforms torchmetrics
    lhotse.augmentation lhotse.dataset.cut_transforms lhotse.dataset.sampling
    lhotse.dataset.signal_transforms lhotse.features.fbank lhotse.features.kaldi
    lhotse.features.mfcc lhotse.features.spectrogram
    trainer.metrics trainer.optim.ema trainer.checkpoint.checkpointer trainer.clipping
    trainer.data trainer.epochs
    trainer.schedules
"""

# The longest prefix decides, so these hold inside what is allowed above, and inside the whole of a
# package that a user allows: what runs code or commands, reads pickles, writes files or downloads.
REFUSED = """
    torch.classes torch.compile torch.cuda.jiterator torch.distributed torch.export torch.fork
    torch.from_file torch.fx torch.hub torch.import_ir_module torch.import_ir_module_from_buffer
    torch.jit torch.library torch.load torch.multiprocessing torch.onnx torch.ops torch.package
    torch.parse_ir torch.save torch.serialization torch.storage torch.testing
    torch.utils.benchmark torch.utils.bottleneck torch.utils.bundled_inputs
    torch.utils.collect_env torch.utils.cpp_extension torch.utils.data.backward_compatibility
    torch.utils.data.datapipes torch.utils.data.graph torch.utils.data.graph_settings
    torch.utils.file_baton torch.utils.hipify torch.utils.mobile_optimizer torch.utils.model_dump
    torch.utils.model_zoo torch.utils.show_pickle torch.utils.tensorboard torch.wait
    torchaudio.datasets torchaudio.io torchaudio.load torchaudio.save torchaudio.utils
    torchaudio.models.decoder.download_pretrained_files
    torchaudio.models.decoder._ctc_decoder.download_pretrained_files
    lhotse.audio.backend lhotse.bin lhotse.caching lhotse.features.io lhotse.hf lhotse.kaldi
    lhotse.lazy lhotse.recipes lhotse.serialization lhotse.shar lhotse.tools lhotse.utils
    lhotse.workflows lhotse.dataset.signal_transforms.GlobalMVN.from_file lhotse.dataset.webdataset
    trainer.config trainer.config.hyperparameters trainer.cli trainer.main trainer.launch
"""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*")
PLAIN = (bool, int, float, str, list, tuple, dict, set, frozenset, type(None))


class Registry:
    """Resolves the dotted names in a YAML, if they are allowed.

    Args:
        allow: packages, modules or single objects by dotted name, in addition to the names that
            the trainer and the recipes list. A package with `YAML_NAMES` is opened by these alone.
        run_folder: the YAML is the hyperparams.yaml of a run folder, which may come from elsewhere:
            of recipes only `RUN_NAMES` are allowed.

    Raises:
        ValueError: `allow` holds something else than names.
    """

    def __init__(self, allow: Iterable[str] = (), *, run_folder: bool = False) -> None:
        self.attribute = "RUN_NAMES" if run_folder else "YAML_NAMES"
        self.rules = dict.fromkeys(ALLOWED.split(), True)
        self.rules |= dict.fromkeys(REFUSED.split(), False)
        self.packages = set(recipe_packages())
        allowed = [allow] if isinstance(allow, str) else list(allow)
        for name in allowed:
            if not NAME.fullmatch(name):
                raise ValueError(f"allow must hold names such as 'mypackage', not {name!r}")
            if hasattr(sys.modules.get(name), "YAML_NAMES"):
                self.packages.add(name)
        self.training: set[str] = set()  # listed for YAML files and not for run folders
        for package in self.packages:
            names = listed_names(package, self.attribute)
            self.rules |= dict.fromkeys(names, True) | {package: False}
            if run_folder:
                self.training |= {*listed_names(package, "YAML_NAMES")} - {*names}
        self.rules |= {name: True for name in allowed if name not in self.packages}

    def locate(self, name: str) -> Any:
        """Return the object with a dotted name.

        Raises:
            ValueError: the name is not allowed, or there is no such object.
        """
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!a} is not a public name: parts of ASCII letters, digits and '_', joined by "
                "dots, none beginning with '_'"
            )
        if self._decision(name) is None:
            name = current_path(name)
        bare = name.removeprefix("builtins.")
        if bare in BUILTINS.split():
            return getattr(builtins, bare)
        found: Any = None
        parts = name.split(".")
        for count, part in enumerate(parts, 1):
            found = self._step(found, ".".join(parts[:count]), part, name)
        if name in self.rules or inspect.ismodule(found) or isinstance(found, PLAIN):
            allowed = self._decision(name) is True
        else:
            allowed = self._decision(name) is not False and self._defined_inside(found)
        if not allowed:
            raise self._refusal(name, f"it is defined in {_origin(found)}")
        return found

    def is_for_training_only(self, name: str) -> bool:
        """Return True for a name that recipes list for YAML files, but not for run folders."""
        return any(f"{name}.".startswith(f"{each}.") for each in self.training)

    def check_attribute(self, value: Any, name: str) -> None:
        """Refuse an attribute of a built object that is a module, or code from elsewhere."""
        code = inspect.isroutine(value) or inspect.isclass(value)
        if inspect.ismodule(value) or (code and not self._defined_inside(value)):
            raise self._refusal(name, f"it comes from {_origin(value)}")

    def _decision(self, name: str) -> bool | None:
        """Return the decision of the longest rule that covers `name`, None if there is no rule."""
        while name:
            if name in self.rules:
                return self.rules[name]
            name = name.rpartition(".")[0]
        return None

    def _related(self, module: str) -> bool:
        """Return True for a module that is allowed, or that contains an allowed name."""
        ahead = (rule.startswith(f"{module}.") for rule, allowed in self.rules.items() if allowed)
        return self._decision(module) is True or any(ahead)

    def _step(self, owner: Any, path: str, part: str, name: str) -> Any:
        """Return the module `path`, imported if it is related, or else the attribute `part`."""
        related = self._related(path)
        is_module = (owner is None or inspect.ismodule(owner)) and _is_module(path)
        if related and is_module:
            found = _import(path, name)
        elif owner is None and related:
            raise ValueError(f"{name} does not exist: no module is called {path!r}")
        elif owner is None or (is_module and not hasattr(owner, part)):
            raise self._refusal(name)
        elif not hasattr(owner, part):
            place, hint = path.rpartition(".")[0], nearest(part, _public(owner))
            raise ValueError(f"{name} does not exist: {place} has no {part!r}{hint}")
        else:
            found = getattr(owner, part)
        if inspect.ismodule(found) and not (related and found.__name__ == path):
            why = f"{path} is the module {found.__name__}" if found.__name__ != path else ""
            raise self._refusal(name, why)
        return found

    def _defined_inside(self, found: Any) -> bool:
        """Return True if the code or the class of an object is from somewhere allowed."""
        origin = _origin(found)
        names = {
            getattr(found, key, type(found).__qualname__) for key in ("__qualname__", "__name__")
        }
        decisions = {self._decision(f"{origin}.{label}") for label in names}
        if decisions == {None} and inspect.isbuiltin(found):
            # torch's operations come from its compiled part: zeros, relu, conv1d …
            return bool(re.fullmatch(r"torch|torch\._C\._(nn|fft|linalg|special)", origin))
        return decisions == {True}

    def _refusal(self, name: str, why: str = "") -> ValueError:
        package = next((each for each in self.packages if name.startswith(f"{each}.")), None)
        if package is not None:
            place = f"{package.replace('.', '/')}/__init__.py"
            return ValueError(
                f"{name} is not allowed: {package} does not list it; a name that "
                f"{'a run folder' if self.attribute == 'RUN_NAMES' else 'a YAML'} may build is "
                f"listed in {self.attribute} of {place}"
            )
        head = name.partition(".")[0]
        heads = sorted({rule.partition(".")[0] for rule, good in self.rules.items() if good})
        hint = "" if head in heads else nearest(head, heads)
        return ValueError(
            f"{name} is not allowed{f' ({why})' if why else ''}; a YAML may name what builds "
            f"things in {', '.join(heads)} and plain builtins such as dict; a package of your own "
            f"is allowed by trainer.main(train, allow=['package']){hint}"
        )


# ---------------------------------------------------------------- recipes


@functools.cache
def recipe_packages() -> tuple[str, ...]:
    """Return the packages of all recipes: those installed, and those of this checkout.

    In a checkout that is not installed the entry points are read from its pyproject.toml.
    """
    found = {each.value for each in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        found |= set(table.get("entry-points", {}).get(ENTRY_POINTS, {}).values())
    packages = []
    for name in sorted(found):
        # A distribution may declare recipes that it was installed without.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
            packages.append(name)
    return tuple(packages)


def listed_names(package: str, attribute: str) -> list[str]:
    """Return the full names that a recipe's package lists in `attribute`.

    Raises:
        ValueError: the package lists something else than dotted names.
    """
    names = getattr(sys.modules[package], attribute, ())
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"{attribute} of {package} must hold names such as 'model.Net', not {name!r}"
            )
    return [f"{package}.{name}" for name in names]


# ---------------------------------------------------------------- modules


def _origin(found: Any) -> str:
    """Return the module in which an object, or else its class, is defined."""
    if inspect.ismodule(found):
        return found.__name__
    origin = getattr(found, "__module__", None)
    return str(origin or type(found).__module__)


def _public(owner: Any) -> list[str]:
    """Return the public names of `owner`, with submodules that are not imported yet."""
    below = [each.name for each in pkgutil.iter_modules(getattr(owner, "__path__", []))]
    return [each for each in [*dir(owner), *below] if not each.startswith("_")]


def _is_module(path: str) -> bool:
    """Return True if there is a module of this name; its parents are imported already."""
    try:
        return importlib.util.find_spec(path) is not None
    except (ImportError, ValueError):  # The parent is no package, or has no spec.
        return False


def _import(path: str, name: str) -> Any:
    """Import a module on the way to `name`."""
    try:
        return importlib.import_module(path)
    except Exception as error:
        extra = ""
        if isinstance(error, ModuleNotFoundError):
            extra = (
                " (packages that a recipe needs are extras of its distribution, as in "
                "pip install 'cortex-speech[recipes]')"
            )
        raise ValueError(
            f"{name} needs the module {path}, whose import failed: "
            f"{type(error).__name__}: {error}{extra}"
        ) from error
