"""A batch trained on once more, with every operation watched: where the first NaN comes from.

What is not finite is followed from the operation that made it, through all that is computed from
it, to the loss: padding may hold any garbage, and a mask before a softmax is an infinity that is
meant, as long as neither arrives there.
"""

from __future__ import annotations

import linecache
import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.metrics import StepReport

# They write what they are told to, or show what was in memory before.
MEANT = re.compile(
    r"(empty|new_empty|resize|masked_fill|fill|full|new_full|where|scalar_tensor|set_)"
)
FIRST = re.compile(r"_ctc_loss|attention|rnn|lstm|gru")  # Their other results are for backward.
TORCH, HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)
FORWARD_OF = re.compile(r'File "([^"]+)", line (\d+)')


class Found(Exception):
    """What was looked for is found: the rest of `fit_batch` need not run."""


class NotAlone(Exception):
    """The forward pass communicates between processes, and the others are not replaying."""


@dataclass
class Trace:
    """An operation whose result was the first that is not finite."""

    operation: str
    module: str | None = None  # the innermost module that ran it, and its class
    line: str | None = None
    phase: str = "forward"
    inputs_finite: bool = True  # but for infinities below zero
    minus_infinity: bool = False  # among the inputs
    dtype: str = ""
    lowest: float | None = None  # of the finite inputs
    highest: float | None = None
    zeros: int = 0  # of the last input: the divisor, the argument of a logarithm
    elements: int = 0


@dataclass
class Finding:
    """What a replay found; `kind` is "loss", "gradient" or None for nothing."""

    kind: str | None = None
    optimizer: str | None = None
    loss: float | None = None
    parameters: list[str] = field(default_factory=list)
    first: Trace | None = None
    module: str | None = None  # the first whose output was not finite
    backward: str | None = None  # what autograd says
    backward_line: str | None = None
    ctc: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


