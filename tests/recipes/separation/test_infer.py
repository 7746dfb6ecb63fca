"""Files to tracks: rate and length, order from piece to piece, with a run folder alone."""

from collections.abc import Iterator
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torchaudio.functional import highpass_biquad, lowpass_biquad, resample

import trainer
from recipes.common.hearing import Source
from recipes.separation import infer, separator
from recipes.separation.scoring import Scores
from recipes.separation.separator import SpeechSeparator
from recipes.separation.train import train
from tests.recipes.common.speakers import sound
from tests.recipes.separation.conftest import mixture_folder
from tests.recipes.separation.test_train import HPARAMS, TINY
from tests.recipes.small_runs import moved_run
from trainer import Checkpointer, cli

RATE = 8000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, moved to where it was not made."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("tr", "cv", "tt"):
        mixture_folder(folder / "2speakers" / "wav8k" / "min" / name, "mix")
    yaml = HPARAMS / "wsj0mix.yaml"
    return moved_run(train, yaml, folder, *TINY["conv"], "--data_folder", str(folder))


def test_tracks_have_the_rate_and_length_of_the_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        sound(tmp_path / "one.wav", 8000, 8000),
        sound(tmp_path / "stereo.flac", 22050, 44100, channels=2),
        sound(tmp_path / "short.wav", 16, 16000),
        sound(tmp_path / "two words.wav", 11036, 11025),
    ]
    out = tmp_path / "tracks"
    assert infer.main([str(run), *map(str, files), "-o", str(out)]) == 0
    expected = [out / f"{file.stem}_{n}{file.suffix}" for file in files for n in (1, 2)]
    assert capsys.readouterr().out.splitlines() == list(map(str, expected))
    for file in files:
        given = soundfile.info(file)
        for n in (1, 2):
            made = soundfile.info(out / f"{file.stem}_{n}{file.suffix}")
            for name in ("samplerate", "frames", "channels", "format", "subtype"):
                assert getattr(made, name) == getattr(given, name)


def test_tracks_add_up_to_the_mixture_as_well_as_they_can() -> None:
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(3, 8000, generator=generator)
    tracks = torch.tensor([[5.0], [-0.1], [1e-3]]) * sources
    found = separator.scaled(tracks, sources.sum(0))
    torch.testing.assert_close(found, sources, atol=1e-3, rtol=0)
    assert separator.scaled(torch.zeros(2, 100), torch.ones(100)).eq(0).all()


class Fickle:
    """Separates high from low by filters, in another order each time."""

    def __init__(self) -> None:
        self.rng, self.lengths = np.random.default_rng(3), []

    def __call__(self, signal: Tensor, rate: int) -> Tensor:
        self.lengths.append(signal.shape[1])
        low, high = signal, signal
        for _ in range(4):
            low, high = lowpass_biquad(low, rate, 700.0), highpass_biquad(high, rate, 1400.0)
        return torch.stack([low, high])[self.rng.permutation(2)]


