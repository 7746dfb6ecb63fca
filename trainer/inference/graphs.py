"""Networks as files for other programs: ONNX and torch.export, checked against torch.

A `Graph` describes the network of such a file, with its inputs and outputs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from trainer.texts import cause

FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
TOLERANCE = 1e-4  # largest difference to torch, relative to the largest value above 1
BATCHES = (1, 3)  # sizes of the batches that a file is checked with

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Port:
    """Input or output of a network.

    Args:
        name: its name in the file.
        axes: sizes of its axes: a number for a fixed size, a name such as "batch" for any size.
        meaning: content, with its unit.
    """

    name: str
    axes: tuple[str | int, ...]
    meaning: str


@dataclass(frozen=True)
class Graph:
    """Network for other programs, as returned by ``Model.graph``.

    Args:
        module: the network; takes the inputs in order, and returns a tensor or a tuple.
        inputs: its inputs; their first axis is the batch.
        outputs: its outputs.
        example: function that returns inputs on the CPU for a batch size and a length.
        lengths: two lengths that the network takes, for the check; equal ones for a fixed length.
        about: description of the network, one sentence.
        settings: further facts for users as JSON, such as the sample rate and the mels.
        after: lines of Python for the example, which use the outputs by their names.
        reference: function whose outputs the file must reproduce; None for ``module``. For a
            ``module`` that is a rewrite of a network that cannot be exported itself.
    """

    module: nn.Module
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    example: Callable[[int, int], Inputs]
    lengths: tuple[int, int]
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    after: str = ""
    reference: Callable[..., Any] | None = None


def write_graph(graph: Graph, to: str, folder: Path) -> dict[str, Any]:
    """Write a network to a file, and check the outputs of the file.

    Args:
        graph: the network.
        to: "onnx" or "torch".
        folder: existing folder for ``model.onnx`` or ``model.pt2``.

    Returns:
        A description of the file as JSON.

    Raises:
        ImportError: a package of the extra ``export`` is missing.
        ValueError: the network cannot be exported, or the file computes other outputs.
    """
    if to == "onnx":
        _import_onnx()
    module = plain_network(graph.module)
    path = folder / FILES[to]
    batch, length = 2, graph.lengths[0]
    inputs = graph.example(batch, length)
    shapes = tuple(
        {n: torch.export.Dim(axis) for n, axis in enumerate(port.axes) if isinstance(axis, str)}
        for port in graph.inputs
    )
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
            if to == "torch":
                torch.export.save(program, path)
                run: Callable[..., Any] = torch.export.load(path).module()
            else:
                torch.onnx.export(
                    program,
                    dynamo=True,
                    f=path,
                    input_names=[port.name for port in graph.inputs],
                    output_names=[port.name for port in graph.outputs],
                    dynamic_shapes=shapes,
                    verbose=False,
                    external_data=False,
                )
                run = _session(path, graph)
    except Exception as error:  # Raised by any of the libraries.
        raise ValueError(f"the network cannot be exported to {to}: {cause(error)}") from error
    sizes = list(dict.fromkeys(itertools.product(BATCHES, graph.lengths)))
    reference = graph.reference or module
    worst = max(_difference(reference, run, graph.example(*each), to) for each in sizes)
    return {
        "format": to,
        "file": FILES[to],
        "about": graph.about,
        "inputs": [
            vars(port) | {"type": str(value.dtype).removeprefix("torch.")}
            for port, value in zip(graph.inputs, inputs, strict=True)
        ],
        "outputs": [vars(port) for port in graph.outputs],
        "settings": dict(graph.settings),
        "checked": {
            "largest_difference": worst,
            "tolerance": TOLERANCE,
            "batch_sizes_and_lengths": sizes,
        },
    }


def plain_network(module: nn.Module) -> nn.Module:
    """Return a copy of a network in fp32, on the CPU, without weight or spectral norms.

    It computes the same as the network in evaluation mode.
    """
    plain = copy.deepcopy(module).float().cpu().eval()
    for part in list(plain.modules()):
        if parametrize.is_parametrized(part):
            # Not `remove_parametrizations`: the copy shares its class with the original.
            names = list(dict(cast(nn.ModuleDict, part.parametrizations).items()))
            values = {name: getattr(part, name).detach() for name in names}
            kind = parametrize.type_before_parametrizations(part)
            del part.parametrizations
            part.__class__ = kind
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value))
        for remove in (remove_weight_norm, remove_spectral_norm):  # Norms of older networks.
            with suppress(ValueError):
                remove(part)
    return plain.requires_grad_(False)


def _difference(
    reference: Callable[..., Any], run: Callable[..., Any], inputs: Inputs, to: str
) -> float:
    """Return the largest difference of a file's outputs, relative to values above 1.

    Raises:
        ValueError: it is above `TOLERANCE`, or shapes differ.
    """
    with torch.no_grad():
        wanted, found = _tuple(reference(*inputs)), _tuple(run(*inputs))
    shape = " and ".join(str(list(each.shape)) for each in inputs)
    worst = 0.0
    for want, have in zip(wanted, found, strict=True):
        if want.shape != have.shape:
            raise ValueError(
                f"the export to {to} is not right, and is not kept: for inputs of shape {shape} it "
                f"returns shape {list(have.shape)}, and torch {list(want.shape)}"
            )
        if not want.numel():
            continue
        difference = (want.double() - have.double()).abs().max().item()
        relative = difference / max(1.0, want.double().abs().max().item())
        if not relative <= TOLERANCE:  # Also for NaN.
            raise ValueError(
                f"the export to {to} is not right, and is not kept: for inputs of shape {shape} "
                f"its output differs by {difference:.2g} from torch's; allowed: {TOLERANCE:g}"
            )
        worst = max(worst, relative)
    return worst


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _import_onnx() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"an export to ONNX needs onnx, onnxscript and onnxruntime ({error}): "
            "pip install 'cortex-speech[export]'"
        ) from error
    return onnxruntime


def _session(path: Path, graph: Graph) -> Callable[..., Any]:
    session = _import_onnx().InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = {p.name: value.numpy() for p, value in zip(graph.inputs, inputs, strict=True)}
        return tuple(map(torch.from_numpy, session.run(None, given)))

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager in which exporters neither print nor warn, since the result is checked."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def example_code(described: Mapping[str, Any], graph: Graph) -> str:
    """Return a program that runs the file beside it, for the README of an export."""
    length, sizes = graph.lengths[0], {"batch": 1}
    onnx = described["format"] == "onnx"
    made = []
    for port, told in zip(graph.inputs, described["inputs"], strict=True):
        shape = tuple(sizes.get(axis, length) if isinstance(axis, str) else axis
                      for axis in port.axes)  # fmt: skip
        value = f"generator.standard_normal({shape}, numpy.float32)"
        if told["type"].startswith("int"):
            value = f"numpy.full({shape}, {length})"
        made.append(f"{port.name} = {value}  # {port.meaning}")
    inputs = [each.name for each in graph.inputs]
    outputs = ", ".join(each.name for each in graph.outputs)
    if onnx:
        given = ", ".join(f'"{name}": {name}' for name in inputs)
        load = f'session = onnxruntime.InferenceSession("{described["file"]}")'
        call = f"[{outputs}] = session.run(None, {{{given}}})"
    else:
        given = ", ".join(f"torch.from_numpy({name})" for name in inputs)
        load = f'network = torch.export.load("{described["file"]}").module()'
        call = f"{outputs} = network({given})"
    shown = [f"print({each.name}.shape)  # {', '.join(map(str, each.axes))}"
             for each in graph.outputs]  # fmt: skip
    after = [line for line in graph.after.strip().splitlines() if line]
    imports = [line for line in after if line.startswith("import ")]
    return "\n".join([
        *imports,
        "import numpy",
        f"import {'onnxruntime' if onnx else 'torch'}",
        "",
        load,
        "generator = numpy.random.default_rng(0)",
        *made,
        call,
        *shown,
        *(line for line in after if line not in imports),
    ])  # fmt: skip
