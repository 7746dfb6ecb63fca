"""The report of a run: `report.html` beside `metrics.jsonl`, complete in one file.

It needs no network and no script, follows the reader's light or dark setting, and is written anew
after stages, so that it can be read while the run goes on. By hand:

    python -c "from trainer.report import write_html; write_html('results/asr/demo/1234')"

`history` reads the records, `plots` selects the charts, `chart` draws them on the axes of `axis`,
`page` puts the page together.
"""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import distributed
from trainer.callbacks import Callback
from trainer.loggers.files import run_folder
from trainer.metrics import StageReport
from trainer.options import RunOptions
from trainer.report.page import render

if TYPE_CHECKING:
    from trainer.brain import Brain

__all__ = ["ReportCallback", "render", "write_html"]

logger = logging.getLogger("trainer")


def write_html(folder: Path | str) -> Path:
    """Write `report.html` from what has been logged so far, or leave the old one as it is.

    Args:
        folder: run folder.

    Returns:
        The path of the report.

    Raises:
        OSError: if it cannot be written.
    """
    folder = Path(folder)
    path, temporary = folder / "report.html", folder / ".report.html.new"
    page = render(folder)
    try:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"the run's report could not be written ({error.strerror}); "
            "free some space or choose another --output_folder",
            str(path),
        ) from error
    return path


class ReportCallback(Callback):
    """Keep the report of a run up to date for about a hundredth of the run's time, on rank 0.

    Reading a long log takes seconds, and a stage may be short. So the report is written after a
    stage only if a hundred times the duration of the last writing has passed since, and again when
    the outermost `fit` or `evaluate` ends. The first failure to write it is a warning, and the run
    goes on.

    Args:
        options: run options, of which the output folder, ``debug`` and ``replay`` count.
    """

    def __init__(self, options: RunOptions) -> None:
        self.folder = run_folder(options)
        self._depth = 0  # A hook of one `fit` may call another, or `evaluate`.
        self._stale = self._warned = False
        self._written, self._duration = -math.inf, 0.0

    def on_fit_start(self, brain: Brain) -> None:
        """Count the calls that run."""
        self._depth += 1

    def on_fit_end(self, brain: Brain) -> None:
        """Bring the report up to date when the outermost call ends."""
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            self.finish()

    on_evaluate_start = on_fit_start
    on_evaluate_end = on_fit_end

    def on_exception(self, brain: Brain, error: BaseException) -> None:
        """Bring the report up to date."""
        self._depth = 0
        self.finish()

    def on_stage_end(self, brain: Brain, report: StageReport) -> None:
        """Write the report if that is cheap."""
        self.refresh()

    def refresh(self) -> None:
        """Note that something was logged, and write the report if that is cheap."""
        self._stale = True
        if time.perf_counter() - self._written >= 100 * self._duration:
            self.finish()

    def finish(self) -> None:
        """Write the report unless it is up to date."""
        if self.folder is None or not self._stale or not distributed.is_main():
            return
        started = time.perf_counter()
        try:
            write_html(self.folder)
        except Exception as error:  # A report is not worth a run.
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the report of the run is not up to date (%s: %s)", type(error).__name__, error
                )
        self._written = time.perf_counter()
        self._duration, self._stale = self._written - started, False