def talk(seconds: float, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """A low hum and a high whistle that come and go; neither is silent for 2 s."""
    time = np.arange(round(seconds * rate)) / rate
    low = 0.3 * np.sin(2 * np.pi * 200 * time) * (np.sin(2 * np.pi * 0.3 * time) > -0.5)
    high = 0.2 * np.sin(2 * np.pi * 3000 * time) * (np.sin(2 * np.pi * 0.23 * time + 1) > -0.5)
    return low, high


def test_speakers_stay_on_their_track_through_all_pieces(tmp_path: Path) -> None:
    low, high = talk(70.0, RATE)
    soundfile.write(tmp_path / "talk.wav", low + high, RATE, subtype="FLOAT")
    separate = Fickle()
    written = infer.separate_file(separate, tmp_path / "talk.wav", tmp_path)
    assert len(separate.lengths) >= 8
    assert (
        max(separate.lengths) <= (separator.PIECE + separator.OVERLAP) * RATE
    )  # however long the file
    tracks = [soundfile.read(path)[0] for path in written]
    assert [len(track) for track in tracks] == [len(low)] * 2
    if np.corrcoef(tracks[0], low)[0, 1] < 0.5:
        tracks.reverse()
    for track, source in zip(tracks, (low, high), strict=True):
        for start in range(0, len(low) - RATE, RATE):  # every second of it
            part, wanted = track[start : start + RATE], source[start : start + RATE]
            if wanted.std() > 0.05:
                assert np.abs(np.fft.rfft(part)).argmax() == np.abs(np.fft.rfft(wanted)).argmax()


KINDS = [
    ("talk.wav", 16000, 1, "PCM_16"),
    ("talk.WAV", 44100, 2, "PCM_24"),
    ("talk.flac", 8000, 3, "PCM_24"),
    ("talk.aiff", 8000, 1, "FLOAT"),
    ("talk.mp3", 44100, 2, "MPEG_LAYER_III"),
    ("talk.ogg", 22050, 1, "VORBIS"),
    ("talk.opus", 16000, 2, "OPUS"),
    ("talk", 8000, 1, "GSM610"),
]


@pytest.mark.parametrize(("name", "rate", "channels", "subtype"), KINDS)
def test_tracks_are_of_the_kind_of_the_file(
    name: str, rate: int, channels: int, subtype: str, tmp_path: Path
) -> None:
    wave = np.stack([sum(talk(21.0, rate))] * channels, 1)
    form = {"talk": "WAV", "talk.opus": "OGG"}.get(name)
    soundfile.write(tmp_path / name, wave, rate, subtype, None, form)

    def halves(signal: Tensor, rate: int) -> Tensor:
        assert signal.shape[0] == channels
        return torch.stack([0.5 * signal, 0.25 * signal])

    given = soundfile.info(tmp_path / name)
    paths = infer.separate_file(halves, tmp_path / name, tmp_path / "out")
    assert [path.name for path in paths] == [f"talk_{n}{Path(name).suffix}" for n in (1, 2)]
    for path, share in zip(paths, (0.5, 0.25), strict=True):
        made = soundfile.info(path)
        for each in ("samplerate", "frames", "channels", "format", "subtype"):
            assert getattr(made, each) == getattr(given, each)
        level = soundfile.read(path)[0].std() / soundfile.read(tmp_path / name)[0].std()
        assert level == pytest.approx(share, rel=0.2)


def test_a_speaker_is_on_one_track_in_all_channels() -> None:
    """Two voices, nearer to one microphone each, which hear them at different times."""
    low, high = (torch.from_numpy(each).float() for each in talk(6.0, RATE))
    heard = [torch.stack([low, 0.3 * high])]
    heard += [torch.stack([0.2 * low.roll(11), 0.9 * high.roll(29)]), torch.stack([low, 0 * high])]
    mixture = torch.stack([each.sum(0) for each in heard])
    for orders in ([(0, 1), (1, 0), (1, 0)], [(1, 0), (1, 0), (0, 1)], [(0, 1)] * 3):
        mixed = [each[list(order)] for each, order in zip(heard, orders, strict=True)]
        found = separator.aligned(mixed, mixture)
        assert found.shape == (2, 3, len(low))
        wanted = torch.stack([each[list(orders[0])] for each in heard], 1)
        torch.testing.assert_close(found, wanted)


def test_channels_of_a_long_file_stay_with_their_speakers(tmp_path: Path) -> None:
    low, high = talk(40.0, RATE)
    stereo = np.stack([low + 0.3 * high, 0.3 * low + high], 1)
    soundfile.write(tmp_path / "talk.wav", stereo, RATE, subtype="FLOAT")
    tracks = [
        soundfile.read(path)[0]
        for path in infer.separate_file(Fickle(), tmp_path / "talk.wav", tmp_path)
    ]
    if np.corrcoef(tracks[0][:, 0], low)[0, 1] < 0.5:
        tracks.reverse()
    for track, gains, source in zip(tracks, ((1, 0.3), (0.3, 1)), (low, high), strict=True):
        for channel, gain in enumerate(gains):
            # Filters shift phases: levels and pitch are compared.
            assert track[:, channel].std() == pytest.approx(gain * source.std(), rel=0.3)


def test_three_speakers_are_followed_as_well() -> None:
    before = torch.randn(3, 2, 500, generator=torch.Generator().manual_seed(0))
    after = torch.cat([before, torch.randn(3, 2, 300)], 2)
    found = separator.follow(before, after[[2, 0, 1]])
    torch.testing.assert_close(found, after)


def test_pieces_are_joined_without_a_click(tmp_path: Path) -> None:
    class Louder:
        """A level of its own for each piece: the hardest case."""

        level = 0.0

        def __call__(self, signal: Tensor, rate: int) -> Tensor:
            self.level += 0.5
            return torch.stack([self.level * signal, signal])

    time = np.arange(40 * RATE) / RATE
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(2 * np.pi * 5 * time), RATE, subtype="FLOAT")
    first, second = infer.separate_file(Louder(), tmp_path / "a.wav", tmp_path)
    steps = np.abs(np.diff(soundfile.read(first)[0])).max()
    assert steps < 0.1 * 2 * np.pi * 5 / RATE * 3  # the loudest piece's own slope, and little more
    torch.testing.assert_close(soundfile.read(second)[0], soundfile.read(tmp_path / "a.wav")[0])


@pytest.mark.parametrize("seconds", [0.01, 12.0, 16.0, 16.01, 20.0, 29.3])
def test_pieces_cover_a_file(tmp_path: Path, seconds: float) -> None:
    path = sound(tmp_path / "long.wav", round(seconds * RATE), RATE)
    signal = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    found, overlap = torch.empty(1, 0), round(separator.OVERLAP * RATE)
    for number, (piece, _) in enumerate(separator.pieces(Source(str(path)))):
        if number:
            assert torch.equal(found[:, -overlap:], piece[:, :overlap])
            assert piece.shape[1] > overlap
        found = torch.cat([found, piece[:, overlap if number else 0 :]], 1)
    assert torch.equal(found, signal[None])


