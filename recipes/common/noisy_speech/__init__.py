"""Corpora for enhancement: clips of speech, clean and with noise, in train, valid and test.

Each is a function that a YAML names with its arguments,

    corpus: !name:recipes.common.noisy_speech.embedded {train: 800, valid: 12, test: 40}

and that returns ``{"train": sources, "valid": sources, "test": sources}`` for
`recipes.common.pairs.Pairs`. Nothing that is heard in one split is heard in another: no voice (but
for corpora that are split by chapter), no sentence, no recording of noise.
"""

from recipes.common.noisy_speech.folders import voicebank
from recipes.common.noisy_speech.made import embedded
from recipes.common.noisy_speech.mixed import speech_and_noise

__all__ = ["embedded", "speech_and_noise", "voicebank"]
