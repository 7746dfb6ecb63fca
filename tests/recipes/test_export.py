"""Exports of the recipes' models: folders that load, and networks for other programs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer
from tests.recipes.run_folder_attacks import tree
from tests.recipes.small_runs import CASES, Case, make_run
from tests.recipes.test_models import assert_same, noise
from trainer.cli.commands import main
from trainer.inference.initialise import initialise
from trainer.inference.loading import open_run

GRAPHS = {"asr", "hifigan", "segan", "separation"}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def run_of(name: str) -> Path:
        pytest.importorskip(getattr(CASES[name], "needs", "torch"))
        if name not in made:
            made[name] = make_run(name, folder / name)
        return made[name]

    return run_of


def answers(name: str, model: Any) -> Any:
    """Return what a model says of a sound, a mel or a text."""
    case = CASES[name]
    torch.manual_seed(0)
    if case.given == "sound":
        return getattr(model, case.method)(noise(6000), rate=16000)
    given = "late at night" if case.given == "text" else torch.randn(80, 7) - 5
    return getattr(model, case.method)(given)


@pytest.mark.parametrize("name", CASES)
def test_an_exported_folder_loads_and_answers_as_the_run_wherever_it_lies(
    name: str, run: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    folder = run(name)
    before = tree(folder)
    model = trainer.load(folder, "cpu")
    expected = answers(name, model)
    made = trainer.export(model, tmp_path / "made")
    assert tree(folder) == before
    assert_same(answers(name, model), expected)  # The model itself is as it was.
    moved = made.rename(tmp_path / "moved")
    shutil.move(folder, tmp_path / "away")  # Nothing is read from there.
    try:
        before = tree(moved)
        again = trainer.load(moved, "cpu")
        assert_same(answers(name, again), expected)
        assert type(again) is type(model)
        assert tree(moved) == before
        assert str(folder.parent) not in (moved / "hyperparams.yaml").read_text()
        once_more = trainer.export(again, tmp_path / "twice")
        assert_same(answers(name, trainer.load(once_more, "cpu")), expected)
    finally:
        shutil.move(tmp_path / "away", folder)
    names = {each.name for each in moved.iterdir()}
    assert {"README.md", "export.json", "hyperparams.yaml", "model.safetensors"} <= names
    with open_run(moved) as opened:
        assert not opened.checkpointer.folder.exists()


def test_what_a_run_has_of_its_source_alone_is_in_its_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from tests.recipes.finetune.small import save_encoder

    if not hasattr(importlib.import_module("recipes.finetune"), "MODEL"):
        pytest.skip("there is no model of it")
    source = save_encoder(tmp_path / "source")
    given = {"source": str(source), "precision": "fp32"}
    case = Case("finetune/few.yaml", "transcribe", overrides=given, metrics={"cer": 1.0})
    monkeypatch.setitem(CASES, "few", case)
    (tmp_path / "run" / "prepared").mkdir(parents=True)
    tokens = {"tokens": ["<blank>", " ", *"abcde"], "ids": None}
    (tmp_path / "run" / "prepared" / "vocabulary.json").write_text(json.dumps(tokens))
    run = make_run("few", tmp_path / "run")
    with pytest.raises(ValueError, match="outside of it: name it, as in"):
        trainer.load(run, "cpu")
    assert main(["export", str(run), str(tmp_path / "out"), "--source", str(source)]) == 0
    expected = answers("few", trainer.load(run, "cpu", overrides={"source": str(source)}))
    shutil.rmtree(source)
    assert_same(answers("few", trainer.load(tmp_path / "out", "cpu")), expected)
    (standalone,) = (tmp_path / "out").glob("*.model")
    from transformers import AutoFeatureExtractor, AutoModel

    assert AutoModel.from_pretrained(standalone).config.model_type == "wav2vec2"
    AutoFeatureExtractor.from_pretrained(standalone)


def test_a_new_run_starts_from_an_export(run: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    copied = shutil.copytree(run("asr"), tmp_path / "1234")
    assert main(["export", str(copied)]) == 0
    assert main(["export", str(copied)]) == 2  # What is there is never written to.
    folder = copied / "export" / "safetensors"  # Where no folder is named.
    assert main(["export", str(folder)]) == 0  # Of an export: beside it.
    assert (copied / "export" / "safetensors-safetensors" / "model.safetensors").is_file()
    model = trainer.load(copied, "cpu")
    with torch.no_grad():
        wanted = {name: each.clone() for name, each in model.modules.named_parameters()}
        for each in model.modules.parameters():
            each.zero_()
    initialise(model.modules, str(folder))
    assert all(torch.equal(wanted[name], p) for name, p in model.modules.named_parameters())


def graph_cases() -> list[Any]:
    """Each recipe that has networks for other programs; one of them in the default suite."""
    return [
        pytest.param(name, to, marks=[] if (name, to) == ("segan", "torch") else [pytest.mark.long])
        for name in sorted(GRAPHS & set(CASES))
        for to in ("onnx", "torch")
    ]


@pytest.mark.parametrize(("name", "to"), graph_cases())
def test_a_network_is_exported_and_the_program_of_its_readme_runs(
    name: str, to: str, run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if to == "onnx":
        for each in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(each)
    assert main(["export", str(run(name)), str(tmp_path / "out"), "--to", to]) == 0
    described = json.loads((tmp_path / "out" / "export.json").read_text())
    checked = described["checked"]
    assert checked["largest_difference"] <= 1e-4
    sizes = [tuple(each) for each in checked["batch_sizes_and_lengths"]]
    assert len({batch for batch, _ in sizes}) >= 2
    assert len({length for _, length in sizes}) >= (1 if name == "segan" else 2)
    assert described["settings"]["sample_rate"] in (8000, 16000)
    (program,) = [
        part.partition("```")[0]
        for part in (tmp_path / "out" / "README.md").read_text().split("```python\n")[1:]
    ]
    monkeypatch.chdir(tmp_path / "out")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    lines = printed.getvalue().splitlines()
    assert len(lines) >= len(described["outputs"])
    assert not any(each.name.startswith(".") for each in tmp_path.iterdir())


def test_the_chunks_of_an_exported_enhancer_are_those_of_the_recipe(
    run: Callable[[str], Path], tmp_path: Path
) -> None:
    if "segan" not in CASES:
        pytest.skip("there is no small run of it")
    model = trainer.load(run("segan"), "cpu", overrides={"precision": "fp32"})
    folder = trainer.export(model, tmp_path / "out", "torch")
    network = torch.export.load(folder / "model.pt2").module()
    chunks = 0.1 * torch.randn(2, model.modules.generator.samples)
    torch.testing.assert_close(network(chunks), model.network(chunks), rtol=0, atol=1e-4)


def test_a_task_without_a_network_says_which_have_one(
    run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ctc", "tacotron2", "metricgan"):
        if name not in CASES or (name == "ctc" and not importlib.util.find_spec("transformers")):
            continue
        for out in ([], [str(tmp_path / "a" / "b" / "out")]):
            assert main(["export", str(run(name)), *out, "--to", "torch"]) == 2
        assert not (run(name) / "export").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 2
        assert "has no network for --to torch; allowed: --to safetensors" in error
        assert "the recipes asr, hifigan, segan, separation" in error
    assert not any(tmp_path.iterdir())
