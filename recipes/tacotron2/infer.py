"""Say texts with a trained synthesiser.

    python recipes/tacotron2/infer.py results/tacotron2/demo/1234 --text "Turn left." -o out.wav
    python recipes/tacotron2/infer.py results/tacotron2/demo/1234 --file lines.txt -o folder

Of a file, each line becomes ``folder/0001.wav``, ``folder/0002.wav`` and so on. Numbers, units and
abbreviations are spelled out. Prints a line ``path<TAB>seconds<TAB>text`` for each text. All it
needs is the run folder: its hyperparams.yaml and its checkpoints, of which it takes the one that
the test took. A text that cannot be said is named on stderr and the others are still said; the exit
code is then 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import trainer
from recipes.common.command import arguments, each_of, local_path, told
from recipes.common.tables import read_text
from recipes.common.writing import check_outputs, kind_for
from recipes.tacotron2.sound import Sounding, write_sound
from recipes.tacotron2.speaker import Speaker


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    given = _arguments(argv)

    def run() -> int:
        texts = _texts(given.text, given.file, given.output)
        check_outputs(texts)
        for path in texts:
            kind_for(path)  # Refuses names that do not end as those of sound files.
        model = trainer.load(given.run, given.device, model=Speaker)
        return say_all(model, model.sound(given.vocoder), texts)

    return told(run)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    output = "a sound file; for --file a folder"
    parser = arguments(__doc__ or "", "tacotron2", files="", output=output)
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", help="what to say")
    texts.add_argument("--file", type=local_path, help="a file with a text a line")
    parser.add_argument(
        "--vocoder",
        type=local_path,
        help="run folder of a HiFi-GAN; default: the run's, or Griffin and Lim's algorithm",
    )
    return parser.parse_args(argv)


def _texts(text: str | None, file: Path | None, output: Path) -> dict[Path, tuple[str, str]]:
    """Each sound file to write with the name and the words of its text."""
    if file is None:
        target = output if output.suffix or output.is_dir() else output.with_suffix(".wav")
        return {target: ("the text", text or "")}
    lines = read_text(file, "a file with a text a line").rstrip().split("\n")
    if lines == [""]:
        raise ValueError(f"{file} is empty: there is no text to say")
    return {
        output / f"{number:04d}.wav": (f"line {number} of {file}", line)
        for number, line in enumerate(lines, 1)
    }


def say_all(model: Speaker, sound: Sounding, texts: Mapping[Path, tuple[str, str]]) -> int:
    """Write a sound file of each text, and return the exit code."""

    def say(path: Path) -> None:
        name, text = texts[path]
        speech = model.synthesise(text, sound, name=name)
        if not speech.finished:
            print(
                f"warning: {name} was cut at {model.hparams.longest:g} s: the gate did not stop it",
                file=sys.stderr,
            )
        write_sound(path, speech.samples[0], speech.rate)
        print(f"{path}\t{speech.duration:.2f}\t{text}", flush=True)

    return each_of(texts, say)


if __name__ == "__main__":
    sys.exit(main())
