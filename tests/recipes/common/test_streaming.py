"""Signals and files of any length come out as long as they were, whole, and without clicks."""

import os
import sys
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from recipes.common import audio
from recipes.common.command import told
from recipes.common.streaming import (
    Chunks,
    convert_file,
    enhance_file,
    enhance_files,
    enhance_signal,
    enhance_signals,
    enhanced_blocks,
    targets,
)
from tests.recipes.common.speakers import RATE, noise, write
from trainer.config.registry import Registry
from trainer.data import BadItem

CHUNKS = Chunks(1000, 250, 3)


def half(chunks: Tensor) -> Tensor:
    assert chunks.shape[1] == CHUNKS.length
    assert len(chunks) <= 3 * CHUNKS.at_once  # of up to three channels
    return chunks / 2


def edgy(chunks: Tensor) -> Tensor:
    """Network whose result depends on where in a chunk a sample lies."""
    return chunks * torch.linspace(0.5, 1.5, chunks.shape[1])


def blocks(signal: Tensor, size: int) -> Iterator[Tensor]:
    return iter(signal.split(size, dim=1))


@pytest.mark.parametrize("samples", [1, 249, 250, 251, 999, 1000, 1001, 1750, 1751, 12345])
def test_what_comes_out_is_as_long_and_in_its_place(samples: int) -> None:
    signal = torch.stack([noise(samples, 1), noise(samples, 2)])
    found = enhance_signal(signal, half, CHUNKS)
    torch.testing.assert_close(found, signal / 2)


@pytest.mark.parametrize("overlap", [0, 250, 500])
@pytest.mark.parametrize("size", [100, 1000, 1001, 5000])
def test_blocks_do_not_change_the_result(overlap: int, size: int) -> None:
    chunks, signal = Chunks(1000, overlap, 3), noise(12345)[None]
    whole = enhance_signal(signal, edgy, chunks)
    pieces = list(enhanced_blocks(blocks(signal, size), edgy, chunks))
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(whole, enhance_signal(signal, edgy, chunks._replace(at_once=1)))


@pytest.mark.parametrize("overlap", [0, 250, 500])
def test_signals_that_are_enhanced_together_are_as_alone(overlap: int) -> None:
    chunks = Chunks(1000, overlap, 3)
    lengths = [1, 250, 999, 1000, 1001, 1750, 5000]
    signals = [noise(2 * length).view(2, -1) for length in lengths] + [noise(1500)[None]]
    calls = []

    def network(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return edgy(rows)

    found = enhance_signals(signals, network, chunks)
    assert len(calls) == 1
    for signal, together in zip(signals, found, strict=True):
        assert torch.equal(together, enhance_signal(signal, edgy, chunks))


def test_chunks_are_joined_without_clicks() -> None:
    """A level that drops by a factor of three within a chunk, from its start to its end."""
    found = enhance_signal(torch.ones(1, 10000), edgy, CHUNKS)[0]
    assert found.diff().abs().max() < 0.01
    assert enhance_signal(torch.ones(1, 10000), edgy, Chunks(1000, 0))[0].diff().abs().max() > 0.9


def test_impossible_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chunks of 10 samples cannot overlap by 6: allowed"):
        enhance_signal(torch.ones(1, 100), half, Chunks(10, 6))
    with pytest.raises(ValueError, match=r"the network made \(3, 999\) of chunks \(3, 1000\)"):
        enhance_signal(torch.ones(1, 9000), lambda chunks: chunks[:, 1:], CHUNKS)


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("plain.wav", 16000, 1, "PCM_16"),
        ("studio.wav", 44100, 2, "PCM_24"),
        ("floats.wav", 48000, 1, "FLOAT"),
        ("packed.flac", 8000, 3, "PCM_16"),
        ("PHONE.WAV", 8000, 1, "ULAW"),
        ("mac.aiff", 48000, 2, "PCM_24"),
        ("long.w64", 16000, 1, "PCM_32"),
        ("exact.caf", 16000, 1, "DOUBLE"),
        ("apple.caf", 44100, 1, "ALAC_24"),
        ("old.wav", 11025, 1, "PCM_U8"),
        ("lossy.ogg", 22050, 2, "VORBIS"),
        ("lossy.opus", 24000, 2, "OPUS"),
        ("lossy.mp3", 44100, 2, "MPEG_LAYER_III"),
        ("mono.MP3", 16000, 1, "MPEG_LAYER_III"),
        ("dialogic.voc", 8000, 1, "PCM_16"),
    ],
)
@pytest.mark.parametrize("samples", [1, 3000, 70001])
def test_a_file_keeps_rate_length_channels_and_bits(
    tmp_path: Path, name: str, rate: int, channels: int, subtype: str, samples: int
) -> None:
    source = tmp_path / name
    time = np.arange(samples)[:, None] / rate
    sound = 0.5 * np.sin(2 * np.pi * 200 * (1 + np.arange(channels)) * time)
    soundfile.write(source, sound, rate, subtype, None, "OGG" if subtype == "OPUS" else None)
    target = targets([str(source)], tmp_path / "out")[str(source)]
    enhance_file(source, target, half, 16000, CHUNKS)
    before, after = soundfile.info(source), soundfile.info(target)
    assert (after.samplerate, after.channels, after.frames) == (rate, channels, before.frames)
    assert (after.format, after.subtype) == (before.format, before.subtype)
    assert target.name == source.name
    if samples > 1:
        heard, _ = soundfile.read(source, always_2d=True)
        found, _ = soundfile.read(target, always_2d=True)
        inner, coarse = slice(100, -100), ("ULAW", "PCM_U8", "VORBIS", "OPUS", "MPEG_LAYER_III")
        off = (found[inner] - heard[inner] / 2) ** 2
        assert off.max() ** 0.5 < (0.1 if subtype in coarse else 5e-3)
        assert off.mean() ** 0.5 < 0.05 * heard.std()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [target.name]


