"""One of two processes that train a MetricGAN+ together.

python -m tests.recipes.metricgan.two_processes FOLDER
"""

import shutil
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

import trainer.report
from recipes.metricgan.history import History
from recipes.metricgan.phases import Phase
from recipes.metricgan.train import Enhancer
from trainer import Stage, distributed, state

from .small import Tones, fit, make

# Not Adam: its first steps divide each gradient by itself, and rounding errors with it.
SGD = {name: partial(torch.optim.SGD, lr=0.01, momentum=0.9) for name in ("opt_g", "opt_d")}
PAIRS, VALID = Tones(8, 700), Tones(3, 700, fixed=True)


def phases(items: int, size: int) -> list[Phase]:
    """For one process; of several each has its part of a batch."""
    size //= distributed.world_size()
    return [
        Phase("warm_up", 1, items=items, batch_size=size, passes=["spectral"]),
        Phase("metric", 2, items=items, batch_size=size),
    ]


# By name: utterances of an epoch, batch size, share of the history, whom nobody can measure,
# window. Of five in batches of four, one process has none in the last, and some batches have none
# that can be measured. A batch of the history holds all: each process draws from its own.
RUNS: dict[str, tuple[int, int, float, list[str], int]] = {
    "few": (5, 4, 0.0, ["tone0", "tone2", "tone5"], 2),
    "history": (6, 6, 1.0, [], 1),
    "varied": (5, 4, 0.0, ["tone0"], 2),
}
# As in the demo: versions of each utterance to compare, and an optimizer for some layers.
VARIED = {
    "variations": 1, "within_weight": 20.0, "metric_layers": ["linear", "sigmoid"],
    "opt_metric": SGD["opt_g"],
}  # fmt: skip


class Scored(Enhancer):
    """Remembers what validation found."""

    score = 0.0

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        metrics = super().on_stage_end(stage, stage_loss, epoch)
        self.score = metrics["pesq"] if metrics else self.score
        return metrics


def trained(folder: Path, name: str) -> dict[str, Any]:
    """What a run ends with."""
    items, size, share, bad, window = RUNS[name]
    brain = make(
        folder, phases(items, size), brain=Scored, bad=bad, grad_accumulation_factor=window,
        hparams={**SGD, "history": History(100, share), **(VARIED if name == "varied" else {})},
        seed=distributed.rank(),
        drift_check_every=1,
    )  # fmt: skip
    fit(brain, PAIRS, VALID)
    return {
        "weights": {name: tensor.detach() for name, tensor in brain.modules.state_dict().items()},
        "optimizer_step": brain.optimizer_step,
        "history": sorted(brain.history[i].id for i in range(len(brain.history))),
        "score": brain.score,
    }


class Stopped(Enhancer):
    """Saves after one of the batches."""

    batch, stop = 0, 0

    def fit_batch(self, batch: Any) -> Any:
        losses = super().fit_batch(batch)
        self.batch += 1
        if self.batch == self.stop:
            self.checkpointer.save_checkpoint(name="stop")
        return losses


def resumed(folder: Path) -> dict[str, Any]:
    """A run, and the same gone on with from the middle of its last epoch."""
    from tests.trainer.resuming import differences, log

    ends = []
    for name, seed, stop in (("straight", 0, 11), ("again", 9, 0)):
        if name == "again" and distributed.is_main():
            shutil.copytree(folder / "straight/saved/stop", folder / "again/saved/stop")
            shutil.copy(folder / "straight/metrics.jsonl", folder / "again")
        distributed.barrier()
        brain = make(folder / name, phases(6, 4)[1:], brain=Stopped, seed=seed)
        brain.stop = stop
        fit(brain, PAIRS)
        own = state.own(brain)
        del own["journal"]["seconds"]
        lines = log(brain) if distributed.is_main() else []
        ends.append({"common": state.common(brain), "own": own, "log": lines})
    return {"found": list(differences(*ends))[:20], "kept": len(brain.history)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    trainer.report.write_html = lambda folder: folder  # type: ignore[assignment]
    distributed.start("cpu", timeout=timedelta(seconds=120))
    rank = distributed.rank()
    for name in RUNS:
        torch.save(trained(folder / f"two-{name}", name), folder / f"{name}-{rank}.pt")
    torch.save(resumed(folder / "resumed"), folder / f"resumed-{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
