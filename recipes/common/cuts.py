"""Sound files: found in folders and by the names of tables, and as lhotse's cuts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from recipes.common.audio import Header
from recipes.common.paths import inside

# Other modules take lhotse's classes from here, where its lack is told.
try:
    from lhotse import CutSet, MonoCut, MultiCut, Recording, SupervisionSegment  # noqa: F401
    from lhotse.audio import AudioSource
    from lhotse.audio.mixer import AudioMixer  # noqa: F401
    from lhotse.cut import Cut, MixedCut, MixTrack  # noqa: F401
except ImportError as error:
    raise ImportError("speech data need lhotse: pip install 'cortex-speech[recipes]'") from error

# Suffixes of the files that are read, in small letters; a file may have them in capitals.
SOUNDS = (
    ".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aifc", ".aiff", ".au", ".caf", ".oga",
    ".rf64", ".sph", ".w64",
)  # fmt: skip
# Recordings that are not read: each is a bad file, unless the same is there in another format.
UNREAD = (".3gp", ".aac", ".amr", ".m4a", ".m4b", ".mp4", ".webm", ".wma")


def cut_of(path: Path, header: Header, name: str, **said: str | None) -> MonoCut:
    """Return the first channel of a whole file as a cut.

    Args:
        path: of the file.
        header: its header, as `recipes.common.audio.check_recordings` gives it.
        name: id of the cut, which no other has.
        said: fields of its supervision: ``text``, ``speaker``, ``gender``, ``language``. Without
            any the cut has no supervision.
    """
    duration = header.duration
    source = AudioSource(type="file", channels=list(range(header.channels)), source=str(path))
    recording = Recording(name, [source], header.sample_rate, header.samples, duration)
    known = [SupervisionSegment(name, name, 0.0, duration, **said)] if said else []
    return MonoCut(name, 0.0, duration, 0, supervisions=known, recording=recording)


def files_below(folder: Path) -> list[Path]:
    """Return the files of a folder and its subfolders, in the order of their paths.

    Links are followed, each folder once. Hidden files and folders are left out, such as the
    ``._a.wav`` that macOS puts beside ``a.wav``. A folder that is not there has none.

    Raises:
        OSError: the folder, or one in it, cannot be read.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(x for x in folders if not x.startswith("."))
        if real not in seen:
            found += [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def sounds(folder: Path) -> dict[str, Path]:
    """Return the sound files of a folder and its subfolders by id, in the order of their paths.

    An id is the path within the folder, without its suffix.

    Raises:
        ValueError: a recording is there in two formats, such as ``a.mp3`` and ``a.mp3.wav``, or two
            spellings of its suffix.
        OSError: a folder cannot be read.
    """
    found: dict[str, Path] = {}
    paths = {path: _id(path, folder) for path in files_below(folder)}
    recordings: dict[str, Path] = {}
    for path, id in paths.items():
        if path.suffix.lower() in SOUNDS:
            if (other := recordings.setdefault(_bare(id), path)) != path:
                raise ValueError(
                    f"{other} and {path} are one recording in two files: remove one of them"
                )
            found[id] = path
    for path, id in paths.items():
        if path.suffix.lower() in UNREAD and _bare(id) not in recordings:
            found.setdefault(id, path)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _id(path: Path, folder: Path) -> str:
    """The path of a file in a folder, without its suffix, as text that can be written anywhere."""
    name = os.fsencode(path.relative_to(folder).with_suffix("").as_posix())
    return normalize("NFC", name.decode("utf-8", "backslashreplace"))


def _bare(id: str) -> str:
    """An id without suffixes of formats that its file was converted from."""
    path = PurePosixPath(id)
    while path.suffix.lower() in (*SOUNDS, *UNREAD):
        path = path.with_suffix("")
    return path.as_posix()


def sound_of(
    found: Mapping[str, Path],
    folder: Path,
    name: str,
    usual: str = SOUNDS[0],
    follow_links: bool = False,
) -> Path:
    """Return the sound file of a name; where there is none, the one that should be there.

    Args:
        found: `sounds` of the folder.
        folder: where it is.
        name: its name, with or without the suffix.
        usual: the suffix of the one that should be there.
        follow_links: a symbolic link may lead out of the folder.

    Raises:
        ValueError: the name leads out of the folder.
    """
    path = PurePosixPath(normalize("NFC", name))
    whole = path.suffix.lower() in (*SOUNDS, *UNREAD)
    known = found.get(path.as_posix()) or (found.get(str(path.with_suffix(""))) if whole else None)
    if known is not None:
        name = known.relative_to(folder).as_posix()
    elif not whole:
        name += usual
    return inside(folder, name, follow_links)


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
