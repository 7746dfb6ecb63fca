"""Registry of the names that a YAML may build: an allow-list, checked before every import.

A name resolves only if it is plain ASCII, none of its parts begins with an underscore, every module
on the way holds allowed names and has the name that leads to it (so that
`torch.utils.data.os.system` ends at `os`), and the object found is

1. listed by name: in `NAMES`, by the trainer, or by a recipe; or
2. of a kind that `CLASSES` or `FUNCTIONS` lists for the module that defines it, such as a network
   in torch.nn.modules, or an operation of torch on tensors. Such objects construct or calculate;
   methods and modules are excluded; or
3. public, and defined in a package that the user allows (`--allow`, `allow=[…]`), or that lies
   beside the user's train.py. Methods must be class or static methods.

A name that the user allows in full, such as `os.path.join`, passes without any of these checks.

The trainer and each recipe list names of their own, relative to their package: `RUN_NAMES` for the
hyperparams.yaml of a run folder, and `YAML_NAMES` for any YAML. Recipes are found by the
entry-point group `cortex.recipes` of their distribution. Such a package must import nothing: it is
imported before its names are checked.
"""

from __future__ import annotations

import builtins
import collections
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import numbers
import pathlib
import pkgutil
import pydoc
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributions import Distribution, Transform
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler

from trainer.compat import toolkit
from trainer.compat.old_paths import OLD_PATHS, current_path
from trainer.options import nearest

logger = logging.getLogger("trainer")

ENTRY_POINTS = "cortex.recipes"

BUILTINS = """
    abs bool dict float frozenset int len list max min range round set slice sorted str sum tuple
"""

NAMES = """
    collections.Counter collections.OrderedDict math.e math.inf math.nan math.pi math.tau
    torch.device torch.dtype torch.Generator torch.Size torch.Tensor
    torch.distributions.kl_divergence torch.nn.Buffer torch.nn.Parameter
    torch.nn.Embedding.from_pretrained torch.nn.EmbeddingBag.from_pretrained
    torch.nn.utils.remove_weight_norm torch.nn.utils.spectral_norm torch.nn.utils.weight_norm
    torch.utils.data.DataLoader torch.utils.data.default_collate torch.utils.data.random_split
    peft.get_peft_model
"""

ADAPTERS = """
    adalora hra ia3 ln_tuning loha lokr lora oft p_tuning prefix_tuning vera
"""
# Modules of torchmetrics whose metrics download nothing.
METRICS = """
    aggregation audio classification clustering collections image.psnr image.ssim nominal
    regression retrieval segmentation shape text.bleu text.cer text.chrf text.edit text.eed text.mer
    text.perplexity text.squad text.ter text.wer text.wil text.wip wrappers
"""

# Base classes of the classes that may be named, by the module that defines a class. Base classes of
# optional packages are given by their names.
CLASSES: dict[str, tuple[type | str, ...]] = {
    "torch.distributions": (Distribution, Transform),
    "torch.nn.modules": (Module,),
    "torch.optim": (Optimizer, LRScheduler, Module),
    "torch.utils.data.dataset": (Dataset,),
    "torch.utils.data.distributed": (Sampler,),
    "torch.utils.data.sampler": (Sampler,),
    "torchaudio.models": (Module,),
    "torchaudio.transforms": (Module,),
    "peft.peft_model": (Module,),
    **{f"peft.tuners.{each}": (Module, "PeftConfig") for each in ADAPTERS.split()},
    "sentencepiece": ("SentencePieceProcessor",),
    **{f"torchmetrics.{each}": (Module,) for each in METRICS.split()},
    "transformers": (
        *(Module, "PretrainedConfig", "PreTrainedConfig", "PreTrainedTokenizerBase"),
        *("FeatureExtractionMixin", "ProcessorMixin"),
    ),
    "transformers.models.auto": (object,),
    "transformers.optimization": (Optimizer,),
    "lhotse.dataset.cut_transforms": (object,),
    "lhotse.dataset.sampling": (Sampler,),
    "lhotse.dataset.signal_transforms": (Module,),
    "lhotse.features.fbank": (object,),
    "lhotse.features.kaldi": (object,),
    "lhotse.features.mfcc": (object,),
    "lhotse.features.spectrogram": (object,),
}
# Modules whose functions may be named.
FUNCTIONS = """
    math torch.fft torch.functional torch.linalg torch.nn.functional torch.nn.init
    torch.nn.utils.parametrizations torch.nn.utils.rnn torch.signal torch.special
    torchaudio.compliance.kaldi torchaudio.functional torchaudio.models._hdemucs
    torchaudio.models.conv_tasnet torchaudio.models.rnnt torchaudio.models.squim
    torchaudio.models.wav2vec2.model transformers.optimization
"""
COMPILED = ("torch._C._fft", "torch._C._linalg", "torch._C._nn", "torch._C._special")

