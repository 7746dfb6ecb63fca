"""Transcribe sound files with a trained recogniser.

    python recipes/asr/infer.py results/asr/demo/1234 FILE...

Prints a line ``path<TAB>text`` for each file, of any rate, length and number of channels. All it
needs is the run folder: its hyperparams.yaml and its checkpoints, of which it takes those that the
test took. A file that cannot be read is named on stderr and the others are still transcribed; the
exit code is then 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

import trainer
from recipes.asr.train import Recogniser
from recipes.common.audio import read_audio, read_header
from recipes.common.command import each_of, file_path, told
from recipes.common.resampling import resample

LONGEST = 20.0  # seconds to recognise at once, about the longest that were trained on
SEARCHED = 4.0  # seconds at the end of these, in which a longer file is cut where it is quiet


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, such as results/asr/demo/1234")
    parser.add_argument(
        "files", nargs="+", type=file_path, metavar="FILE", help="sound files of any kind"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    parser.add_argument("--decoder", choices=("greedy", "beam"), help="default: the run's")
    given = parser.parse_args(argv)
    return told(lambda: run(given))


def run(given: argparse.Namespace) -> int:
    """Print the transcript of each file; gives the exit code."""
    decoder = {"decoder": given.decoder} if given.decoder else {}
    brain = trainer.load(given.run, given.device, brain=Recogniser, overrides=decoder)

    def print_text(path: str) -> None:
        print(f"{path}\t{transcribe(brain, path)}", flush=True)

    return each_of(given.files, print_text)


def transcribe(brain: Recogniser, path: str | Path) -> str:
    """Transcribe a file, of several channels their mean. Raises BadItem."""
    texts = [brain.transcribe(piece) for piece in pieces(path, brain.hparams.sample_rate)]
    return " ".join(filter(None, texts))


def pieces(path: str | Path, sample_rate: int, longest: float = LONGEST) -> Iterator[Tensor]:
    """A file as samples (S,) at this rate, up to ``longest`` seconds each, cut in quiet places."""
    header = read_header(path)
    rate, first = header.sample_rate, 0
    while first < header.samples:
        count = min(round(longest * rate), header.samples - first)
        piece = read_audio(path, start=first / rate, duration=count / rate, channel="mean")
        if first + count < header.samples:
            piece = piece[: quietest(piece, rate)]
        first += len(piece)
        yield resample(piece, rate, sample_rate)


def quietest(signal: Tensor, rate: int) -> int:
    """The middle of the quietest tenth of a second in the last ``SEARCHED`` seconds, or half."""
    window = round(0.1 * rate)
    start = max(len(signal) // 2, len(signal) - round(SEARCHED * rate))
    power = signal[start:].unfold(0, window, 1 + window // 4).square().mean(-1)
    return start + int(power.argmin()) * (1 + window // 4) + window // 2


if __name__ == "__main__":
    sys.exit(main())
