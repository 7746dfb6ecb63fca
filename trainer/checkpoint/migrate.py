"""Migration of earlier checkpoint formats, which no other code knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def migrate(
    version: int, shared: dict[str, Any], local: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the state "brain" of a checkpoint to the layout of format 2.

    Format 2 shares some values of format 1's local state: pass that of rank 0 to use the shared
    result. States that are not of the format raise errors of Python such as KeyError.

    Returns:
        The shared and the local state; unchanged for format 2, and for another object that is
        called "brain".
    """
    if version > 1 or not isinstance(shared, dict) or "position" not in shared:
        return shared, local
    return _shared_of_1(shared, local), _local_of_1(shared, local)


def complete(local: Mapping[str, Any]) -> dict[str, Any]:
    """Return the local state of a Brain, completed for format 1 and early saves of format 2."""
    lacking: dict[str, dict[str, Any]] = {
        "guard": {"spoilt": False, "counted": False},
        "metrics": {"waiting": []},
        "windows": {"lead": ""},
    }
    return {
        name: {**lacking.get(name.partition(".")[0], {}), **state}
        if isinstance(state, dict)
        else state
        for name, state in local.items()
    }


def _shared_of_1(shared: Mapping[str, Any], local: Mapping[str, Any]) -> dict[str, Any]:
    position = shared["position"]
    as_saved = ("epoch", "step", "optimizer_step", "phase", "stopped", "fits", "processes")
    state: dict[str, Any] = {
        "progress": {
            **{name: position[name] for name in as_saved},
            "epoch_batches": position["batches"],
            "seconds": local["journal"]["seconds"],
            "joint": local["joint"],
            "averaged": local["averaged"],
            "nonfinite_count": position["patience"]["count"],
        },
        "modules": shared["modules"],
        "trainable": shared["trainable"],
    }
    if shared["weight_average"]:
        state["ema"] = shared["weight_average"]
    state |= {f"optimizers.{name}": update for name, update in shared["updates"].items()}
    state |= {f"objects.{name}": each for name, each in shared["objects"].items()}
    return state


def _local_of_1(shared: Mapping[str, Any], local: Mapping[str, Any]) -> dict[str, Any]:
    journal = local["journal"]
    state: dict[str, Any] = {
        "rng": local["rng"],
        "guard": {"buffers": local["statistics"]},
        "metrics": {
            "average": local["average"],
            "interval": journal["mean"],
            "counts": journal["counts"],
            "tallies": journal["tallies"],
            "logged": {"train": {}},
        },
        "attributes": local["attributes"],
        "callbacks.LoggerCallback": {"jsonl_lines": shared["position"]["log_lines"]},
    }
    if local.get("monitor"):
        state["callbacks.LayerMonitor"] = local["monitor"]
    if "buffers" in local:
        state["buffers"] = local["buffers"]
    state |= {f"windows.{name}": window for name, window in local["windows"].items()}
    state |= {f"objects.{name}": each for name, each in local.get("objects", {}).items()}
    return state
