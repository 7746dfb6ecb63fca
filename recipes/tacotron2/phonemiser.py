"""The child process that knows how English is pronounced: espeak-ng behind a pipe.

`recipes.tacotron2.text` starts this file as a program of its own,

    python -I phonemiser.py FOLDER_OF_ESPEAKNG_LOADER

so that espeak-ng, which is under the GPL-3, is never loaded into the process that trains. It
imports the standard library alone. A request is a line of JSON on standard input,

    {"voice": "en-us", "text": "turn the light on"}

and its answer a line of JSON on standard output: the text in the International Phonetic Alphabet.
Punctuation stays where it was. What it cannot do it says on standard error, and exits with 1.
"""

from __future__ import annotations

import ctypes
import json
import re
import signal
import sys
from pathlib import Path

SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT; nothing is spoken here
DO_NOT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: report a missing voice folder instead
UTF8 = 1  # espeakCHARS_UTF8
IPA = 0x02  # phonememode
DATA = "espeak-ng-data"
LIBRARIES = {"win32": "espeak-ng.dll", "darwin": "libespeak-ng.dylib"}
MARKS = re.compile(r"([,.;:?!]+)")


def load(folder: Path) -> ctypes.CDLL:
    """The library, initialised."""
    library = ctypes.CDLL(str(folder / LIBRARIES.get(sys.platform, "libespeak-ng.so")))
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    library.espeak_TextToPhonemes.argtypes = (
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.c_int,
        ctypes.c_int,
    )
    path = str(folder / DATA)
    if library.espeak_Initialize(SYNCHRONOUS, 0, path.encode(), DO_NOT_EXIT) < 0:
        raise RuntimeError(f"espeak-ng could not read its voices in {path}")
    return library


def pronounce(library: ctypes.CDLL, text: str) -> str:
    """A text in IPA, with its punctuation and single spaces."""
    parts = MARKS.split(text)  # texts and marks in turn: the library would drop the marks
    parts[::2] = [_clauses(library, part) for part in parts[::2]]
    joined = "".join(
        f"{said}{mark} " for said, mark in zip(parts[::2], [*parts[1::2], ""], strict=True)
    )
    return " ".join(joined.split())


def _clauses(library: ctypes.CDLL, text: str) -> str:
    rest = ctypes.c_char_p(text.encode())
    found = []
    while rest.value:  # a clause a call, until the library sets the pointer to NULL
        found.append(library.espeak_TextToPhonemes(ctypes.byref(rest), UTF8, IPA).decode())
    return " ".join(" ".join(found).split())


def main(folder: Path) -> None:
    """Answer each request on standard input, a line of JSON, with phonemes on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, by closing the pipe
    library = load(folder)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if library.espeak_SetVoiceByName(request["voice"].encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {request['voice']!r}")
        answer = json.dumps(pronounce(library, request["text"]))
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))
