"""The report of a run: `report.html` beside `metrics.jsonl`, complete in one file.

`history` reads the records, `plots` selects the charts, `chart` draws them with `axis`, `samples`
shows the samples of `Brain.show`, `page` and `comparison` compose pages from the parts in `html`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trainer.loggers.files import ReportLogger, replace_file
from trainer.report.page import render

__all__ = ["ReportLogger", "compare", "render", "write_html"]


def write_html(folder: Path | str) -> Path:
    """Write `report.html` from the records so far; on an error the old one stays.

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


def compare(folders: Iterable[Path | str], out: Path | str) -> Path:
    """Write a page that compares runs: results, settings, curves, and samples side by side.

    Runs whose settings differ only in the seed get mean and standard deviation. Runs of different
    tasks may be compared; a missing value is a dash.

    Args:
        folders: run folders.
        out: the page to write.

    Returns:
        The path of the page.

    Raises:
        ValueError: if there is no run, a folder does not exist, or there are more than 24 runs.
        OSError: if the page cannot be written.
    """
    from trainer.report.comparison import render_comparison  # It imports the YAML reader.

    page = render_comparison(list(dict.fromkeys(Path(folder) for folder in folders)))
    replace_file(Path(out), [page.encode(errors="backslashreplace")], "comparison")
    return Path(out)
