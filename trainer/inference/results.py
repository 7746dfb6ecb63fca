"""Results of the methods of `trainer.inference.Model`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


@dataclass(frozen=True)
class Word:
    """A recognised word.

    Attributes:
        text: the word.
        start: time of its start, in seconds from the start of the sound.
        end: time of its end, in seconds.
        score: mean probability of its tokens, from 0 to 1; None if the model gives none.
    """

    text: str
    start: float
    end: float
    score: float | None = None


@dataclass(frozen=True)
class Transcript:
    """Result of ``transcribe``; ``str()`` of it is ``text``.

    Attributes:
        text: the recognised text.
        words: its words with their times; empty if the model gives no times.
        score: mean probability of the tokens, from 0 to 1; None if the model gives none.
    """

    text: str
    words: tuple[Word, ...] = ()
    score: float | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class Sound:
    """Samples with their rate: result of ``enhance``, ``separate`` and ``vocode``, and an input.

    Attributes:
        samples: float32 samples (C, T) on the CPU, within -1 and 1 for `save`.
        rate: sample rate in Hz.
    """

    samples: Tensor = field(repr=False)
    rate: int

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.samples.shape[-1] / self.rate

    def save(self, path: str | Path) -> Path:
        """Write the sound to a file in the format of its suffix, such as ``x.flac``.

        The file is written atomically, and replaces an existing one.

        Args:
            path: the file.

        Returns:
            The path.

        Raises:
            ImportError: soundfile is not installed.
            OSError: the file cannot be written.
            ValueError: soundfile writes no such format, or the samples are not finite (C, T).
        """
        try:
            import soundfile
        except ImportError as error:
            raise ImportError(
                "writing audio needs soundfile: pip install 'cortex-speech[recipes]'"
            ) from error
        target = Path(os.path.expanduser(path))
        kind = target.suffix.removeprefix(".").upper()
        known = {each for each in soundfile.available_formats() if soundfile.default_subtype(each)}
        if kind not in known - {"SD2"}:  # SD2 is a pair of files.
            raise ValueError(
                f"{target} has no suffix of a sound file that soundfile writes, such as .wav or "
                ".flac"
            )
        samples = torch.as_tensor(self.samples).detach().float()
        if samples.ndim != 2 or not torch.isfinite(samples).all():
            raise ValueError(
                f"{target} cannot be written: the samples have the shape {tuple(samples.shape)}; "
                "allowed: finite numbers (C, T)"
            )
        part = target.with_name(f".{token_hex(8)}.part")
        try:
            part.touch()  # Errors of the system are clearer than those of soundfile.
            soundfile.write(part, samples.mT.numpy(), self.rate, format=kind)
            os.replace(part, target)
        except (OSError, soundfile.LibsndfileError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.error_string
            raise OSError(f"{target} cannot be written: {reason}") from error
        finally:
            with suppress(OSError):
                part.unlink()
        return target


@dataclass(frozen=True, eq=False)
class Speech(Sound):
    """Result of ``synthesise``.

    Attributes:
        samples: float32 samples (1, T) on the CPU, within -1 and 1.
        rate: sample rate in Hz.
        text: the spoken text, as the model reads it.
        mel: log-mel spectrogram of M mels and F frames (M, F).
        mel_config: its settings, which must be those of the vocoder.
        alignment: attention of each frame to the N symbols of the text (F, N).
        symbols: names of these symbols, such as letters.
        finished: False if the model did not find the end, and was stopped.
    """

    text: str = ""
    mel: Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False)
    mel_config: Mapping[str, float] = field(default_factory=dict, repr=False)
    alignment: Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False)
    symbols: tuple[str, ...] = field(default=(), repr=False)
    finished: bool = True


@dataclass(frozen=True)
class Classification:
    """Result of ``classify``; ``str()`` of it is ``label``.

    Attributes:
        label: the most probable class.
        probability: its probability, from 0 to 1.
        probabilities: probability of each class, largest first.
    """

    label: str
    probability: float
    probabilities: Mapping[str, float] = field(repr=False)

    @classmethod
    def ranked(cls, labels: Sequence[str], probabilities: Tensor) -> Classification:
        """Return the result for a distribution over classes.

        Args:
            labels: names of the N classes.
            probabilities: their probabilities (N,), in the same order.
        """
        pairs = zip(labels, probabilities.tolist(), strict=True)
        found = sorted(pairs, key=lambda each: -each[1])
        return cls(*found[0], dict(found))

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False)
class Embedding:
    """Result of ``embed``.

    Attributes:
        vector: float32 numbers (D,) on the CPU.
    """

    vector: Tensor

    def similarity(self, other: Embedding) -> float:
        """Return the cosine of the angle to another embedding, from -1 to 1."""
        return float(cosine_similarity(self.vector, other.vector, dim=0))
