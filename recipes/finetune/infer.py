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
from recipes.asr.transcriber import PieceTranscriber
from recipes.common.command import arguments, each_of, told
from recipes.finetune.classify import SoundClassifier
from recipes.finetune.embedder import Embedder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    parser = arguments(__doc__ or "", "finetune")
    parser.add_argument("--source", help="pretrained model of a run with save: trainable")
    given = parser.parse_args(argv)
    return told(lambda: run(given))


def run(given: argparse.Namespace) -> int:
    """Print what is found in each file, and return the exit code."""
    source = {} if given.source is None else {"source": given.source}
    model = trainer.load(given.run, given.device, overrides=source)
    if not isinstance(model, PieceTranscriber | Embedder):
        raise ValueError(f"{given.run} is no run of recipes.finetune: its model is {model!r}")
    return each_of(given.files, lambda path: print(f"{path}\t{answer(model, path)}", flush=True))


def answer(model: PieceTranscriber | Embedder, path: str | Path) -> str:
    """Return the text, the label or the embedding of a file, as text.

    Raises:
        BadItem: the file cannot be used, or is too short.
    """
    if isinstance(model, PieceTranscriber):
        return str(model.transcribe(path))
    if isinstance(model, SoundClassifier) and not model.hparams.verify:
        found = model.classify(path)
        return f"{found.label}\t{found.probability:.4f}"
    return " ".join(f"{each:.6g}" for each in model.embed(path).vector.tolist())


if __name__ == "__main__":
    sys.exit(main())
