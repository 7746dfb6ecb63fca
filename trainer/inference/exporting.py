"""Export of trained models, as folders in the hub's layout: weights, ONNX or torch.export."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from torch import Tensor, nn

from trainer.adapters import merge_adapters, plain_name
from trainer.config import reading
from trainer.config.reading import items, nodes, object_name, pop, put, replace_children, tag
from trainer.config.registry import recipe_packages
from trainer.config.run_folder import KINDS
from trainer.inference.cards import write_card
from trainer.inference.graphs import FILES, example_code, write_graph
from trainer.inference.initialise import WEIGHTS
from trainer.inference.loading import RECIPE, Origin, origin_of
from trainer.inference.model import Model
from trainer.options import BRAIN_KEYS, HINTS, nearest
from trainer.run_files import CHECKPOINTS, HYPERPARAMS
from trainer.untrusted import confined, no_modules_from

if TYPE_CHECKING:
    from trainer.brain import Brain
    from trainer.inference.graphs import Graph

DESCRIPTION = "export.json"
HEADER = "# The hyperparameters of an exported model, for trainer.load."
FORMATS = ("safetensors", *FILES)
# Run options that an exported YAML keeps. Its weights are averaged already.
KEPT = ("seed", "precision", "eval_precision", "threads", "output_folder")


def export(
    model: Model | Brain,
    folder: str | Path,
    to: str = "safetensors",
    *,
    seeds: Sequence[str | Path] = (),
) -> Path:
    """Write a model to a new folder, with adapters merged into the weights that they adapt.

    The folder has a README.md that describes the model and its run, with samples, and an
    ``export.json`` for programs. The model itself is unchanged.

    - ``safetensors``: all weights in ``model.safetensors``, by their names in ``model.modules``;
      for a model of `trainer.load` also the files that it needs, so that `trainer.load` reads the
      folder. Each model of transformers is also saved by ``save_pretrained``, in a folder of its
      name, such as ``encoder/``.
    - ``onnx`` and ``torch``: a network in ``model.onnx``, or in ``model.pt2`` for
      ``torch.export.load``. The file is run and compared to torch on inputs of several lengths and
      batch sizes. A class of your own names the network by a method ``graph(modules)`` that returns
      a `trainer.inference.Graph`.

    Args:
        model: the model with the weights to write: one of `trainer.load`, or a Brain within its
            ``best_weights()``.
        folder: the folder to make.
        to: ``safetensors``, ``onnx`` or ``torch``.
        seeds: folders of runs that differ from the model's only in their seeds; the README gives
            mean and standard deviation of their metrics.

    Returns:
        The folder.

    Raises:
        ValueError: ``to`` is unknown, the folder exists and is not empty, merged weights would not
            be finite, the model has no network for this format, its file computes other outputs
            than torch, or a run in ``seeds`` differs in more than its seed.
        OSError: a file cannot be written.
        ImportError: a package that the format needs is missing.

    Example::

        trainer.export(trainer.load("results/kws/demo/1234"), "exported")
    """
    if to not in FORMATS:
        raise ValueError(
            f"there is no export to {to!r}{nearest(to, FORMATS)}; allowed: {', '.join(FORMATS)}"
        )
    target = Path(os.path.expanduser(folder))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{folder} exists, and is not an empty folder: name a new one")
    merged = copy.deepcopy(model.modules).cpu().eval()
    merge_adapters(merged)
    origin = origin_of(model)
    with _new(target) as partial:
        described: dict[str, Any] = {"format": to}
        code = ""
        if to == "safetensors":
            _write_weights(merged, origin, partial)
            if origin is not None:
                _write_parts(merged, origin, partial)
        else:
            graph = _graph(model, origin, merged.float(), to)
            described = write_graph(graph, to, partial)
            code = example_code(described, graph)
        write_card(partial, model, origin, described, code, seeds)
        text = json.dumps(described, indent=1, ensure_ascii=False)
        (partial / DESCRIPTION).write_text(f"{text}\n", encoding="utf-8")
    return target


@contextmanager
def _new(target: Path) -> Iterator[Path]:
    """Context manager that yields a folder to fill, which becomes ``target`` on exit.

    After an error neither folder exists.

    Raises:
        OSError: a file cannot be written.
    """
    made = [each for each in target.parents if not each.exists()]  # innermost first
    partial = target.parent / f".{target.name}-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # Another process may have put something there.
            for each in made:
                each.rmdir()
        # Users know the target, not the temporary folder beside it.
        if isinstance(error, OSError) and error.strerror:
            file = error.filename
            if file is None or Path(os.fsdecode(file)).is_relative_to(partial):
                raise OSError(f"{target} cannot be written: {error.strerror}") from error
        raise


def _graph(model: Model | Brain, origin: Origin | None, modules: nn.ModuleDict, to: str) -> Graph:
    """Return the network to export, from the model's method ``graph`` or the recipe's graph.py.

    Raises:
        ValueError: there is neither.
    """
    make = getattr(type(model), "graph", None) if isinstance(model, Model) else None
    if make is not None:
        own: Graph = make(model, modules)
        return own
    able = [each for each in recipe_packages() if importlib.util.find_spec(f"{each}.graph")]
    for package in [] if origin is None else origin.run.recipes():
        if package in able:
            found: Graph = importlib.import_module(f"{package}.graph").graph(modules, model.hparams)
            return found
    raise ValueError(
        f"a {type(model).__name__} has no network for --to {to}; allowed: --to safetensors, models "
        "of a class with a method graph, and among the recipes "
        f"{', '.join(each.rpartition('.')[2] for each in able)}"
    )


# ------------------------------------------------------------------------------------- safetensors


def _write_weights(merged: nn.Module, origin: Origin | None, folder: Path) -> None:
    """Write the weights by their names in the run, and each model of transformers."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            f"an export needs safetensors ({error}): pip install 'cortex-speech[export]'"
        ) from error
    state: Mapping[str, Any] = merged.state_dict()
    if origin is not None and all(plain_name(name) == name for name in origin.weights):
        state = origin.weights  # `Model.prepare` may have changed names.
    seen: set[int] = set()
    weights: dict[str, Tensor] = {}
    texts = {name: value for name, value in state.items() if isinstance(value, str)}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            kept = tensor.detach().to("cpu").contiguous()
            # safetensors has no shared tensors: each name gets a copy.
            weights[name] = kept.clone() if kept.data_ptr() in seen else kept
            seen.add(kept.data_ptr())
    path = folder / WEIGHTS
    save_file(weights, path, {"format": "pt", **texts})
    os.chmod(path, folder.stat().st_mode & 0o666)  # safetensors makes it private.
    for name, part in _of_transformers(merged).items():
        part.save_pretrained(folder / name)