def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty times the length, with another rate and two channels, and no larger pieces."""
    monkeypatch.setattr(audio, "BLOCK", 4096)
    largest: dict[int, int] = {}
    peaks = {}
    for seconds in (2, 40):
        file = write(tmp_path / f"{seconds}.wav", 0.1 * noise(2 * seconds * 8000).view(2, -1), 8000)
        waiting = []

        def watched(chunks: Tensor, waiting: list[int] = waiting) -> Tensor:
            waiting.append(chunks.untyped_storage().nbytes())
            return chunks

        tracemalloc.start()
        enhance_file(file, tmp_path / "out" / file.name, watched, 16000, CHUNKS)
        peaks[seconds] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        largest[seconds] = max(waiting)
        assert len(waiting) > 2 * seconds
        assert soundfile.info(tmp_path / "out" / file.name).frames == seconds * 8000
    assert max(largest.values()) < 100_000  # of a file of 10 MB at this rate
    # NumPy's blocks, which soundfile reads, are traced, and what else the process allocates
    # meanwhile, some 20 kB; 40 s of them would be 2.5 MB.
    assert max(peaks.values()) < 250_000


def test_a_cut_file_leaves_nothing_behind(tmp_path: Path) -> None:
    file = write(tmp_path / "cut.flac", 0.1 * noise(200000))
    file.write_bytes(file.read_bytes()[:-100000])
    with pytest.raises(BadItem, match=r"cut.flac: its data are cut"):
        enhance_file(file, tmp_path / "out" / "cut.flac", half, 16000, CHUNKS)
    assert not list((tmp_path / "out").iterdir())


def test_files_that_cannot_be_used_are_named_and_the_others_enhanced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.wav", 0.1 * noise(5000))
    (tmp_path / "text.wav").write_text("no sound")
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    files = [tmp_path / "none.wav", tmp_path / "text.wav", nan, good]
    assert enhance_files([*map(str, files)], tmp_path / "out", half, 16000, CHUNKS) == 2
    told = capsys.readouterr()
    assert told.out == f"{good}\t{tmp_path / 'out' / 'good.wav'}\n"
    assert [line.partition(".wav: ")[2][:14] for line in told.err.splitlines()] == [
        "it does not ex", "it is not an a", "1 of its sampl",
    ]  # fmt: skip
    assert enhance_files([str(good)], tmp_path / "out", half, 16000, CHUNKS) == 0


@pytest.mark.parametrize("name", ["enhance_file", "enhance_files", "convert_file"])
def test_a_yaml_may_cut_chunks_but_write_no_files(name: str) -> None:
    assert Registry().locate("recipes.common.streaming.Chunks") is Chunks
    with pytest.raises(ValueError, match=f"recipes.common.streaming.{name}"):
        Registry().locate(f"recipes.common.streaming.{name}")


def test_no_file_overwrites_another_or_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a/x.wav and b/x.ogg would both become .*x.wav"):
        targets(["a/x.wav", "b/x.ogg"], tmp_path)
    with pytest.raises(ValueError, match=r"x.flac would overwrite itself; choose another folder"):
        targets([str(tmp_path / "x.flac")], tmp_path)


@pytest.mark.parametrize("format", ["WAVEX", "RF64", "NIST"])
def test_kinds_of_wav_stay_what_they_are(format: str, tmp_path: Path) -> None:
    source = tmp_path / "a.wav"
    soundfile.write(source, 0.1 * noise(4 * 3000).view(-1, 4).numpy(), RATE, "PCM_24", None, format)
    convert_file(source, tmp_path / "b.wav", iter, RATE)
    assert soundfile.info(tmp_path / "b.wav").format == format
    assert np.array_equal(soundfile.read(source)[0], soundfile.read(tmp_path / "b.wav")[0])


def test_samples_above_full_scale_stay_where_the_format_has_them(tmp_path: Path) -> None:
    loud = 3 * noise(5000).numpy()
    for suffix, subtype in ((".wav", "FLOAT"), (".caf", "FLOAT"), (".aiff", "DOUBLE")):
        soundfile.write(tmp_path / f"a{suffix}", loud, RATE, subtype)
        convert_file(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}", iter, RATE)
        assert np.array_equal(soundfile.read(tmp_path / f"b{suffix}")[0], loud)
    soundfile.write(tmp_path / "c.wav", loud / 4, RATE, "PCM_16")
    convert_file(tmp_path / "c.wav", tmp_path / "d.wav", lambda each: (4 * x for x in each), RATE)
    clipped = soundfile.read(tmp_path / "d.wav")[0]
    assert np.abs(clipped - (4 * soundfile.read(tmp_path / "c.wav")[0]).clip(-1, 1)).max() < 1e-4


def test_outputs_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder" / "a.wav").mkdir(parents=True)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for folder, reason in (
        ("file", "a.wav cannot be written: .*file is no folder"),
        ("file/more", "a.wav cannot be written: .*file is no folder"),
        ("gone/more", "a.wav cannot be written: .*gone is no folder"),
        ("folder", "folder/a.wav cannot be written: it is a folder"),
    ):
        with pytest.raises(ValueError, match=reason):
            targets(["a.wav"], tmp_path / folder)
    assert targets(["a.wav"], tmp_path / "new" / "er") == {"a.wav": tmp_path / "new/er/a.wav"}
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"b.xyz cannot be written: .* ends in .wav, .flac, .aif"):
        convert_file(write(tmp_path / "a.wav", noise(9)), tmp_path / "b.xyz", iter, RATE)


def test_a_name_that_is_not_utf_8_stays_as_it_is(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    source = os.fsdecode(str(tmp_path / "caf\u00e9.wav").encode("latin-1"))
    write(tmp_path / "a.wav", 0.1 * noise(3000)).rename(source)
    assert told(lambda: enhance_files([source], tmp_path / "out", half, 16000, CHUNKS)) == 0
    assert [os.fsencode(path.name) for path in (tmp_path / "out").iterdir()] == [b"caf\xe9.wav"]
    sys.stdout.flush()
    assert b"out/caf\xe9.wav\n" in capfdbinary.readouterr().out


def test_what_a_network_makes_of_a_file_is_numbers_or_told(tmp_path: Path) -> None:
    source = write(tmp_path / "a.wav", 0.1 * noise(3000))
    for wrong in (torch.nan, torch.inf):
        network = partial(torch.full_like, fill_value=wrong)
        with pytest.raises(BadItem, match="a.wav: the network makes numbers of it that are not"):
            enhance_file(source, tmp_path / "b.wav", network, RATE, CHUNKS)
    assert os.listdir(tmp_path) == ["a.wav"]
