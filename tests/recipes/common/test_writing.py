"""Whatever libsndfile writes comes back as it was: rate, channels, format and depth."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from recipes.common.streaming import convert_file, targets
from recipes.common.writing import kind_for, kind_of, name_for

# What libsndfile has no header for, or cannot read, although it writes it.
UNREAD = {("RAW", subtype) for subtype in soundfile.available_subtypes("RAW")}
UNREAD |= {("AIFF", "DWVW_16"), ("AIFF", "DWVW_24")}
MISCOUNTED = {("VOC", "ULAW"), ("VOC", "ALAW"), ("PAF", "PCM_24")}  # by libsndfile itself
READ_ONLY = {("SD2", subtype) for subtype in soundfile.available_subtypes("SD2")}


def kinds() -> list[tuple[str, str]]:
    every = soundfile.available_formats()
    found = {(each, subtype) for each in every for subtype in soundfile.available_subtypes(each)}
    return sorted(found - UNREAD - READ_ONLY)


def sound(rate: int, channels: int, seconds: float = 0.2) -> np.ndarray:
    time = np.arange(round(seconds * rate))[:, None] / rate
    return 0.3 * np.sin(2 * np.pi * 200 * (1 + np.arange(channels)) * time)


def about(path: Path) -> tuple[object, ...]:
    info = soundfile.info(path)
    return info.samplerate, info.channels, info.format, info.subtype, info.endian


def test_every_kind_of_file_comes_back_as_it_was(tmp_path: Path) -> None:
    """Files have a suffix that says nothing: the header alone decides."""
    covered: Counter[tuple[str, str]] = Counter()
    for form, subtype in kinds():
        orders = ("LITTLE", "BIG") if subtype == "PCM_16" else ()
        ways = [(8000, 1, "FILE"), (48000, 2, "FILE"), *((44100, 1, each) for each in orders)]
        for rate, channels, endian in ways:
            source = tmp_path / f"{form}-{subtype}-{rate}-{channels}-{endian}.x"
            try:
                soundfile.write(source, sound(rate, channels), rate, subtype, endian, form)
                given = about(source)
            except (soundfile.SoundFileError, ValueError):
                continue  # Not of this rate, number of channels or order of bytes.
            target = targets([str(source)], tmp_path / "out")[str(source)]
            convert_file(source, target, iter, soundfile.info(source).samplerate)
            assert target.name == source.name
            assert about(target) == given
            if (form, subtype) not in MISCOUNTED:
                assert soundfile.info(target).frames == soundfile.info(source).frames
            covered[form, subtype] += 1
    missing = {("AIFF", "DWVW_12"), ("WAV", "MPEG_LAYER_III")}
    missing |= {("MP3", "MPEG_LAYER_I"), ("MP3", "MPEG_LAYER_II")}
    assert set(kinds()) - set(covered) == missing
    assert covered.total() > 140


@pytest.mark.parametrize(
    ("name", "subtype", "levels", "mode"),
    [
        ("a.mp3", "MPEG_LAYER_III", (0.3, 0.8), "CONSTANT"),
        ("a.mp3", "MPEG_LAYER_III", (0.3, 0.9), "VARIABLE"),
        ("a.ogg", "VORBIS", (0.3, 0.9), None),
        ("a.opus", "OPUS", (0.3, 0.9), None),
    ],
)
def test_what_is_lossy_has_about_as_many_bits_as_before(
    name: str, subtype: str, levels: tuple[float, ...], mode: str | None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rate = 16000
    wave = sound(rate, 1, 12.0) * rng.uniform(0.1, 1.0, (12 * rate, 1)).round(1)
    form = "MP3" if name == "a.mp3" else "OGG"
    sizes = []
    for level in levels:
        options = {} if mode is None else {"bitrate_mode": mode}
        with soundfile.SoundFile(
            tmp_path / name, "w", rate, 1, subtype, None, form, compression_level=level, **options
        ) as file:
            for block in np.split(wave, 12):
                file.write(block)
        convert_file(tmp_path / name, tmp_path / f"b{Path(name).suffix}", iter, rate)
        sizes.append((tmp_path / name).stat().st_size)
        made = (tmp_path / f"b{Path(name).suffix}").stat().st_size
        assert 0.85 < made / sizes[-1] < 1.25
    assert sizes == sorted(sizes, reverse=True)


def test_what_is_only_read_becomes_a_wav_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.mp2"
    soundfile.write(source, sound(16000, 1), 16000, "MPEG_LAYER_III", None, "MP3")
    assert name_for(source) == "a.mp2"

    def fail(*_: object) -> None:
        raise soundfile.SoundFileRuntimeError("File contains data in an unimplemented format.")

    monkeypatch.setattr("recipes.common.writing._tried", fail)
    assert kind_of(source) is None
    target = targets([str(source)], tmp_path / "out")[str(source)]
    assert target.name == "a.wav"
    convert_file(source, target, iter, 16000)
    assert about(target)[:4] == (16000, 1, "WAV", "PCM_16")
    assert caplog.messages == [f"{source} is MP3 (MPEG_LAYER_III), which is only read, not written"]


@pytest.mark.parametrize(
    ("subtype", "clips"),
    [("PCM_16", True), ("PCM_24", True), ("FLOAT", False), ("DOUBLE", False), ("ULAW", True)],
)
def test_samples_above_full_scale_are_clipped_where_the_depth_has_none(
    subtype: str, clips: bool, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "a.wav", sound(8000, 2), 8000, subtype)

    def louder(blocks: object) -> object:
        return (5 * each for each in blocks)

    convert_file(tmp_path / "a.wav", tmp_path / "b.wav", louder, 8000)
    before, after = (soundfile.read(tmp_path / name)[0] for name in ("a.wav", "b.wav"))
    wanted = (5 * before).clip(-1, 1) if clips else 5 * before
    assert np.abs(after - wanted).max() < (0.04 if subtype == "ULAW" else 1e-4)


def test_a_file_that_is_made_of_none_is_of_the_kind_of_its_suffix(tmp_path: Path) -> None:
    assert kind_for(tmp_path / "a.FLAC")[:2] == ("FLAC", "PCM_16")
    with pytest.raises(ValueError, match="a.mp3 cannot be written: the name of a sound file ends"):
        kind_for(tmp_path / "a.mp3")


def test_blocks_of_any_length_are_written(tmp_path: Path) -> None:
    def whole(blocks: object) -> list[Tensor]:
        return [torch.cat(list(blocks), 1)]

    for name, form in (("a.ogg", "VORBIS"), ("a.opus", "OPUS"), ("a.flac", "PCM_16")):
        wave = sound(48000, 2, 5.0)
        with soundfile.SoundFile(tmp_path / name, "w", 48000, 2, form,
                                 format="FLAC" if name == "a.flac" else "OGG") as file:  # fmt: skip
            for block in np.split(wave, 5):
                file.write(block)
        convert_file(tmp_path / name, tmp_path / f"b{name}", whole, 48000)
        assert soundfile.info(tmp_path / f"b{name}").frames == len(wave)
