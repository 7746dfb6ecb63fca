"""Progress of a run: lines at its start, then a bar for each stage or a line per minute."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm

from trainer import distributed
from trainer.callbacks import Callback
from trainer.metrics import StageReport, StepReport
from trainer.progress import Stage

if TYPE_CHECKING:
    from trainer.brain import Brain

LINE_SECONDS = 60.0  # between two lines if the output is no terminal
MAX_OPTIMIZERS = 4  # whose norms and rates are shown
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"

logger = logging.getLogger("trainer")


def announce(line: str, prints: bool) -> None:
    """Log a line; in a program without logging, print it if ``prints``."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", line)
    elif prints:
        tqdm.write(line, file=sys.stderr)


class ProgressBar(Callback):
    """Show the progress of each stage on rank 0: batches, time left and figures of training.

    The figures are those that the host has already: no step waits for the device.

    Args:
        shown: False shows nothing.

    Attributes:
        progressbar_shown: False hides stages that begin from now on; set by the argument
            ``progressbar`` of `Brain.fit` and `Brain.evaluate`.
    """

    def __init__(self, shown: bool = True) -> None:
        self.progressbar_shown = shown
        self._stages: list[_Stage] = []  # A hook of one stage may run another stage.
        self._outer: list[int] = []  # Number of stages before each running call.
        self._due = math.inf  # Time of the next line, of any stage.
        self._begun = False  # True once the start lines are printed.

    def on_fit_start(self, brain: Brain) -> None:
        """Record the number of bars of outer calls of `fit` or `evaluate`."""
        self._outer.append(len(self._stages))

    def on_fit_end(self, brain: Brain) -> None:
        """Remove the bars of a call that failed."""
        self._keep(self._outer.pop() if self._outer else 0)

    on_evaluate_start = on_fit_start
    on_evaluate_end = on_fit_end

    def on_stage_start(
        self, brain: Brain, stage: Stage, epoch: int | None, total: int | None
    ) -> None:
        """Show a stage; a resumed training stage starts at its finished batches.

        Before the first training stage of a Brain, the lines of `start_lines` are printed.
        """
        if stage is Stage.TRAIN and not self._begun and distributed.is_main():
            self._begun = True
            for line in start_lines(brain, total):
                announce(line, self.progressbar_shown)
        name = stage.value if epoch is None else f"epoch {epoch} {stage.value}"
        done = brain.progress.step if stage is Stage.TRAIN else 0
        shown = self.progressbar_shown and distributed.is_main()
        end = _last_batch(brain, total) if stage is Stage.TRAIN else total
        self._stages.append(_Stage(name, end, done, shown))
        self._due = min(self._due, time.monotonic() + LINE_SECONDS)

    def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
        """Advance by a batch, and update the figures."""
        shown = self._stages[-1] if self._stages else None
        if shown is None or (shown.bar is not None and shown.bar.disable):
            return
        if type(loss) is StepReport:
            shown.add(loss)
        shown.done += 1
        if not (time.monotonic() >= self._due if shown.bar is None else shown.bar.update()):
            return
        figures = self.figures(brain) if stage is Stage.TRAIN else ""
        if shown.bar is None:
            self._due = time.monotonic() + LINE_SECONDS
            print(shown.line(figures), file=sys.stderr, flush=True)
        else:
            shown.bar.set_postfix_str(figures, refresh=False)

    def on_log(self, brain: Brain, record: dict[str, Any]) -> None:
        """Keep the losses of a log record, for recipes whose batches report none on the host."""
        if self._stages:
            self._stages[-1].logged = record

    def on_stage_end(self, brain: Brain, report: StageReport) -> None:
        """Remove the bar of the stage."""
        self._keep(len(self._stages) - 1)

    def on_exception(self, brain: Brain, error: BaseException) -> None:
        """Remove all bars."""
        self._keep(0)
        self._outer.clear()

    @property
    def current(self) -> Any:
        """The bar that is shown, or None."""
        return self._stages[-1].bar if self._stages else None

    def figures(self, brain: Brain) -> str:
        """Return the figures of training, such as "step 7, loss 1.2, norm 3, lr 0.001"."""
        return self._stages[-1].figures(brain)

    def _keep(self, number: int) -> None:
        """Remove all bars but the outermost ``number``."""
        while len(self._stages) > number:
            if (bar := self._stages.pop().bar) is not None:
                bar.close()


