"""What a Brain's state is: gathered from what it owns, so that nothing is registered and forgotten.

Common to all ranks are the modules, the updates (optimizer, schedule, scaler, clipper), the
position in the run and every object among the hparams and the Brain's own attributes that offers
``state_dict`` and ``load_state_dict``, or is a random generator. Each rank's own are its random
generators, open windows, averages, buffers, objects without parameters, and what hooks keep as
plain attributes of the Brain (``self.train_stats``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from trainer import checks, distributed, seed

POSITION = ("epoch", "step", "optimizer_step")
LONGEST = 100  # entries of a container in which stateful objects are looked for


def objects(brain: Any) -> dict[str, Any]:
    """The stateful objects of a Brain by name: "hparams.early_stopping", "metrics.wer"."""
    known = {id(brain), id(brain.checkpointer), *(id(part) for part in brain.modules.modules())}
    for update in brain.updates.values():
        known |= {id(part) for part in (update.optimizer, update.schedule, update.clip, update)}
    tensors = {id(t) for t in (*brain.modules.parameters(), *brain.modules.buffers())}
    named = {f"hparams.{name}": value for name, value in vars(brain.hparams).items()}
    named |= {name: value for name, value in vars(brain).items() if name not in brain.framework}
    found = {}
    for name, value in _flat(named):
        part = seed.as_stateful(value) or value
        stateful = hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
        # Where a sampler or a loader is, the position in the epoch says.
        if not stateful or isinstance(part, (type, Sampler, DataLoader)) or id(value) in known:
            continue
        if isinstance(part, nn.Module) and all(
            id(t) in tensors for t in part.state_dict(keep_vars=True).values()
        ):
            continue  # The same networks once more, as in a ModuleList of all.
        known.add(id(value))
        found[name] = part
    return found


def _flat(named: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is in a mapping and in the containers in it, with dotted names."""
    for name, value in named.items():
        if type(value) in (list, tuple):
            value = dict(enumerate(value))
        # A longer one is data, and not a handful of metrics or schedules.
        if type(value) is not dict:
            yield f"{prefix}{name}", value
        elif len(value) <= LONGEST:
            yield from _flat(value, f"{prefix}{name}.")


def light(found: Mapping[str, Any]) -> dict[str, Any]:
    """The states of those objects that may differ per rank: of all but further networks."""
    return {
        name: part.state_dict()
        for name, part in found.items()
        if not (isinstance(part, nn.Module) and any(True for _ in part.parameters()))
    }


def common(brain: Any) -> dict[str, Any]:
    """The part that all ranks share."""
    brain.monitor.flush()  # Before the position says how many lines the log has.
    return {
        **weights(brain),
        "position": {
            **{name: getattr(brain, name) for name in POSITION},
            **brain.keeper.position(),
            "patience": brain.patience.state_dict(),
        },
        "objects": {name: part.state_dict() for name, part in objects(brain).items()},
        "trainable": {
            name: p.requires_grad
            for name, p in brain.modules.named_parameters()
            if p.requires_grad != brain.attributes.trainable.get(name)
        },
    }


def weights(brain: Any) -> dict[str, Any]:
    """The part of it that is trained: modules, their average, the updates."""
    average = brain.weight_average
    return {
        "modules": brain.modules.state_dict(),
        "updates": {name: update.state_dict() for name, update in brain.updates.items()},
        "weight_average": {} if average is None else average.state_dict(),
    }


def load_common(brain: Any, state: Mapping[str, Any]) -> None:
    """Restore what `common` gave; of the objects, those that exist by now.

    Raises ValueError, before anything is changed, where the state is another model's.
    """
    check_modules(brain.modules, state["modules"])
    checks.same_keys("the optimizers of this Brain", state["updates"], brain.updates)
    for name, update in brain.updates.items():
        update.check_state_dict(state["updates"][name])
    found = objects(brain)
    check_objects(found, [name for name in state["objects"] if name in found])
    load_weights(brain, state)
    load_objects(brain, state["objects"])
    load_position(brain, state["position"])


