"""Clipping study: claims of the literature on gradient clipping, tested by small experiments.

Attributes:
    RUN_NAMES: names of this package that the hyperparams.yaml of a run folder may build: what using
        a trained model needs.
    YAML_NAMES: names of this package that a YAML may build: these, and what only a training needs.
"""

RUN_NAMES: tuple[str, ...] = ()
YAML_NAMES: tuple[str, ...] = RUN_NAMES