class Probe(TorchDispatchMode):
    """Watches the operations of one replay; `optimize` stands in for `Training._optimize`."""

    def __init__(self, brain: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.finding = Finding()
        self.names: dict[int, str] = {}
        for name, p in brain.modules.named_parameters():
            self.names.setdefault(id(p), name)
        self._modules = {id(m): name for name, m in brain.modules.named_modules() if name}
        self._stack: list[str] = []
        self._phase = "forward"
        self._origins: dict[int, Trace] = {}  # by the memory that holds what is not finite
        self._scales = {name: update.scaler for name, update in brain.updates.items()}

    # ------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise NotAlone
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        origin = self._origin(_floats((args, kwargs)))
        # What is computed in place is no longer what came in.
        facts = _facts(args, kwargs) if func._schema.is_mutable else None
        out = func(*args, **kwargs)
        if "_ctc_loss" in name and "backward" not in name:
            self._note_ctc(args)
        results = _floats(out[0] if FIRST.search(name) and isinstance(out, tuple) else out)
        tops = [_extremes(t) for t in results]
        if any(map(any, tops)) and origin is None and not MEANT.match(name):
            facts = facts or _facts(args, kwargs)
            if any(nan or high for nan, high, _ in tops) or not facts["minus_infinity"]:
                origin = self._trace(name, facts)
        for tensor, top in zip(results, tops, strict=True):
            if any(top) and origin is not None:
                self._origins[_place(tensor)] = origin
            else:
                self._origins.pop(_place(tensor), None)
        return out

    def _origin(self, tensors: list[Tensor]) -> Trace | None:
        """Where what is not finite in these came from, as far as an operation was seen to do it."""
        known = (self._origins.get(_place(t)) for t in tensors) if self._origins else ()
        return next((origin for origin in known if origin is not None), None)

    def _trace(self, name: str, facts: dict[str, Any]) -> Trace:
        module, line = self._stack[-1] if self._stack else None, None
        node: Any = torch._C._current_autograd_node() if self._phase == "backward" else None
        if node is not None:  # The operation that is being differentiated, and where it was called.
            name = node.name()
            line = _last_own("".join(node.metadata.get("traceback_", ())))
        return Trace(name, module, line or _line(), self._phase, **facts)

    def _note_ctc(self, args: Any) -> None:
        _, targets, frames, lengths = args[:4]
        frames, lengths = _numbers(frames), _numbers(lengths)
        rows = targets if targets.dim() == 2 else targets.split(lengths)
        repeats = [
            int((row[1:n] == row[: n - 1]).sum()) if n > 1 else 0
            for row, n in zip(rows, lengths, strict=True)
        ]
        self.finding.ctc.append((frames, lengths, repeats))

    # ---------------------------------------------------------------------------------- modules

    def _enter(self, module: nn.Module, _args: Any) -> None:
        name = self._modules.get(id(module), "")
        self._stack.append(f"{name or '(not in modules)'} ({type(module).__name__})")

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        name = self._stack.pop() if self._stack else type(module).__name__
        if self.finding.module is None and any(
            nan or high for nan, high, _ in map(_extremes, _floats(output))
        ):
            self.finding.module = name

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, everything that is computed is looked at."""
        hooks = nn.modules.module
        with ExitStack() as stack:
            for handle in (
                hooks.register_module_forward_pre_hook(self._enter),
                hooks.register_module_forward_hook(self._leave, always_call=True),
            ):
                stack.callback(handle.remove)
            if (
                "torch._dynamo" in sys.modules
            ):  # Else nothing is compiled, and importing it is slow.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Only the graph with its lines: what is not finite is looked for here.
            stack.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
            stack.enter_context(self)
            yield

    # ------------------------------------------------------------------------- losses, gradients

    def optimize(self, parts: Any, weight: float, retain_graph: bool, last: bool) -> StepReport:
        """Judge losses and their gradients; nothing moves."""
        for updates, loss in parts:
            name, value = updates[0].name, float(loss.detach())
            if not math.isfinite(value):
                self.finding.kind, self.finding.optimizer = "loss", name
                self.finding.loss = value
                self.finding.first = self._origin([loss.detach()])
                raise Found
            if weight and loss.requires_grad:
                self._judge(name, loss, [p for update in updates for p in update.params])
        return StepReport(parts[0][0][0].name, "accumulated", value, weight)

    def _judge(self, name: str, loss: Tensor, params: list[Tensor]) -> None:
        scaler = self._scales[name]
        scaled = loss * scaler.get_scale() if scaler.is_enabled() else loss
        self._phase = "backward"
        grads = torch.autograd.grad(scaled, params, retain_graph=True, allow_unused=True)
        bad = [
            (self.names.get(id(p), f"{name}: {tuple(p.shape)}"), _values(grad))
            for p, grad in zip(params, grads, strict=True)
            if grad is not None and not bool(torch.isfinite(_values(grad)).all())
        ]
        if bad:
            if loss.is_cpu:  # Elsewhere, backward runs in a thread that nobody watches.
                self.finding.first = self._origin([grad for _, grad in bad])
            self.finding.kind, self.finding.optimizer = "gradient", name
            self.finding.loss = float(loss.detach())
            self.finding.parameters = [each for each, _ in bad]
            self._ask_autograd(scaled, params)
            raise Found
        self._phase = "forward"

    def _ask_autograd(self, loss: Tensor, params: list[Tensor]) -> None:
        """Which derivative it is, and where its function was called. It tells of NaN alone."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                with torch.autograd.set_detect_anomaly(True):
                    torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                match = re.search(r"Function '(\w+)' returned nan", str(error))
                self.finding.backward = match[1] if match else str(error)
        for warning in told:
            if "forward call that caused the error" in str(warning.message):
                self.finding.backward_line = _last_own(str(warning.message))


def _floats(value: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [_values(t) for t in found if (t.is_floating_point() or t.is_complex()) and t.numel()]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _extremes(tensor: Tensor) -> tuple[bool, bool, bool]:
    """Whether there is a NaN, an infinity, and one below zero in it."""
    if bool(torch.isfinite(tensor).all()):
        return False, False, False
    if tensor.is_complex():
        return True, True, False
    return bool(tensor.isnan().any()), bool(tensor.isposinf().any()), bool(tensor.isneginf().any())


def _facts(args: Any, kwargs: Any) -> dict[str, Any]:
    """What is to be known of an operation's inputs."""
    given = _floats((args, kwargs))
    tops = [_extremes(t) for t in given]
    last = next((t for t in reversed(tree_leaves((args, kwargs))) if isinstance(t, Tensor)), None)
    numbers = [t[torch.isfinite(t)].double() for t in given if not t.is_complex()]
    numbers = [t for t in numbers if t.numel()]
    return {
        "inputs_finite": not any(nan or high for nan, high, _ in tops),
        "minus_infinity": any(low for _, _, low in tops),
        "dtype": str(last.dtype).removeprefix("torch.") if last is not None else "",
        "lowest": min((float(t.min()) for t in numbers), default=None),
        "highest": max((float(t.max()) for t in numbers), default=None),
        "zeros": int((last == 0).sum()) if last is not None else 0,
        "elements": sum(t.numel() for t in given),
    }


def _numbers(value: Any) -> list[int]:
    return value.tolist() if isinstance(value, Tensor) else list(value)


def _line() -> str | None:
    """The innermost line that is neither torch's nor ours."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((TORCH, HERE, "<")):
            return _shown(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _last_own(traceback: str) -> str | None:
    """The innermost such line of a traceback that is text."""
    places = FORWARD_OF.findall(traceback)
    own = [place for place in places if not place[0].startswith((TORCH, HERE, "<"))]
    return _shown(own[-1][0], int(own[-1][1])) if own else None


def _shown(file: str, number: int) -> str:
    text = linecache.getline(file, number).strip()
    try:
        file = str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        file = str(Path(file))
    return f"{file}:{number}: {text}" if text else f"{file}:{number}"
