"""Fixtures of all recipes' tests."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture
def empty_speech_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthesise embedded speech into an empty cache; skip without the extra `demo`."""
    if importlib.util.find_spec("espeakng_loader") is None:
        pytest.skip("needs the extra demo")
    monkeypatch.setenv("CORTEX_CACHE", str(tmp_path / "cache"))
