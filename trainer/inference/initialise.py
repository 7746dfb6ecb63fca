"""Initial weights of a new run: from another run, files of weights, or a model on the hub.

    init_from: results/pretraining/1234   # or model.safetensors, state.pt, a folder, a name
    init_map: {"encoder.*": "wav2vec2.encoder.*", "head.*": null}

Only tensors are read. A file or folder takes precedence over a name on the hub.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer import checks, distributed, json_files
from trainer.adapters import derive_adapters, is_replaced, plain_name
from trainer.checkpoint.frozen import BASE, base_of
from trainer.checkpoint.run_state import misfit
from trainer.checkpoint.user_state import KEY
from trainer.options import nearest
from trainer.run_files import CHECKPOINTS, HYPERPARAMS
from trainer.texts import first_line, first_names
from trainer.untrusted import confined, printable

if TYPE_CHECKING:
    from trainer.brain import Brain

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ENDING = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Keys of a state_dict in files, and prefixes that wrappers of a model add to names.
HOLDERS = ("state_dict", "model_state_dict", "model", "modules", "module", "weights")
WRAPPERS = ("module.", "_orig_mod.")

logger = logging.getLogger("trainer")

Weights = dict[str, Any]


def initialise(
    modules: nn.Module, source: str, names: Mapping[str, str | None] | None = None
) -> None:
    """Load weights into modules, and report the tensors taken, new and left.

    Args:
        modules: modules of a Brain; names are those of `plain_name`.
        source: a run folder, a file (.safetensors, or a state_dict of torch.save), a folder with
            weights in safetensors, or a name on the hub.
        names: names in the source by patterns of the modules' names, with as many ``*``, each of
            which stands for any text. None leaves matching weights as they are. The first pattern
            that matches counts; names without one are the same in the source.

    Raises:
        ValueError: the source cannot be read, none of its names fits, or a shape or type differs.
    """
    found = distributed.run_on_all(read_weights, source)
    base = found.pop(BASE, None)
    given: Weights = {}
    # Originals first: a trained copy with the same plain name replaces its original.
    for name in sorted(found, key=is_replaced, reverse=True):
        given[plain_name(name)] = found[name]
    own = modules.state_dict()
    targets = _targets(list(dict.fromkeys(map(plain_name, own))), given, names or {}, source)
    taken = {
        name: given[target]
        for name, value in own.items()
        if (target := targets[plain_name(name)]) in given
        and isinstance(value, Tensor) == isinstance(given[target], Tensor)
    }
    if not taken:
        raise ValueError(
            f"init_from {source}: none of its {len(given)} names fits; it has {_some(given)}, and "
            f"this model {_some(targets)}{_suggestion(modules, given)}"
        )
    if base is not None:
        base_of(base, modules)
    tensors = {name: value for name, value in taken.items() if isinstance(value, Tensor)}
    other = [name for name, value in tensors.items() if value.shape != own[name].shape]
    if other:
        shapes = f"{list(tensors[other[0]].shape)} there and {list(own[other[0]].shape)} here"
        more = f" (and {len(other) - 1} more)" if other[1:] else ""
        raise ValueError(
            f"init_from {source}: {other[0]} has shape {shapes}{more}; leave it new by a pattern "
            f"with null, such as init_map: {{{plain_name(other[0])}: null}}, or choose a model of "
            "the same size"
        )
    for name, value in tensors.items():
        if reason := misfit(value, own[name]):
            raise ValueError(
                f"init_from {source}: {name} is {reason} there, and {own[name].dtype} here"
            )
    modules.load_state_dict({**own, **taken})
    derive_adapters(modules, taken)
    vars(modules)["made_from"] = source
    if distributed.is_main():
        used = {targets[plain_name(name)] for name in taken}
        new = [name for name in own if name not in taken and not is_replaced(name)]
        left = [name for name in given if name not in used]
        logger.info(
            "init_from %s: %d tensors taken, %d new%s, %d left%s",
            source, len(taken), len(new), _listed(new), len(left), _listed(left),
        )  # fmt: skip


def _targets(
    own: Sequence[str], given: Weights, names: Mapping[str, str | None], source: str
) -> dict[str, str | None]:
    """Return the source name of each name of the model; None for weights that stay new.

    Raises:
        ValueError: a pattern matches nothing in the model or in the source, or has another number
            of ``*`` than its value.
    """
    targets: dict[str, str | None] = {}
    for pattern, target in names.items():
        if target is not None and target.count("*") != pattern.count("*"):
            raise ValueError(
                f"init_map maps {pattern!r} to {target!r}; allowed: null, or a name with as many *"
            )
        regex = re.compile("(.*)".join(map(re.escape, pattern.split("*"))))
        matches = {name: match for name in own if (match := regex.fullmatch(name))}
        if not matches:
            raise ValueError(
                f"init_map has {pattern!r}, which matches no name of this model"
                f"{nearest(pattern, own)}; it has {_some(own)}"
            )
        form = (target or "").replace("{", "{{").replace("}", "}}").replace("*", "{}")
        mapped = {
            name: None if target is None else form.format(*match.groups())
            for name, match in matches.items()
        }
        if target is not None and not any(each in given for each in mapped.values()):
            raise ValueError(
                f"init_map maps {pattern!r} to {target!r}, and {source} has no such name"
                f"{nearest(target, given)}; it has {_some(given)}"
            )
        targets = mapped | targets
    return {name: name for name in own} | targets


def _some(names: Iterable[str]) -> str:
    return first_names(map(printable, names)) or "none"


def _listed(names: list[str]) -> str:
    return f" ({_some(names)})" if names else ""


def _suggestion(modules: nn.Module, given: Weights) -> str:
    """Return the end of a message: an init_map that would make names fit, or an empty text."""
    for name, module in modules.named_children():
        for own in module.state_dict():
            for each in given:
                if f".{each}".endswith(f".{plain_name(own)}"):
                    start = each.removesuffix(plain_name(own))
                    if start == f"{name}.":
                        return ""
                    return f"; did you mean init_map: {{{name}.*: '{start}*'}}?"
    return ""


# ----------------------------------------------------------------------------------------- sources


def read_weights(source: str) -> Weights:
    """Return tensors by name, on the CPU, from a run, a file, a folder or the hub.

    Raises:
        ValueError: there is no such source, or it does not hold weights.
    """
    path = Path(os.path.expanduser(source))
    if (path / HYPERPARAMS).is_file() and not is_export(path):
        return _of_run(path)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return _of_file(path)
    if path.exists() or path.is_absolute() or not HUB_NAME.fullmatch(source):
        raise ValueError(f"init_from {source}: there is no file or folder of weights of this name")
    return _of_hub(source)


def is_export(folder: Path) -> bool:
    """Return True for a folder with the weights of an export, and no checkpoints."""
    return (folder / WEIGHTS).is_file() and not (folder / CHECKPOINTS).exists()


def read_export(folder: Path) -> Weights:
    """Return the weights of an export, and the states of modules that save themselves.

    Raises:
        ValueError: the file is a link that leads out of the folder, or no file of safetensors.
    """
    path = confined(folder, folder / WEIGHTS)
    found = _of_safetensors(path, "")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        texts = file.metadata() or {}
    return found | {name: text for name, text in texts.items() if name.endswith(KEY)}


def _of_run(folder: Path) -> Weights:
    """Return the weights to test a run with: of its best checkpoint, or the newest."""
    from trainer.evaluation import load_weights
    from trainer.inference.loading import OF_THE_MODEL, open_run

    with open_run(folder) as opened:
        kind: type[Brain] | None = None
        with suppress(ValueError, ImportError):  # Its recipe may not be installed.
            kind = opened.brain_class()
        best = {} if kind is None else opened.best_checkpoint(kind)
        options = opened.options(*OF_THE_MODEL)
        found = load_weights(opened.checkpointer, options, best.get("max_key"), best.get("min_key"))
    if found is None:
        raise ValueError(f"init_from {folder}: the run has no sound checkpoint")
    return _tensors(found, folder)


def _of_folder(folder: Path) -> Weights:
    if (folder / INDEX).is_file():
        return _of_shards(folder / INDEX)
    single = folder / WEIGHTS
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return _of_safetensors(files[0])
    if files:
        names = _some([each.name for each in files])
        raise ValueError(f"init_from {folder}: it has several files of weights ({names}): name one")
    pickled = sorted(each.name for each in folder.iterdir() if each.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"init_from {folder}: it has only pickled weights ({_some(pickled)}), which may run "
            "code; allowed: safetensors"
        )
    raise ValueError(
        f"init_from {folder}: it is no run folder (no {HYPERPARAMS}) and has no weights "
        f"(no {WEIGHTS})"
    )


def _of_file(path: Path) -> Weights:
    if path.name.endswith(".index.json"):
        return _of_shards(path)
    if path.suffix == ENDING:
        return _of_safetensors(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # About formats that are refused anyway.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # An unpickler may raise anything on other bytes.
        if type(error).__name__ == "UnpicklingError":
            raise ValueError(
                f"init_from {path}: it holds pickled objects, which may run code, and not only "
                "tensors; allowed: safetensors, or a state_dict that torch.save has written"
            ) from error
        raise ValueError(
            f"init_from {path}: it cannot be read as weights ({first_line(error)})"
        ) from error
    found = _tensors(content, path)
    _warn(path, found)
    return found


def _warn(path: Path, found: Weights) -> None:
    if distributed.is_main():
        checks.warn_of_nonfinite(path, found)


def _of_safetensors(path: Path, option: str = "init_from ") -> Weights:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{option}{path} needs safetensors ({error}): pip install 'cortex-speech[hf]'"
        ) from error
    try:
        found: Weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{option}{path}: it is no file of safetensors ({error})") from error
    _warn(path, found)
    return found


def _of_shards(index: Path) -> Weights:
    """Return the weights of several files, which lie beside their index."""
    try:
        content = json_files.read(index)
        files = set(content["weight_map"].values())
        if not all(os.path.basename(each) == each and each.endswith(ENDING) for each in files):
            raise ValueError(f"its files must be {ENDING}, beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"init_from {index}: it is no index of weights ({error})") from error
    found: Weights = {}
    for each in sorted(files):
        found |= _of_safetensors(index.parent / each)
    missing = [name for name in content["weight_map"] if name not in found]
    if missing:
        raise ValueError(f"init_from {index}: no file in safetensors has {_some(missing)}")
    return found


def _of_hub(name: str) -> Weights:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"init_from {name} is no file or folder, and the hub needs huggingface-hub ({error}): "
            "pip install 'cortex-speech[hf]'"
        ) from error
    try:
        folder = snapshot_download(name, allow_patterns=["model*.safetensors", INDEX])
    except Exception as error:  # Raised by any library that it uses to connect.
        raise ValueError(
            f"init_from {name}: there is no file or folder of this name, and the hub does not give "
            f"it ({printable(' '.join(str(error).split())[:200])})"
        ) from error
    return _of_folder(Path(folder))


def _tensors(content: Any, path: Path) -> Weights:
    """Return the state_dict in the content of a file, without prefixes of wrappers.

    Raises:
        ValueError: there is none.
    """
    for _ in range(3):
        if isinstance(content, Mapping) and any(isinstance(v, Tensor) for v in content.values()):
            break
        held = content if isinstance(content, Mapping) else {}
        content = next((held[key] for key in HOLDERS if key in held), None)
    if not isinstance(content, Mapping):
        raise ValueError(f"init_from {path}: it holds no state_dict, that is tensors by name")
    found = {
        str(name): value
        for name, value in content.items()
        if isinstance(value, Tensor) or str(name).endswith(KEY) or name == BASE
    }
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in found):
            found = {name.removeprefix(wrapper): value for name, value in found.items()}
    return found
