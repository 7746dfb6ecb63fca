"""Checkpoints without frozen weights, which are verified against the model that a run builds."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.untrusted import printable

# Key among saved weights, whose names have a dot, of the description of the omitted ones.
BASE = "base"
WEIGHTS = ("modules", "weights_of_run")  # keys of weights in the state of a run


class OtherBase(ValueError):
    """Error for a checkpoint whose frozen weights are not those of the model."""


class FrozenBase:
    """The frozen parameters of a model, which checkpoints leave out.

    A parameter is left out while it requires no gradient and has the value that it had when this
    object was made. One that was trained for a while, or changed by hand, is saved.

    Attributes:
        summary: name, SHA-256 and size of the weights that the last save left out.
    """

    def __init__(self, modules: nn.Module) -> None:
        self._modules, self._name = modules, base_name(modules)
        self._start = digests(self._frozen())
        self.summary: dict[str, Any] | None = None

    def _frozen(self) -> dict[str, Tensor]:
        weights = self._modules.state_dict(keep_vars=True)
        return {
            name: p.detach()
            for name, p in weights.items()
            if isinstance(p, nn.Parameter) and not p.requires_grad
        }

    def leave_out(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a run without the frozen parameters, and with their digests."""
        frozen = {name: p for name, p in self._frozen().items() if name in self._start}
        found = digests(frozen)
        left = {name: each for name, each in found.items() if each == self._start[name]}
        size = sum(frozen[name].nbytes for name in left)
        self.summary = {"name": self._name, "sha256": sha256_of(left), "bytes": size}
        small = {key: self._without(state[key], left) for key in WEIGHTS if key in state}
        if "ema" in state:
            small["ema"] = {**state["ema"], "average": self._without(state["ema"]["average"], left)}
        return {**state, **small}

    def _without(self, weights: Any, left: Mapping[str, str]) -> Any:
        kept = copy.copy(weights)  # Keeps the attribute `_metadata`.
        gone = {name: each for name, each in left.items() if kept.pop(name, None) is not None}
        kept[BASE] = {"name": self._name, "tensors": gone}
        return kept


def completed(weights: Any, modules: nn.Module, prefix: str = "") -> Any:
    """Return saved weights, completed by the omitted ones from modules.

    Args:
        weights: saved weights, or averages, by name. Returned as they are if nothing was left out.
        modules: the modules to load the weights into.
        prefix: start of the saved names that names in ``modules`` lack.

    Raises:
        OtherBase: the modules have other frozen weights than the run had.
    """
    if not isinstance(weights, Mapping) or BASE not in weights:
        return weights
    full: Any = copy.copy(weights)
    left_out = base_of(full.pop(BASE), modules, prefix)
    # Copies: an average over checkpoints is taken in place.
    full.update({name: each.to("cpu", copy=True) for name, each in left_out.items()})
    return full


def base_name(modules: nn.Module) -> str:
    """Return a name of a model's base for messages: its sources, or its classes."""
    given = vars(modules).get("made_from")  # By `initialise`.
    named = [
        getattr(module, name, None)
        for module in modules.modules()
        for name in ("source", "name_or_path")
    ]
    sources = [each for each in (given, *named) if isinstance(each, str) and each]
    return ", ".join(dict.fromkeys(sources or (type(m).__name__ for m in modules.children())))


def base_of(base: Any, modules: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of modules that the entry `BASE` names, or raise OtherBase.

    Saved names begin with ``prefix``; names in ``modules`` lack it.
    """
    name, tensors = described(base)
    tensors = {n: each for n, each in tensors.items() if n.startswith(prefix)}
    own = modules.state_dict()
    present = {n: own[n.removeprefix(prefix)] for n in tensors if n.removeprefix(prefix) in own}
    found = digests(present)
    other = [each for each in tensors if found.get(each) != tensors[each]]
    if other:
        raise OtherBase(
            f"the checkpoint has no frozen weights: it is relative to {printable(name)!r} (SHA-256 "
            f"{sha256_of(tensors)[:12]}), and the base here is {base_name(modules)!r} (SHA-256 "
            f"{sha256_of(found)[:12]}): {len(other)} of {len(tensors)} tensors differ, such as "
            f"{printable(other[0])}; give the base that the run was trained on"
        )
    return present


def described(base: Any) -> tuple[str, dict[str, str]]:
    """Return the name and the digests in the entry `BASE` of saved weights, or raise ValueError."""
    if isinstance(base, Mapping) and isinstance(base.get("tensors"), Mapping):
        name, tensors = base.get("name"), dict(base["tensors"])
        if all(isinstance(text, str) for text in (name, *tensors, *tensors.values())):
            return str(name), tensors
    raise ValueError("the checkpoint does not list the weights that it left out")


def sha256_of(tensors: Mapping[str, str]) -> str:
    """Return a SHA-256 of the names and digests of tensors."""
    return hashlib.sha256(json.dumps(dict(tensors), sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a SHA-256 of the content, type and shape of each tensor."""
    found = {}
    for name, tensor in tensors.items():
        data = tensor.detach().to("cpu").contiguous()
        digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)} ".encode())
        if data.nbytes:  # Without NumPy, which may be missing.
            digest.update((ctypes.c_char * data.nbytes).from_address(data.data_ptr()))
        found[name] = digest.hexdigest()
    return found
