"""Models from run folders: what `trainer.load` returns, and what a folder from elsewhere can do."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import trainer
from recipes.asr.train import Recogniser, TextBrain
from recipes.asr.transcriber import Transcriber
from recipes.common.command import each_of, told
from tests.processes import ROOT, Forks
from tests.recipes.run_folder_attacks import STEP, batches, make_run, tree
from tests.recipes.small_runs import Saved
from trainer import Brain, Checkpointer
from trainer.cli.replay import replay
from trainer.data import BadItem


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, moved to where it was not made."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder / "run")
    shutil.move(folder / "run", folder / "elsewhere")
    return folder / "elsewhere"


# ----------------------------------------------------------------------------------- what it gives


def test_a_model_has_the_weights_of_its_best_checkpoint_and_changes_nothing(run: Path) -> None:
    checkpoints = Checkpointer(run / "checkpoints")
    (best,) = checkpoints.find(min_key="wer")
    saved, before = checkpoints.read(best)["brain"]["modules"], tree(run)
    state = torch.get_rng_state()
    model = trainer.load(run, "cpu")
    brain = trainer.load(run, "cpu", brain=Recogniser)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model, Transcriber)
    for made in (model, brain):
        found = made.modules.state_dict()
        assert found.keys() == saved.keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())
        assert not made.modules.training
    assert isinstance(str(model.transcribe(torch.randn(9000), 16000)), str)
    brain.evaluate(batches()[:1])
    assert set(brain.test_metrics) == {"wer", "cer"}
    brain.opt_class = torch.optim.SGD
    brain.fit([1], batches()[:1])  # Fine-tuning records nothing there, either.
    assert tree(run) == before


def test_a_model_says_what_it_is_and_can_do(run: Path) -> None:
    model = trainer.load(run, torch.device("cpu"))  # type: ignore[call-overload]
    assert model.tasks() == ["transcribe"]
    assert repr(model) == "Transcriber(transcribe; 7,817 parameters, fp32, cpu)"
    with pytest.raises(AttributeError, match="Transcriber cannot enhance: it has transcribe"):
        _ = model.enhance
    with pytest.raises(AttributeError, match="Transcriber has no attribute 'transcrib'"):
        _ = model.transcrib


def test_a_model_is_used_from_several_threads(run: Path) -> None:
    model = trainer.load(run, "cpu")
    sounds = [torch.randn(count) for count in (9000, 5000, 12000, 7000)]
    alone = [model.transcribe(each, 16000) for each in sounds]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(lambda each: model.transcribe(each, 16000), sounds)) == alone


def test_a_run_is_loaded_while_it_goes_on(run: Path, tmp_path: Path) -> None:
    """Each save deletes the checkpoint before it."""
    shutil.copytree(run, tmp_path / "run")
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    checkpointer.add_recoverable("brain", Saved(trainer.load(run, "cpu").modules))
    done, saved = threading.Event(), 0

    def save() -> None:
        nonlocal saved
        while not done.is_set():
            checkpointer.save_and_keep_only(meta={"wer": 1.0 / (saved + 1)}, min_keys=["wer"])
            saved += 1

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for _ in range(5):
            model = trainer.load(tmp_path / "run", "cpu")
            assert model.tasks() == ["transcribe"]
    finally:
        done.set()
        thread.join()
    assert saved > 1


def test_the_class_overrides_and_the_metric_may_be_given(run: Path) -> None:
    class Mine(Recogniser):
        pass

    class Other(Transcriber):
        pass

    model = trainer.load(run, "cpu", brain=Mine, overrides={"lexicon": None}, max_key="wer")
    assert type(model) is Mine
    assert type(trainer.load(run, "cpu", model=Other)) is Other
    assert model.hparams.lexicon is None
    with pytest.raises(ValueError, match="there is no key or run option 'lexicom'; did you mean"):
        trainer.load(run, "cpu", overrides={"lexicom": None})
    with pytest.raises(ValueError, match="no sound checkpoint with 'cer2', the m"), pytest.warns():
        trainer.load(run, "cpu", min_key="cer2")
    for kinds, message in [
        ({"model": Other, "brain": Mine}, "both model and brain are given; allowed: one of them"),
        ({"model": Mine}, "model is .*Mine.*; allowed: a subclass of trainer.Model"),
        ({"brain": Other}, "brain is .*Other.*; allowed: a subclass of trainer.Brain"),
        ({"model": "Transcriber"}, "model is 'Transcriber'; allowed: a subclass of trainer.Model"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer.load(run, "cpu", **kinds)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)


class Scorer(trainer.Model):
    """A model of a program, whose method needs no recipe."""

    def classify(self, values: list[float]) -> float:
        with torch.inference_mode(), self.autocast():
            return float(self.modules.net.linear(torch.tensor([values], device=self.device)))


class Own(Brain):
    def compute_forward(self, batch: torch.Tensor, stage: trainer.Stage) -> torch.Tensor:
        return self.modules.net.linear(batch).mean()

    def compute_objectives(
        self, predictions: torch.Tensor, batch: torch.Tensor, stage: trainer.Stage
    ) -> torch.Tensor:
        return predictions


def test_classes_of_a_program_are_built_when_the_program_names_them(tmp_path: Path) -> None:
    net = Net(4)
    brain = Own({"net": net}, torch.optim.SGD, checkpointer=Checkpointer(tmp_path / "checkpoints"))
    brain.fit([1], [torch.randn(2, 4)])
    yaml = tmp_path / "hyperparams.yaml"
    yaml.write_text(f"modules: {{net: !new:{__name__}.Net {{width: 4}}}}\n")
    with pytest.raises(ValueError, match="is a run of no installed recipe: name its class, as in"):
        trainer.load(tmp_path, "cpu")
    with pytest.raises(ValueError, match=r"Net' is not allowed: .*allow=\['your_package'\]\)"):
        trainer.load(tmp_path, "cpu", brain=Own)
    found = [trainer.load(tmp_path, "cpu", brain=Own, allow=[__name__])]
    scorers = [trainer.load(tmp_path, "cpu", model=Scorer, allow=[__name__])]
    yaml.write_text("width: 4\n")  # As `trainer.launch` records it.
    with pytest.raises(ValueError, match="builds no modules: give .*those that the program of the"):
        trainer.load(tmp_path, "cpu", brain=Own)
    found.append(trainer.load(tmp_path, "cpu", brain=Own, modules={"net": Net(4)}))
    scorers.append(trainer.load(tmp_path, "cpu", model=Scorer, modules={"net": Net(4)}))
    for scorer in scorers:
        expected = net.linear(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).detach()
        assert scorer.classify([1.0, 2.0, 3.0, 4.0]) == pytest.approx(float(expected))
        assert scorer.tasks() == ["classify"]
    for model in found:
        assert torch.equal(model.modules.net.linear.weight, net.linear.weight)
    with pytest.raises(ValueError, match=r"checkpoints: the saved parameter .* has shape \(1, 4\)"):
        trainer.load(tmp_path, "cpu", brain=Own, modules={"net": Net(5)})
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="has no weights: neither checkpoints"):
        trainer.load(tmp_path, "cpu", brain=Own, modules={"net": Net(4)})
    assert not (tmp_path / "checkpoints").exists()


def test_a_skipped_step_of_a_recipe_is_replayed_without_data(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(run)
    assert replay([str(run), STEP, "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert f"replaying step {STEP}, epoch 1; the weights are those of step 2" in told
    assert "the batch itself is not finite: 1 of 18000 values of 'sig' (1-0)" in told
    assert tree(run) == before
    with pytest.raises(ValueError, match="--tensorboard has no effect on a replay"):
        replay([str(run), STEP, "--tensorboard", "true"])
    monkeypatch.delattr(TextBrain, "on_stage_start")  # As if train() made the scores.
    monkeypatch.setattr(Recogniser, "on_fit_start", lambda brain: brain.missing)
    with pytest.raises(ValueError, match=r"without the data of the run \(Attrib.* with --script"):
        replay([str(run), STEP])


# ------------------------------------------------------------------------------------- the attacks

# Kinds of which some variants are of no effect at all, so that the folder can be used.
IGNORED = {
    "attributes", "checkpointer", "output folder", "run options", "modules in the run folder",
    "modules of other names", "other files", "terminals of kept batches", "control",
}  # fmt: skip


def test_nothing_in_a_run_folder_writes_starts_imports_or_reads_elsewhere(
    tmp_path: Path, forks: Forks
) -> None:
    """The witness is an audit hook of the process, and the tree of files with their times."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["-m", "tests.recipes.run_folder_attacks", str(tmp_path)]
    done = forks.program(words, ROOT, environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kinds = defaultdict(list)
    for each in found:
        kinds[each["kind"]].append(each)
    control = kinds.pop("control")
    assert len(control) == 8
    assert all(each["violations"] for each in control)
    assert len(kinds) >= 20
    assert all(len(variants) >= 4 for variants in kinds.values())
    for each in (each for variants in kinds.values() for each in variants):
        assert not each["violations"], each
        if each["refused"] is None:
            assert each["kind"] in IGNORED, each
        else:
            assert each["refused"].count("\n") == 0, each
            assert each["refused"].isprintable()
    assert "\x1b" not in done.stderr + done.stdout
    assert (tmp_path / "outside" / "precious").read_text() == "precious"


# --------------------------------------------------------------------------------- the exit codes


def test_a_file_that_fails_is_named_the_others_are_done_and_the_exit_code_is_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(item: str) -> None:
        if item in errors:
            raise errors[item]
        print(item)

    errors = {"b": BadItem("b", "is none"), "c": OSError(28, "No space left"), "d": ValueError("d")}
    assert each_of("abcde", work) == 2
    assert capsys.readouterr() == ("a\ne\n", "error: b: is none\nerror: [Errno 28] No space left\n"
                                   "error: d\n")  # fmt: skip
    assert each_of("ae", work) == 0
    assert told(lambda: each_of("ab", work)) == 2
    for error in (ValueError("x"), OSError("x"), ImportError("x")):
        assert told(lambda error=error: (_ for _ in ()).throw(error)) == 2
    with pytest.raises(ZeroDivisionError):  # A fault of the program keeps its traceback.
        told(lambda: 1 // 0)
