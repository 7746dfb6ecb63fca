"""How a YAML becomes objects: reading, references, and the guard before what it names.

`trainer.hparams` is the way in.
"""
