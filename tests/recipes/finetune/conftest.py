"""Small pretrained models with random weights, in the hub's layout, and no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": [16] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def small_model(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a model as the hub has it, and gives its folder."""
    transformers = pytest.importorskip("transformers")

    def make(name: str = "model", kind: str = "wav2vec2", ctc: bool = False, **other: Any) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / name
        norm = other.setdefault("feat_extract_norm", "layer")
        settings = {**SMALL, "vocab_size": len(TOKENS), **other}
        config = transformers.AutoConfig.for_model(kind, **settings)
        maker = transformers.AutoModelForCTC if ctc else transformers.AutoModel
        transformers.utils.logging.disable_progress_bar()
        maker.from_config(config).save_pretrained(folder)
        masks = norm == "layer"
        extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masks)
        extractor.save_pretrained(folder)
        if ctc:
            vocabulary = tmp_path / "tokens.json"
            vocabulary.write_text(json.dumps({token: n for n, token in enumerate(TOKENS)}))
            transformers.Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
        return folder

    return make
