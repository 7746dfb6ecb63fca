"""What a run is made of around its training: arguments, folder, environment, session.

`trainer.cli` puts them together.
"""
