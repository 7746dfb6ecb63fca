"""Speech separation: a track for each of several simultaneous talkers.

Attributes:
    BRAIN: the Brain of a run, which trains and evaluates.
    MODEL: the model of a run, which `trainer.load` makes.
    INFER: what infer.py takes after the run folder, for the command that a run ends with.
    RUN_NAMES: names of this package that the hyperparams.yaml of a run folder may build: what using
        a trained model needs.
    YAML_NAMES: names of this package that a YAML may build: these, and what only a training needs.
    LIMITS: what its models are not made for, in Markdown, which a model card shows.
"""

BRAIN: str = "train.Separator"
MODEL: str = "separator.SpeechSeparator"
INFER: str = "FILE -o FOLDER"
RUN_NAMES: tuple[str, ...] = ("model.SepFormer", "model.SineTasNet")
YAML_NAMES: tuple[str, ...] = (
    *RUN_NAMES,
    "folders.librimix",
    "folders.wsj0mix",
    "mixing.Mixing",
    "mixing.drawn",
    "recorded.recorded",
    "speech.coloured",
    "speech.embedded",
    "speech.recorded",
    "speech.wham",
)
LIMITS: str = (
    "The number of speakers is fixed: it gives as many tracks with fewer or more people, too. It "
    "was trained on mixtures of close voices without a room; voices that are alike, echoes and "
    "noise make it worse. The order of the tracks has no meaning."
)