def load_weights(brain: Any, state: Mapping[str, Any]) -> None:
    """Restore what `weights` gave."""
    brain.modules.load_state_dict(state["modules"])
    if brain.weight_average is not None:
        if state["weight_average"]:
            brain.weight_average.load_state_dict(state["weight_average"])
        else:  # Averaging begins now, with these weights.
            brain.weight_average.restart(brain.modules)
    for name, update in brain.updates.items():
        update.load_state_dict(state["updates"][name])


def load_position(brain: Any, saved: Mapping[str, Any]) -> None:
    """Go to a saved place in the run."""
    position = dict(saved)
    brain.patience.load_state_dict(position.pop("patience"))
    for name in POSITION:
        setattr(brain, name, position.pop(name))
    brain.keeper.go_to(position)


def copied(state: Any) -> Any:
    """A copy that shares no memory, in that of the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, OrderedDict):  # Of a module: it carries versions as an attribute.
        copies = OrderedDict((key, copied(value)) for key, value in state.items())
        vars(copies).update(vars(state))
        return copies
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    return type(state)(map(copied, state)) if isinstance(state, (list, tuple)) else state


def load_trainable(brain: Any, changed: Mapping[str, bool]) -> None:
    """Freeze and thaw the parameters as the hooks had until the save."""
    flags = {**brain.attributes.trainable, **changed}
    for name, p in brain.modules.named_parameters():
        p.requires_grad_(flags.get(name, p.requires_grad))


def load_objects(brain: Any, states: Mapping[str, Any]) -> None:
    """Restore the objects that exist."""
    for name, part in objects(brain).items():
        if name in states:
            part.load_state_dict(states[name])


def check_objects(found: Iterable[str], saved: Iterable[str]) -> None:
    """Raise ValueError where a Brain's objects are not those that were saved."""
    checks.same_keys("the stateful objects of this Brain", dict.fromkeys(saved), found)


def check_modules(modules: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError where saved weights do not fit: the first that differs, and how."""
    own = modules.state_dict()
    checks.same_keys("the modules of this Brain", state, own)
    for name, tensor in own.items():
        if isinstance(tensor, Tensor) and tensor.shape != state[name].shape:
            raise ValueError(
                f"the saved parameter {name!r} has shape {tuple(state[name].shape)}, this Brain's "
                f"has {tuple(tensor.shape)}: the checkpoint was made with other settings"
            )


def own(brain: Any) -> dict[str, Any]:
    """The part that differs per rank; rank 0's objects and buffers are the common ones."""
    joint = None if brain._joint is None else [update.name for update in brain._joint]
    state = {
        "rng": seed.rng_state(),
        "windows": {name: update.window_state() for name, update in brain.updates.items()},
        "joint": joint,
        "averaged": brain._averaged,
        "statistics": brain.statistics.state_dict() if brain.in_window() else {},
        "average": brain.average.state_dict(),
        "journal": brain.journal.state_dict(),
        "monitor": brain.monitor.state_dict(),
        "attributes": brain.attributes.state_dict(),
    }
    if distributed.rank() > 0:
        state["objects"] = light(objects(brain))
        state["buffers"] = dict(brain.modules.named_buffers())
    return state


def load_own(brain: Any, state: Mapping[str, Any]) -> None:
    """Restore what `own` gave."""
    for name, update in brain.updates.items():
        update.load_window_state(state["windows"][name])
    if state["joint"] is not None:
        brain._joint = [brain.updates[name] for name in state["joint"]]
    brain._averaged = state["averaged"]
    brain.statistics.load_state_dict(state["statistics"])
    brain.average.load_state_dict(state["average"])
    brain.journal.load_state_dict(state["journal"])
    brain.monitor.load_state_dict(state.get("monitor", {}))
    brain.attributes.load_state_dict(state["attributes"])
    load_objects(brain, state.get("objects", {}))
    for name, buffer in brain.modules.named_buffers():
        if name in state.get("buffers", {}):
            buffer.copy_(state["buffers"][name])
    seed.set_rng_state(state["rng"])
