"""Fixtures that the tests of SEGAN share."""

import pytest
import torch


@pytest.fixture
def uninitialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions are made without drawing their weights: a hundred million take seconds."""
    for layer in (torch.nn.Conv1d, torch.nn.ConvTranspose1d):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
