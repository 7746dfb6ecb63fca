"""Probe: watches every operation of a batch, and finds the first that gave NaN or infinity.

A non-finite value is followed from the operation that made it, through everything computed
from it, to the loss. One that does not reach the loss is no fault: padding may hold any value,
and a mask before a softmax is an intended infinity.
"""

from __future__ import annotations

import linecache
import math
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.metrics import StepReport
from trainer.optim.step import Update

if TYPE_CHECKING:
    from trainer.brain import Brain

# Operations that write a given value or return uninitialised memory.
INTENDED = re.compile(
    r"(empty|new_empty|resize|masked_fill|fill|full|new_full|where|scalar_tensor|set_)"
)
# Operations with only one result that counts: the others are for the backward pass.
FIRST_RESULT = re.compile(r"_ctc_loss|attention|rnn|lstm|gru")
# Folders of code that is not the user's: torch and this package.
NOT_OWN = (os.path.dirname(torch.__file__), os.path.dirname(__file__), "<")
TRACEBACK_LINE = re.compile(r'File "([^"]+)", line (\d+)')


class NonFiniteFound(Exception):
    """Raised when a loss or gradient is not finite, to skip the rest of `fit_batch`."""


class CollectiveCalled(Exception):
    """Raised when the forward pass calls a collective, since other ranks do not rerun it."""


@dataclass
class Origin:
    """The first operation whose result was not finite."""

    operation: str  # Name of the operation, or of autograd's function in the backward pass.
    module: str | None = None  # Innermost module that ran it, with its class.
    line: str | None = None  # Line of the user's code that called it.
    phase: str = "forward"  # "forward" or "backward".
    minus_infinity: bool = False  # True if minus infinity was among the inputs.
    lowest: float | None = None  # Smallest finite input.
    highest: float | None = None  # Largest finite input.
    zeros: int = 0  # Zeros in the last input: a divisor, or the argument of a logarithm.
    elements: int = 0  # Number of elements of all inputs.


@dataclass
class Finding:
    """Result of a rerun."""

    kind: str | None = None  # "loss", "gradient", or None if everything was finite.
    optimizer: str | None = None  # Name of the optimizer whose loss it was.
    loss: float | None = None
    parameters: list[str] = field(default_factory=list)  # Parameters with a non-finite gradient.
    first: Origin | None = None  # Operation that caused it, if known.
    module: str | None = None  # First module whose output was not finite.
    # For each CTC loss: frames, target lengths and repeats, by example.
    ctc: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)


class Probe(TorchDispatchMode):
    """Watches the operations of one rerun; its `optimize` replaces that of the Brain.

    Args:
        brain: the Brain that is rerun, in a `Brain.sandbox`.

    Attributes:
        finding: the result.
    """

    def __init__(self, brain: Brain) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.finding = Finding()
        self._modules = {id(m): name for name, m in brain.modules.named_modules() if name}
        self._stack: list[str] = []
        self._phase = "forward"
        self._origins: dict[int, Origin] = {}  # Origins of non-finite memory, by address.

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager in which every operation is watched."""
        hooks = nn.modules.module
        with ExitStack() as stack:
            for handle in (
                hooks.register_module_forward_pre_hook(self._enter),
                hooks.register_module_forward_hook(self._leave, always_call=True),
            ):
                stack.callback(handle.remove)
            if "torch._dynamo" in sys.modules:  # Else nothing is compiled.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Lets backward on a GPU run in this thread, where the mode sees its operations.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            # Records the line of each function; this mode detects NaN itself.
            stack.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
            stack.enter_context(self)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record the first one with a non-finite result."""
        if "c10d" in func.namespace:
            raise CollectiveCalled
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        origin = self._origin(_floats((args, kwargs)))
        # An in-place operation overwrites its inputs.
        facts = _facts(args, kwargs) if func._schema.is_mutable else None
        out = func(*args, **kwargs)
        if "_ctc_loss" in name and "backward" not in name:
            self.finding.ctc.append(_ctc_lengths(*args[1:4]))
        first_only = FIRST_RESULT.search(name) and isinstance(out, tuple)
        results = _floats(out[0] if first_only else out)
        bad = [_nonfinite(t) for t in results]
        if any(map(any, bad)) and origin is None and not INTENDED.match(name):
            facts = facts or _facts(args, kwargs)
            if any(nan or high for nan, high, _ in bad) or not facts["minus_infinity"]:
                origin = self._make_origin(name, facts)
        for tensor, kinds in zip(results, bad, strict=True):
            if any(kinds) and origin is not None:
                self._origins[_address(tensor)] = origin
            else:
                self._origins.pop(_address(tensor), None)
        return out

    def _origin(self, tensors: list[Tensor]) -> Origin | None:
        """Return the origin of non-finite values in tensors; None if all are finite."""
        known = (self._origins.get(_address(t)) for t in tensors) if self._origins else ()
        return next((origin for origin in known if origin is not None), None)

    def _make_origin(self, name: str, facts: dict[str, Any]) -> Origin:
        module, line = self._stack[-1] if self._stack else None, None
        node: Any = torch._C._current_autograd_node() if self._phase == "backward" else None
        if node is not None:  # The differentiated function, and the line that called it.
            name = node.name()
            line = _last_own_line("".join(node.metadata.get("traceback_", ())))
        if line is None:
            stack = traceback.walk_stack(sys._getframe(1))
            line = _own_line((frame.f_code.co_filename, number) for frame, number in stack)
        return Origin(name, module, line, self._phase, **facts)

    def _enter(self, module: nn.Module, _args: Any) -> None:
        name = self._modules.get(id(module), "")
        self._stack.append(f"{name or '(not in modules)'} ({type(module).__name__})")

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        name = self._stack.pop() if self._stack else type(module).__name__
        if self.finding.module is None and any(
            nan or high for nan, high, _ in map(_nonfinite, _floats(output))
        ):
            self.finding.module = name

    def optimize(
        self,
        losses: list[tuple[list[Update], Tensor]],
        weight: float,
        retain_graph: bool,
        last: bool,
    ) -> StepReport:
        """Check losses and their gradients instead of an optimizer step; change no weights.

        For a batch of ``weight`` 0 no gradient is computed.

        Raises:
            NonFiniteFound: if a loss or gradient is not finite.
        """
        value = math.nan
        for updates, loss in losses:
            value = float(loss.detach())
            if not math.isfinite(value):
                self._found("loss", updates[0].name, value, self._origin([loss.detach()]))
            if weight and loss.requires_grad:
                self._check_gradients(updates, loss, value)
        return StepReport(losses[0][0][0].name, "accumulated", value, weight)

    def _check_gradients(self, updates: list[Update], loss: Tensor, value: float) -> None:
        name, scaler = updates[0].name, updates[0].scaler
        names = {p: n for update in updates for p, n in update.named().items() if p.requires_grad}
        params = list(names)
        scaled = loss * scaler.get_scale() if scaler.is_enabled() else loss
        self._phase = "backward"
        grads = torch.autograd.grad(scaled, params, retain_graph=True, allow_unused=True)
        bad = [
            (names[p], _values(grad))
            for p, grad in zip(params, grads, strict=True)
            if grad is not None and not bool(torch.isfinite(_values(grad)).all())
        ]
        if bad:
            self.finding.parameters = [each for each, _ in bad]
            self._found("gradient", name, value, self._origin([grad for _, grad in bad]))
        self._phase = "forward"

    def _found(self, kind: str, optimizer: str, loss: float, first: Origin | None) -> None:
        finding = self.finding
        finding.kind, finding.optimizer, finding.loss, finding.first = kind, optimizer, loss, first
        raise NonFiniteFound


