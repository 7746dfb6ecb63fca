"""Small voices: each speaker a buzz of an own pitch, so that little has to be learned."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

RATE = 8000
PITCHES = {"ann": 220, "eve": 260, "bob": 90, "dan": 120}  # Hz
GENDERS = {"ann": "female", "eve": "female", "bob": "male", "dan": "male"}


def buzz(pitch: float, seconds: float, seed: int, rate: int = RATE) -> np.ndarray:
    """Harmonics of a pitch that come and go, and a little noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    waves = [np.sin(2 * np.pi * n * pitch * time + rng.uniform(0, 6)) / n for n in range(1, 8)]
    loud = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 3) * time)
    return (0.1 * loud * sum(waves) + 1e-3 * rng.normal(size=len(time))).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


def cut_of(path: Path, speaker: str, gender: str | None) -> MonoCut:
    info = soundfile.info(path)
    source = AudioSource(type="file", channels=[0], source=str(path))
    recording = Recording(
        path.stem, [source], info.samplerate, info.frames, info.frames / info.samplerate
    )
    said = SupervisionSegment(
        path.stem, path.stem, 0.0, recording.duration, speaker=speaker, gender=gender
    )
    return MonoCut(path.stem, 0.0, recording.duration, 0, supervisions=[said], recording=recording)


def record(folder: Path, people: Sequence[str] = tuple(PITCHES), takes: int = 3) -> CutSet:
    """So many seconds-long recordings of each of the people."""
    cuts = []
    for number, name in enumerate(people):
        for take in range(takes):
            samples = buzz(PITCHES[name], 1.0 + 0.1 * take, 10 * number + take)
            path = write(folder / f"{name}-{take}.wav", samples)
            cuts.append(cut_of(path, name, GENDERS[name]))
    return CutSet.from_cuts(cuts)


@pytest.fixture(scope="session")
def voices(tmp_path_factory: pytest.TempPathFactory) -> CutSet:
    """Three recordings of about a second by each of four people."""
    return record(tmp_path_factory.mktemp("voices"))


def mixture_folder(root: Path, kind: str, speakers: int = 2, count: int = 4) -> Path:
    """Mixtures of this kind ("mix", "mix_clean" or "mix_both") as files, with sources and noise."""
    names = sorted(PITCHES)
    for number in range(count):
        seconds = 0.6 + 0.05 * number
        parts = [
            0.3 * buzz(PITCHES[names[(number + n) % 4]], seconds, 10 * number + n)
            for n in range(speakers)
        ]
        hiss = 0.01 * np.random.default_rng(number).normal(size=len(parts[0]))
        every = [*parts, hiss.astype(np.float32)] if kind == "mix_both" else parts
        write(root / kind / f"m{number}.wav", sum(every))
        for n, part in enumerate(parts, 1):
            write(root / f"s{n}" / f"m{number}.wav", part)
        if kind == "mix_both":
            write(root / "noise" / f"m{number}.wav", every[-1])
    return root


def librispeech_part(root: Path, name: str, people: range, seconds: float = 0.3) -> None:
    """A part of LibriSpeech: two recordings of each of the people, at 16 kHz."""
    for number in people:
        folder = root / name / str(number) / "1"
        for take in range(2):
            sound = buzz(90 + 9 * number, 2 * seconds, take)  # of as many samples at twice the rate
            write(folder / f"{number}-1-{take:04d}.flac", sound, 16000)
        lines = [f"{number}-1-{take:04d} SOME WORDS\n" for take in range(2)]
        (folder / f"{number}-1.trans.txt").write_text("".join(lines))
