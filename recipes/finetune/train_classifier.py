"""Train a classifier of recordings, or embeddings that tell speakers apart.

    python recipes/finetune/train.py hparams/finetune/classify.yaml --source FOLDER_OR_NAME \
        --data_folder FOLDER
    python recipes/finetune/train.py hparams/finetune/speaker.yaml --data_folder FOLDER

An encoder gives frames, a pooling layer one vector an utterance, a head the scores of classes. Ends
with accuracy and macro F1 of the test set, or, with ``verify``, with the equal error rate and the
detection cost of a list of trials; by the best checkpoint.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import trainer
from recipes.common.loading import DurationBatches
from recipes.common.training import fit_and_test
from recipes.finetune.classify import Labels
from recipes.finetune.labelled import Corpus, Labelled, Recording
from recipes.finetune.trials import (
    Trial,
    check_names,
    cosine_scores,
    make_trials,
    read_trials,
    verification,
)
from trainer import Brain, Stage, distributed
from trainer.data import BadItem
from trainer.evaluation import evaluation_mode
from trainer.loggers.files import replace_file
from trainer.samples import Cell, Histogram, Matrix

logger = logging.getLogger(__name__)

NEAR = 0.05  # largest share of padding where the front end of an encoder normalises over time
SHOWN = 5  # labels that an error lists


# ------------------------------------------------------------------------------------------ labels


def prepare_labels(labels: Labels, corpus: Corpus, verify: bool) -> None:
    """Fill ``labels`` from the recordings to train, and check those of valid and test.

    Raises:
        ValueError: there is one class only, valid or test has a label that train has not, or the
            run was begun with others.
    """
    names = sorted({each.label for each in corpus["train"]})
    if len(names) < 2:
        raise ValueError(
            f"all {len(corpus['train'])} recordings of train have the label {names[0]!r}: "
            "a classifier needs two classes"
        )
    if not verify:
        _check_known(corpus, names)
    if labels.names and labels.names != names:
        changed = sorted({*labels.names} ^ {*names})
        raise ValueError(
            f"the run was begun with other labels ({labels.file}): {', '.join(changed[:SHOWN])} "
            "came or went; use another output_folder"
        )
    labels.names = names
    if distributed.is_main():
        labels.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(names, ensure_ascii=False, indent=0)
        replace_file(labels.file, [text.encode()], "labels")


def _check_known(corpus: Corpus, names: Sequence[str]) -> None:
    for split in ("valid", "test"):
        unknown = [each for each in corpus[split] if each.label not in names]
        if unknown:
            counts = Counter(each.label for each in unknown)
            listed = ", ".join(f"{name!r} ({n})" for name, n in counts.most_common(SHOWN))
            raise ValueError(
                f"{split} has {len(unknown)} recordings of classes without one to train: "
                f"{listed}{' …' if len(counts) > SHOWN else ''}; the first is {unknown[0].path}"
            )
        present = {each.label for each in corpus[split]}
        if absent := [name for name in names if name not in present]:
            logger.warning(
                "%s has no recording of %d of %d classes, such as %r: its measures are of the "
                "others",
                split, len(absent), len(names), absent[0],
            )  # fmt: skip


def class_weights(
    given: str | Mapping[str, float] | None, recordings: Sequence[Recording], names: Sequence[str]
) -> list[float]:
    """Return the weight of each class in the loss, with mean 1 over the recordings.

    Args:
        given: None for equal ones; "balanced" for the inverse of the number of recordings; or
            weights by label, 1 where there is none.
        recordings: those of train.
        names: labels by number.

    Raises:
        ValueError: a label is unknown, or a weight is not above 0.
    """
    counts = Counter(each.label for each in recordings)
    if given is None:
        weights = dict.fromkeys(names, 1.0)
    elif isinstance(given, str):
        if given != "balanced":
            raise ValueError(f"class_weights is {given!r}; allowed: null, balanced, {{label: …}}")
        weights = {name: 1.0 / counts[name] for name in names}
    else:
        if unknown := [str(name) for name in given if str(name) not in names]:
            raise ValueError(
                f"class_weights has {', '.join(unknown[:SHOWN])}; the labels are "
                f"{', '.join(names[:20])}"
            )
        weights = dict.fromkeys(names, 1.0) | {str(name): float(w) for name, w in given.items()}
    if bad := [name for name, weight in weights.items() if not 0 < weight < math.inf]:
        raise ValueError(f"the weight of {bad[0]!r} is {weights[bad[0]]}; allowed: above 0")
    mean = sum(weights[name] * n for name, n in counts.items()) / len(recordings)
    return [weights[name] / mean for name in names]


# ------------------------------------------------------------------------------------- evaluations


class Evaluation(Protocol):
    """Measures of a stage that does not train."""

    shown: dict[str, Cell]

    def add(self, batch: Any, outputs: Tensor) -> None:
        """Take in a batch, and what the network gives for it."""

    def finish(self, folder: Path | None, stage: Stage) -> dict[str, float]:
        """Return the measures over all processes, and write them. A collective."""


class Classified:
    """Accuracy, macro F1 and the confusion matrix, of logits.

    Args:
        names: labels by number.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.rows: list[tuple[str, int, int, float]] = []  # id, class, class found, probability

    def add(self, batch: Any, outputs: Tensor) -> None:
        best = outputs.float().softmax(1).max(1)
        self.rows += zip(
            batch.id,
            batch.on_host.label.tolist(),
            best.indices.tolist(),
            best.values.tolist(),
            strict=True,
        )

    def finish(self, folder: Path | None, stage: Stage) -> dict[str, float]:
        """Write ``confusion_<stage>.csv`` and ``predictions_<stage>.csv``."""
        rows = sorted(tuple(row) for part in distributed.all_gather_json(self.rows) for row in part)
        matrix = confusion([row[1:3] for row in rows], len(self.names))
        self.shown = {"confusion": Matrix(matrix, self.names)}
        if folder is not None and distributed.is_main():
            names = self.names
            _write(
                folder / f"confusion_{stage.value}.csv",
                ["label", *names],
                ([name, *counts] for name, counts in zip(names, matrix, strict=True)),
            )
            _write(
                folder / f"predictions_{stage.value}.csv",
                ["id", "label", "predicted", "probability"],
                ([id, names[true], names[said], f"{p:.4f}"] for id, true, said, p in rows),
            )
        return measures(matrix)


