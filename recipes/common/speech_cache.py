"""The sound files of the embedded speech: made once, then found in the user's cache folder.

A file's name is a hash of all that made it (text, voice, sample rate, version of the synthesiser),
so the same line finds the same file whatever was asked for before, and no line can find a stale
one. A file appears whole or not at all; one process synthesises at a time, and others that want the
same lines wait for it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from recipes.common import synthesiser
from recipes.common.voices import Voice

EDITION = 1  # raise it when the same line shall sound different: the cache starts anew
PACKAGE = "espeakng-loader"
LEVEL = 0.07  # RMS of a line, full scale being 1 (-23 dB)
PEAK = 0.95  # never above, however spiky the voice
SILENCE = 0.003  # of the peak: below it a line has not begun, or is over
MARGIN = 0.06  # seconds kept before the first and after the last sound
HEADER = 44  # bytes before the samples of a WAV file as written here
WORKERS = 4  # child processes at most


def folder() -> Path:
    """Return the cache folder of this user: ``CORTEX_CACHE``, or the system's place for caches."""
    if chosen := os.environ.get("CORTEX_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cortex-speech"


@dataclass(frozen=True)
class Line:
    """One sentence in one voice: what a file holds."""

    voice: Voice
    text: str
    sample_rate: int  # Hz

    @property
    def request(self) -> dict[str, str | int]:
        """Return the request to the synthesiser."""
        voice = self.voice
        delivery = {"rate": voice.rate, "pitch": voice.pitch, "range": voice.range}
        return {"voice": voice.label, **delivery, "text": self.text}

    @cached_property
    def key(self) -> str:
        """A hash of all that decides the bytes of the file."""
        made_of = [EDITION, _known_version(), self.sample_rate, sorted(self.request.items())]
        return hashlib.blake2b(json.dumps(made_of).encode(), digest_size=16).hexdigest()

    @cached_property
    def path(self) -> Path:
        """The file, in the cache folder."""
        return folder() / "speech" / self.key[:2] / f"{self.key}.wav"


@cache
def _known_version() -> str:
    """Read the version once: a list has thousands of keys."""
    return _version()


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the embedded speech needs the synthesiser of {PACKAGE}, which is not installed:"
            " pip install 'cortex-speech[demo]'"
        ) from None


def length(path: Path) -> int | None:
    """Return the number of samples in a cached file, or None if it is missing or not whole."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    if len(header) < HEADER or header[:4] != b"RIFF" or header[36:40] != b"data":
        return None
    promised: int = struct.unpack("<I", header[40:])[0]
    return promised // 2 if promised and size == HEADER + promised else None


def fill(lines: Sequence[Line]) -> list[int]:
    """Synthesise those lines that the cache does not have, with a progress bar.

    Returns:
        The number of samples of each line.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: the synthesiser fails.
        ModuleNotFoundError: there is no synthesiser.
    """
    _version()
    try:
        found = {line: length(line.path) for line in lines}
        if missing := [line for line, samples in found.items() if samples is None]:
            _make(missing)
            found |= {line: length(line.path) for line in missing}
    except OSError as error:
        raise OSError(
            f"cannot write the embedded speech into {folder()} ({error}); the environment variable"
            " CORTEX_CACHE chooses another folder"
        ) from error
    return [_known(line, found[line]) for line in lines]


def _known(line: Line, samples: int | None) -> int:
    if samples is None:
        raise FileNotFoundError(f"{line.path} was removed while it was wanted")
    return samples


def _make(lines: Sequence[Line]) -> None:
    from filelock import FileLock

    folder().mkdir(parents=True, exist_ok=True)
    with FileLock(folder() / "speech.lock"):
        # Another process may have made them meanwhile.
        if missing := [line for line in lines if length(line.path) is None]:
            _synthesise(missing)


def _synthesise(lines: Sequence[Line]) -> None:
    workers = min(os.cpu_count() or 1, WORKERS, len(lines))
    cancelled = threading.Event()
    # disable=None: no bar where standard error is not a terminal.
    with (
        tqdm(total=len(lines), desc="embedded speech", unit="utt", disable=None) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):

        def work(share: Sequence[Line]) -> None:
            with Synthesiser() as child:
                for line in share:
                    if cancelled.is_set():
                        return
                    write(line.path, finish(child.say(line), line.sample_rate), line.sample_rate)
                    bar.update()

        shares = [pool.submit(work, lines[start::workers]) for start in range(workers)]
        try:
            for share in as_completed(shares):
                share.result()
        except BaseException:
            cancelled.set()  # or leaving the pool would wait for all the lines of the others
            raise


class Synthesiser:
    """A child process that speaks lines, one at a time."""

    def __init__(self) -> None:
        _version()
        package = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # found, but not imported
        assert package is not None
        assert package.origin is not None
        program = [sys.executable, "-I", synthesiser.__file__, str(Path(package.origin).parent)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe)

    def say(self, line: Line) -> Tensor:
        """Return the samples of a line as espeak-ng gives them, (T,) int16 at its own rate."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(line.request).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failure(line) from None
        size = stdout.read(4)
        data = stdout.read(struct.unpack("<I", size)[0]) if len(size) == 4 else b""
        if not data:
            raise self._failure(line)
        return torch.frombuffer(bytearray(data), dtype=torch.int16)

    def _failure(self, line: Line) -> RuntimeError:
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace").strip()
        return RuntimeError(
            f"the synthesiser ended with status {self._process.wait()} at {line.text!r} in the"
            f" voice {line.voice.label}: {said or 'it gave no reason'}"
        )

    def __enter__(self) -> Synthesiser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with suppress(BrokenPipeError), self._process:  # a line that it never read is lost with it
            pass


def finish(spoken: Tensor, sample_rate: int) -> Tensor:
    """Trim, resample and level what espeak-ng gave.

    ``spoken`` is (T,) int16 at `synthesiser.SAMPLE_RATE`; the result (T',) int16 at
    ``sample_rate``. Computed in float64, so that the number of threads does not reach the sixteenth
    bit.
    """
    wave = spoken.double() / 2**15
    heard = (wave.abs() > SILENCE * wave.abs().max()).nonzero()
    margin = round(MARGIN * synthesiser.SAMPLE_RATE)
    wave = wave[max(0, int(heard[0]) - margin) : int(heard[-1]) + 1 + margin]
    wave = _resampler(sample_rate)(wave)
    wave = wave * min(LEVEL / wave.square().mean().sqrt().item(), PEAK / wave.abs().max().item())
    return (wave * 2**15).round().to(torch.int16)


@cache
def _resampler(sample_rate: int) -> Callable[[Tensor], Tensor]:
    from torchaudio.transforms import Resample

    return Resample(synthesiser.SAMPLE_RATE, sample_rate, dtype=torch.float64)


def write(path: Path, samples: Tensor, sample_rate: int) -> None:
    """Write (T,) int16 ``samples`` as a mono 16-bit WAV file, which appears whole or not at all."""
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, samples.numpy(), sample_rate, subtype="PCM_16", format="WAV")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # a killed run's is overwritten by the next that wants it
    part.write_bytes(content.getvalue())
    os.replace(part, path)
