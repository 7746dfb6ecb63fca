"""What a Brain's state is: gathered from what it owns, so that nothing is registered and forgotten.

Common to all ranks are the modules, the updates (optimizer, schedule, scaler, clipper), the
position in the run and every object among the hparams and the Brain's own attributes that offers
``state_dict`` and ``load_state_dict``. Each rank's own are its random generators, open windows,
averages, and the numbers that hooks keep as attributes of the Brain (``self.train_stats``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trainer import checks, seed

POSITION = ("epoch", "step", "optimizer_step")


def objects(brain: Any) -> dict[str, Any]:
    """The stateful objects of a Brain by name: "hparams.early_stopping", "scheduler_g"."""
    known = {id(brain), id(brain.checkpointer), *(id(part) for part in brain.modules.modules())}
    for update in brain.updates.values():
        known |= {id(part) for part in (update.optimizer, update.schedule, update.clip, update)}
    tensors = {id(t) for t in (*brain.modules.parameters(), *brain.modules.buffers())}
    named = {f"hparams.{name}": value for name, value in vars(brain.hparams).items()}
    named |= {name: value for name, value in vars(brain).items() if name not in brain.framework}
    found = {}
    for name, value in named.items():
        stateful = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
        if not stateful or isinstance(value, type) or id(value) in known:
            continue
        if isinstance(value, nn.Module) and all(
            id(t) in tensors for t in (*value.parameters(), *value.buffers())
        ):
            continue  # The same networks once more, as in a ModuleList of all.
        known.add(id(value))
        found[name] = value
    return found


def common(brain: Any) -> dict[str, Any]:
    """The part that all ranks share."""
    average = brain.weight_average
    return {
        "modules": brain.modules.state_dict(),
        "updates": {name: update.state_dict() for name, update in brain.updates.items()},
        "position": {
            **{name: getattr(brain, name) for name in POSITION},
            **brain.keeper.position(),
            "patience": brain.patience.state_dict(),
        },
        "objects": {name: value.state_dict() for name, value in objects(brain).items()},
        "weight_average": {} if average is None else average.state_dict(),
    }


def load_common(brain: Any, state: Mapping[str, Any]) -> None:
    """Restore what `common` gave.

    Raises ValueError, before anything is changed, where the state is another model's.
    """
    check_modules(brain.modules, state["modules"])
    checks.same_keys("the optimizers of this Brain", state["updates"], brain.updates)
    found = objects(brain)
    checks.same_keys("the stateful objects of this Brain", state["objects"], found)
    if brain.weight_average is not None and state["weight_average"]:
        brain.weight_average.load_state_dict(state["weight_average"])
    brain.modules.load_state_dict(state["modules"])
    for name, update in brain.updates.items():
        update.load_state_dict(state["updates"][name])
    for name, value in found.items():
        value.load_state_dict(state["objects"][name])
    position = dict(state["position"])
    brain.patience.load_state_dict(position.pop("patience"))
    for name in POSITION:
        setattr(brain, name, position.pop(name))
    brain.keeper.go_to(position)


def check_modules(modules: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError where saved weights do not fit: the first that differs, and how."""
    own = modules.state_dict()
    checks.same_keys("the modules of this Brain", state, own)
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"the saved parameter {name!r} has shape {tuple(state[name].shape)}, this Brain's "
                f"has {tuple(tensor.shape)}: the checkpoint was made with other settings"
            )


def own(brain: Any) -> dict[str, Any]:
    """The part that differs per rank."""
    return {
        "rng": seed.rng_state(),
        "windows": {name: update.window_state() for name, update in brain.updates.items()},
        "average": brain.average.state_dict(),
        "journal": brain.journal.state_dict(),
        "attributes": {
            name: value
            for name, value in vars(brain).items()
            if name not in brain.framework and not name.startswith("_") and _numbers(value)
        },
    }


def load_own(brain: Any, state: Mapping[str, Any]) -> None:
    """Restore what `own` gave."""
    for name, update in brain.updates.items():
        update.load_window_state(state["windows"][name])
    brain.average.load_state_dict(state["average"])
    brain.journal.load_state_dict(state["journal"])
    vars(brain).update(state["attributes"])
    seed.set_rng_state(state["rng"])


def _numbers(value: Any) -> bool:
    """Whether a value is made of numbers, with names at most as keys: what a hook counts.

    Texts alone are not: paths and names are settings, and a moved run has new ones.
    """
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _numbers(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(_numbers(part) for part in value)
    return isinstance(value, (int, float, Tensor)) or value is None
