"""Every way in which an audio file can be unusable is told apart."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from recipes.common.audio import (
    Expected,
    Forward,
    Header,
    check_recordings,
    read_audio,
    read_channels,
    read_header,
)
from trainer.data import BadItem

RATE = 16000


def tone(path: Path, samples: int = 1600, rate: int = RATE, **options: str) -> Path:
    soundfile.write(path, 0.5 * np.sin(np.arange(samples) / 9), rate, **options)
    return path


def _cut(path: Path, size: int | float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: size if isinstance(size, int) else round(size * len(whole))])


def _cut_flac(path: Path) -> None:
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 8000), RATE, format="FLAC")
    _cut(path, 0.5)


def _nan(path: Path) -> None:
    samples = np.zeros(1600, "float32")
    samples[[3, 5]] = np.nan, np.inf
    soundfile.write(path, samples, RATE, subtype="FLOAT")


# name: (what happens to a good file, what is said of it, whether its header says so)
WAYS: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "missing": (Path.unlink, "it does not exist", True),
    "empty": (lambda path: path.write_bytes(b""), r"it is empty \(0 bytes\)", True),
    "cut header": (lambda path: _cut(path, 30), r"its header is cut or broken \(Error in", True),
    "only header": (lambda path: _cut(path, 44), "its data are cut: 0 of 3200 bytes", True),
    "cut data": (lambda path: _cut(path, 0.5), "its data are cut: 1578 of 3200 bytes", True),
    "cut flac": (_cut_flac, r"its data are cut or broken \(", False),
    "text": (
        lambda path: path.write_text("not a sound\n" * 99),
        r"it is not an audio file \(Format not recognised; it begins with b'not '\)",
        True,
    ),
    "not finite": (_nan, "2 of its samples are not finite numbers", False),
    "rate": (
        lambda path: tone(path, rate=8000),
        "it is sampled at 8000 Hz, not at 16000 Hz",
        True,
    ),
    "channels": (
        lambda path: soundfile.write(path, np.zeros((1600, 2)), RATE),
        "it has 2 channels, expected: 1",
        True,
    ),
    "no samples": (lambda path: tone(path, 0), "it holds no samples", True),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "it is no regular file", True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_bad_file_is_named_with_its_reason(way: str, tmp_path: Path) -> None:
    spoil, sentence, shows = WAYS[way]
    path = tone(tmp_path / "one.wav")
    spoil(path)
    with pytest.raises(BadItem, match=sentence) as caught:
        read_audio(path, RATE)
    assert caught.value.path == str(path)
    if shows:
        with pytest.raises(BadItem, match=sentence):
            read_header(path, Expected(RATE, 1))
    else:
        read_header(path, Expected(RATE, 1))


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_a_good_file_is_read_whole_or_in_part(ending: str, tmp_path: Path) -> None:
    path = tone(tmp_path / f"one.{ending}", 8000)
    expected = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    assert read_header(path) == Header(8000, RATE, 1)
    assert read_header(path).duration == 0.5
    signal = read_audio(path, RATE)
    assert signal.dtype == torch.float32
    assert torch.equal(signal, expected)
    part = read_audio(path, RATE, start=0.1, duration=0.2)
    torch.testing.assert_close(part, expected[1600:4800], atol=1e-3, rtol=0)
    assert torch.equal(read_audio(path, RATE, duration=0.50004), expected)
    with pytest.raises(BadItem, match=r"it lasts 0.500 s, asked for was 0.400 s to 0.600 s"):
        read_audio(path, RATE, start=0.4, duration=0.2)


def test_a_stream_that_never_learnt_its_length_is_good(tmp_path: Path) -> None:
    path = tone(tmp_path / "one.wav")
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4  # As a program that writes to a pipe leaves it.
    path.write_bytes(data)
    assert len(read_audio(path, RATE)) == 1600


def test_one_of_several_channels_or_their_mean_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "two.wav"
    soundfile.write(path, np.stack([np.full(100, 0.25), np.full(100, -0.5)], 1), RATE, "FLOAT")
    for channel, value in ((0, 0.25), (1, -0.5), ("mean", -0.125)):
        signal = read_audio(path, RATE, channel=channel)
        assert signal.tolist() == [value] * 100
        assert signal.is_contiguous()
    with pytest.raises(BadItem, match="it has 2 channels, asked for was 2; allowed: 0 to 1"):
        read_audio(path, RATE, channel=2)


def test_another_rate_is_resampled_where_that_is_allowed(tmp_path: Path) -> None:
    time = np.arange(8000) / 8000
    path = tmp_path / "low.wav"
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * time), 8000, "FLOAT")
    signal = read_audio(path, RATE, resample=True)
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(16000) / RATE)
    assert signal.shape == (16000,)
    torch.testing.assert_close(signal[200:-200], expected[200:-200], atol=2e-3, rtol=0)


def test_recordings_are_checked_before_anything_is_trained(tmp_path: Path, caplog: object) -> None:
    paths = [tone(tmp_path / f"{index}.wav", 100 + index) for index in range(40)]
    shown = [way for way in WAYS if WAYS[way][2]][:2]
    for way, path in zip(shown, paths[5:], strict=False):
        WAYS[way][0](path)
    with caplog.at_level(logging.WARNING):
        good = check_recordings(paths, RATE)
    assert list(good) == paths[:5] + paths[7:]
    assert good[paths[9]] == Header(109, RATE, 1)
    assert caplog.messages == [
        f"skipped {paths[5]}: it does not exist",
        f"skipped {paths[6]}: it is empty (0 bytes)",
    ]
    with pytest.raises(BadItem, match="5.wav: it does not exist"):
        check_recordings(paths, RATE, on_bad="raise")
    paths[20].unlink()
    with pytest.raises(ValueError, match="3 of 40 files are bad, more than the 5.0%") as caught:
        check_recordings(paths, RATE)
    assert str(caught.value).count("\n") == 3
    assert f"{paths[20]}: it does not exist" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "format", "subtype"),
    [
        ("one.WAV", "WAV", "PCM_16"),
        ("one.wav", "WAVEX", "PCM_24"),
        ("one.wav", "RF64", "PCM_32"),
        ("one.w64", "W64", "PCM_16"),
        ("one.aiff", "AIFF", "PCM_24"),
        ("one.aifc", "AIFF", "FLOAT"),
        ("one.caf", "CAF", "PCM_16"),
        ("one.au", "AU", "PCM_16"),
        ("one.WAV", "NIST", "PCM_16"),
        ("one.Flac", "FLAC", "PCM_24"),
        ("one.wav", "WAV", "DOUBLE"),
    ],
)
def test_every_format_is_read_and_told_where_it_is_cut(
    name: str, format: str, subtype: str, tmp_path: Path
) -> None:
    samples = 0.5 * np.sin(np.arange(4000) / 9)
    loud = 10.0 if subtype in ("FLOAT", "DOUBLE") else 1.0
    soundfile.write(tmp_path / name, loud * samples, RATE, subtype=subtype, format=format)
    assert read_header(tmp_path / name) == Header(4000, RATE, 1)
    found = read_audio(tmp_path / name, RATE)
    torch.testing.assert_close(found, torch.from_numpy(loud * samples).float(), atol=1e-4, rtol=0)
    _cut(tmp_path / name, 0.5)
    with pytest.raises(BadItem, match="its (data are|header is) cut"):
        read_audio(tmp_path / name, RATE)


def test_what_was_written_to_a_pipe_is_as_long_as_it_is(tmp_path: Path) -> None:
    """Sizes that SoX, FFmpeg, arecord and others leave in the header."""
    path = tone(tmp_path / "one.wav")
    data = bytearray(path.read_bytes())
    for promised in (0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0x7FFFFFDB, 0xFFFFFFFF, 0xFFFFF000):
        data[40:44] = promised.to_bytes(4, "little")
        data[4:8] = min(promised + 36, 0xFFFFFFFF).to_bytes(4, "little")
        path.write_bytes(data)
        assert read_header(path) == Header(1600, RATE, 1)
        assert len(read_audio(path, RATE)) == 1600
    for format, at, promised in (
        ("AIFF", b"SSND", 0x7F000008),
        ("AU", b".snd\0\0\0\x18", 0xFFFFFFFF),
    ):
        other = tone(tmp_path / f"one.{format}", format=format)
        raw = bytearray(other.read_bytes())
        start = raw.index(at) + len(at)
        raw[start : start + 4] = promised.to_bytes(4, "big")
        other.write_bytes(raw)
        assert len(read_audio(other, RATE)) == 1600
    data[4:8], data[40:44] = b"\x24\0\0\0", b"\0\0\0\0"
    path.write_bytes(data + bytes(4000))
    with pytest.raises(BadItem, match="no samples by its header, which was not finished: write it"):
        read_header(path)
    flac = tone(tmp_path / "one.flac")
    raw = bytearray(flac.read_bytes())
    raw[21], raw[22:26] = raw[21] & 0xF0, b"\0\0\0\0"  # Of the 36 bits of the number of samples.
    flac.write_bytes(raw)
    with pytest.raises(BadItem, match="its header does not say how long it is: write it anew"):
        read_audio(flac)
    data[4:8], data[40:44] = b"\xff" * 4, (1_900_000_000).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(BadItem, match="its data are cut: 3200 of 1900000000 bytes"):
        read_header(path)


def mp3(path: Path, rate: int, channels: int, mode: str) -> Path:
    """Loud and quiet parts, of which the first is the loudest."""
    parts = [np.random.default_rng(0).normal(0, each, (rate, channels)) for each in (0.3, 1e-4)]
    kind = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": mode}
    with soundfile.SoundFile(path, "w", rate, channels, compression_level=0.5, **kind) as file:
        file.write(np.concatenate(parts))
    return path


def without_header(data: bytes) -> bytes:
    """An MP3 without its first frame, which tells of all."""
    place = next(place for name in (b"Xing", b"Info") if (place := data.find(name)) >= 0)
    return data[data.index(data[:2], place) :]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_an_mp3_has_all_its_samples_or_is_bad(
    tmp_path: Path, rate: int, channels: int, mode: str
) -> None:
    path = mp3(tmp_path / "a.mp3", rate, channels, mode)
    data = path.read_bytes()
    path.write_bytes(b"ID3\3\0\0\0\0\0\x0a" + bytes(10) + data + b"TAG" + bytes(125))
    assert read_header(path).samples == len(read_audio(path, channel=0)) == 2 * rate
    unknown = "its header does not say how long it is: write it anew"
    joined, bare = tmp_path / "joined.mp3", tmp_path / "bare.mp3"
    joined.write_bytes(data + data)
    with pytest.raises(BadItem, match=unknown):
        read_header(joined)
    bare.write_bytes(without_header(data))
    if mode == "VARIABLE":
        with pytest.raises(BadItem, match=unknown):
            read_header(bare)
    else:
        assert abs(len(read_audio(bare, channel=0)) - 2 * rate) < 3 * 1152


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_U8", "FLOAT"])
@pytest.mark.parametrize("width", [2, 3])
def test_a_wav_that_goes_on_behind_its_header_is_bad(
    tmp_path: Path, subtype: str, width: int
) -> None:
    """A recorder was killed that had written the size of its first block."""
    path = tone(tmp_path / "a.wav", 16000, subtype=subtype)
    data = path.read_bytes()
    place = data.index(b"data") + 4
    size = 800 * width  # An odd number of blocks, an even one of bytes.
    short = data[:place] + size.to_bytes(4, "little") + data[place + 4 :]
    path.write_bytes(short)
    with pytest.raises(BadItem, match=f"goes on behind the {size} bytes of its header, which was"):
        read_header(path)
    # Chunks and zeros are no samples.
    for behind in (b"LIST\0\x4e\0\0" + bytes(range(256)) * 78, b"TAG" + data, bytes(20000)):
        path.write_bytes(short[: place + 4 + size] + behind)
        assert read_header(path).samples * {"PCM_16": 2, "PCM_U8": 1, "FLOAT": 4}[subtype] == size


@pytest.mark.parametrize("suffix", [".ogg", ".opus", ".wav"])
def test_files_that_were_joined_are_bad(tmp_path: Path, suffix: str) -> None:
    kind = {"format": "OGG", "subtype": "OPUS"} if suffix == ".opus" else {}
    one = tone(tmp_path / f"a{suffix}", 16000, **kind)
    other = tone(tmp_path / f"b{suffix}", 40000, **kind)
    assert read_header(one).samples == len(read_audio(one)) == 16000
    joined = tmp_path / f"joined{suffix}"
    for parts in ((one, other), (other, one), (one, one)):
        joined.write_bytes(b"".join(part.read_bytes() for part in parts))
        with pytest.raises(BadItem, match="does not say how long it is|header is cut or broken"):
            read_header(joined)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_an_mp3_of_few_bits_is_the_same_in_parts_and_in_blocks(rate: int, tmp_path: Path) -> None:
    """Its frames refer to bits in many frames before them."""
    time = np.arange(10 * rate) / rate
    path = tmp_path / "a.mp3"
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 200 * time), rate)
    whole, _ = read_channels(path)
    for start in (0.5, 1.111, 4.0, 9.0):
        part, _ = read_channels(path, start, 0.75)
        first = round(start * rate)
        torch.testing.assert_close(part, whole[:, first : first + part.shape[1]])
    with Forward(path) as file:
        blocks = [file.read(5000, dtype="float32") for _ in range(2 * rate // 1000 + 1)]
    assert np.allclose(np.concatenate(blocks), whole[0].numpy(), atol=1e-6)
