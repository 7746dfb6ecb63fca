"""Distribution: what a wheel contains, and the dependencies that are declared."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = packages_distributions()
OWN = {"trainer", "recipes", *sys.stdlib_module_names}


def names(requirements: list[str]) -> set[str]:
    """Return the distributions of requirements, in their normal form."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", each)[0]).lower() for each in requirements}


def needs(path: Path, anywhere: bool) -> set[str]:
    """Return the distributions that a file imports, anywhere or as it is imported."""
    nodes = list(ast.parse(path.read_text()).body)
    found = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif anywhere or not isinstance(node, ast.FunctionDef | ast.ClassDef):
            nodes += ast.iter_child_nodes(node)
    return names([INSTALLED.get(each, [each])[0] for each in found - OWN])


def test_every_import_is_of_a_declared_distribution() -> None:
    base = names(PROJECT["dependencies"])
    recipes = base | names(EXTRAS["recipes"])
    anything = recipes.union(*map(names, EXTRAS.values()))
    files = [*ROOT.glob("trainer/**/*.py"), *ROOT.glob("recipes/**/*.py")]
    assert len(files) > 200
    for path in files:
        at_import = needs(path, anywhere=False)
        if path.is_relative_to(ROOT / "trainer"):
            assert at_import <= base, path
        elif path.parent.name != "finetune":  # Whose README adds the extra `hf`.
            assert at_import <= recipes, path
        assert needs(path, anywhere=True) <= anything, path


def test_a_wheel_has_all_code_all_yamls_and_the_licence_and_runs_anywhere(tmp_path: Path) -> None:
    source, folder, empty = tmp_path / "source", tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    for name in ("trainer", "recipes", "hparams"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--no-build-isolation", "-w", tmp_path, source], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        inside = set(packed.namelist())
        packed.extractall(folder)
    wanted = {str(each.relative_to(source)) for each in source.glob("[rt]*/**/*.py")}
    yamls = {f"recipes/{each.relative_to(source)}" for each in source.glob("hparams/*/*.yaml")}
    assert len(wanted) > 200
    assert len(yamls) > 30
    assert inside >= wanted | yamls | {"trainer/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside)
    listed = subprocess.run(
        [sys.executable, "-m", "trainer", "run"], cwd=empty, env={"PYTHONPATH": str(folder)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert len(listed.splitlines()) == len(yamls)
