"""Import paths of earlier versions, as aliases of the modules that replaced them.

After `install`, `import trainer.nonfinite` returns the module `trainer.optim.guard`, which is
imported only then. Dotted names in a YAML are translated by `current_path`.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, PathEntryFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Successors by former module, searched in order for a name.
OLD_PATHS: dict[str, tuple[str, ...]] = {
    "trainer.averages": ("trainer.metrics", "trainer.optim.ema"),
    "trainer.configuration": ("trainer.config",),
    "trainer.drift": ("trainer.diagnostics.replica_check",),
    "trainer.feeding": ("trainer.data.feed",),
    "trainer.finding": ("trainer.tuner",),
    "trainer.hooks": ("trainer.progress",),
    "trainer.hparams": ("trainer.config.hyperparameters",),
    "trainer.interrupt": ("trainer.signals",),
    "trainer.journal": ("trainer.loggers",),
    "trainer.log": ("trainer.loggers.files",),
    "trainer.nonfinite": ("trainer.optim.guard",),
    "trainer.page": ("trainer.report",),
    "trainer.precision": ("trainer.optim.precision",),
    "trainer.replay": ("trainer.diagnostics.replay",),
    "trainer.run": ("trainer.cli",),
    "trainer.step": ("trainer.optim.step",),
    "trainer.testing": ("trainer.evaluation",),
    "trainer.update": ("trainer.optim.step",),
}


def current_path(name: str) -> str:
    """Return the current dotted name of an object whose module may have moved.

    Args:
        name: dotted name of a module or of an object in one, such as "trainer.averages.Mean".

    Returns:
        The current name, such as "trainer.metrics.Mean"; ``name`` itself if nothing has moved.
    """
    parts = name.split(".")
    modules, rest = OLD_PATHS.get(".".join(parts[:2]), ()), parts[2:]
    for module in modules:
        if len(modules) == 1 or (rest and hasattr(importlib.import_module(module), rest[0])):
            return ".".join([module, *rest])
    return name


class _Finder(PathEntryFinder, Loader):
    """Finder and loader of former modules of `trainer`."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in OLD_PATHS else None

    def exec_module(self, module: ModuleType) -> None:
        """Replace `module` by its successor, or fill it with the public names of packages.

        The alias of a package has no submodules, which would be imported a second time.
        """
        modules = [importlib.import_module(name) for name in OLD_PATHS[module.__name__]]
        if len(modules) == 1 and not hasattr(modules[0], "__path__"):
            sys.modules[module.__name__] = modules[0]
            return
        for each in reversed(modules):
            vars(module).update({name: vars(each)[name] for name in vars(each) if name[0] != "_"})


def install(search_path: list[str]) -> None:
    """Make former import paths importable.

    Args:
        search_path: `trainer.__path__`; gets an entry that is searched last, and only for modules
            of `trainer`.
    """
    entry = f"{search_path[0]}/<former import paths>"

    def hook(path: str) -> _Finder:
        if path != entry:
            raise ImportError
        return _Finder()

    sys.path_hooks.append(hook)
    search_path.append(entry)
