"""Classification and speaker verification, from files to a run folder that loads elsewhere."""

import csv
import importlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import trainer
from recipes.common.audio import read_audio
from recipes.finetune.classify import Labels, SoundClassifier
from recipes.finetune.infer import answer
from recipes.finetune.labelled import Recording
from recipes.finetune.tdnn import TDNN
from recipes.finetune.train_classifier import (
    Classified,
    Classifier,
    Verified,
    class_weights,
    confusion,
    loader_options,
    measures,
    prepare,
    prepare_labels,
    train,
)
from recipes.finetune.trials import Trial
from tests.processes import TwoRanks
from trainer import Stage, cli, distributed
from trainer.data import BadItem, Batch, Padded, pad

HPARAMS = Path(__file__).parents[3] / "hparams" / "finetune"
TINY = [
    "--steps=2", "--schedule.warmup_steps=1", "--seconds=0.3", "--batch_seconds=3",
    "--seconds_tested=0.5", "--num_workers=0", "--device=cpu", "--no-progressbar",
    "--log_interval=1", "--threads=1",
]  # fmt: skip
PRETRAINED = (
    "!new:recipes.finetune.model.PretrainedEncoder {source: !ref <source>, layers: weighted, "
    "kept: !ref <output_folder>/prepared/encoder}"
)
ENCODER = "!new:recipes.finetune.tdnn.TDNN {sample_rate: 8000, bands: 16, size: 12}"


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight recordings of each of six tones with noise; the folders are classes, or speakers."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(1)
    for label in range(6):
        (folder / f"t{label}").mkdir()
        for take in range(8):
            time = np.arange(round(8000 * (0.4 + 0.05 * take))) / 8000
            sound = 0.3 * np.sin(2 * np.pi * (300 + 450 * label) * time)
            sound += rng.normal(0, 0.02, len(time))
            soundfile.write(folder / f"t{label}" / f"{take}.wav", sound, 8000)
    return folder


def run(
    yaml: str, folder: Path, tones: Path, *arguments: str, program: Any = train
) -> dict[str, float]:
    given = [str(HPARAMS / f"{yaml}.yaml"), "--output_folder", str(folder), "--encoder", ENCODER]
    given += ["--data_folder", str(tones), "--max_grad_norm", "5.0", *TINY, *arguments]
    return cli.main(program, given)


def sorted_scores(model: SoundClassifier, signal: torch.Tensor) -> list[float]:
    return [score for _, score in sorted(model.classify(signal, 8000).probabilities.items())]


CLASSIFY = [
    "--source=null",
    "--param_groups=null",
    "--corpus.valid=0.25",
    "--corpus.test=0.25",
    "--opt_class.lr=0.01",
]
SPEAKER = ["--corpus.valid=0.34", "--corpus.test=0.33", "--embed.size=8"]


def read_bars(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="|"))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------- a run


def test_a_classifier_from_files_to_a_loaded_run(tones: Path, tmp_path: Path) -> None:
    metrics = run("classify", tmp_path / "run", tones, *CLASSIFY, "--class_weights=balanced")
    assert set(metrics) == {"accuracy", "macro_f1"}
    folder = tmp_path / "run"
    assert json.loads((folder / "prepared" / "labels.json").read_text()) == [
        f"t{n}" for n in range(6)
    ]
    rows = read(folder / "predictions_test.csv")
    assert len(rows) == 12
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert metrics["accuracy"] == pytest.approx(100 * right / len(rows))
    counts = read(folder / "confusion_test.csv")
    assert [row.pop("label") for row in counts] == [f"t{n}" for n in range(6)]
    assert [sum(map(int, row.values())) for row in counts] == [2] * 6
    assert (folder / "confusion_valid.csv").is_file()

    shutil.move(folder, tmp_path / "elsewhere")
    model = trainer.load(tmp_path / "elsewhere", "cpu")
    assert isinstance(model, SoundClassifier)
    for row in rows:
        signal = read_audio(tones / f"{row['id']}.wav", 8000)
        middle = round((len(signal) - min(4000, len(signal))) / 2)
        found = model.classify(signal[middle : middle + 4000], 8000)
        scores = found.probabilities
        assert found.label == str(found) == row["predicted"]
        assert found.probability == scores[found.label]
        assert scores[found.label] == pytest.approx(float(row["probability"]), abs=2e-3)
    assert list(scores) == sorted(scores, key=lambda name: -scores[name])
    assert sum(scores.values()) == pytest.approx(1.0)
    path = tones / f"{rows[0]['id']}.wav"
    found = model.classify(path)
    assert answer(model, path) == f"{found.label}\t{found.probability:.4f}"
    assert model.embed(path).vector.shape == (12,)
    long = torch.randn(9001)  # in three pieces
    mean = (
        sum(torch.tensor(list(sorted_scores(model, piece))) for piece in long.split(3000)[:3]) / 3
    )
    torch.testing.assert_close(torch.tensor(list(sorted_scores(model, long))), mean)
    with pytest.raises(BadItem, match="it has 10 samples at 8000 Hz; the encoder needs 80"):
        model.classify(torch.zeros(10), 8000)
    soundfile.write(tmp_path / "short.wav", np.zeros(20), 16000)
    with pytest.raises(BadItem, match="short.wav: it has 10 samples at 8000 Hz"):
        answer(model, tmp_path / "short.wav")