# Parts of these packages that stay closed when a user allows a package as a whole: they run code or
# commands, read pickles, write files or download. A user can allow single names of them in full.
CLOSED = """
    lhotse.audio.backend lhotse.bin lhotse.caching lhotse.dataset.cut_transforms.reverberate
    lhotse.dataset.sampling.stateless lhotse.dataset.signal_transforms.GlobalMVN.from_file
    lhotse.dataset.webdataset lhotse.features.io lhotse.hf lhotse.kaldi lhotse.lazy lhotse.recipes
    lhotse.serialization lhotse.shar lhotse.tools lhotse.utils lhotse.workflows
    torch._C torch.classes torch.compile torch.cuda.jiterator torch.distributed torch.export
    torch.fork torch.from_file torch.fx torch.hub torch.import_ir_module
    torch.import_ir_module_from_buffer torch.jit torch.library torch.multiprocessing
    torch.onnx torch.ops torch.package torch.parse_ir torch.serialization torch.storage
    torch.testing torch.utils torch.wait torchaudio.datasets torchaudio.io torchaudio.load
    torchaudio.models.decoder torchaudio.save torchaudio.utils torchmetrics.audio.dnsmos
    torchmetrics.audio.nisqa
"""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*")
NAME_IN_FULL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
MAKERS = ("from_pretrained", "from_config")  # class methods of transformers
PLAIN = (bool, int, float, str, list, tuple, dict, set, frozenset, type(None))

# Types of attributes that `!ref <object.attribute>` reads, alone or in containers.
VALUES = (
    numbers.Number, str, type(None), pathlib.PurePath, torch.Tensor, Module, torch.dtype,
    torch.device,
)  # fmt: skip
CONTAINERS = (list, tuple, dict, set, frozenset, torch.Size, collections.OrderedDict)
# Packages whose properties may be read on the way, in addition to allowed packages.
READABLE = {"abc", "builtins", "collections", "enum", "pathlib", "trainer"}

Rule = Literal["open", "kind", "closed"]


