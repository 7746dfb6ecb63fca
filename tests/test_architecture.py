"""The shape of the project: floors, budgets, owners, and who may import whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINER = ROOT / "trainer"

# A module imports only from lower floors; a package counts as one module. The policies of floor 1
# do not know each other: whoever changes one reads that one alone.
FLOORS = [
    {"checks", "distributed", "epochs", "interrupt", "options", "seed"},
    {"configuration"},
    {
        "averages", "checkpoint", "clipping", "data", "drift", "hparams", "log", "nonfinite",
        "page", "precision", "profiling", "reduction", "report", "schedules",
    },
    {"update"},
    {"step"},
    {
        "attributes", "feeding", "forensics", "hooks", "journal", "monitor", "setup", "state",
        "verdict",
    },
    {"replay", "resumption", "testing"},
    {"keeping"},
    {"training"},
    {"workings"},
    {"finding"},
    {"brain"},
    {"run"},
    {"cli", "speechbrain_names"},
    {"__init__", "__main__"},
]  # fmt: skip
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}

# What moves weights, and the files that may say it.
OWNERS = {
    r"\.backward\(": {"step.py"},
    r"optimizer\.step\(": {"update.py"},
    r"clip_grad": set(),
    r"GradScaler\(": {"precision.py"},
    r"all_reduce\(": {"distributed.py"},
}
UNSAFE = (
    r"weights_only\s*=\s*False",
    r"\bpickle\b",
    r"yaml\.(unsafe_)?load\(",
    r"torchaudio\.(load|save)\(",
)


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    """The module of trainer/ that a file belongs to; a package's files are one module."""
    return path.relative_to(TRAINER).with_suffix("").parts[0]


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


def test_every_module_has_a_floor_and_imports_only_lower_ones() -> None:
    checked = 0
    for path in sources(TRAINER):
        own = module_of(path)
        assert own in FLOOR, f"{path.name} has no floor"
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "trainer" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != own:
                assert FLOOR[parts[1]] < FLOOR[own], f"{own} imports {parts[1]}"
                checked += 1
    assert checked > 60


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


def test_files_and_functions_fit_a_screen_or_two() -> None:
    counted = 0
    for path in [*sources(TRAINER), *sources(ROOT / "recipes")]:
        text = path.read_text()
        assert text.count("\n") <= 300, f"{path.name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            documented = ast.get_docstring(node) is not None
            first = node.body[1].lineno if documented and len(node.body) > 1 else node.lineno
            lines = (node.end_lineno or first) - first + 1
            assert lines <= 40, f"{path.name}: {node.name} has {lines} lines"
            if node.name == "__init__":
                args = node.args
                assert len(args.args) + len(args.kwonlyargs) - 1 <= 8, f"{path.name}: {node.lineno}"
            counted += 1
    assert counted > 1000


def test_the_loop_is_one_screen() -> None:
    tree = ast.parse((TRAINER / "brain.py").read_text())
    names = {"fit", "_fit_train", "_evaluate", "fit_batch", "optimize"}
    lines = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            names.discard(node.name)
            documented = ast.get_docstring(node) is not None
            lines += (node.end_lineno or 0) - node.body[1 if documented else 0].lineno + 1
    assert not names
    assert lines <= 60


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


def test_the_readme_maps_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    modules = {
        path.relative_to(ROOT).parts
        for folder in ("trainer", "recipes")
        for path in sources(ROOT / folder)
    }
    names = set()
    for parts in modules:
        if parts[-1] == "__init__.py":
            continue
        names.add(
            "/".join(parts[:2]) + "/"
            if parts[0] == "trainer" and len(parts) > 2
            else "/".join(parts)
        )
    assert len(names) > 40
    assert [name for name in sorted(names) if f"`{name}`" not in readme] == []
