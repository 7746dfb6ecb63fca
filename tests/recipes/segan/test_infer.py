"""Enhancing files with nothing but a run folder."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import trainer
from recipes.common.streaming import enhance_signal
from recipes.segan import infer
from recipes.segan.enhancer import SEGAN
from recipes.segan.train import train
from tests.recipes.common.speakers import RATE, noise, voice, write
from tests.recipes.segan.test_train import HPARAMS, TINY, WARM
from tests.recipes.small_runs import moved_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, moved to where it was not made."""
    pytest.importorskip("pystoi")
    folder = tmp_path_factory.mktemp("made")
    for part in ("train-clean-100", "dev-clean", "test-clean"):
        for number in range(2):
            path = folder / "speech" / part / part[0] / "1" / f"{part[0]}-1-{number:04d}.flac"
            write(path, voice(1.0, number))
    for number in range(3):
        write(folder / "noise" / f"{number}.wav", 0.1 * noise(RATE, number))
    return moved_run(
        train, HPARAMS / "real.yaml", folder, *TINY, *WARM,
        "--data_folder", str(folder / "speech"), "--noise_folder", str(folder / "noise"),
        "--measures", "[stoi, si_snr]", "--steps", "2",
    )  # fmt: skip


def test_files_of_every_kind_come_out_as_they_were(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        write(tmp_path / "plain.wav", 0.1 * noise(20000)),
        write(tmp_path / "stereo.flac", 0.1 * noise(2 * 30000).view(2, -1), 44100),
        write(tmp_path / "short.wav", 0.1 * noise(3), 8000),
    ]
    out = tmp_path / "out"
    assert infer.main([str(run), *map(str, files), "-o", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{file}\t{out / file.name}" for file in files]
    for file in files:
        before, after = soundfile.info(file), soundfile.info(out / file.name)
        assert after.samplerate == before.samplerate
        assert (after.frames, after.channels) == (before.frames, before.channels)
    # What is in it is what the network of the best checkpoint makes of it.
    model = trainer.load(run)
    assert isinstance(model, SEGAN)
    heard = torch.from_numpy(soundfile.read(files[0], dtype="float32")[0])[None]
    truth = enhance_signal(heard, model.network, model.chunks)[0].clamp(-1, 1)
    found = soundfile.read(out / "plain.wav", dtype="float32")[0]
    assert np.abs(found - truth.numpy()).max() < 1e-4


def test_what_cannot_be_used_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.wav", 0.1 * noise(9000))
    missing = tmp_path / "missing.wav"
    assert infer.main([str(run), str(missing), str(good), "-o", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.out == f"{good}\t{tmp_path / 'out' / 'good.wav'}\n"
    assert f"error: {missing}: it does not exist" in told.err
    assert infer.main([str(run), str(good), "-o", str(tmp_path)]) == 2
    assert f"error: {good} would overwrite itself" in capsys.readouterr().err
    assert infer.main([str(tmp_path), str(good), "-o", str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path} is no run folder: it has no hyperparams.yaml" in (
        capsys.readouterr().err
    )
