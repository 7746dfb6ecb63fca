"""Recipes by name: `cortex run TASK/NAME` finds the YAML and the program of an installed recipe.

Recipes are found by the entry-point group `cortex.recipes`. The YAMLs of a package `pack.task` are
in `pack/task/hparams`, or in `hparams/task` within or beside `pack`.
"""

from __future__ import annotations

import difflib
import itertools
import os
import pkgutil
import re
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.cli import session
from trainer.cli.arguments import HELP, help_text
from trainer.cli.ending import from_here
from trainer.config.hyperparameters import describe
from trainer.config.registry import EXTRAS, recipe_packages

TRAIN = "train.py"
MAX_HEAD = 12  # lines of a YAML
MAX_NAMED = 5  # names that a message suggests


class Recipe(NamedTuple):
    """YAML, and the program that it configures, such as train.py of a recipe."""

    file: Path
    program: Path

    def command(self) -> list[str]:
        """Return program and YAML, relative to the current folder if they lie in it."""
        return [from_here(self.program), from_here(self.file)]

    def own_modules(self) -> list[str]:
        """Return the modules beside the program; the YAML may name them."""
        names = [each.name for each in pkgutil.iter_modules([str(self.program.parent)])]
        return [name for name in names if name not in sys.stdlib_module_names]


def recipes() -> dict[str, Recipe]:
    """Return the installed recipes by name, such as "task/name"."""
    found: dict[str, Recipe] = {}
    for package in recipe_packages():
        folder = Path(sys.modules[package].__path__[0])
        task = folder.name
        if not (folder / TRAIN).is_file():
            continue
        places = [folder / "hparams", *(above / "hparams" / task for above in folder.parents[:2])]
        files = next((sorted(each.glob("*.yaml")) for each in places if each.is_dir()), [])
        for file in files:
            # The opening comment of a YAML may name another program.
            named = re.search(rf"(\w+\.py) \S*{re.escape(file.name)}", "".join(_head(file)))
            program = folder / named[1] if named else folder / TRAIN
            program = program if program.is_file() else folder / TRAIN
            found.setdefault(f"{task}/{file.stem}", Recipe(file, program))
    return found


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name, or by the path of a YAML.

    A YAML that belongs to no recipe is run by the train.py beside it, or by that of the recipe
    whose name its folder has.
    """
    known = recipes()
    if name in known:
        return known[name]
    path = Path(os.path.expanduser(name))
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise ValueError(f"there is no file {name}")
        for each in known.values():
            if each.file.resolve() == path.resolve():
                return each
        if (beside := path.with_name(TRAIN)).is_file():
            return Recipe(path, beside)
        for key, each in known.items():
            if key.startswith(f"{path.parent.name}/"):
                return Recipe(path, each.program.with_name(TRAIN))
        raise ValueError(f"there is no {TRAIN} beside {name}, nor a recipe {path.parent.name!r}")
    parts = [each for each in known if name in each.split("/")]
    close = (parts or difflib.get_close_matches(name, known, n=MAX_NAMED, cutoff=0.5))[:MAX_NAMED]
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"there is no recipe {name!r}{hint} (`cortex run` lists them)")


def list_recipes() -> list[str]:
    """Return a line for each recipe: its name, and the first paragraph of its YAML's comment."""
    lines = []
    known = recipes()
    width = max(map(len, known), default=0)
    for name, each in known.items():
        words = (line.lstrip("#").strip() for line in _head(each.file))
        title = " ".join(itertools.takewhile(bool, words)).rstrip(":.")
        lines.append(f"{name.ljust(width)}  {title}".rstrip())
    return lines


def run_recipe(name: str, argv: Sequence[str]) -> int:
    """Run a recipe in this process, like `python train.py FILE` with these arguments.

    With --help, print options and keys and run nothing.

    Returns:
        The exit code.
    """
    recipe = find_recipe(name)
    if any(each in HELP for each in argv):
        print(help_text("cortex run", name, describe(str(recipe.file)), by_name=True), flush=True)
        return 0
    sys.argv = [*recipe.command(), *argv]
    sys.path.insert(0, str(recipe.program.parent.resolve()))
    try:
        runpy.run_path(str(recipe.program), run_name="__main__")
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} cannot be run: {error} ({EXTRAS})") from error
    except Exception as error:  # Without the frames of this command.
        if isinstance(error, ImportError) and not error.name:  # It says what to install.
            raise ImportError(f"{name} cannot be run: {error}") from error
        session.trim(error)
        traceback.print_exception(error)
        return 1
    return 0


def _head(file: Path) -> list[str]:
    """Return the opening comment of a YAML, line by line."""
    with file.open(encoding="utf-8", errors="replace") as text:
        lines = itertools.islice(text, MAX_HEAD)
        return list(itertools.takewhile(lambda line: line.startswith("#"), lines))
