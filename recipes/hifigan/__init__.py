"""HiFi-GAN: a vocoder trained against period and scale discriminators.

Attributes:
    RUN_NAMES: names of this package that the hyperparams.yaml of a run folder may build: what using
        a trained model needs.
    YAML_NAMES: names of this package that a YAML may build: these, and what only a training needs.
"""

RUN_NAMES: tuple[str, ...] = (
    "model.Discriminators",
    "model.PeriodDiscriminator",
    "model.ScaleDiscriminator",
)
YAML_NAMES: tuple[str, ...] = (*RUN_NAMES, "data.embedded", "data.folder")
