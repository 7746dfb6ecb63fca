"""The report of a run: `report.html` beside `metrics.jsonl`, complete in one file.

It needs no network and no script, follows the reader's light or dark setting, and is written anew
after stages, so that it can be read while the run goes on. By hand:

    python -c "from trainer.report import write_html; write_html('results/asr/demo/1234')"

`history` reads the records, `plots` selects the charts, `chart` draws them on the axes of `axis`,
`page` puts the page together from the parts in `html`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.loggers.files import replace_file
from trainer.loggers.protocol import Logger
from trainer.report.page import render

__all__ = ["ReportLogger", "render", "write_html"]

logger = logging.getLogger("trainer")


def write_html(folder: Path | str) -> Path:
    """Write `report.html` from what has been logged so far; on an error the old one stays.

    Args:
        folder: run folder.

    Returns:
        The path of the report.

    Raises:
        OSError: if it cannot be written.
    """
    folder = Path(folder)
    path = folder / "report.html"
    replace_file(path, [render(folder).encode(errors="backslashreplace")], "report")
    return path


class ReportLogger(Logger):
    """Keep `report.html` up to date, at about 1 % of the run's time.

    Reading a long log takes seconds, and a stage may be short. So the report is written after a
    stage only if a hundred times the duration of the last writing has passed since, and again when
    the logger is closed. It shows what the `JsonlLogger` has written, and stands behind it. The
    first failure to write it is a warning.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stale = self._warned = False
        self._written, self._duration = -math.inf, 0.0

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Write the report after a stage if that is cheap."""
        if kind == "stage":
            self._refresh()

    def artifact(self, name: str, path: Path) -> None:
        """Write the report if that is cheap: it lists the reports of skipped steps."""
        self._refresh()

    def close(self) -> None:
        """Write the report unless it is up to date."""
        if not self._stale:
            return
        started = time.perf_counter()
        try:
            write_html(self.folder)
        except Exception as error:  # A failed report must not end the run.
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the report of the run is not up to date (%s: %s)", type(error).__name__, error
                )
        self._written = time.perf_counter()
        self._duration, self._stale = self._written - started, False

    def _refresh(self) -> None:
        self._stale = True
        if time.perf_counter() - self._written >= 100 * self._duration:
            self.close()
