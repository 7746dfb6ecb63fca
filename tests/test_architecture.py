"""The shape of the project: owners, safe loading, light imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINER = ROOT / "trainer"

# What moves weights, and the files that may say it.
OWNERS = {
    r"\.backward\(": {"step.py"},
    r"optimizer\.step\(": {"update.py"},
    r"clip_grad": set(),
    r"GradScaler\(": {"precision.py"},
    r"all_reduce\(": {"__init__.py"},
}
UNSAFE = (
    r"weights_only\s*=\s*False",
    r"\bpickle\b",
    r"yaml\.(unsafe_)?load\(",
    r"torchaudio\.(load|save)\(",
)


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it; relative ones made absolute."""
    package = (
        ["trainer", *path.relative_to(TRAINER).parent.parts] if TRAINER in path.parents else []
    )
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return found


def code_of(path: Path) -> str:
    """A file without comments and documentation."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0].value = ast.Constant("")
    return ast.unparse(tree)


def test_the_trainer_knows_no_recipe_and_a_recipe_no_other() -> None:
    for path in sources(TRAINER):
        assert not any(name.split(".")[0] == "recipes" for name in imports_of(path)), path
    tasks = [folder for folder in (ROOT / "recipes").iterdir() if (folder / "train.py").exists()]
    assert tasks
    for task in tasks:
        for path in sources(task):
            for name in imports_of(path):
                parts = name.split(".")
                if parts[0] == "recipes":
                    assert parts[1] in (task.name, "common"), f"{path} imports {name}"


def test_the_trainer_needs_torch_hyperpyyaml_and_tqdm_alone() -> None:
    allowed = {"trainer", "torch", "hyperpyyaml", "ruamel", "yaml", "tqdm", "__future__"}
    found = {name.split(".")[0] for path in sources(TRAINER) for name in imports_of(path)}
    assert found - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("pattern", OWNERS)
def test_one_place_moves_weights(pattern: str) -> None:
    files = [*sources(TRAINER), *sources(ROOT / "recipes")]
    assert len(files) > 40
    users = {path.name for path in files if re.search(pattern, code_of(path))}
    assert users == OWNERS[pattern]


def test_nothing_that_is_read_can_run_code() -> None:
    for path in [*sources(TRAINER), *sources(ROOT / "recipes")]:
        code = code_of(path)
        for pattern in UNSAFE:
            assert not re.search(pattern, code), f"{path}: {pattern}"
        for call in re.findall(r"torch\.load\([^\n]*", code):
            assert "weights_only=True" in call, f"{path}: {call}"


def test_importing_the_trainer_imports_nothing_heavy_but_torch() -> None:
    script = (
        "import sys, trainer;"
        "heavy = {'torchaudio', 'lhotse', 'soundfile', 'matplotlib', 'tensorboard', 'scipy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_every_yaml_says_how_it_is_run() -> None:
    files = sorted((ROOT / "hparams").rglob("*.yaml"))
    assert len(files) >= 3
    for path in files:
        relative = path.relative_to(ROOT).as_posix()
        first = "\n".join(path.read_text().splitlines()[:4])
        assert f"train.py {relative}" in first, path
