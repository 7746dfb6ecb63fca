"""Small sounds that behave like speech, and files and cuts of them."""

from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from torch import Tensor

RATE = 16000


def voice(seconds: float = 1.5, seed: int = 0, rate: int = RATE, pitch: float = 120.0) -> Tensor:
    """Harmonics in syllables of a quarter of a second with pauses between, (T,): PESQ hears it."""
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.1 * np.sin(2 * np.pi * 3 * time))) / rate
    sound = sum(np.sin(k * phase + draw.uniform(0, 6)) / k for k in range(1, 20))
    loud = np.maximum(0, np.sin(2 * np.pi * 2 * time + draw.uniform(0, 6)))
    return torch.from_numpy((0.1 * loud * sound).astype(np.float32))


def noise(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def write(path: Path, signal: Tensor, rate: int = RATE) -> Path:
    """A 16-bit file of (T,) or (C, T)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, signal.numpy() if signal.dim() == 1 else signal.mT.numpy(), rate)
    return path


def sound(path: Path, samples: int, rate: int, channels: int = 1, **kind: str) -> Path:
    """A file of noise, of a kind that soundfile takes."""
    noises = np.random.default_rng(0).normal(0.0, 0.1, (samples, channels))
    soundfile.write(path, noises, rate, **kind)
    return path


def cut(path: Path, speaker: str = "ann") -> MonoCut:
    """A file as a cut of somebody's speech."""
    found = soundfile.info(path)
    source = AudioSource(type="file", channels=[0], source=str(path))
    name, seconds = path.stem, found.frames / found.samplerate
    recording = Recording(name, [source], found.samplerate, found.frames, seconds)
    said = SupervisionSegment(name, name, 0.0, seconds, speaker=speaker)
    return MonoCut(name, 0.0, seconds, 0, supervisions=[said], recording=recording)