class _Stage:
    """A shown stage, with the figures behind its bar.

    Args:
        name: text before the bar.
        total: batches of the stage; None if unknown.
        done: finished batches of a resumed stage.
        shown: False makes a bar that shows nothing.
    """

    def __init__(self, name: str, total: int | None, done: int, shown: bool) -> None:
        self.name, self.total, self.done = name, total, done
        self.bar = _make_bar(name, total, done, shown)  # None if lines are printed.
        self.loss: float | None = None  # Loss of the last step, if known.
        self.items = 0.0  # Number of examples since the stage began in this process.
        self.logged: Mapping[str, Any] = {}  # Last log record.
        self._first, self._started = done, time.monotonic()

    def add(self, report: StepReport) -> None:
        """Add the loss and the examples of a finished window."""
        if report.outcome != "accumulated":
            self.items += report.weight
            if report.loss is not None:
                self.loss = report.loss

    def line(self, figures: str) -> str:
        """Return the line to print instead of a bar."""
        line = f"{self.name} {self.done}/{'?' if self.total is None else self.total}"
        if self.total is not None:
            pace = (time.monotonic() - self._started) / (self.done - self._first)
            left = max(self.total - self.done, 0) * pace
            line += f", {tqdm.format_interval(left)} left"
        return f"{line}, {figures}" if figures else line

    def figures(self, brain: Brain) -> str:
        """Return step, loss, norm, learning rate, items a second and skipped steps as a text."""
        loss, rate = self.logged.get("loss"), self.logged.get("examples_per_second")
        if self.loss is not None:
            loss, rate = self.loss, self.items / max(time.monotonic() - self._started, 1e-9)
        parts = loss if isinstance(loss, Mapping) else {"": loss}
        losses = (f"{name} {each:.4g}".strip() for name, each in parts.items() if each is not None)
        updates = list(brain.updates.values())[:MAX_OPTIMIZERS]
        norms, rates = [each.last_norm for each in updates], [each.lr for each in updates]
        skipped = brain.progress.nonfinite_count
        found = {
            "step": str(brain.progress.optimizer_step),
            "loss": " ".join(losses),
            "norm": " ".join(f"{each:.3g}" for each in norms if each is not None),
            "lr": " ".join(f"{each:.3g}" for each in rates if each is not None),
        }
        texts = [f"{label} {text}" for label, text in found.items() if text]
        texts += [f"{rate:.4g} items/s"] if rate else []
        return ", ".join(texts + ([f"{skipped} skipped"] if skipped else []))


def _make_bar(desc: str, total: int | None, initial: int, shown: bool) -> Any:
    """Return a bar for the terminal or the notebook; None if lines are printed instead."""
    kind = _notebook_bar() if shown else None
    if kind is None and shown and not sys.stderr.isatty():
        return None
    return (kind or tqdm)(
        total=total,
        initial=initial,
        desc=desc,
        disable=not shown,
        leave=False,
        dynamic_ncols=True,
        bar_format=BAR if kind is None and total else None,
        **({"colour": None} if os.environ.get("NO_COLOR") else {}),  # whatever TQDM_COLOUR says
    )


def _notebook_bar() -> Any:
    """Return tqdm's bar for notebooks; None elsewhere, or without ipywidgets."""
    if "ipykernel" not in sys.modules:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm.auto is experimental; ipywidgets may be missing.
        from tqdm import auto, notebook
    return auto.tqdm if issubclass(auto.tqdm, notebook.tqdm_notebook) else None


def _last_batch(brain: Brain, total: int | None) -> int | None:
    """Return the last batch of an epoch, also by ``optimizer_step_limit``.

    A skipped step delays that end; the bar then goes beyond it.

    Args:
        brain: the Brain, about to train.
        total: batches of the epoch; None if unknown.
    """
    if (limit := brain.options.optimizer_step_limit) is None:
        return total
    progress, updates = brain.progress, brain.updates.values()
    waiting = max((update.window.count for update in updates), default=0)
    steps = max(limit - progress.optimizer_step, 0)
    last = progress.step + max(steps * brain.options.grad_accumulation_factor - waiting, 0)
    return last if total is None else min(total, last)


def start_lines(brain: Brain, batches: int | None) -> list[str]:
    """Return the first lines: device and precision, parameters, ranks, batches, run folder.

    Args:
        brain: the Brain, about to train.
        batches: batches of an epoch on this rank; None if unknown.
    """
    options, ranks = brain.options, distributed.world_size()
    known = "an unknown number of" if batches is None else f"{batches:,}"
    accumulated = options.grad_accumulation_factor
    folder = "none" if options.debug else options.output_folder or "none"
    return [
        f"device: {brain.device}, precision {options.precision}"
        + (f", evaluation {options.eval_precision}" if options.eval_precision else ""),
        _trainable(brain),
        f"ranks: {ranks}",
        f"epoch: {known} batches"
        + (" on each rank" if ranks > 1 else "")
        + (f", an optimizer step every {accumulated}" if accumulated > 1 else ""),
        f"run folder: {folder}",
    ]


def _trainable(brain: Brain) -> str:
    """Return the line with the numbers of trainable and of all parameters, also by module."""
    owned = {p for update in brain.updates.values() for p in update.all_params if p.requires_grad}

    def counted(module: nn.Module) -> tuple[int, int]:
        params = list(module.parameters())
        return sum(p.numel() for p in params if p in owned), sum(p.numel() for p in params)

    count, total = counted(brain.modules)
    text = f"trainable: {count:,} of {total:,} parameters ({100 * count / max(total, 1):.2f} %)"
    parts = {name: counted(module) for name, module in brain.modules.named_children()}
    if len(parts) > 1:
        text += ": " + ", ".join(
            f"{name} {own:,} of {all_:,}" for name, (own, all_) in parts.items()
        )
    return text
