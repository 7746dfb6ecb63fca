"""Configuration: reading a YAML, resolving references, building objects behind an allow-list.

`trainer.config.hyperparameters` is the entry point.
"""