class Registry:
    """Resolves the dotted names in a YAML, if they are allowed.

    Args:
        allow: packages, modules or single objects by dotted name, in addition to the names that
            the trainer and the recipes list. For a package with `YAML_NAMES` only these are
            allowed.
    """

    source = "a YAML"  # in messages
    attribute = "YAML_NAMES"  # of packages: their list of names

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self.downloads = False  # True if objects may download files while they are built.
        self.packages = {"trainer", *recipe_packages()}
        allowed = [allow] if isinstance(allow, str) else [*allow]
        for name in allowed:
            if not isinstance(name, str) or not NAME_IN_FULL.fullmatch(name):
                raise ValueError(f"allow must hold names such as 'mypackage', not {name!r}")
            if hasattr(sys.modules.get(name), "YAML_NAMES"):
                self.packages.add(name)
        if toolkit.PACKAGE in sys.modules and self.attribute == "YAML_NAMES":
            allowed.append(toolkit.PACKAGE)
        self.allowed = {*allowed} - self.packages
        self.listed = {*NAMES.split()}
        for package in self.packages:
            self.listed |= {*listed_names(package, self.attribute)}
        # The longest prefix of a name decides.
        self.rules: dict[str, Rule] = dict.fromkeys(
            [*CLOSED.split(), *toolkit.CLOSED, *self.packages], "closed"
        )
        self.rules |= dict.fromkeys([*CLASSES, *FUNCTIONS.split()], "kind")
        self.rules |= dict.fromkeys(self.allowed, "open")
        # Allowed names, and modules with allowed names.
        self.good = {*self.listed, *(name for name, rule in self.rules.items() if rule != "closed")}

    def locate(self, name: str) -> Any:
        """Return the object with a dotted name.

        Raises:
            ValueError: the name is not allowed, or there is no such object.
        """
        full = f"builtins.{name}" if hasattr(builtins, name) else name
        if full in self.allowed:
            return _located(full)
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!a} is not a public name: parts of ASCII letters, digits and '_', joined by "
                f"dots, none beginning with '_'{self._way_to_allow(name)}"
            )
        if full.removeprefix("builtins.") in BUILTINS.split():
            return getattr(builtins, full.removeprefix("builtins."))
        owner = found = None
        path = ""
        is_old = ".".join(name.split(".")[:2]) in OLD_PATHS
        for part in (current_path(name) if is_old else name).split("."):
            if owner is not None and not (
                inspect.ismodule(found) or self._allows(path, owner, found)
            ):
                break  # Attributes of a refused object are not read.
            path = f"{path}.{part}".removeprefix(".")
            owner, found = found, self._step(found, path, part, full)
        if not self._allows(path, owner, found):
            raise self._refusal(full, _description(owner, found))
        return found

    def is_for_training_only(self, name: str) -> bool:
        """Return True for a name that is not needed to use a trained model."""
        return False

    def is_own(self, name: str) -> bool:
        """Return True for a name that the user allows, or in a package of the user."""
        return self._rule(name) == "open"

    def read(self, owner: Any, name: str) -> Any:
        """Return an attribute of a built object, for `!ref <object.name>`.

        A property is read only if its class belongs to a package that is allowed.

        Raises:
            AttributeError: there is no such attribute.
            ValueError: the class is not allowed, or the attribute is no value and no network.
        """
        classes = (*type(owner).__mro__, *(owner.__mro__ if inspect.isclass(owner) else ()))
        code = {name, "__getattr__", "__getattribute__"}
        foreign = [each for each in classes if code & {*vars(each)} and not self._is_readable(each)]
        what = f"{name!r} of a {type(owner).__name__} is not allowed"
        if inspect.ismodule(owner) or foreign:
            raise ValueError(
                f"{what}: a reference reads attributes of networks, tensors, and objects of "
                "allowed packages"
            )
        value = getattr(owner, name)
        if self._is_value(value):
            return value
        instead = (
            "; a function is given by !name:module.function, and a method is taken from its "
            "object in train.py"
        )
        raise ValueError(
            f"{what}: it is a {type(value).__name__}, and a reference reads numbers, texts, "
            "tensors, networks, paths, and lists or mappings of these"
            f"{instead if callable(value) else ''}"
        )

    def _rule(self, name: str) -> Rule | None:
        """Return the rule of the longest prefix of `name`, None if there is none."""
        while name and name not in self.rules:
            name = name.rpartition(".")[0]
        return self.rules.get(name)

    def _is_related(self, module: str) -> bool:
        """Return True for a module that is allowed, or that contains an allowed name."""
        ahead = any(name.startswith(f"{module}.") for name in self.good)
        return ahead or self._rule(module) in ("open", "kind")

    def _step(self, owner: Any, path: str, part: str, name: str) -> Any:
        """Return the module `path`, imported if related, or else the attribute `part`."""
        related, inside = self._is_related(path), inspect.ismodule(owner)
        is_module = (owner is None or inside) and _is_module(path)
        if owner is None and not related:
            raise self._refusal(name)
        if related and is_module:
            found = _import(path, name)
        elif owner is None:
            raise ValueError(f"{name} does not exist: no module is called {path!r}")
        else:
            # A module's `__getattr__` may import a submodule, so that `hasattr` would run code.
            asked = related or path in self.listed or not inside
            try:
                have = hasattr(owner, part) if asked else part in vars(owner)
            except ImportError as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{name} cannot be imported: {reason}") from error
            if not have and (is_module or part in getattr(owner, "__all__", ())):
                raise self._refusal(name)
            if not have:
                place, hint = path.rpartition(".")[0], nearest(part, _public(owner))
                raise ValueError(f"{name} does not exist: {place} has no {part!r}{hint}")
            found = getattr(owner, part)
        if inspect.ismodule(found) and not (related and found.__name__ == path):
            why = f"{path} is the module {found.__name__}" if found.__name__ != path else ""
            raise self._refusal(name, why)
        return found

    def _allows(self, name: str, owner: Any, found: Any) -> bool:
        """Return True if the object `found`, read from `owner` by `name`, may be named."""
        if name in self.listed or isinstance(found, torch.dtype):
            return True
        if inspect.ismodule(found) or isinstance(found, PLAIN):
            return self._rule(name) == "open"
        if inspect.isbuiltin(found) and _is_operation(found):
            return True
        if is_maker(found) and inspect.isclass(owner):
            return self._rule(name) != "closed"  # The class is allowed already.
        if _needs_object(owner, name.rpartition(".")[2], found):
            return False
        if self._rule(name) == "open" and _is_inherited(found):
            return True
        while isinstance(found, functools.partial) and inspect.ismodule(owner):
            found = found.func
        origin = _origin(found)
        labels = {
            getattr(found, key, type(found).__qualname__) for key in ("__qualname__", "__name__")
        }
        rules = {self._rule(f"{origin}.{label}") for label in labels}
        if rules == {"open"}:
            return self._rule(name) != "closed"
        return rules == {"kind"} and inspect.ismodule(owner) and _is_of_kind(found, origin)

    def _is_readable(self, kind: type) -> bool:
        """Return True if properties of a class may be read."""
        module = str(kind.__module__)
        roots = READABLE | {each.partition(".")[0] for each in (*CLASSES, *self.packages)}
        return module.partition(".")[0] in roots or self.is_own(module)

    def _is_value(self, value: Any) -> bool:
        """Return True for a value or a network, or a container of these."""
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            each = waiting.pop()
            kind = type(each)
            if isinstance(each, VALUES) or id(each) in seen:
                continue
            if isinstance(each, CONTAINERS) and (kind in CONTAINERS or hasattr(kind, "_fields")):
                seen.add(id(each))
                waiting += [*each, *each.values()] if isinstance(each, dict) else each
            elif inspect.isclass(each) or not self.is_own(f"{kind.__module__}.{kind.__qualname__}"):
                return False
        return True

    def _way_to_allow(self, name: str) -> str:
        """Return advice on allowing a name, as the end of a sentence."""
        if not NAME_IN_FULL.fullmatch(name):
            return ""
        return f"; allow it by --allow {name} on the command line, or allow=['{name}'] in Python"

    def _refusal(self, name: str, why: str = "") -> ValueError:
        allow = self._way_to_allow(name)
        for package in self.packages:
            if name.startswith(f"{package}."):
                return ValueError(
                    f"{name} is not allowed: {package} does not list it; a name that {self.source} "
                    f"may build is listed in {self.attribute} of "
                    f"{package.replace('.', '/')}/__init__.py{allow}"
                )
        head = name.partition(".")[0]
        heads = sorted({each.partition(".")[0] for each in self.good})
        hint = "" if head in heads else nearest(head, heads)
        if not (_is_module(head) or hasattr(builtins, head)):
            return ValueError(f"{name} does not exist: no module is called {head!r}{hint}")
        if allow:
            allow += ", and the whole of your own package by trainer.main(train, allow=['package'])"
        return ValueError(
            f"{name} is not allowed{f' ({why})' if why else ''}; a YAML may name what builds "
            f"things in {', '.join(heads)} and plain builtins such as dict{allow}{hint}"
        )