def _of_transformers(modules: nn.Module) -> dict[str, Any]:
    """Return the models of transformers by name, without those within another one."""
    kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    found: dict[str, Any] = {}
    for name, module in modules.named_modules() if kind else ():
        if isinstance(module, kind) and not name.startswith(tuple(f"{each}." for each in found)):
            found[name] = module
    return found


def _write_parts(merged: nn.Module, origin: Origin, folder: Path) -> None:
    """Write what `trainer.load` needs besides the weights: the YAML and the files it names."""
    run, source = origin.run, os.path.abspath(origin.run.folder)
    run.configuration.override({"output_folder": source})
    with no_modules_from(run.folder):
        root = run.configuration.checked()
    for name, module in merged.named_modules():
        kept = getattr(module, "kept", None)
        if kept is not None and callable(getattr(module, "keep", None)):
            place = os.path.relpath(os.path.abspath(kept), source)
            module.kept = folder / place  # The module is a copy.
            module.keep()
            for part in _of_transformers(module):
                _add_files(folder / place, folder / f"{name}.{part}".strip("."))
    for place in _trim(root, source, run.recipes()):
        _copy(run.folder, place, folder)
    text = f"{HEADER}\n{reading.dump(root)}"
    (folder / HYPERPARAMS).write_text(text, encoding="utf-8")


def _trim(root: MappingNode, source: str, recipes: Sequence[str]) -> list[str]:
    """Remove training-only keys from a YAML tree, and make paths relative to the folder.

    Args:
        root: the tree, without references; it is changed in place.
        source: absolute path of the run folder.
        recipes: packages of the recipes whose objects the tree builds.

    Returns:
        The paths in the run folder that the model needs, relative to it.
    """
    for key, node in list(items(root)):
        training = key in BRAIN_KEYS or (key in HINTS and key not in KEPT)
        made = object_name(node).rpartition(".")[0]
        if training or (made in KINDS and made != "torch.nn"):
            pop(root, key)
        elif _is_path(node) and not _inside(node.value, source):
            put(root, key, ScalarNode(reading.NULL, "null"))  # Valid only on this machine.
    put(root, "output_folder", ScalarNode(reading.STR, "."))
    if len(recipes) == 1:
        put(root, RECIPE, ScalarNode(reading.STR, recipes[0]))
    for node in nodes(root):  # Shared values are written out, shared objects as aliases.
        replace_children(node, lambda _, each: copy.copy(each) if _is_plain(each) else each)
    needed: dict[str, None] = {}
    for node in nodes(root):
        for _, each in items(node):
            if isinstance(each, ScalarNode) and _is_path(each) and _inside(each.value, source):
                place = os.path.relpath(each.value, source)
                # A folder that no object takes may hold anything of the training.
                if object_name(node) or os.path.isfile(each.value):
                    needed[place] = None
                each.tag, each.value, each.style = "!ref", f"<output_folder>/{place}", None
    return list(needed)


def _is_plain(node: Node) -> bool:
    return isinstance(node, ScalarNode) and not object_name(node)


def _is_path(node: Node) -> bool:
    text = node.value if isinstance(node, ScalarNode) and tag(node) == reading.STR else ""
    return os.path.isabs(text)


def _inside(path: str, folder: str) -> bool:
    return f"{os.path.normpath(path)}{os.sep}".startswith(f"{folder}{os.sep}")


def _copy(run: Path, place: str, folder: Path) -> None:
    """Copy a file or folder that the run's YAML names; keep existing files."""
    source = run / place
    if not source.exists() or place.split(os.sep)[0] == CHECKPOINTS:
        return
    files = sorted(source.rglob("*")) if confined(run, source).is_dir() else [source]
    for each in files:
        target = folder / each.relative_to(run)
        if confined(run, each).is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(each, target)


def _add_files(source: Path, target: Path) -> None:
    """Copy the files that the target folder lacks, such as a feature extractor."""
    for each in source.iterdir() if target.is_dir() else ():
        if each.is_file() and not (target / each.name).exists():
            shutil.copyfile(each, target / each.name)
