"""HiFi-GAN: a vocoder trained against period and scale discriminators.

Attributes:
    BRAIN: the Brain of a run, which trains and evaluates.
    MODEL: the model of a run, which `trainer.load` makes.
    INFER: what infer.py takes after the run folder, for the command that a run ends with.
    RUN_NAMES: names of this package that the hyperparams.yaml of a run folder may build: what using
        a trained model needs.
    YAML_NAMES: names of this package that a YAML may build: these, and what only a training needs.
    LIMITS: what its models are not made for, in Markdown, which a model card shows.
"""

BRAIN: str = "train.HiFiGAN"
MODEL: str = "vocoder.Vocoder"
INFER: str = "FILE -o FOLDER"
RUN_NAMES: tuple[str, ...] = (
    "model.Discriminators",
    "model.PeriodDiscriminator",
    "model.ScaleDiscriminator",
)
YAML_NAMES: tuple[str, ...] = (*RUN_NAMES, "data.embedded", "data.folder")
LIMITS: str = (
    "The vocoder makes sound of mels that were computed exactly as those that it was trained on: "
    "other mels give noise. Voices, languages and recordings that are unlike its training data "
    "sound rougher, and so do mels that another network predicts."
)
