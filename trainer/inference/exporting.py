"""Export of trained models: adapters merged into the weights that they adapt, in safetensors."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainer.adapters import merge_adapters

if TYPE_CHECKING:
    from trainer.brain import Brain
    from trainer.inference.model import Model

WEIGHTS = "model.safetensors"


def export(model: Model | Brain, folder: str | Path) -> Path:
    """Write the weights of a model, with adapters merged into them, to a new folder.

    It has all weights in ``model.safetensors``, by their names in ``model.modules``, which
    ``init_from`` reads. Each model of transformers is also saved as transformers does it, in a
    folder of its own name, such as ``encoder/``, for ``from_pretrained``. The model itself stays as
    it is.

    Args:
        model: the model, with the weights that are to be written: as `trainer.load` gives it, or a
            Brain within its ``best_weights()``.
        folder: the folder to make.

    Returns:
        The folder.

    Raises:
        ValueError: the folder exists and is not empty, or merged weights would not be finite.
        ImportError: safetensors is not installed.

    Example::

        trainer.export(trainer.load("results/finetune/1234"), "exported")
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            f"an export needs safetensors ({error}): pip install 'cortex-speech[hf]'"
        ) from error
    target = Path(folder).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{folder} exists, and is not an empty folder: name a new one")
    merged = copy.deepcopy(model.modules)
    merge_adapters(merged)
    seen: set[int] = set()
    weights: dict[str, Tensor] = {}
    for name, tensor in merged.state_dict().items():
        if isinstance(tensor, Tensor):
            kept = tensor.detach().to("cpu").contiguous()
            # A tensor of several names, which the format has not, is written under each.
            weights[name] = kept.clone() if kept.data_ptr() in seen else kept
            seen.add(kept.data_ptr())
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}-{os.getpid()}"
    partial.mkdir()
    try:
        save_file(weights, partial / WEIGHTS, {"format": "pt"})
        os.chmod(partial / WEIGHTS, partial.stat().st_mode & 0o666)  # It is for its owner alone.
        for name, part in _of_transformers(merged):
            part.save_pretrained(partial / name)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _of_transformers(modules: nn.Module) -> list[tuple[str, Any]]:
    """Return the models of transformers by name, without those within another one."""
    library = sys.modules.get("transformers")
    if library is None:
        return []
    found: dict[str, nn.Module] = {}
    for name, module in modules.named_modules():
        if isinstance(module, library.PreTrainedModel) and not any(
            name.startswith(f"{each}.") for each in found
        ):
            found[name] = module
    return list(found.items())
