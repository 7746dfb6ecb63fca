"""Run folders of small networks with random weights, made without a training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.recipes.finetune.small import save_whisper
from trainer import Checkpointer, Run, cli
from trainer.config.hyperparameters import Configuration

HPARAMS = Path(__file__).parents[2] / "hparams"


@dataclass(frozen=True)
class Case:
    """A model to test.

    Attributes:
        yaml: its file below ``hparams/``.
        method: its method.
        given: what the method is called with: "sound", "mel" or "text".
        overrides: keys of the YAML, for a small network.
        metrics: of its checkpoint, by which the recipe chooses.
        not_imported: modules of the recipe that loading must not import.
        prepare: writes what else is in the run folder.
        needs: package without which the model is not tested.
        seed: of the random weights.
    """

    yaml: str
    method: str
    given: str = "sound"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    not_imported: tuple[str, ...] = ()
    prepare: Callable[[Path], object] = lambda folder: None
    needs: str = "torch"
    seed: int = 0


FINETUNE = (
    "recipes.finetune.train", "recipes.finetune.train_classifier", "recipes.finetune.data",
    "recipes.finetune.labelled", "recipes.asr.train",
)  # fmt: skip
NETWORK = {
    "width": 16,
    "precision": "fp32",
    "network": {
        "num_hidden_layers": 1, "num_attention_heads": 2, "conv_dim": [8, 16],
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    },
}  # fmt: skip


def characters(folder: Path) -> None:
    """Write the vocabulary of a run."""
    (folder / "prepared").mkdir(parents=True)
    tokens = {"tokens": ["<blank>", " ", *"abcde"], "ids": None}
    (folder / "prepared" / "vocabulary.json").write_text(json.dumps(tokens))


def labels(folder: Path) -> None:
    """Write the labels of a run."""
    (folder / "prepared").mkdir(parents=True)
    (folder / "prepared" / "labels.json").write_text('["one", "two", "three"]')


def whisper(folder: Path) -> None:
    """Write the description of a Whisper with random weights."""
    save_whisper(folder / "prepared" / "model")


CASES: dict[str, Case] = {
    "asr": Case(
        "asr/demo.yaml",
        "transcribe",
        overrides={
            "width": 16, "bands": 32, "lexicon": None, "precision": "fp32",
            "model": {"front": {"channels": 4}, "encoder": {"num_layers": 1, "num_heads": 2}},
        },
        metrics={"wer": 1.0},
        not_imported=("recipes.asr.train", "recipes.asr.data", "recipes.asr.scoring"),
        seed=2,
    ),
    "ctc": Case(
        "finetune/few.yaml",
        "transcribe",
        overrides=NETWORK,
        metrics={"cer": 1.0, "wer": 1.0},
        not_imported=FINETUNE,
        prepare=characters,
        needs="transformers",
        seed=2,
    ),
    "whisper": Case(
        "finetune/whisper.yaml",
        "transcribe",
        overrides={"source": "the/hub", "data_folder": "none", "model": {"longest": 6}},
        metrics={"wer": 1.0},
        not_imported=FINETUNE,
        prepare=whisper,
        needs="transformers",
    ),
    "pretrain": Case(
        "finetune/pretrain.yaml",
        "embed",
        overrides=NETWORK,
        metrics={"accuracy": 1.0},
        not_imported=FINETUNE,
        needs="transformers",
    ),
    "classify": Case(
        "finetune/speaker.yaml",
        "classify",
        overrides={"encoder": {"size": 12}, "data_folder": "none", "seconds_tested": 0.3},
        metrics={"eer": 1.0},
        not_imported=FINETUNE,
        prepare=labels,
    ),
    "speaker": Case(
        "finetune/speaker.yaml",
        "embed",
        overrides={"encoder": {"size": 12}, "data_folder": "none", "seconds_tested": 0.3},
        metrics={"eer": 1.0},
        not_imported=FINETUNE,
        prepare=labels,
    ),
    "metricgan": Case(
        "metricgan/demo.yaml",
        "enhance",
        overrides={
            "units": 4, "generator": {"layers": 1, "width": 4}, "discriminator": {"channels": 2},
            "precision": "fp32", "chunks": {"length": 4096, "overlap": 1024},
        },
        metrics={"pesq_metric": 1.0},
        not_imported=("recipes.metricgan.train", "recipes.common.pairs", "recipes.common.judges"),
    ),
    "segan": Case(
        "segan/demo.yaml",
        "enhance",
        overrides={
            "channels": [4, 6], "discriminator_channels": [4, 6], "kernel": 5, "stride": 2,
            "generator": {"residual": False}, "discriminator": {"references": 2},
            "samples": 1024, "chunks": {"overlap": 256}, "precision": "fp32",
        },
        metrics={"stoi": 1.0},
        not_imported=("recipes.segan.train", "recipes.common.pairs", "recipes.common.judges"),
    ),
    "separation": Case(
        "separation/demo.yaml",
        "separate",
        overrides={
            "separator": {
                "enc_num_feats": 8, "msk_num_feats": 8, "msk_num_hidden_feats": 8,
                "msk_num_layers": 1, "msk_num_stacks": 1,
            },
        },
        metrics={"si_snri": 1.0},
        not_imported=("recipes.separation.train", "recipes.separation.speech"),
    ),
    "hifigan": Case(
        "hifigan/demo.yaml",
        "vocode",
        given="mel",
        overrides={"generator": {"channels": 8, "kernels": [3], "dilations": [[1]]}},
        not_imported=("recipes.hifigan.train", "recipes.hifigan.data", "recipes.hifigan.scoring"),
    ),
    "tacotron2": Case(
        "tacotron2/ljspeech.yaml",
        "synthesise",
        given="text",
        overrides={
            "data_folder": "missing", "sample_rate": 16000, "longest": 0.5,
            "model": {"net": {
                "symbol_embedding_dim": 8, "encoder_embedding_dim": 8, "encoder_n_convolution": 1,
                "attention_rnn_dim": 10, "attention_hidden_dim": 6, "decoder_rnn_dim": 10,
                "prenet_dim": 8, "postnet_embedding_dim": 8, "postnet_n_convolution": 2,
            }},
        },
        metrics={"mel_l1": 1.0},
        not_imported=("recipes.tacotron2.train", "recipes.tacotron2.data"),
    ),
}  # fmt: skip


def moved_run(train: Callable[[Run], Any], yaml: Path, folder: Path, *arguments: str) -> Path:
    """Train by a recipe, and return the run folder, moved to where it was not made."""
    cli.main(train, [str(yaml), "--output_folder", str(folder / "run"), *arguments])
    return Path(shutil.move(folder / "run", folder / "elsewhere"))


class Saved:
    """State of a Brain, as far as a model needs it."""

    def __init__(self, modules: nn.ModuleDict) -> None:
        self.modules = modules

    def state_dict(self) -> dict[str, Any]:
        return {"modules": self.modules.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("a model is not loaded by it")


def make_run(name: str | Case, folder: Path) -> Path:
    """Make the folder of a run of a case, with a checkpoint of random weights."""
    case = CASES[name] if isinstance(name, str) else name
    case.prepare(folder)
    configuration = Configuration(HPARAMS / case.yaml)
    configuration.override({**case.overrides, "output_folder": str(folder)})
    torch.manual_seed(case.seed)
    hparams = configuration.build()
    checkpointer = Checkpointer(folder / "checkpoints")
    checkpointer.add_recoverable("brain", Saved(nn.ModuleDict(hparams["modules"])))
    checkpointer.save_checkpoint(meta=case.metrics)
    (folder / "hyperparams.yaml").write_text(f"# resolved\n{configuration.dump()}")
    return folder
