"""The recogniser on recorded speech, in the layouts of real corpora, from files to errors."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.asr.data import digits

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[3]
ONE_PART = "{train: [train-clean-100], valid: [train-clean-100], test: [train-clean-100]}"


def run(folder: Path, yaml: str, *arguments: str) -> list[dict[str, Any]]:
    """Train in a process of its own, and read what it logged."""
    command = [sys.executable, "recipes/asr/train.py", f"hparams/asr/{yaml}", *arguments,
               "--output_folder", str(folder), "--no-progressbar", "--threads", "1"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_takes_of_six_speakers_make_strings_that_share_no_take(speech_data: Path) -> None:
    strings = {"train": 60, "valid": 30, "test": 60}
    takes = {"train": [6, 49], "valid": [4, 5], "test": [3, 3]}
    corpus = digits(str(speech_data / "fsdd"), 8000, strings, takes)
    used: dict[str, set[str]] = {}
    for split, count in strings.items():
        cuts = list(corpus[split])
        assert len(cuts) == count
        tracks = [track.cut for cut in cuts for track in cut.tracks]
        used[split] = {cut.recording_id for cut in tracks}
        first, last = takes[split]
        assert {int(name.split("_")[2]) for name in used[split]} <= set(range(first, last + 1))
    speakers = {name.split("_")[1] for name in used["train"]}
    assert speakers == {name.split("_")[1] for name in used["test"]}
    assert len(speakers) == 6
    assert not used["train"] & used["test"]


def test_recorded_digits_train_and_are_tested(speech_data: Path, tmp_path: Path) -> None:
    lines = run(
        tmp_path, "fsdd.yaml", "--data_folder", str(speech_data / "fsdd"), "--steps", "3",
        "--schedule.warmup_steps", "1", "--corpus.strings", "{train: 60, valid: 10, test: 10}",
    )  # fmt: skip
    assert lines[-1]["stage"] == "test"
    assert 0.0 <= lines[-1]["wer"] < math.inf
    assert 0.0 <= lines[-1]["cer"] < math.inf


def test_two_batches_of_librispeech_are_learned(speech_data: Path, tmp_path: Path) -> None:
    lines = run(
        tmp_path, "librispeech.yaml", "--data_folder", str(speech_data / "librispeech_3spk"),
        "--parts", ONE_PART, "--overfit_batches", "2", "--batch_seconds", "20", "--steps", "20",
        "--grad_accumulation_factor", "1", "--speeds", "[1.0]", "--model.augment", "null",
        "--width", "96", "--model.encoder.num_layers", "2", "--model.encoder.dropout", "0.0",
        "--schedule.warmup_steps", "5", "--average_checkpoints", "1", "--checkpointer.keep_last",
        "1", "--num_workers", "0",
    )  # fmt: skip
    valid = [line["loss"] for line in lines if line["kind"] == "stage" and line["stage"] == "valid"]
    assert len(valid) >= 2
    assert valid[-1] < valid[0]
