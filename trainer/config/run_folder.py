"""The YAML of a run folder, which may come from elsewhere: it may build only listed classes.

It may name what recipes list in `RUN_NAMES`, the classes of torch, torchaudio and the trainer that
are listed here, and names in packages that the caller allows. `!new:` and `!name:` build classes;
`!apply:` calls `len` and the listed functions. `!applyref:`, `!module:`, `!include:`, `base`,
attributes of objects, and paths that lead out of the run folder are refused.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainer.config.building import ATTRIBUTE, arguments
from trainer.config.reading import location, nodes, object_name, plain, tag
from trainer.config.registry import NAME, NAMES, Registry, is_below, listed_names
from trainer.untrusted import confined

# Module of the name: base class, and the module or package that defines the class.
KINDS: dict[str, tuple[type, str]] = {
    "torch.nn": (nn.Module, "torch.nn.modules"),
    "torch.optim": (Optimizer, "torch.optim"),
    "torch.optim.lr_scheduler": (LRScheduler, "torch.optim.lr_scheduler"),
    "trainer": (object, "trainer.epochs"),
    "trainer.clipping": (object, "trainer.clipping"),
    "trainer.epochs": (object, "trainer.epochs"),
    "trainer.schedules": (object, "trainer.schedules"),
}
CLASSES = (
    "torchaudio.models.Conformer",
    "torchaudio.models.ConvTasNet",
    "torchaudio.models.Tacotron2",
    "torchaudio.transforms.SpecAugment",
    *(f"peft.{each}Config" for each in ("HRA", "IA3", "LoHa", "LoKr", "Lora")),
)
# Readers of a run folder, such as `trainer.load`, make a Checkpointer of their own.
TRAINING_ONLY = (
    "trainer.Checkpointer",
    "trainer.checkpoint.Checkpointer",
    "trainer.checkpoint.checkpointer.Checkpointer",
)


class RunFolderRegistry(Registry):
    """Resolves the names in the YAML of a run folder, and in packages that the caller allows."""

    source, attribute = "a run folder", "RUN_NAMES"

    def __init__(self, allow: Iterable[str] = ()) -> None:
        super().__init__(allow)
        self.listed -= {*NAMES.split()}
        every = {each for name in self.packages for each in listed_names(name, "YAML_NAMES")}
        self.training = every - self.listed

    def locate(self, name: str) -> Any:
        """Return the class, or the listed function, with a dotted name."""
        if name == "len":
            return len
        if name in self.listed or name in CLASSES or is_below(name, self.allowed):
            return super().locate(name)
        module, _, last = name.rpartition(".")
        if module in KINDS and NAME.fullmatch(name):
            base, home = KINDS[module]
            found = vars(importlib.import_module(module)).get(last)
            inside = is_below(getattr(found, "__module__", ""), [home])
            if inside and inspect.isclass(found) and issubclass(found, base):
                return found
        raise self._refusal(name)

    def is_for_training_only(self, name: str) -> bool:
        """Return True for a name that using a trained model does not need."""
        return name in TRAINING_ONLY or is_below(name, self.training)

    def _way_to_allow(self, name: str) -> str:
        return ""

    def _refusal(self, name: str, why: str = "") -> ValueError:
        if any(name.startswith(f"{each}.") for each in self.packages):
            return super()._refusal(name, why)
        return ValueError(
            f"{name!a} is not allowed: a run folder may build what installed recipes list in "
            "RUN_NAMES, layers of torch.nn, and optimizers and schedules; classes of your own are "
            "allowed by trainer.load(run, model=YourModel, allow=['your_package'])"
        )


def check_tags(root: Node) -> None:
    """Raise ValueError for `!applyref:`, which would run while references are resolved."""
    for node in nodes(root):
        if tag(node).startswith("!applyref:"):
            raise ValueError(f"{location(node)}: {tag(node)} is not allowed in a run folder")


def check_objects(root: MappingNode, registry: RunFolderRegistry, folder: Path) -> None:
    """Check the objects of a resolved tree, and that their paths lie in the run folder.

    Raises:
        ValueError: something is not allowed; names file and line.
    """
    for node in nodes(root):
        try:
            if tag(node) == ATTRIBUTE:
                attribute = str(node.value[1].value)
                raise ValueError(
                    f"{attribute!r} is an attribute of an object, which a run folder may not read"
                )
            if object_name(node):
                _check_object(node, registry, folder)
        except ValueError as error:
            raise ValueError(f"{location(node)}: {error}") from error


def _check_object(node: Node, registry: RunFolderRegistry, folder: Path) -> None:
    name = object_name(node)
    kind, target = tag(node).removesuffix(name), registry.locate(name)
    if inspect.isclass(target):
        allowed = kind in ("!new:", "!name:")
    else:
        allowed = kind == "!apply:" and (name == "len" or name in registry.listed)
    if not allowed:
        raise ValueError(
            f"{tag(node)} is not allowed in a run folder: it builds classes by !new: and !name:, "
            "and calls only functions that recipes list in RUN_NAMES"
        )
    for _, parameter, value in arguments(node, target):
        if "Path" in str(parameter.annotation) and isinstance(value, ScalarNode):
            text = plain(value)
            if isinstance(text, str):
                confined(folder, text)
