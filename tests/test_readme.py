"""Commands that the texts name; `test_docs.py` runs the code blocks."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import trainer
from trainer.cli import arguments
from trainer.cli.commands import COMMANDS
from trainer.cli.ending import end_lines
from trainer.cli.recipe import recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def masked(line: str) -> str:
    """Return a line without its figures and the path of this Python."""
    return re.sub(r"\d[\d.e-]*", "0", line.replace(sys.executable, "python"))


def test_the_demo_ends_as_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"ends with\n\n<!-- .*? -->\n```\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    folder = Path("results/asr/demo/1234")
    checkpointer = trainer.Checkpointer(folder / "checkpoints", keep_best={"wer": "min"})
    checkpointer.save_checkpoint({"optimizer_step": 1000, "wer": 1.4175})
    (folder / "report.html").write_text("")
    monkeypatch.setattr(sys, "argv", ["recipes/asr/train.py"])
    lines = end_lines(folder, checkpointer, tmp_path / "recipes/asr/train.py", [])
    shown = block.splitlines()
    assert shown[0].startswith("test: wer=")
    assert [masked(each) for each in lines] == list(map(masked, shown[1:]))


def test_the_documentation_names_commands_and_recipes_that_exist() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    text = "\n".join(page.read_text() for page in pages)
    named = re.findall(r"(?:`|^|\$ |= |; )cortex ([a-z]+)(?: ([a-z_0-9]+/[a-z_0-9]+))?", text, re.M)
    assert {name for name, _ in named} >= {"run", "ls", "compare", "report", "sweep", "average"}
    assert {name for name, _ in named} <= {*COMMANDS}
    found = {name for command, name in named if command in ("run", "sweep") and name}
    assert found
    assert found <= {*recipes()}


def commands() -> list[tuple[str, list[str]]]:
    """Return the training commands of all pages and YAMLs: file, and arguments after train.py."""
    found = []
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*/README.md")]
    for page in sorted([*pages, *ROOT.glob("hparams/*/*.yaml")]):
        text = re.sub(r"\\\n#?", " ", page.read_text())
        for match in re.finditer(r"recipes/\w+/train\.py (hparams/[^`#|&\n]*)", text):
            found.append((str(page.relative_to(ROOT)), shlex.split(match[1])))
    return found


def test_every_training_command_of_the_documentation_has_known_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    seen = commands()
    for page, given in seen:
        try:
            if "--help" not in given and not any("…" in each for each in given):
                arguments.configure(given)
        except ValueError as error:
            pytest.fail(f"{page}: {shlex.join(given)}: {error}")
    assert len(seen) > 40
    assert len({page for page, _ in seen}) > 15
