"""Run folders of small networks with random weights, made without a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import Checkpointer
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
        seed: of the random weights.
    """

    yaml: str
    method: str
    given: str = "sound"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    not_imported: tuple[str, ...] = ()
    seed: int = 0


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
            "data_folder": "missing", "longest": 0.5,
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


class _Saved:
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
    configuration = Configuration(HPARAMS / case.yaml)
    configuration.override({**case.overrides, "output_folder": str(folder)})
    torch.manual_seed(case.seed)
    hparams = configuration.build()
    checkpointer = Checkpointer(folder / "checkpoints")
    checkpointer.add_recoverable("brain", _Saved(nn.ModuleDict(hparams["modules"])))
    checkpointer.save_checkpoint(meta=case.metrics)
    (folder / "hyperparams.yaml").write_text(f"# resolved\n{configuration.dump()}")
    return folder
