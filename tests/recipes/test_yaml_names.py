"""What a YAML may not name of the recipes: programs, and whatever leaves a file behind."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.config.guard import Guard

RECIPES = Path(__file__).parents[2] / "recipes"
WRITING = {"write_text", "write_bytes", "mkdir", "unlink", "rmtree", "rename", "save", "SoundFile"}
# Learns its pieces from the texts of a corpus, and keeps them in the run folder.
KNOWN = {"recipes.asr.text.Pieces"}


def writes(node: ast.AST) -> bool:
    """Whether there is a call in it that writes a file."""
    for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
        name = ast.unparse(call.func)
        last = name.rpartition(".")[2]
        modes = [*call.args, *(each.value for each in call.keywords)] if last == "open" else []
        writing = any(isinstance(m, ast.Constant) and m.value in ("w", "a", "wb") for m in modes)
        reads = last == "SoundFile" and len(call.args) == 1
        if (last in WRITING and not reads) or name in ("soundfile.write", "os.replace") or writing:
            return True
    return False


def found() -> Iterator[str]:
    for path in sorted(RECIPES.rglob("*.py")):
        module = ".".join(path.relative_to(RECIPES.parent).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                program = node.name == "main" or (path.stem, node.name) == ("train", "train")
                if program or writes(node):
                    yield f"{module}.{node.name}"


def test_what_writes_files_is_refused() -> None:
    names = set(found())
    assert len(names) >= 30
    assert names >= KNOWN
    for name in sorted(names - KNOWN):
        with pytest.raises(ValueError, match=re.escape(name)):
            Guard().locate(name)
