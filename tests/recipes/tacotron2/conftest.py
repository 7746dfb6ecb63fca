"""Small folders in the layouts of the real ones, and small networks."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.models import Tacotron2

from recipes.tacotron2.model import Tacotron

RATE = 16000
SENTENCES = [
    "Press one.", "The door is open.", "Good bye!", "Please hold.", "Nobody is here.",
    "Say it again.", "A new message.", "Goodbye now.", "Enter a name.", "All of it.",
]  # fmt: skip


def tacotron(reduction: int = 1, symbols: int = 12, bands: int = 6) -> Tacotron:
    """A small network with weights from the current seed."""
    net = Tacotron2(
        n_mels=bands,
        n_symbol=symbols,
        n_frames_per_step=reduction,
        symbol_embedding_dim=8,
        encoder_embedding_dim=8,
        encoder_n_convolution=2,
        attention_rnn_dim=10,
        attention_hidden_dim=6,
        attention_location_n_filter=2,
        attention_location_kernel_size=3,
        attention_dropout=0.0,
        decoder_dropout=0.0,
        decoder_rnn_dim=10,
        prenet_dim=8,
        postnet_embedding_dim=8,
        postnet_n_convolution=2,
    )
    return Tacotron(net, mean=-3.0, deviation=2.0)


@pytest.fixture
def undropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dropout anywhere: that of the pre-net never rests by itself."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_, **__: x)


def reading_folder(folder: Path, suffix: str = ".wav", rate: int = RATE) -> Path:
    """Ten sentences of noise, half a second and more each, in the layout of LJSpeech."""
    (folder / "wavs").mkdir(parents=True)
    lines = []
    for number, text in enumerate(SENTENCES):
        noise = np.random.default_rng(number).normal(0, 0.1, round((0.6 + 0.02 * number) * rate))
        soundfile.write(folder / "wavs" / f"r{number}{suffix}", noise, rate)
        lines.append(f"r{number}|{text}|{text}\n")
    (folder / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reading_folder(tmp_path_factory.mktemp("recorded") / "prompts")


@pytest.fixture
def speech_data() -> Path:
    """The folder of recorded speech; skips where it is not there."""
    folder = Path(os.environ.get("SPEECH_DATA", Path(__file__).parents[4] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder
