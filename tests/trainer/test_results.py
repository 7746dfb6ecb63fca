"""Results of trained models."""

import pytest
import torch

from trainer.inference import Classification


def test_a_classification_is_ranked_by_probability() -> None:
    found = Classification.ranked(["a", "b", "c"], torch.tensor([0.25, 0.5, 0.25]))
    assert (found.label, found.probability, str(found)) == ("b", 0.5, "b")
    assert list(found.probabilities.items()) == [("b", 0.5), ("a", 0.25), ("c", 0.25)]
    with pytest.raises(ValueError, match="shorter"):
        Classification.ranked(["a", "b", "c"], torch.tensor([0.5, 0.5]))
