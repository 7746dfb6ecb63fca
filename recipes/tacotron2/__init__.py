"""Synthesis of speech from text: torchaudio's Tacotron2."""
