"""Quality of clips resynthesised from their mels, beside Griffin-Lim, in numbers and to hear.

    scores = Scores(judges, mel, griffin_lim, run_folder, shown=6)
    scores.add(id, original, resynthesis)  # (S,) each
    metrics = scores.finish()              # {"mel_l1": 0.55, "mel_l1_griffinlim": 0.16, "pesq": …}

`finish` writes ``scores_test.csv`` with a line a clip; `Scores.samples` are some clips, as they
were, resynthesised and by Griffin-Lim, for `Brain.show`.
"""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from statistics import fmean

from torch import Tensor
from torchaudio.functional import resample

from recipes.common.griffin_lim import GriffinLim
from recipes.common.judges import Judges
from recipes.common.mel import LogMel
from trainer import distributed
from trainer.samples import Audio, Cell

SIDES = {"": "resynthesised", "_griffinlim": "Griffin-Lim"}  # behind the names of metrics


def mel_distance(mel: LogMel, one: Tensor, other: Tensor) -> float:
    """The mean absolute difference of two signals' log-mels (natural logarithm)."""
    return float((mel(one) - mel(other)).abs().mean())


class Scores:
    """The test of a vocoder, over all processes.

    Args:
        judges: measure PESQ and STOI, at their own sample rate, while the networks go on.
        mel: the front end whose mels the vocoder takes.
        griffin_lim: what it is compared with.
        folder: where the table goes, usually that of the run.
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
        self._kept: dict[str, dict[str, Audio]] = {}

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
        if len(self._kept) < self.shown:
            kept = {"original": original} | {SIDES[side]: wav for side, wav in made.items()}
            rate = self.mel.sample_rate
            self._kept[id] = {name: Audio(wav, rate, True) for name, wav in kept.items()}

    def samples(self) -> list[dict[str, Cell]]:
        """Rows for `Brain.show`, once `finish` has collected the scores of this process."""
        rows = []
        for id, sounds in self._kept.items():
            scores = {name: round(value, 3) for name, value in self._rows[id].items()}
            rows.append({"id": id, **scores, **sounds})
        return rows

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
        means = {}
        for name in [m + side for m in ("mel_l1", *self.judges.measures) for side in SIDES]:
            values = [row[name] for row in rows.values() if name in row]
            if not values:
                raise ValueError(f"{name}: none of {len(rows)} clips could be measured")
            means[name] = fmean(values)
        if distributed.is_main():
            self._write(rows, means)
        return means

    def _heard(self, wav: Tensor) -> Tensor:
        return resample(wav, self.mel.sample_rate, self.judges.sample_rate)

    def _write(self, rows: dict[str, dict[str, float]], means: dict[str, float]) -> None:
        """The table: a line for each clip, empty where it could not be measured, then the means."""
        with (self.folder / "scores_test.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["id", *means])
            for id, row in {**rows, "mean": means}.items():
                table.writerow([id, *(f"{row[n]:.4f}" if n in row else "" for n in means)])
