"""Embedded sentences with noise that is made, too: babble of the other voices, coloured noise."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from recipes.common.cuts import MonoCut
from recipes.common.loading import load
from recipes.common.noise import babble, coloured_noise
from recipes.common.noisy_speech.clips import SPLITS, snr_range
from recipes.common.pairs import Corpus, Mixed, Source
from recipes.common.speech import embedded_speech, to_cuts


def embedded(
    train: int,
    valid: int,
    test: int,
    snr: Sequence[float] = (0.0, 10.0),
    babble_share: float = 0.5,
    sample_rate: int = 16000,
) -> Corpus:
    """So many synthesised sentences each, with babble of other voices or coloured noise behind.

    Args:
        train: number of sentences to train on.
        valid: number of sentences to validate on.
        test: number of sentences to test on.
        snr: lowest and highest signal-to-noise ratio, in dB.
        babble_share: share of sentences with babble rather than coloured noise, from 0 to 1.
        sample_rate: Hz.
    """
    low, high = snr_range("snr", snr)
    corpus: dict[str, Sequence[Source]] = {}
    for split, count in zip(SPLITS, (train, valid, test), strict=True):
        cuts = list(to_cuts(embedded_speech(split, count, "prose", sample_rate)))
        noise = MadeNoise(cuts, babble_share)
        corpus[split] = [Mixed(cut, noise, (low, high)) for cut in cuts]
    return corpus


class MadeNoise:
    """Babble of the voices of some cuts, never that of the speaker, or coloured noise.

    Each time are drawn which of the two it is, then 2 to 5 talkers with two utterances each, or the
    colour: power that falls as ``1 / f ** exponent``, with an exponent from 0 (white) to 2 (brown).
    With fewer than three voices there is coloured noise alone.
    """

    TALKERS = (2, 5)
    SAID = 2  # utterances of a talker

    def __init__(self, cuts: Sequence[MonoCut], babble_share: float = 0.5) -> None:
        if not 0.0 <= babble_share <= 1.0:
            raise ValueError(f"babble_share must be a number from 0 to 1, not {babble_share!r}")
        self.babble_share = babble_share
        self.voices: dict[str, list[MonoCut]] = {}
        for cut in cuts:
            self.voices.setdefault(_speaker(cut), []).append(cut)

    def __call__(self, cut: MonoCut, samples: int, sample_rate: int, rng: random.Random) -> Tensor:
        others = [voice for voice in self.voices if voice != _speaker(cut)]
        fewest, most = self.TALKERS
        # Drawn in any case, so that one more voice does not change the other draws.
        crowd, seed = rng.random() < self.babble_share, rng.getrandbits(62)
        if not crowd or len(others) < fewest:
            # Powers of two: each other length costs the plan of a Fourier transform of its own.
            size = 1 << (samples - 1).bit_length()
            return coloured_noise(seed, size, rng.uniform(0.0, 2.0))[:samples]
        talkers = rng.sample(others, min(len(others), rng.randint(fewest, most)))
        said = [
            rng.sample(self.voices[each], min(self.SAID, len(self.voices[each])))
            for each in talkers
        ]
        recordings = [[load(each, sample_rate, resample=True) for each in one] for one in said]
        return babble(seed, samples, recordings)


def _speaker(cut: MonoCut) -> str:
    return str(cut.supervisions[0].speaker) if cut.supervisions else str(cut.id)
