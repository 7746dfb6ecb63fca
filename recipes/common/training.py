"""Training of a Brain, and the test of its best checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainer import Brain


def fit_and_test(
    brain: Brain, epochs: Iterable[int], sets: Mapping[str, Any], loading: Mapping[str, Any]
) -> dict[str, float]:
    """Train, and test the checkpoint that the Brain's ``best_checkpoint`` chooses.

    Args:
        brain: the Brain.
        epochs: the epoch counter.
        sets: datasets "train" and "valid"; and "test", without which nothing is tested.
        loading: options of the loader of each.

    Returns:
        The metrics of the test.
    """
    brain.fit(
        epochs,
        sets["train"],
        sets["valid"],
        train_loader_kwargs=loading["train"],
        valid_loader_kwargs=loading["valid"],
    )
    if "test" in sets:
        best = getattr(brain, "best_checkpoint", {})
        brain.evaluate(sets["test"], test_loader_kwargs=loading["test"], **best)
    return brain.test_metrics
