"""Automatic speech recognition: Conformer with CTC.

Attributes:
    BRAIN: the Brain of a run, which trains and evaluates.
    MODEL: the model of a run, which `trainer.load` makes.
    RUN_NAMES: names of this package that the hyperparams.yaml of a run folder may build: what using
        a trained model needs.
    YAML_NAMES: names of this package that a YAML may build: these, and what only a training needs.
    LIMITS: what its models are not made for, in Markdown, which a model card shows.
"""

BRAIN: str = "train.Recogniser"
MODEL: str = "transcriber.Transcriber"
RUN_NAMES: tuple[str, ...] = (
    "model.ConformerCTC",
    "model.FrameNorm",
    "model.LogMel",
    "model.Subsampling",
    "text.Characters",
    "text.Pieces",
)
YAML_NAMES: tuple[str, ...] = (
    *RUN_NAMES,
    "data.digits",
    "data.embedded",
    "data.librispeech",
    "data.table",
)
LIMITS: str = (
    "The recogniser knows the words and the kinds of sentences that it was trained on: one that "
    "was trained on synthetic or on read speech of close microphones makes many more errors on "
    "other voices, accents, noise and spontaneous speech. It writes no punctuation, and always "
    "answers, also to sounds that are no speech. Its scores are not calibrated."
)
