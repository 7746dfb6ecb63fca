"""Quality of clips resynthesised from their mels, beside Griffin-Lim, in numbers and to hear.

    scores = Scores(judges, mel, griffin_lim, run_folder, shown=6)
    scores.add(id, original, resynthesis)  # (S,) each
    metrics = scores.finish()              # {"mel_l1": 0.55, "mel_l1_griffinlim": 0.16, "pesq": …}

`finish` writes ``scores_test.csv`` with a line a clip, and ``samples.html``, a page on which some
clips are heard as they were, resynthesised, and by Griffin-Lim.
"""

from __future__ import annotations

import copy
import csv
import re
from html import escape
from pathlib import Path
from statistics import fmean

import soundfile
from torch import Tensor
from torchaudio.functional import resample

from recipes.common.griffin_lim import GriffinLim
from recipes.common.judges import Judges
from recipes.common.mel import LogMel
from trainer import distributed

SIDES = {"": "resynthesised", "_griffinlim": "Griffin-Lim"}  # behind the names of metrics
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem;
padding: 0 1rem; }} table {{ border-collapse: collapse; }} td, th {{ padding: .4rem .8rem;
text-align: left; }} audio {{ width: 16rem; }}</style></head><body>
<h1>{title}</h1><p>{means}</p>
<table><thead><tr><th>clip</th><th>original</th>{sides}</tr></thead><tbody>
{rows}
</tbody></table></body></html>
"""


def mel_distance(mel: LogMel, one: Tensor, other: Tensor) -> float:
    """The mean absolute difference of two signals' log-mels (natural logarithm)."""
    return float((mel(one) - mel(other)).abs().mean())


class Scores:
    """The test of a vocoder, over all processes.

    Args:
        judges: measure PESQ and STOI, at their own sample rate, while the networks go on.
        mel: the front end whose mels the vocoder takes.
        griffin_lim: what it is compared with.
        folder: where the table, the page and the sounds go, usually that of the run.
        shown: how many clips are kept to hear.
    """

    def __init__(
        self, judges: Judges, mel: LogMel, griffin_lim: GriffinLim, folder: str | Path, shown: int
    ) -> None:
        self.judges, self.griffin_lim = judges, griffin_lim
        self.mel = copy.deepcopy(mel).cpu()
        self.folder, self.shown = Path(folder), -(-shown // distributed.world_size())
        self.start()

    def start(self) -> None:
        """Forget what was added."""
        self.judges.forget()
        self._rows: dict[str, dict[str, float]] = {}
        self._files: dict[str, list[str]] = {}
        self._stems: dict[str, str] = {}

    def add(self, id: str, original: Tensor, resynthesis: Tensor) -> None:
        """Take in a clip: samples (S,) each, whole frames of the front end."""
        original, resynthesis = original.cpu().float(), resynthesis.cpu().float()
        made = {"": resynthesis, "_griffinlim": self.griffin_lim(self.mel(original))}
        self._rows[id] = {
            f"mel_l1{side}": mel_distance(self.mel, wav, original) for side, wav in made.items()
        }
        truth = self._heard(original)
        for side, wav in made.items():
            self.judges.submit(id + side, truth, self._heard(wav))
        if len(self._files) < self.shown:
            kept = {"original": original} | {SIDES[side]: wav for side, wav in made.items()}
            self._files[id] = [self._keep(id, kind, wav) for kind, wav in kept.items()]

    def finish(self) -> dict[str, float]:
        """Wait for the judges; the means over all clips of all processes. A collective.

        Raises ValueError for a measure that no clip has.
        """
        for name, found in self.judges.collect().items():
            side = "_griffinlim" if name.endswith("_griffinlim") else ""
            row = self._rows[name.removesuffix("_griffinlim")]
            row |= {f"{measure}{side}": value for measure, value in found.items()}
        rows = dict(
            sorted(
                pair for part in distributed.all_gather_json(self._rows) for pair in part.items()
            )
        )
        files = dict(
            sorted(p for part in distributed.all_gather_json(self._files) for p in part.items())
        )
        means = {}
        for name in [m + side for m in ("mel_l1", *self.judges.measures) for side in SIDES]:
            values = [row[name] for row in rows.values() if name in row]
            if not values:
                raise ValueError(f"{name}: none of {len(rows)} clips could be measured")
            means[name] = fmean(values)
        if distributed.is_main():
            self._write(rows, means)
            self._show(rows, means, files)
        return means

    def _heard(self, wav: Tensor) -> Tensor:
        return resample(wav, self.mel.sample_rate, self.judges.sample_rate)

    def _keep(self, id: str, kind: str, wav: Tensor) -> str:
        """Write a sound; its path, relative to the folder."""
        stem = re.sub(r"[^\w.-]", "_", id[:80])
        if self._stems.setdefault(stem, id) != id:  # As of a/b and a_b.
            stem += f"_{len(self._files)}"
        name = f"samples/{stem}_{kind}.wav"
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        soundfile.write(self.folder / name, wav.clamp(-1, 1).numpy(), self.mel.sample_rate)
        return name

    def _write(self, rows: dict[str, dict[str, float]], means: dict[str, float]) -> None:
        """The table: a line for each clip, empty where it could not be measured, then the means."""
        with (self.folder / "scores_test.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["id", *means])
            for id, row in {**rows, "mean": means}.items():
                table.writerow([id, *(f"{row[n]:.4f}" if n in row else "" for n in means)])

    def _show(
        self,
        rows: dict[str, dict[str, float]],
        means: dict[str, float],
        files: dict[str, list[str]],
    ) -> None:
        """The page of sounds; its links are relative, so that the folder can be moved."""
        lines = []
        for id, names in files.items():
            cells = [f"<th>{escape(id)}</th>"]
            for name, side in zip(names, (None, *SIDES), strict=True):
                told = "" if side is None else _told(rows[id], side)
                cells.append(
                    f'<td><audio controls preload="none" src="{escape(name)}"></audio>'
                    f"<br>{told}</td>"
                )
            lines.append(f"<tr>{''.join(cells)}</tr>")
        heads = "".join(f"<th>{word}</th>" for word in SIDES.values())
        about = "; ".join(f"{word}: {_told(means, side)}" for side, word in SIDES.items())
        page = PAGE.format(
            title=f"{len(rows)} test clips", means=about, sides=heads, rows="\n".join(lines)
        )
        (self.folder / "samples.html").write_text(page, encoding="utf-8")


def _told(row: dict[str, float], side: str) -> str:
    """One side's scores in words."""
    other = [each for each in SIDES if each != side and len(each) > len(side)]
    mine = {n: v for n, v in row.items() if n.endswith(side) and not any(map(n.endswith, other))}
    return ", ".join(f"{name.removesuffix(side)} {value:.2f}" for name, value in mine.items())
