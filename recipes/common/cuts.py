"""Sound files as lhotse's cuts, by what their headers say."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from recipes.common.audio import Header
from recipes.common.paths import inside

try:
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource
    from lhotse.cut import Cut
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


def sound_of(folder: Path, name: str, usual: str = SOUNDS[0]) -> Path:
    """Return the sound file of a name; where there is none, the one that should be there.

    Args:
        folder: where it is.
        name: its name without the suffix.
        usual: the suffix that is looked for first.

    Raises:
        ValueError: the name leads out of the folder.
    """
    order = sorted(SOUNDS, key=lambda suffix: suffix != usual)
    paths = (inside(folder, name + suffix) for suffix in order)
    return next((path for path in paths if os.path.isfile(path)), inside(folder, name + usual))


def path_of(cut: Cut) -> str:
    """Return the first file of a cut, or its id where it has none."""
    return next(_files(cut), str(cut.id))


def count_files(cuts: Iterable[Cut]) -> int:
    """Return the number of different files of cuts; one without a file counts as one."""
    names = set()
    for cut in cuts:
        names.update(list(_files(cut)) or [str(cut.id)])
    return len(names)


def _files(cut: Cut) -> Iterator[str]:
    for part in [track.cut for track in cut.tracks] if hasattr(cut, "tracks") else [cut]:
        recording = getattr(part, "recording", None)
        for source in recording.sources if recording is not None else ():
            if source.type == "file":
                yield str(source.source)
