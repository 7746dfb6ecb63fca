"""Small pretrained models with random weights, in the hub's layout, and no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.finetune.small import save_encoder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def small_model(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a model as the hub has it, and gives its folder."""
    pytest.importorskip("transformers")

    def make(name: str = "model", **settings: Any) -> Path:
        return save_encoder(tmp_path / name, **settings)

    return make
