"""Automatic speech recognition: Conformer with CTC."""