def test_speakers_from_files_to_a_loaded_run(tones: Path, tmp_path: Path) -> None:
    metrics = run("speaker", tmp_path / "run", tones, *SPEAKER, "--score_norm=2")
    assert set(metrics) == {
        "eer", "min_dcf_0.01", "min_dcf_0.05", "eer_snorm", "min_dcf_0.01_snorm",
        "min_dcf_0.05_snorm",
    }  # fmt: skip
    assert 0 <= metrics["eer"] <= 100
    rows = read(tmp_path / "run" / "trials_test.csv")
    assert len(rows) == 16 * 15 / 2  # two of six speakers
    assert len(json.loads((tmp_path / "run" / "prepared" / "labels.json").read_text())) == 2
    assert "keep_best names" not in (tmp_path / "run" / "train.log").read_text()
    manifest = next((tmp_path / "run" / "checkpoints").glob("*/*.json")).read_text()
    assert '"eer"' in manifest
    model = trainer.load(tmp_path / "run", "cpu")
    assert isinstance(model, SoundClassifier)
    row = rows[0]
    one, other = model.embed([tones / f"{row[side]}.wav" for side in ("enrol", "test")])
    assert one.vector.shape == (8,)
    assert one.similarity(other) == pytest.approx(float(row["score"]), abs=0.05)
    numbers = [float(each) for each in answer(model, tones / f"{row['enrol']}.wav").split()]
    torch.testing.assert_close(torch.tensor(numbers), one.vector, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_pretrained_encoder_is_not_needed_by_the_run(
    tones: Path, tmp_path: Path, small_model: Callable[..., Path], norm: str
) -> None:
    source = small_model("model", feat_extract_norm=norm)
    program = importlib.import_module("recipes.finetune.train").train  # which needs transformers
    given = ["--source", str(source), "--encoder", PRETRAINED, "--seconds_tested=1.0"]
    run("classify", tmp_path / "run", tones, *CLASSIFY, *given, program=program)
    rows = read(tmp_path / "run" / "predictions_test.csv")
    shutil.rmtree(source)
    model = trainer.load(tmp_path / "run", "cpu")
    assert isinstance(model, SoundClassifier)
    for row in rows[:4]:
        scores = model.classify(tones / f"{row['id']}.wav").probabilities
        assert set(scores) == {f"t{n}" for n in range(6)}
        assert scores[row["predicted"]] == pytest.approx(
            float(row["probability"]), abs=1e-3 if norm == "layer" else 0.05
        )


def test_a_list_of_trials_is_scored_by_its_names(
    tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = tmp_path / "trials.txt"
    trials.write_text("1 t0/1.wav t0/2.wav\n0 t0/1.wav t3/2\n0 t3/2.wav t0/0.wav\n")
    given = [*SPEAKER, "--corpus.valid=0.5", "--trials", str(trials)]
    run("speaker", tmp_path / "run", tones, *given)
    rows = read(tmp_path / "run" / "trials_test.csv")
    assert [(r["label"], r["enrol"], r["test"]) for r in rows] == [
        ("1", "t0/1", "t0/2"), ("0", "t0/1", "t3/2"), ("0", "t3/2", "t0/0")
    ]  # fmt: skip
    labels = json.loads((tmp_path / "run" / "prepared" / "labels.json").read_text())
    assert not {"t0", "t3"} & set(labels)
    trials.write_text("1 t0/1.wav t0/2.wav\n0 t0/1.wav t3/99.wav\n")
    with pytest.raises(SystemExit):
        run("speaker", tmp_path / "other", tones, *given)
    said = capsys.readouterr().err
    assert "names 1 recordings that are not there, in 1 of 2 trials; the first is 't3/99" in said


def test_a_resumed_run_keeps_its_labels_and_goes_on(tones: Path, tmp_path: Path) -> None:
    arguments = [*CLASSIFY, "--steps=8", "--epoch_counter.limit=2"]
    whole = run("classify", tmp_path / "whole", tones, *arguments)
    run("classify", tmp_path / "run", tones, *arguments, "--epoch_counter.limit=1")
    assert run("classify", tmp_path / "run", tones, *arguments) == whole
    with pytest.raises(SystemExit):
        run("classify", tmp_path / "run", tones, *CLASSIFY, "--corpus.classes=[t0, t1, t2]")


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    tones: Path, tmp_path: Path
) -> None:
    metrics = run("classify", tmp_path / "run", tones, *CLASSIFY)
    found = (tmp_path / "run" / "predictions_test.csv").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # The labels are known.
    assert run("classify", tmp_path / "run", tones, *CLASSIFY) == metrics
    assert (tmp_path / "run" / "predictions_test.csv").read_text() == found


BAD = {
    "one class": (["--corpus.classes=[t1]"], "recordings of train have the label 't1': a classif"),
    "best": (["--best=eer"], "best is 'eer'; allowed: accuracy, macro_f1"),
    "trials": (["--trials=x"], "trials has an effect only with verify: true"),
    "source": (["--source=x"], "source is 'x', and TDNN, the encoder, is made without it"),
    "rate": (["--seconds=0.001"], "parts of 0.001 s are taken; the encoder needs 80 samples"),
    "weights": (["--class_weights={t9: 2}"], "class_weights has t9; the labels are t0, t1"),
    "weight": (["--class_weights={t1: 0}"], "the weight of 't1' is 0.0; allowed: above 0"),
    "weight kind": (["--class_weights=even"], "class_weights is 'even'; allowed: null, balanced"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_trained_is_a_sentence_before_training(
    tones: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[case]
    with pytest.raises(SystemExit) as caught:
        run("classify", tmp_path / "run", tones, *CLASSIFY, *arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"error: {message}" in said or message in said.splitlines()[-2]
    assert "Traceback" not in said
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


# ------------------------------------------------------------------------------------------ labels


def recordings(*labels: str) -> list[Recording]:
    return [Recording(f"{n}", Path(f"{n}.wav"), label) for n, label in enumerate(labels)]


def test_labels_that_do_not_belong_together_are_a_sentence(tmp_path: Path) -> None:
    corpus = {"train": recordings("a", "b"), "valid": recordings("a"), "test": recordings("a", "c")}
    with pytest.raises(ValueError, match=r"test has 1 recordings of classes without one to train: "
                       r"'c' \(1\); the first is 1.wav"):  # fmt: skip
        prepare_labels(Labels(tmp_path / "labels.json"), corpus, verify=False)
    prepare_labels(Labels(tmp_path / "labels.json"), corpus, verify=True)
    labels = Labels(tmp_path / "labels.json")
    assert labels.names == ["a", "b"]
    with pytest.raises(
        ValueError, match="the run was begun with other labels .*: b came or went|c"
    ):
        prepare_labels(labels, {**corpus, "train": recordings("a", "c")}, verify=True)
    for text in ("[", '["a"]', '["a", "a"]', '["a", 1]', "{}"):
        (tmp_path / "labels.json").write_text(text)
        with pytest.raises(
            ValueError, match="labels.json (cannot be read|is no list of two or more)"
        ):
            Labels(tmp_path / "labels.json")


def test_class_weights_have_mean_one_over_the_recordings() -> None:
    some = recordings(*"aaaaaabbbc")
    for given in (None, "balanced", {"a": 3.0}, {"b": 0.5, "c": 7}):
        weights = class_weights(given, some, ["a", "b", "c"])
        assert 6 * weights[0] + 3 * weights[1] + weights[2] == pytest.approx(10)
    balanced = class_weights("balanced", some, ["a", "b", "c"])
    assert 6 * balanced[0] == pytest.approx(3 * balanced[1]) == pytest.approx(balanced[2])


# ---------------------------------------------------------------------------------------- measures


def test_measures_are_those_of_precision_and_recall() -> None:
    rng = np.random.default_rng(4)
    for classes in (2, 5):
        pairs = [(int(a), int(b)) for a, b in rng.integers(0, classes, (80, 2))]
        pairs += [(0, 0)] * 30
        found = measures(confusion(pairs, classes + 2))  # two that are neither there nor found
        scores = []
        for each in range(classes):
            hits = sum(true == each == said for true, said in pairs)
            precision = hits / sum(said == each for _, said in pairs)
            recall = hits / sum(true == each for true, _ in pairs)
            scores.append(2 * precision * recall / (precision + recall))
        assert found["macro_f1"] == pytest.approx(100 * np.mean(scores))
        right = np.mean([true == said for true, said in pairs])
        assert found["accuracy"] == pytest.approx(100 * right)
    assert measures([[2, 0], [1, 0]]) == {"accuracy": pytest.approx(200 / 3), "macro_f1": 40.0}
    with pytest.raises(ValueError, match="there are no recordings"):
        measures([[0, 0], [0, 0]])


def batch(names: str, seed: int) -> tuple[Batch, torch.Tensor]:
    """Embeddings, or logits, of recordings, whose names are their speakers and numbers."""
    rng = torch.Generator().manual_seed(seed)
    ids = names.split()
    fields = {"id": ids, "name": [each[0] for each in ids],
              "label": torch.tensor(["ab".index(each[0]) for each in ids])}  # fmt: skip
    vectors = torch.randn(len(ids), 4, generator=rng)
    return Batch(fields, len(ids)), vectors


BATCHES = [("a1 a2 b1", 1), ("b2", 2), ("a3 b3 b4", 3)]


def finished(rank: int | None, folder: str) -> list[dict[str, float]]:
    every = Classified(list("abcd")), Verified(None, (0.05,))
    for evaluation in every:
        for number, given in enumerate(BATCHES):
            if rank is None or number % 2 == rank:
                evaluation.add(*batch(*given))
    return [evaluation.finish(Path(folder), Stage.TEST) for evaluation in every]


def on_rank(folder: str) -> list[dict[str, float]]:
    return finished(distributed.rank(), folder)


def test_two_processes_measure_what_one_does(tmp_path: Path, two_ranks: TwoRanks) -> None:
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    alone = finished(None, str(tmp_path / "one"))
    assert two_ranks(on_rank, tmp_path / "two") == [alone, alone]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["confusion_test.csv", "predictions_test.csv", "trials_test.csv"]
    for name in names:
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_trials_of_recordings_that_could_not_be_read_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trials = [Trial(True, "a1", "a2"), Trial(False, "a1", "b1"), Trial(False, "a2", "broken")]
    evaluation = Verified(trials, (0.05,))
    evaluation.add(*batch("a1 a2 b1", 1))
    found = evaluation.finish(tmp_path, Stage.VALID)
    assert "valid: 1 of 3 trials are left out" in caplog.text
    assert len(read(tmp_path / "trials_valid.csv")) == 2
    assert set(found) == {"eer", "min_dcf_0.05"}


# ------------------------------------------------------------------------------------------ encoder


def test_the_small_encoder_gives_each_utterance_what_it_gives_alone() -> None:
    torch.manual_seed(0)
    encoder = TDNN(8000, bands=16, size=12)
    signals = [torch.randn(size) for size in (4000, 80, 2345)]
    wavs, lengths = pad(signals)
    together, frames = encoder(wavs, lengths)
    for number, signal in enumerate(signals):
        alone, (count,) = encoder(signal[None], torch.tensor([len(signal)]))
        assert count == frames[number]
        torch.testing.assert_close(together[number, :count], alone[0, :count], atol=1e-4, rtol=0)
        assert not together[number, count:].any()


def test_a_batch_gives_the_embeddings_and_loss_that_each_utterance_gives_alone() -> None:
    torch.manual_seed(0)
    from recipes.finetune.pooling import AttentiveStatistics, CosineHead, Embedding

    modules = {
        "encoder": TDNN(8000, bands=16, size=12),
        "embed": Embedding(AttentiveStatistics(12, 8), 6),
        "head": CosineHead(6, 3),
    }
    own: Any = {"verify": False, "best": "accuracy", "labels": SimpleNamespace(names=list("abc"))}
    brain = Classifier(modules, hparams=own, run_opts={"device": "cpu"})
    brain.weights = torch.tensor([0.5, 1.0, 2.0])
    signals = [torch.randn(size) for size in (4000, 900, 2345)]

    def loss(some: list[torch.Tensor], labels: list[int]) -> tuple[torch.Tensor, float]:
        data = Batch({"sig": Padded(*pad(some)), "label": torch.tensor(labels)}, len(some))
        found = brain.compute_forward(data, Stage.TRAIN)
        return found.detach(), brain.compute_objectives(found, data, Stage.TRAIN).item()

    together, mean = loss(signals, [0, 1, 2])
    alone = [loss([signal], [label]) for label, signal in enumerate(signals)]
    torch.testing.assert_close(together, torch.cat([each for each, _ in alone]), atol=1e-5, rtol=0)
    assert mean == pytest.approx(sum(each for _, each in alone) / 3, rel=1e-4)
    assert math.isfinite(mean)


# ---------------------------------------------------------------------------------- recorded speech


def untrained(run: trainer.Run) -> dict[str, float]:
    """Test the network as it is before its training."""
    _, sets = prepare(run)
    options = loader_options(sets["test"], "test", run.hparams)
    brain = Classifier(run.hparams["modules"], hparams=run.hparams, run_opts={"device": "cpu"})
    brain.evaluate(sets["test"], test_loader_kwargs=options)
    return brain.test_metrics


@pytest.mark.real
def test_recorded_speakers_are_told_apart(speech_data: Path, tmp_path: Path) -> None:
    folder = speech_data / "speechocean762_1000"
    if not folder.is_dir():
        pytest.skip("needs speechocean762_1000")
    corpus = (
        "!name:recipes.finetune.labelled.table {data_folder: !ref <data_folder>, audio: audio, "
        "columns: {path: id, label: speaker}, unseen: true}"
    )
    given = [str(HPARAMS / "speaker.yaml"), "--data_folder", str(folder), "--corpus", corpus,
             "--no-progressbar", "--score_norm=5"]  # fmt: skip
    before = cli.main(untrained, [*given, "--output_folder", str(tmp_path / "before")])
    after = cli.main(train, [*given, "--output_folder", str(tmp_path / "run")])
    print("untrained:", before, "trained:", after)
    train_speakers = set(json.loads((tmp_path / "run" / "prepared" / "labels.json").read_text()))
    rows = read(tmp_path / "run" / "trials_test.csv")
    speakers = {row["id"]: row["speaker"] for row in read_bars(folder / "utterances.csv")}
    tested = {speakers[row[side]] for row in rows for side in ("enrol", "test")}
    assert len(tested) > 20
    assert not tested & train_speakers
    assert after["eer"] < 0.7 * before["eer"]
    assert after["min_dcf_0.05"] < before["min_dcf_0.05"]


# ----------------------------------------------------------------------------------------- learning


@pytest.mark.long
def test_tones_are_learned(tones: Path, tmp_path: Path) -> None:
    classes = run("classify", tmp_path / "a", tones, *CLASSIFY, "--steps=150", "--batch_seconds=6")
    assert classes["accuracy"] > 90
    assert classes["macro_f1"] > 90