# ---------------------------------------------------------------- recipes


def install_hint(error: Exception) -> str:
    """Return the command that installs the module that an import lacks, or "".

    It is that of the first extra with the module among the distributions of recipes.
    """
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = re.escape(error.name.partition(".")[0]).replace("_", "[-_]")
        for each in importlib.metadata.entry_points(group=ENTRY_POINTS):
            for line in (each.dist and each.dist.requires) or ():
                extra = re.match(rf"{top}\b(?![-.]).*extra == ['\"]([\w-]+)", line)
                if each.dist and extra:
                    return f": pip install '{each.dist.name}[{extra[1]}]'"
    return ""


@functools.cache
def recipe_packages() -> tuple[str, ...]:
    """Return the packages of all recipes: those installed, and those of this checkout.

    The entry points of a checkout that is not installed are read from its pyproject.toml.
    """
    found = {each.module for each in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        found |= set(table.get("entry-points", {}).get(ENTRY_POINTS, {}).values())
    packages = []
    for name in sorted(found):
        try:
            if not hasattr(importlib.import_module(name), "__path__"):
                raise ImportError("it is a module, and a recipe is a package")
            packages.append(name)
        except Exception as error:  # Another author's recipe must not break the others.
            # A distribution may declare recipes that are not installed.
            if not (isinstance(error, ModuleNotFoundError) and is_below(name, [str(error.name)])):
                logger.warning(
                    "the recipe %s is left out, since its import fails: %s: %s",
                    name, type(error).__name__, error,
                )  # fmt: skip
    return tuple(packages)


def recipe_of(script: Path) -> str | None:
    """Return the package of the recipe whose train.py a path names; None for another program."""
    for package in recipe_packages():
        train = (*package.split("."), "train.py")
        if hasattr(sys.modules[package], "BRAIN") and script.parts[-len(train) :] == train:
            return package
    return None


def listed_names(package: str, attribute: str) -> list[str]:
    """Return the full names that a recipe's package lists; ValueError if they are no names."""
    names = getattr(sys.modules[package], attribute, ())
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"{attribute} of {package} must hold names such as 'model.Net', not {name!r}"
            )
    return [f"{package}.{name}" for name in names]


