"""Sound files as lhotse's cuts, by what their headers say."""

from __future__ import annotations

from pathlib import Path

from recipes.common.audio import Header

try:
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource
except ImportError as error:
    raise ImportError("speech data need lhotse: pip install 'cortex-speech[recipes]'") from error

SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3")


def cut_of(path: Path, header: Header, name: str, **said: str | None) -> MonoCut:
    """Return the first channel of a whole file as a cut with this name.

    ``said`` is known of it: ``text``, ``speaker``, ``gender``, ``language``; None is left out.
    """
    duration = header.duration
    source = AudioSource(type="file", channels=list(range(header.channels)), source=str(path))
    recording = Recording(name, [source], header.sample_rate, header.samples, duration)
    known = [SupervisionSegment(name, name, 0.0, duration, **said)] if said else []
    return MonoCut(name, 0.0, duration, 0, supervisions=known, recording=recording)
