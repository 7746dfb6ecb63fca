"""Embedded speech: transcribed utterances by many voices, without a download.

    from recipes.common.speech import embedded_speech, to_cuts

    cuts = to_cuts(embedded_speech("train", 2000))

The first use synthesises (about half a minute for 2,000 utterances); later uses find the files in
the user's cache folder: ``~/.cache/cortex-speech`` on Linux, its equivalents elsewhere, or the
environment variable ``CORTEX_CACHE``. A file is named by a hash of all that made it (text, voice,
rate of samples, version), so the same request finds the same files whatever was asked for before,
and no request can find a stale one.

The speech is that of espeak-ng, from the PyPI package ``espeakng-loader``, which brings the library
and its voices in the wheel. espeak-ng is under the GPL-3, hence the optional extra (``pip install
'cortex-speech[demo]'``) and the child process (`recipes.common.synthesiser`): it is neither part of
this project nor loaded into the process that trains. The sound that a program makes is not covered
by its licence: it may be used freely.

Train, valid and test share no voice (`recipes.common.voices`) and no sentence
(`recipes.common.sentences`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.common import speech_cache
from recipes.common.sentences import sentences
from recipes.common.voices import READER, VOICES, Voice
from trainer import distributed
from trainer.seed import derive

if TYPE_CHECKING:
    from lhotse import CutSet


@dataclass(frozen=True, slots=True)
class Utterance:
    """One spoken sentence, in a 16-bit mono WAV file."""

    id: str
    text: str  # lower-case letters, apostrophes and single spaces
    speaker: str
    gender: str  # "female" or "male"
    path: Path
    samples: int
    sample_rate: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.samples / self.sample_rate


def embedded_speech(
    split: str,
    utterances: int,
    style: str = "commands",
    sample_rate: int = 16000,
    speakers: int | None = None,
    seed: int = 0,
) -> list[Utterance]:
    """Return utterances of a split, whose voices take turns; synthesise those not in the cache.

    Args:
        split: "train", "valid" or "test".
        utterances: number of utterances. A longer list begins with the shorter one.
        style: "commands" (numbers, dates and orders from about a hundred words, 2.3 s each) or
            "prose" (about 330 words, 4.2 s each).
        sample_rate: in Hz.
        speakers: number of the split's voices to use, the first ones; None for all.
        seed: chooses the sentences.

    Raises:
        ValueError: the split or style is unknown, or there are not so many speakers.
        ModuleNotFoundError: the synthesiser is not installed.
    """
    voices = _voices(split, speakers)
    texts = _texts(split, utterances, style, seed)
    spoken = [(_delivered(voices[i % len(voices)], text), text) for i, text in enumerate(texts)]
    return _speak(spoken, sample_rate)


def one_voice_reading(
    split: str,
    utterances: int,
    sample_rate: int = 16000,
    seed: int = 0,
    longest: int | None = None,
) -> list[Utterance]:
    """Return sentences of prose by one reader, who is the same in every split.

    Args:
        split: "train", "valid" or "test", which share no sentence.
        utterances: number of utterances.
        sample_rate: in Hz.
        seed: chooses the sentences.
        longest: characters of a sentence, at most; 45 or more. None for any number.

    Raises:
        ValueError: the split is unknown, or ``longest`` is too small.
        ModuleNotFoundError: the synthesiser is not installed.
    """
    texts = _texts(split, utterances, "prose", seed, longest)
    return _speak([(READER, text) for text in texts], sample_rate)


def spoken_words(split: str, words: Sequence[str], sample_rate: int = 16000) -> list[Utterance]:
    """Return each word by each voice of a split, such as for a keyword spotter.

    Args:
        split: "train", "valid" or "test", which share no voice.
        words: the words, or phrases.
        sample_rate: in Hz.

    Raises:
        ValueError: the split is unknown.
        ModuleNotFoundError: the synthesiser is not installed.
    """
    voices = _voices(split, None)
    return _speak(
        [(_delivered(each, word), word) for word in words for each in voices], sample_rate
    )


def to_cuts(utterances: Sequence[Utterance]) -> CutSet:
    """Return utterances as lhotse's cuts with one supervision each: text, speaker and gender."""
    from lhotse import CutSet

    from recipes.common.audio import Header
    from recipes.common.cuts import cut_of

    return CutSet.from_cuts(
        cut_of(
            one.path, Header(one.samples, one.sample_rate, 1), one.id, text=one.text,
            language="English", speaker=one.speaker, gender=one.gender,
        )
        for one in utterances
    )  # fmt: skip


def _voices(split: str, speakers: int | None) -> tuple[Voice, ...]:
    voices = VOICES.get(split, ())
    if not voices:
        raise ValueError(f"split of the embedded speech is {split!r}, not one of {list(VOICES)}")
    if speakers is not None and not 1 <= speakers <= len(voices):
        raise ValueError(f"{split} has 1 to {len(voices)} speakers, not {speakers}")
    return voices[:speakers]


def _texts(
    split: str, utterances: int, style: str, seed: int, longest: int | None = None
) -> list[str]:
    if utterances < 1:
        raise ValueError(f"embedded speech has at least 1 utterance, not {utterances}")
    if longest is not None and longest < 45:  # of shorter ones there are few
        raise ValueError(f"longest must be at least 45 characters, not {longest}")
    texts = sentences(split, style, seed)
    return list(islice((t for t in texts if longest is None or len(t) <= longest), utterances))


def _delivered(voice: Voice, text: str) -> Voice:
    """The voice as it says this text: nobody says everything equally fast and high."""
    draw = derive(0, voice.name, text)
    faster, higher = draw % 1000 / 500 - 1, draw // 1000 % 1000 / 500 - 1  # each from -1 to 1
    rate, pitch = voice.rate * (1 + 0.1 * faster), voice.pitch + 4 * higher
    return replace(voice, rate=round(rate), pitch=round(pitch))


def _speak(spoken: Sequence[tuple[Voice, str]], sample_rate: int) -> list[Utterance]:
    lines = [speech_cache.Line(voice, text, sample_rate) for voice, text in spoken]
    result = []
    for line, samples in zip(lines, speech_cache.fill(lines), strict=True):
        name = line.voice.name
        result.append(
            Utterance(
                id=f"{name}-{line.key[:16]}",
                text=line.text,
                speaker=name,
                gender=line.voice.gender,
                path=line.path,
                samples=samples,
                sample_rate=sample_rate,
            )
        )
    if distributed.is_main():
        hours = sum(one.duration for one in result) / 3600
        where = speech_cache.folder()
        print(
            f"embedded speech: {len(result)} utterances, {hours:.2f} h, cached in {where}",
            file=sys.stderr,
        )
    return result