# ---------------------------------------------------------------- modules


def is_below(name: str, packages: Iterable[str]) -> bool:
    """Return True for a name that is one of the packages, or lies in one."""
    return any(f"{name}.".startswith(f"{each}.") for each in packages)


def is_maker(target: Any) -> bool:
    """Return True for a class method of transformers that makes a model or a tokenizer.

    A subclass elsewhere may inherit it.
    """
    own = inspect.isclass(getattr(target, "__self__", None)) and target.__name__ in MAKERS
    return own and str(target.__module__).startswith("transformers.")


def _located(name: str) -> Any:
    """Return the object with a name that the user allows."""
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        raise ValueError(f"{name} cannot be imported: {error.value}") from error
    if found is None:
        raise ValueError(f"{name} does not exist")
    return found


def _is_operation(found: Any) -> bool:
    """Return True for a compiled operation of torch on tensors, such as zeros or conv1d."""
    own = getattr(torch._C._VariableFunctions, found.__name__, None) is found
    return (own or found.__module__ in COMPILED) and found is not torch.from_file


def _is_of_kind(found: Any, origin: str) -> bool:
    """Return True for a class or function that CLASSES or FUNCTIONS allows in its module."""
    if not inspect.isclass(found):
        return inspect.isroutine(found) and is_below(origin, FUNCTIONS.split())
    bases = {*found.__mro__, *(each.__name__ for each in found.__mro__)}
    return any(is_below(origin, [each]) and bases & {*CLASSES[each]} for each in CLASSES)


def _is_inherited(found: Any) -> bool:
    """Return True for a class method in `NAMES` that a subclass inherits."""
    label = f".{getattr(found, '__name__', '')}"
    twins = [pydoc.locate(each) for each in NAMES.split() if each.endswith(label)]
    function = getattr(found, "__func__", None)
    return function is not None and function in [getattr(t, "__func__", None) for t in twins]


def _needs_object(owner: Any, name: str, found: Any) -> bool:
    """Return True for a method that needs an object, such as `save`, and makes none."""
    if not inspect.isroutine(found) or inspect.ismodule(owner):
        return False
    defined = inspect.getattr_static(owner, name, None)
    return not (inspect.isclass(owner) and isinstance(defined, (classmethod, staticmethod)))


def _description(owner: Any, found: Any) -> str:
    """Describe a refused object for a message."""
    if inspect.ismodule(found):
        return "it is a module"
    if inspect.isclass(owner) or (inspect.isroutine(found) and not inspect.ismodule(owner)):
        return "it is a method"
    return f"it is defined in {_origin(found)}"


def _origin(found: Any) -> str:
    """Return the module that defines an object, or else its class."""
    return str(getattr(found, "__module__", None) or type(found).__module__)


def _public(owner: Any) -> list[str]:
    """Return the public names of `owner`, with submodules that are not imported yet."""
    below = [each.name for each in pkgutil.iter_modules(getattr(owner, "__path__", []))]
    return [each for each in [*dir(owner), *below] if not each.startswith("_")]


def _is_module(path: str) -> bool:
    """Return True if a module of this name exists; its parents are imported already."""
    try:
        return importlib.util.find_spec(path) is not None
    except (ImportError, ValueError):  # The parent is no package, or has no spec.
        return False


def _import(path: str, name: str) -> Any:
    """Import a module on the way to `name`."""
    try:
        return importlib.import_module(path)
    except Exception as error:
        why = (
            f"{name} needs the module {path}, whose import failed: {type(error).__name__}: {error}"
            f"{install_hint(error)}"
        )
        raise ValueError(why) from error