def test_unusable_files_are_named_and_the_others_separated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.wav").write_text("no sound at all")
    good, missing = sound(tmp_path / "good.wav", 4000, 8000), tmp_path / "missing.wav"
    given = [
        str(run),
        str(missing),
        str(tmp_path / "text.wav"),
        str(good),
        "-o",
        str(tmp_path / "o"),
    ]
    assert infer.main(given) == 2
    told = capsys.readouterr()
    assert told.out.splitlines() == [str(tmp_path / "o" / f"good_{n}.wav") for n in (1, 2)]
    assert f"error: {missing}: it does not exist" in told.err
    assert "text.wav: it is not an audio file" in told.err


def test_no_half_tracks_are_left(tmp_path: Path) -> None:
    class Failing:
        def __init__(self) -> None:
            self.calls: Iterator[int] = iter(range(1))

        def __call__(self, signal: Tensor, rate: int) -> Tensor:
            next(self.calls)
            return torch.stack([signal, signal])

    path = sound(tmp_path / "long.wav", 40 * RATE, RATE)
    with pytest.raises(RuntimeError):
        infer.separate_file(Failing(), path, tmp_path / ".")
    assert [each.name for each in tmp_path.iterdir()] == ["long.wav"]


def test_what_cannot_be_done_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(sound(tmp_path / "good.wav", 4000, 8000))
    assert infer.main([str(tmp_path), good, "-o", str(tmp_path)]) == 2
    assert f"error: {tmp_path} is no run folder: it has no hyperparams.yaml" in (
        capsys.readouterr().err
    )
    assert infer.main([str(run), good, "elsewhere/good.flac", "-o", str(tmp_path)]) == 2
    assert "2 of the files are called good: their tracks would be the same" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("rate", [RATE, 2 * RATE])
def test_tracks_are_those_of_the_test(run: Path, tmp_path: Path, rate: int) -> None:
    """The weights, the network and the precision are the same: so are the estimates."""
    mixture, *estimates = (
        torch.from_numpy(soundfile.read(run / "examples" / "best1" / f"{name}.wav")[0])
        for name in ("mixture", "estimate1", "estimate2")
    )
    soundfile.write(tmp_path / "m.wav", resample(mixture, RATE, rate), rate, subtype="DOUBLE")
    assert infer.main([str(run), str(tmp_path / "m.wav"), "-o", str(tmp_path)]) == 0
    tracks = [
        resample(torch.from_numpy(soundfile.read(tmp_path / f"m_{n}.wav")[0]), rate, RATE)
        for n in (1, 2)
    ]
    alike = np.abs(np.corrcoef([*tracks, *estimates])[:2, 2:])
    assert np.allclose(np.sort(alike.max(1)), 1.0, atol=1e-3 if rate == RATE else 0.03)
    # As loud as they are in the mixture: no other gains bring their sum much nearer to it.
    both = torch.stack(tracks, 1)
    best = both @ torch.linalg.lstsq(both, mixture[:, None]).solution
    left, least = ((each - mixture).norm() for each in (both.sum(1), best[:, 0]))
    assert left < 1.002 * least < 0.999 * mixture.norm()


def test_the_best_weights_are_taken_as_in_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those after the first of three epochs, which a metric calls the best."""
    scores = iter([3.0, 1.0, 2.0, 0.0])
    monkeypatch.setattr(Scores, "means", lambda _: {"si_snri": next(scores)})
    for name in ("tr", "cv", "tt"):
        mixture_folder(tmp_path / "2speakers" / "wav8k" / "min" / name, "mix", count=2)
    given = ["--data_folder", str(tmp_path), *TINY["conv"], "--optimizer_step_limit=3"]
    folder = tmp_path / "run"
    cli.main(train, [str(HPARAMS / "wsj0mix.yaml"), "--output_folder", str(folder), *given])
    assert "testing with the weights of step-00000001" in (folder / "train.log").read_text()
    assert isinstance(trainer.load(folder), SpeechSeparator)
    checkpoints = Checkpointer(folder / "checkpoints")
    (best,) = checkpoints.find(max_key="si_snri")
    saved = checkpoints.read(best)["brain"]["modules"]
    assert best.meta["si_snri"] == 3.0

    class Seen(Exception):
        pass

    def look(separate: MethodType, *_: object) -> int:
        for name, tensor in separate.__self__.modules.state_dict().items():
            assert torch.equal(tensor, saved[name])
        raise Seen

    monkeypatch.setattr(infer, "separate_all", look)
    with pytest.raises(Seen):
        infer.main([str(folder), "x.wav", "-o", str(tmp_path / "out")])


def test_no_track_overwrites_a_file_that_is_to_be_separated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(sound(tmp_path / name, RATE // 5, RATE)) for name in ("a.wav", "a_1.wav")]
    assert infer.main([str(run), *files, "-o", str(tmp_path)]) == 2
    told = f"a track of a would overwrite {files[1]}; choose another folder than {tmp_path}"
    assert told in capsys.readouterr().err
    assert infer.main([str(run), *files, "-o", str(tmp_path / "tracks")]) == 0
