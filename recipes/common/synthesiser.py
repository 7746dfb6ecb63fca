"""The child process that speaks: espeak-ng behind a pipe, the same bytes for the same request.

`recipes.common.speech` starts this file as a program of its own,

    python -I synthesiser.py FOLDER_OF_ESPEAKNG_LOADER

so that espeak-ng, which is under the GPL-3, is never loaded into the process that trains. It
imports the standard library alone. A request is a line of JSON on standard input:

    {"voice": "en-us+f1", "rate": 170, "pitch": 50, "range": 50, "text": "turn the light on"}

and its answer on standard output the number of bytes (four, little-endian), then that many bytes of
16-bit samples at 22,050 Hz. What it cannot do it says on standard error, and exits with status 1.

The noise and the flutter of a voice come from counters inside the library that run on from
utterance to utterance: neither `espeak_ng_SetRandSeed` alone nor ending and initialising the
library again resets them. Loading the library anew does. Each request therefore gets a freshly
loaded library (5 ms); where the system does not really unload it, the whole process starts itself
again.
"""

from __future__ import annotations

import _ctypes
import ctypes
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

SAMPLE_RATE = 22050  # Hz; espeak-ng knows no other
SEED = 1
SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback, before espeak_Synth returns
DO_NOT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: report a missing voice folder instead
UTF8 = 1  # espeakCHARS_UTF8
PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}  # espeak_PARAMETER
DATA = "espeak-ng-data"  # the voices, in the same folder as the library
LIBRARIES = {"win32": "espeak-ng.dll", "darwin": "libespeak-ng.dylib"}

Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def load(folder: Path) -> ctypes.CDLL:
    """Load the library anew, so that its samples depend on the request alone."""
    library = ctypes.CDLL(str(folder / LIBRARIES.get(sys.platform, "libespeak-ng.so")))
    if library.espeak_ng_GetSampleRate() != 0:  # 0 until initialised: this one was in use before
        os.execv(sys.executable, [sys.executable, "-I", *sys.argv])
    path = str(folder / DATA)
    if library.espeak_Initialize(SYNCHRONOUS, 0, path.encode(), DO_NOT_EXIT) != SAMPLE_RATE:
        raise RuntimeError(f"espeak-ng could not read its voices in {path}")
    return library


def unload(library: ctypes.CDLL) -> None:
    """Forget the library with all its counters."""
    library.espeak_Terminate()
    close = _ctypes.FreeLibrary if sys.platform == "win32" else _ctypes.dlclose
    close(library._handle)


def speak(library: ctypes.CDLL, request: dict[str, Any]) -> bytes:
    """Return the 16-bit samples of one request, spoken by a library that was just loaded."""
    samples = bytearray()

    def collect(wave: Any, count: int, events: Any) -> int:
        if wave and count > 0:
            samples.extend(ctypes.string_at(wave, 2 * count))
        return 0  # go on

    callback = Callback(collect)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(request["voice"].encode()) != 0:
        raise RuntimeError(f"espeak-ng has no voice {request['voice']!r}")
    for name, number in PARAMETERS.items():
        library.espeak_SetParameter(number, request[name], 0)
    library.espeak_ng_SetRandSeed(SEED)
    text = request["text"].encode()
    status = library.espeak_Synth(text, len(text) + 1, 0, 0, 0, UTF8, None, None)
    library.espeak_Synchronize()
    if status != 0 or not samples:
        raise RuntimeError(f"espeak-ng said nothing for {request['text']!r}")
    return bytes(samples)


def main(folder: Path) -> None:
    """Answer each request on standard input, a line of JSON, with samples on standard output."""
    # Ctrl-C reaches this process too; the parent decides, by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    library = load(folder)
    for line in iter(sys.stdin.buffer.readline, b""):
        request = json.loads(line)
        # The library itself takes the accent's plain voice for a variant that it does not have.
        if not (folder / DATA / "voices" / "!v" / request["voice"].partition("+")[2]).is_file():
            raise RuntimeError(f"espeak-ng has no voice {request['voice']!r}")
        samples = speak(library, request)
        sys.stdout.buffer.write(struct.pack("<I", len(samples)) + samples)
        sys.stdout.buffer.flush()
        unload(library)
        library = load(folder)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))