def _floats(value: Any) -> list[Tensor]:
    """Return the floating-point and complex tensors in nested containers."""
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [_values(t) for t in found if (t.is_floating_point() or t.is_complex()) and t.numel()]


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, which its views share."""
    return tensor.untyped_storage().data_ptr()


def _values(tensor: Tensor) -> Tensor:
    """Return the explicit values of a sparse tensor; a dense tensor itself."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _nonfinite(tensor: Tensor) -> tuple[bool, bool, bool]:
    """Return three flags: True if a tensor has NaN, infinity, minus infinity."""
    if bool(torch.isfinite(tensor).all()):
        return False, False, False
    if tensor.is_complex():
        return True, True, False
    return bool(tensor.isnan().any()), bool(tensor.isposinf().any()), bool(tensor.isneginf().any())


def _facts(args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the fields of `Origin` that describe an operation's inputs."""
    inputs = _floats((args, kwargs))
    last = next((t for t in reversed(tree_leaves((args, kwargs))) if isinstance(t, Tensor)), None)
    numbers = [t[torch.isfinite(t)].double() for t in inputs if not t.is_complex()]
    numbers = [t for t in numbers if t.numel()]
    return {
        "minus_infinity": any(_nonfinite(t)[2] for t in inputs),
        "lowest": min((float(t.min()) for t in numbers), default=None),
        "highest": max((float(t.max()) for t in numbers), default=None),
        "zeros": int((last == 0).sum()) if last is not None else 0,
        "elements": sum(t.numel() for t in inputs),
    }


def _ctc_lengths(
    targets: Tensor, input_lengths: Any, target_lengths: Any
) -> tuple[list[int], list[int], list[int]]:
    """Return frames, target lengths and repeats of a CTC loss, by example."""
    frames, lengths = (
        each.tolist() if isinstance(each, Tensor) else list(each)
        for each in (input_lengths, target_lengths)
    )
    rows = targets if targets.dim() == 2 else targets.split(lengths)
    repeats = [
        int((row[1:n] == row[: max(n - 1, 0)]).sum()) for row, n in zip(rows, lengths, strict=True)
    ]
    return frames, lengths, repeats


def _last_own_line(text: str) -> str | None:
    """Return the innermost line of the user's code in a formatted traceback."""
    lines = reversed(TRACEBACK_LINE.findall(text))
    return _own_line((file, int(number)) for file, number in lines)


def _own_line(lines: Iterable[tuple[str, int]]) -> str | None:
    """Return the first of some lines (file, number) that is the user's code."""
    for file, number in lines:
        if not file.startswith(NOT_OWN):
            text, here = linecache.getline(file, number).strip(), os.path.join(os.getcwd(), "")
            place = f"{file.removeprefix(here)}:{number}"
            return f"{place}: {text}" if text else place
    return None
