"""Speech enhancement: MetricGAN+.

Attributes:
    BRAIN: the Brain of a run, which trains and evaluates.
    MODEL: the model of a run, which `trainer.load` makes.
    INFER: what infer.py takes after the run folder, for the command that a run ends with.
    RUN_NAMES: names of this package that the hyperparams.yaml of a run folder may build: what using
        a trained model needs.
    YAML_NAMES: names of this package that a YAML may build: these, and what only a training needs.
    LIMITS: what its models are not made for, in Markdown, which a model card shows.
"""

BRAIN: str = "train.Enhancer"
MODEL: str = "enhancer.MetricGAN"
INFER: str = "FILE -o FOLDER"
RUN_NAMES: tuple[str, ...] = (
    "discriminator.Discriminator",
    "history.History",
    "model.Generator",
    "model.LearnableSigmoid",
    "model.Spectrum",
    "phases.Phase",
)
YAML_NAMES: tuple[str, ...] = RUN_NAMES
LIMITS: str = (
    "The network was trained to raise one objective score, which is not what listeners hear: "
    "speech may be damaged where the score rises. Noise, rooms and voices unlike those of the "
    "training were not measured. The phase of the sound is left as it is."
)
