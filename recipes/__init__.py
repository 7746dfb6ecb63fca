"""Recipes: the tasks that subclass `trainer.Brain`, one folder each."""
