"""Small pretrained models with random weights, saved as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": [16] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
SPECIAL = [
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>",
    "<|transcribe|>", "<|notimestamps|>",
]  # fmt: skip
SECONDS = 6  # that the small Whisper takes, where others take 30


def save_encoder(folder: Path, kind: str = "wav2vec2", ctc: bool = False, **other: Any) -> Path:
    """Save an encoder; with ``ctc`` one with a last layer, and a tokenizer of capital letters."""
    import transformers

    torch.manual_seed(0)
    norm = other.setdefault("feat_extract_norm", "layer")
    settings = {**SMALL, "vocab_size": len(TOKENS), **other}
    config = transformers.AutoConfig.for_model(kind, **settings)
    maker = transformers.AutoModelForCTC if ctc else transformers.AutoModel
    transformers.utils.logging.disable_progress_bar()
    maker.from_config(config).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")
    extractor.save_pretrained(folder)
    if ctc:
        vocabulary = folder.with_name("tokens.json")
        vocabulary.write_text(json.dumps({token: n for n, token in enumerate(TOKENS)}))
        transformers.Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder


def save_whisper(folder: Path, special: list[str] = SPECIAL, **other: Any) -> Path:
    """Save a Whisper whose tokens are bytes."""
    import transformers
    from tokenizers import pre_tokenizers

    torch.manual_seed(0)
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": special[1:]})
    tokenizer.save_pretrained(folder)
    end = vocabulary["<|endoftext|>"]
    settings = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "num_mel_bins": 8, "max_source_positions": 50 * SECONDS, "max_target_positions": 220,
        "pad_token_id": end, "bos_token_id": end, "eos_token_id": end,
        "decoder_start_token_id": vocabulary["<|startoftranscript|>"],
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    config = transformers.WhisperConfig(vocab_size=len(names), **{**settings, **other})
    transformers.utils.logging.disable_progress_bar()
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS).save_pretrained(
        folder
    )
    return folder
