"""Code that two or more tasks share.

Attributes:
    RUN_NAMES: names of this package that the hyperparams.yaml of a run folder may build: what using
        a trained model needs.
    YAML_NAMES: names of this package that a YAML may build: these, and what only a training needs.
"""

RUN_NAMES: tuple[str, ...] = (
    "mel.LogMel",
    "sentences.vocabulary",
    "streaming.Chunks",
    "vocoder.Generator",
)
YAML_NAMES: tuple[str, ...] = (
    *RUN_NAMES,
    "noisy_speech.embedded",
    "noisy_speech.speech_and_noise",
    "noisy_speech.voicebank",
)
