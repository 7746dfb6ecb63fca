"""Use a fine-tuned model on sound files: texts, labels or embeddings.

    python recipes/finetune/infer.py results/finetune/ctc_wav2vec2/1234 FILE...

Prints a line ``path<TAB>text`` for each file, of any rate, length and number of channels; a
classifier prints a label and its probability, a speaker model an embedding. All it needs is the run
folder, unless the checkpoints hold only what was trained. A file that cannot be read is named on
stderr and the others still follow; the exit code is then 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import trainer
from recipes.asr.infer import LONGEST, pieces
from recipes.common.command import each_of, file_path, told
from recipes.finetune.classify import Classifier, described
from recipes.finetune.train import Recogniser, Transcriber
from trainer import Brain


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "files", nargs="+", type=file_path, metavar="FILE", help="sound files of any kind"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    parser.add_argument("--source", help="pretrained model of a run with save: trainable")
    given = parser.parse_args(argv)
    return told(lambda: run(given))


def run(given: argparse.Namespace) -> int:
    """Print what is found in each file; gives the exit code."""
    source = {} if given.source is None else {"source": given.source}
    brain = trainer.load(given.run, given.device, overrides=source)

    def print_line(path: str) -> None:
        print(f"{path}\t{answer(brain, path)}", flush=True)

    return each_of(given.files, print_line)


def answer(brain: Brain, path: str | Path) -> str:
    """Return the text, the label or the embedding of a file, as text.

    Raises:
        BadItem: the file cannot be used.
        ValueError: the model is none that answers, or the file is shorter than its frames.
    """
    if isinstance(brain, Classifier):
        return described(brain, path)
    if not isinstance(brain, Recogniser | Transcriber):
        raise ValueError(f"a run of {type(brain).__name__} transcribes and classifies nothing")
    longest = LONGEST
    if isinstance(brain, Transcriber):  # What it takes, less the rounding of resampled pieces.
        longest = min(longest, 0.99 * brain.modules.model.samples / brain.modules.model.rate)
    texts = []
    for piece in pieces(path, brain.hparams.sample_rate, longest):
        try:
            texts.append(brain.transcribe(piece))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return " ".join(filter(None, texts))


if __name__ == "__main__":
    sys.exit(main())
