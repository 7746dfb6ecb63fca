"""How a YAML becomes objects: reading, references, and the guard before what it names.

`trainer.config.hyperparameters` is the way in.
"""
