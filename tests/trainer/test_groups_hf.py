"""Parameter groups of models of transformers, and of those with adapters of peft."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import Brain, Stage

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}  # fmt: skip
GROUPS = {
    "encoder.*": {"lr": 1e-4, "layer_decay": 0.5, "freeze_until": 2, "eval": True},
    "*.bias|*norm*": {"weight_decay": 0.0},
    "*": {"lr": 0.01},
}


class Tuner(Brain):
    """An encoder and a head on the mean of its frames."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        self.notes = [*getattr(self, "notes", []), self.modules.encoder.training]
        return self.modules.head(self.modules.encoder(batch["x"]).last_hidden_state.mean(1))

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return predictions.square().mean()


def fitted(encoder: nn.Module) -> Tuner:
    brain = Tuner(
        {"encoder": encoder, "head": nn.Linear(16, 2)},
        partial(torch.optim.AdamW, lr=0.5, weight_decay=0.1),
        {"param_groups": GROUPS},
        {"device": "cpu", "progressbar": False},
    )
    torch.manual_seed(0)
    brain.fit([1], [{"x": torch.randn(2, 400)} for _ in range(4)])
    return brain


def rates(brain: Tuner) -> dict[str, tuple[float, float]]:
    names = {p: name for name, p in brain.modules.named_parameters()}
    return {
        names[p]: (group["lr"], group["weight_decay"])
        for group in brain.optimizer.param_groups for p in group["params"]
    }  # fmt: skip


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SIZES))  # type: ignore[no-any-return]


def test_layers_of_an_encoder_of_transformers_have_their_rates() -> None:
    brain = fitted(encoder())
    found = rates(brain)
    assert len(found) > 40
    for name, (rate, decay) in found.items():
        head, top = name.startswith("head."), ".encoder.layers.1." in name
        low = ".encoder.layers.0." in name
        share = 1.0 if top else 0.5 if low else 0.25
        assert rate == pytest.approx(0.01 if head else 1e-4 * share)
        assert decay == (0.0 if name.endswith(".bias") or "norm" in name else 0.1)
    assert brain.notes == [False, False, True, True]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_base_under_an_adapter_is_never_unfrozen() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(encoder(), config)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    brain = fitted(adapted)
    found = rates(brain)
    for name, p in adapted.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert torch.equal(p, before[name]) != ("lora_" in name), name
        layer = next((n for n in (0, 1) if f".layers.{n}." in name), -1)
        assert found[f"encoder.{name}"][0] == pytest.approx(1e-4 * (0.25, 0.5, 1.0)[layer + 1])