def confusion(pairs: Iterable[tuple[int, int]], classes: int) -> list[list[int]]:
    """Count pairs of a class and the class found: a row for each class, a column for each found."""
    matrix = [[0] * classes for _ in range(classes)]
    for true, found in pairs:
        matrix[true][found] += 1
    return matrix


def measures(matrix: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return accuracy and macro F1 of a confusion matrix, in per cent.

    The mean of F1 is over the classes that are there or were found.
    """
    there = [sum(row) for row in matrix]
    found = [sum(column) for column in zip(*matrix, strict=True)]
    hits = [row[n] for n, row in enumerate(matrix)]
    scores = [2 * hit / (a + b) for hit, a, b in zip(hits, there, found, strict=True) if a + b > 0]
    if not scores:
        raise ValueError("no accuracy: there are no recordings")
    return {
        "accuracy": 100 * sum(hits) / sum(there),
        "macro_f1": 100 * sum(scores) / len(scores),
    }


class Verified:
    """Equal error rate and detection costs of trials between recordings, of their embeddings.

    Args:
        trials: the list; None for pairs of the recordings (`make_trials`).
        priors: prior probabilities of a pair of one speaker.
        cohort: embeddings of other speakers (C, D), for measures with normalised scores as well.
    """

    def __init__(
        self,
        trials: Sequence[Trial] | None,
        priors: Sequence[float],
        cohort: Tensor | None = None,
    ) -> None:
        self.trials, self.priors, self.cohort = trials, priors, cohort
        self.rows: list[tuple[str, str, list[float]]] = []

    def add(self, batch: Any, outputs: Tensor) -> None:
        self.rows += zip(batch.id, batch.name, outputs.float().tolist(), strict=True)

    def finish(self, folder: Path | None, stage: Stage) -> dict[str, float]:
        """Write ``trials_<stage>.csv``."""
        rows = [row for part in distributed.all_gather_json(self.rows) for row in part]
        embeddings = {id: torch.tensor(vector) for id, _, vector in rows}
        given = self.trials or make_trials({id: name for id, name, _ in rows})
        trials = [each for each in given if {each.enrol, each.test} <= embeddings.keys()]
        if len(trials) < len(given):
            logger.warning(
                "%s: %d of %d trials are left out, since recordings could not be read",
                stage.value, len(given) - len(trials), len(given),
            )  # fmt: skip
        targets = [trial.target for trial in trials]
        columns = {"score": cosine_scores(trials, embeddings)}
        found = verification(columns["score"], targets, self.priors)
        result = _named(found.eer, found.min_dcf)
        groups = {
            kind: [s for s, one in zip(columns["score"], targets, strict=True) if one == same]
            for kind, same in (("same speaker", True), ("different speakers", False))
        }
        self.shown = {"scores": Histogram(groups, "cosine score")}
        if self.cohort is not None:
            columns["normalised"] = cosine_scores(trials, embeddings, self.cohort)
            found = verification(columns["normalised"], targets, self.priors)
            result |= _named(found.eer, found.min_dcf, "_snorm")
        if folder is not None and distributed.is_main():
            scores = zip(*columns.values(), strict=True)
            _write(
                folder / f"trials_{stage.value}.csv",
                ["label", "enrol", "test", *columns],
                (
                    [int(trial.target), trial.enrol, trial.test, *(f"{each:.6f}" for each in row)]
                    for trial, row in zip(trials, scores, strict=True)
                ),
            )
        return result


def _named(eer: float, min_dcf: Mapping[float, float], suffix: str = "") -> dict[str, float]:
    costs = {f"min_dcf_{prior:g}{suffix}": cost for prior, cost in min_dcf.items()}
    return {f"eer{suffix}": 100 * eer, **costs}


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


# ------------------------------------------------------------------------------------------- Brain


class Classifier(Brain):
    """Learns classes by cross entropy; or, with ``verify``, embeddings of speakers.

    Reads from the YAML ``labels``, ``verify``, ``best`` (the measure by which the checkpoint to
    use is chosen), ``priors`` and ``seconds_tested``; modules ``encoder``, ``embed`` and ``head``.

    Attributes:
        weights: of each class in the loss; None for equal ones.
        trials: list of trials by stage; pairs of the recordings of the stage where there is none.
        cohort: recordings of speakers to normalise the scores of the test by; None for none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights: Tensor | None = None
        self.trials: dict[Stage, list[Trial]] = {}
        self.cohort: Labelled | None = None

    @property
    def best_checkpoint(self) -> dict[str, str]:
        """The metric that chooses the checkpoint to use."""
        return {"min_key" if self.hparams.verify else "max_key": self.hparams.best}

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return self.embeddings(*batch.sig)

    def embeddings(self, wavs: Tensor, lengths: Tensor) -> Tensor:
        """Return embeddings (B, E) of signals (B, S) of so many samples (B,)."""
        embedded: Tensor = self.modules.embed(*self.modules.encoder(wavs, lengths))
        return embedded

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        labels = batch.label
        if stage is not Stage.TRAIN:
            logits = self.modules.head(predictions)
            self.evaluation.add(batch, logits)
            return cross_entropy(logits.float(), labels)
        losses = cross_entropy(
            self.modules.head(predictions, labels).float(), labels, reduction="none"
        )
        if self.weights is not None:
            losses = losses * self.weights[labels]
        return losses.mean()

    def evaluate_batch(self, batch: Any, stage: Stage) -> Any:
        if not self.hparams.verify:
            return super().evaluate_batch(batch, stage)
        with self.autocast():
            embeddings = self.compute_forward(batch, stage)
        self.evaluation.add(batch, embeddings)
        return None  # Speakers that are new have no class, and so no loss.

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        if stage is Stage.TRAIN:
            return
        own = self.hparams
        self.evaluation: Evaluation = (
            Verified(
                self.trials.get(stage),
                own.priors,
                self._cohort() if stage is Stage.TEST and self.cohort is not None else None,
            )
            if own.verify
            else Classified(own.labels.names)
        )

    def on_stage_end(
        self, stage: Stage, stage_loss: Any, epoch: int | None = None
    ) -> Mapping[str, float] | None:
        if stage is Stage.TRAIN:
            return None
        folder = self.hparams.output_folder  # None for a model that `trainer.load` made
        metrics = self.evaluation.finish(None if folder is None else Path(folder), stage)
        self.show(stage.value, [{"id": stage.value, **metrics, **self.evaluation.shown}])
        return metrics

    @torch.inference_mode()
    def _embed(self, signal: Tensor) -> Tensor:
        """Return the direction (E,) of the embedding of samples (S,)."""
        lengths = torch.tensor([len(signal)], device=self.device)
        with evaluation_mode(self.modules), self.autocast(Stage.TEST):
            return normalize(self.embeddings(signal[None].to(self.device), lengths).float())[0]

    def _cohort(self) -> Tensor:
        """Mean embedding (C, E) of each speaker of the cohort. A collective."""
        assert self.cohort is not None
        mine: list[tuple[str, list[float]]] = []
        for index in range(distributed.rank(), len(self.cohort), distributed.world_size()):
            try:
                item = self.cohort[index]
            except BadItem as bad:
                logger.warning("left out of the cohort: %s", bad)
                continue
            mine.append((item["name"], self._embed(item["sig"]).tolist()))
        groups: dict[str, list[list[float]]] = {}
        for name, vector in sorted(chain.from_iterable(distributed.all_gather_json(mine))):
            groups.setdefault(name, []).append(vector)
        return torch.stack([normalize(torch.tensor(each)).mean(0) for each in groups.values()])


# -------------------------------------------------------------------------------------------- runs


def train(run: trainer.Run) -> dict[str, float]:
    """Train as the YAML says, and test the best checkpoint."""
    hparams = run.hparams
    brain, sets = prepare(run)
    loading = {split: loader_options(each, split, hparams) for split, each in sets.items()}
    return fit_and_test(brain, hparams["epoch_counter"], sets, loading)


def prepare(run: trainer.Run) -> tuple[Classifier, dict[str, Labelled]]:
    """Return the Brain of a run and its datasets; the head has a row for each label.

    Raises:
        ValueError: settings or recordings do not belong together.
    """
    hparams = run.hparams
    _check_choices(hparams)
    verify, labels, modules = hparams["verify"], hparams["labels"], hparams["modules"]
    corpus = hparams["corpus"]()
    prepare_labels(labels, corpus, verify)
    if len(modules["head"].weight) != len(labels):
        modules["head"].resize(len(labels))
    sets = _datasets(corpus, hparams)
    trials = _trials(corpus, hparams["trials"]) if verify else {}
    weights = class_weights(hparams["class_weights"], corpus["train"], labels.names)
    if hasattr(modules["encoder"], "load_pretrained"):
        from recipes.finetune.sources import begin  # which needs transformers

        begin(modules["encoder"], run)
    brain = Classifier(modules, hparams["opt_class"], hparams, run.options, hparams["checkpointer"])
    brain.trials = trials
    if hparams["class_weights"] is not None:
        brain.weights = torch.tensor(weights, device=brain.device)
    if hparams["score_norm"]:
        brain.cohort = _cohort(corpus["train"], sets["valid"], hparams["score_norm"])
    return brain, sets


def _check_choices(hparams: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of which the run would make nothing."""
    verify, best = hparams["verify"], hparams["best"]
    allowed = ("accuracy", "macro_f1")
    if verify:
        allowed = ("eer", *(f"min_dcf_{prior:g}" for prior in hparams["priors"]))
    if best not in allowed:
        raise ValueError(f"best is {best!r}; allowed: {', '.join(allowed)}")
    for name in ("trials", "score_norm"):
        if hparams[name] and not verify:
            raise ValueError(f"{name} has an effect only with verify: true, for speakers")
    encoder = hparams["modules"]["encoder"]
    if hparams["source"] is not None and not hasattr(encoder, "load_pretrained"):
        raise ValueError(
            f"source is {hparams['source']!r}, and {type(encoder).__name__}, the encoder, is made "
            "without it: give encoder: !new:recipes.finetune.model.PretrainedEncoder "
            "{source: !ref <source>, layers: weighted}, or source: null"
        )
    if verify and hparams["modules"]["embed"].size < 2:
        raise ValueError("embeddings of one number cannot be told apart by their cosine")


def _datasets(corpus: Corpus, hparams: Mapping[str, Any]) -> dict[str, Labelled]:
    encoder = hparams["modules"]["encoder"]
    return {
        split: Labelled(
            recordings,
            hparams["labels"].names,
            encoder.rate,
            hparams["seconds" if split == "train" else "seconds_tested"],
            encoder.shortest,
            train=split == "train",
        )
        for split, recordings in corpus.items()
    }


def loader_options(dataset: Labelled, split: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loader's options: batches by seconds, of near-equal length where that matters."""
    near = getattr(hparams["modules"]["encoder"], "reads_padding", False)
    batches = DurationBatches(
        dataset.durations,
        max(hparams["batch_seconds"], *dataset.durations),
        seed=hparams["seed"],
        shuffle=split == "train",
        max_padding=NEAR if near else 1.0,
    )
    return {"batch_sampler": batches, "num_workers": hparams["num_workers"]}


def _trials(corpus: Corpus, path: str | None) -> dict[Stage, list[Trial]]:
    """The trials of valid and test by ids of recordings: a list for test, pairs elsewhere."""
    found = {
        Stage(split): make_trials({each.id: each.label for each in corpus[split]}, what=split)
        for split in ("valid", "test")
        if path is None or split == "valid"
    }
    if path is not None:
        ids = {name: each.id for each in corpus["test"] for name in (each.id, each.name)}
        trials = read_trials(path)
        check_names(trials, ids, f"the list of trials {path}", "among those of test")
        found[Stage.TEST] = [
            trial._replace(enrol=ids[trial.enrol], test=ids[trial.test]) for trial in trials
        ]
    return found


def _cohort(recordings: Sequence[Recording], like: Labelled, most: int) -> Labelled:
    """At most so many recordings of each speaker of train, read as those of another set."""
    chosen: dict[str, list[Recording]] = {}
    for each in sorted(recordings):
        chosen.setdefault(each.label, []).append(each)
    some = [each for group in chosen.values() for each in group[:most]]
    return Labelled(some, [], like.sample_rate, like.seconds, like.shortest)
