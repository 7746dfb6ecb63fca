"""A choice that a recipe does not know is refused by a sentence with those that it knows."""

import importlib
from pathlib import Path

import pytest

from trainer import cli

HPARAMS = Path(__file__).parents[2] / "hparams"

WRONG = {
    "asr": ["--lexicon", "[words]", "--decoder", "best"],
    "metricgan": ["--target", "wer"],
    "metricgan ": ["--valid_measures", "[pesk]"],
    "metricgan  ": ["--target", "stoi", "--measures", "[si_snr]"],
    "metricgan   ": ["--metric_layers", "[lstn]"],
    "segan": ["--best", "loss"],
    "segan ": ["--valid_measures", "[stoy]"],
    "hifigan": ["--best", "pesq"],
    "hifigan ": ["--measures", "[pesk]"],
    "separation": ["--mixing.pairs", "some"],
}


@pytest.mark.parametrize("task", WRONG, ids=lambda task: f"{task.strip()} {' '.join(WRONG[task])}")
def test_an_unknown_choice_is_a_sentence_with_those_there_are(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = importlib.import_module(f"recipes.{task.strip()}.train").train
    small = ["--corpus.train", "2", "--corpus.valid", "1", "--corpus.test", "1"]
    argv = [str(HPARAMS / task.strip() / "demo.yaml"), "--output_folder", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as caught:
        cli.main(train, [*argv, *small, *WRONG[task]])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert "allowed: " in said
    assert "KeyError" not in said


def test_an_unknown_experiment_is_a_sentence_with_those_there_are() -> None:
    from recipes.clipping_study.experiments import experiments

    with pytest.raises(ValueError, match="experiments has speeds; allowed: recurrent, warmup"):
        experiments({"speeds": {}})


def test_an_unknown_vocabulary_is_a_sentence_with_those_there_are() -> None:
    from recipes.common.sentences import vocabulary

    with pytest.raises(ValueError, match="vocabulary of 'poems'; allowed: commands, prose"):
        vocabulary("poems")
