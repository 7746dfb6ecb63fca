"""Architecture: layers, owners, safe loading, light imports, documents that name what exists."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINER = ROOT / "trainer"

# Calls that have one owner: the folder it is in, and in how many files it may stand.
OWNERS = {
    r"\.backward\(": ("trainer/optim", 1),
    r"optimizer\.step\(": ("trainer/optim", 1),
    r"clip_grad": ("", 0),
    r"GradScaler\(": ("trainer/optim", 1),
    r"\bdist\.(all_|broadcast|barrier|reduce|gather|scatter|init_)\w*\(": (
        "trainer/distributed",
        1,
    ),
}
UNSAFE = (
    r"weights_only\s*=\s*False",
    r"\bpickle\b",
    r"yaml\.(unsafe_)?load\(",
    r"torchaudio\.(load|save)\(",
)


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports anywhere, relative ones made absolute."""
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


@functools.cache
def code_of(path: Path) -> str:
    """Return the code of a file without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0].value = ast.Constant("")
    return ast.unparse(tree)


def test_the_layers_hold() -> None:
    """The contracts are in pyproject.toml; `lint-imports` shows which import breaks one."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as f; f()"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert "3 kept, 0 broken" in done.stdout, done.stdout + done.stderr


# A recogniser with a pretrained encoder is the recogniser, with another model.
BUILDS_ON = {"finetune": "asr"}


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
                    known = (task.name, "common", BUILDS_ON.get(task.name))
                    assert parts[1] in known, f"{path} imports {name}"


def test_the_trainer_names_no_recipe_in_a_string() -> None:
    """Nor in a docstring; `common` and `separation` are words of English, too."""
    tasks = {path.parent.name for path in (ROOT / "recipes").glob("*/__init__.py")}
    names = "|".join({*tasks, "tacotron"} - {"common", "separation"})
    assert len(tasks) >= 9
    for path in sources(TRAINER):
        text = path.read_text().lower().replace("torchaudio.models.tacotron2", "")
        found = re.search(rf"{names}|\b(common|separation)/|\brecipes[./]\w", text)
        assert not found, f"{path}: {found[0]}"


def test_no_private_attribute_of_an_object_is_read_in_another_file() -> None:
    own: dict[Path, set[str]] = {}
    read: list[tuple[Path, str, str]] = []
    for path in sources(TRAINER):
        own[path] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                own[path] |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("trainer"):
                read += [(path, str(node.module), each.name) for each in node.names]
            elif isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                if owner in ("self", "cls"):
                    own[path].add(node.attr)
                elif owner != "super()":
                    read.append((path, owner, node.attr))
    ours = set().union(*own.values())
    private = [each for each in read if re.match(r"_[a-z]", each[2])]
    assert len(private) > 20
    for path, owner, name in private:
        # torch and Python have private names of their own.
        assert name in own[path] or (name not in ours and not owner.startswith("trainer")), (
            f"{path} reads {owner}.{name}"
        )


@pytest.mark.parametrize("pattern", OWNERS)
def test_one_place_moves_weights(pattern: str) -> None:
    files = [*sources(TRAINER), *sources(ROOT / "recipes")]
    assert len(files) > 150
    users = [str(path.relative_to(ROOT)) for path in files if re.search(pattern, code_of(path))]
    owner, count = OWNERS[pattern]
    assert len(users) == count
    assert all(user.startswith(owner) for user in users)


def test_process_groups_are_spoken_to_in_one_package() -> None:
    for path in [*sources(TRAINER), *sources(ROOT / "recipes")]:
        if TRAINER / "distributed" not in path.parents:
            assert not any(name.startswith("torch.distributed") for name in imports_of(path)), path


def test_nothing_that_is_read_can_run_code() -> None:
    for path in [*sources(TRAINER), *sources(ROOT / "recipes")]:
        code = code_of(path)
        for pattern in UNSAFE:
            assert not re.search(pattern, code), f"{path}: {pattern}"
        for call in re.findall(r"torch\.load\([^\n]*", code):
            assert "weights_only=True" in call, f"{path}: {call}"


def test_other_toolkits_are_named_in_one_package() -> None:
    for path in sources(TRAINER):
        code = re.sub(r"trainer\.(compat\.speechbrain|speechbrain_names)", "", code_of(path))
        if TRAINER / "compat" not in path.parents:  # Its marks on methods begin with "_".
            assert not re.search(r"(?<!_)speechbrain", code), path


def test_every_yaml_says_how_it_is_run() -> None:
    files = sorted((ROOT / "hparams").rglob("*.yaml"))
    assert len(files) >= 3
    for path in files:
        relative = path.relative_to(ROOT).as_posix()
        first = "\n".join(path.read_text().splitlines()[:4])
        assert f"train.py {relative}" in first, path


def test_every_test_that_the_guarantees_name_exists() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(named) > 50
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
    promises = re.findall(r"^\| ([RS]\d+) \|.*$", text, re.MULTILINE)
    assert promises == [*(f"R{n}" for n in range(1, 25)), *(f"S{n}" for n in range(1, 26))]
    unheld = re.findall(r"^\| ([RS]\d+) \|.*\| no test yet \|", text, re.MULTILINE)
    assert unheld == []


def test_the_design_has_every_module() -> None:
    named = re.findall(r"`trainer\.(\w+)`", (ROOT / "docs" / "design.md").read_text())
    modules = {each.stem for each in TRAINER.iterdir() if (each / "__init__.py").is_file()}
    modules |= {each.stem for each in TRAINER.glob("*.py") if not each.stem.startswith("__")}
    assert len(modules) > 30
    assert modules <= {*named}


def test_the_walks_through_the_code_are_as_short_as_the_docs_say() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.walks"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    walked = {name: int(files) for name, files, *_ in map(str.split, done.stdout.splitlines())}
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    stated = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", text, re.MULTILINE)
    assert {name for name, _ in stated} == set(walked) == {"step", "fit", "save", "command"}
    for name, files in stated:
        assert walked[name] <= int(files), f"{name}: {walked[name]} files, and the docs say {files}"


def test_documents_name_files_and_modules_that_exist() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*/README.md")]
    assert len(documents) >= 20
    found = 0
    for document in documents:
        text = document.read_text()
        paths = re.findall(r"\b(?:trainer|recipes|hparams|tests|docs|scripts)/[\w/.-]*\w", text)
        modules = re.findall(r"`(trainer(?:\.[a-z_]+)+)`", text)
        for name in paths:
            assert (ROOT / name).exists(), f"{document.name} names {name}"
        for name in modules:
            path = ROOT / name.replace(".", "/")
            if not path.is_dir() and not path.with_suffix(".py").is_file():
                # A name in a module, or an attribute of the package.
                path = path.parent
                assert path.is_dir() or path.with_suffix(".py").is_file(), (
                    f"{document.name}: {name}"
                )
        found += len(paths) + len(modules)
    assert found > 150
