"""Parameter groups reach the optimizers of every recipe, none of which knows of them."""

from pathlib import Path

import pytest

from .test_syncs import RECIPES


@pytest.mark.parametrize("task", [task for task in RECIPES if " " not in task])
def test_every_recipe_trains_with_groups(task: str, tmp_path: Path) -> None:
    brain, source, loading = RECIPES[task](tmp_path)
    first = next(n for n, p in brain.modules.named_parameters() if p.requires_grad)
    brain.hparams.param_groups = {
        first: {"lr_factor": 0.5, "freeze_until": 1}, "*.bias": {"weight_decay": 0.25, "lr": 0.125},
        "*": {"weight_decay": 0.0, "max_grad_norm": 0.5},
    }  # fmt: skip
    before = brain.modules.get_parameter(first).detach().clone()
    brain.fit([1, 2], source, train_loader_kwargs=loading)
    names = {p: name for name, p in brain.modules.named_parameters()}
    biases = 0
    for update in brain.updates.values():
        for group in update.optimizer.param_groups:
            for name in (names[p] for p in group["params"]):
                bias = name.endswith(".bias")
                biases += bias
                assert group["weight_decay"] == (0.25 if bias else 0.0)
                assert (group.get("initial_lr", group["lr"]) == 0.125) == bias
                assert group["max_grad_norm"] == 0.5
                assert group.get("lr_factor", 1.0) == (0.5 if name == first else 1.0)
    assert biases
    assert brain.optimizer_step >= 2
    assert brain.modules.get_parameter(first).requires_grad
    assert not before.equal(brain.modules.get_parameter(first))
