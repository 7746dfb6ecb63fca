"""Names of recipes in a YAML: those that the recipes list, and nothing that writes files."""

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recipes.finetune.small import save_encoder, save_whisper
from trainer.config.hyperparameters import Configuration
from trainer.config.registry import Registry, listed_names, recipe_packages
from trainer.inference import open_run

RECIPES = Path(__file__).parents[2] / "recipes"
WRITING = {"write_text", "write_bytes", "mkdir", "unlink", "rmtree", "rename", "save", "SoundFile"}
BRAINS = {
    "asr": "Recogniser", "hifigan": "HiFiGAN", "metricgan": "Enhancer", "segan": "Enhancer",
    "separation": "Separator", "tacotron2": "Synthesiser",
}  # fmt: skip
# They learn their tokens from the texts of a corpus, and keep them in the run folder.
KNOWN = {"recipes.asr.text.Pieces", "recipes.finetune.text.Vocabulary"}
# Of the recipe that fine-tunes, whose Brain is that of the objects in the YAML.
BRAINS_OF = {
    "classify": "Classifier", "ctc_wav2vec2": "Recogniser", "few": "Recogniser",
    "pretrain": "Pretrainer", "speaker": "Classifier", "whisper": "Transcriber",
}  # fmt: skip
WITH_A_MODEL = ("classify", "ctc_wav2vec2", "whisper")
WITHOUT_TRANSFORMERS = ("demo", "speaker")


def writes(node: ast.AST) -> bool:
    """Return True if a node contains a call that writes a file."""
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


def test_every_recipe_lists_names_that_exist() -> None:
    folders = {f"recipes.{each.parent.name}" for each in RECIPES.glob("*/__init__.py")}
    assert set(recipe_packages()) == folders
    assert len(folders) == 9
    count = 0
    for package in sorted(folders):
        source = ast.parse((RECIPES / package.partition(".")[2] / "__init__.py").read_text())
        assert not [
            each for each in ast.walk(source) if isinstance(each, ast.Import | ast.ImportFrom)
        ]
        names = listed_names(package, "YAML_NAMES")
        assert set(names) >= set(listed_names(package, "RUN_NAMES"))
        if package == "recipes.finetune" and importlib.util.find_spec("transformers") is None:
            continue  # Its modules cannot be imported.
        for name in names:
            module, _, attribute = name.rpartition(".")
            assert Registry().locate(name) is getattr(importlib.import_module(module), attribute)
        count += len(names)
    assert count >= 40


def test_what_writes_files_is_not_listed() -> None:
    names = set(found())
    listed = {name for each in recipe_packages() for name in listed_names(each, "YAML_NAMES")}
    assert len(names) >= 25  # The search finds them.
    assert names & listed == KNOWN
    for name in sorted(names - KNOWN):
        if name.startswith("recipes.finetune.") and not importlib.util.find_spec("transformers"):
            continue  # Its modules cannot be imported.
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is not allowed: .*__init__\.py"):
            Registry().locate(name)


@pytest.mark.parametrize("path", sorted((RECIPES.parent / "hparams").rglob("*.yaml")), ids=str)
def test_every_yaml_is_built_and_its_run_folder_without_the_corpus(
    path: Path, tmp_path: Path
) -> None:
    wide = Configuration(path)
    top = [key for key in wide.described() if "." not in key.name]
    wide.override({key.name: "x" for key in top if key.default.strip() == "!PLACEHOLDER"})
    wide.override({"output_folder": str(tmp_path)})
    if path.parent.name == "finetune" and path.stem not in WITHOUT_TRANSFORMERS:
        pytest.importorskip("transformers")
    if path.parent.name == "finetune" and path.stem in WITH_A_MODEL:
        saved = save_whisper if path.stem == "whisper" else save_encoder
        wide.override({"source": str(saved(tmp_path / "model"))})
        wide.override({"encoder": {"channel_span": 24}} if path.stem == "ctc_wav2vec2" else {})
    (tmp_path / "hyperparams.yaml").write_text(wide.dump())
    narrow = Configuration(tmp_path / "hyperparams.yaml", run_folder=True)
    everything, kept = wide.build(), narrow.build()
    assert set(everything) == {key.name for key in top}
    assert set(kept) <= set(everything)
    assert "corpus" not in kept
    assert ("modules" in kept) == ("modules" in everything)
    assert "checkpointer" not in kept
    recipe = path.parent.name
    kind = BRAINS_OF.get(path.stem) if recipe == "finetune" else BRAINS.get(recipe)
    if kind is not None:
        (tmp_path / "checkpoints").mkdir()
        with open_run(tmp_path) as opened:
            assert opened.brain_class().__name__ == kind
