"""Speech enhancement: SEGAN.

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
MODEL: str = "enhancer.SEGAN"
INFER: str = "FILE -o FOLDER"
RUN_NAMES: tuple[str, ...] = ("model.Discriminator", "model.Generator", "model.VirtualBatchNorm")
YAML_NAMES: tuple[str, ...] = RUN_NAMES
LIMITS: str = (
    "The network may take away speech with the noise, and add sounds of its own. Noise, rooms and "
    "voices unlike those of the training were not measured, and clean speech is not left as it "
    "is."
)
