"""Clipping study: six small experiments on clipping and models, and a page of the results.

    python recipes/clipping_study/train.py hparams/clipping_study/full.yaml

Hundreds of short trainings through the same `Brain` as any recipe's. Started again it goes on:
finished trainings are in ``cells.jsonl`` of the run folder, the page beside it is ``study.html``.
"""

from __future__ import annotations

import trainer
from recipes.clipping_study.experiments import experiments
from recipes.clipping_study.findings import findings
from recipes.clipping_study.page import write_page
from recipes.clipping_study.study import Results
from recipes.clipping_study.study import run as run_study


def train(run: trainer.Run) -> dict[str, float]:
    """Do what is not done yet, and write page and table."""
    hparams = run.hparams
    results = Results(run.folder / "cells.jsonl")
    chosen = experiments(hparams["experiments"])
    run_study(chosen, results, hparams["workers"], hparams["seeds"])
    found = findings(chosen, results, hparams["seeds"])
    write_page(run.folder, found, len(results), results.seconds())
    return {"trainings": len(results), "cpu_minutes": results.seconds() / 60}


if __name__ == "__main__":
    trainer.main(train)
