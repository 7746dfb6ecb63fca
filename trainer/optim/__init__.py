"""Optimizer steps: precision, the non-finite guard, weight averages, building optimizers."""
