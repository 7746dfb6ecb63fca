"""The skipped steps that a run has investigated, in its report."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

MAX_STEPS = 20


def nonfinite_list(folder: Path) -> str:
    """Return the section that lists non-finite steps and their causes; empty without any.

    Args:
        folder: run folder. The reports are in its ``nonfinite/``, one for each step, or one for
            each process whose own batch was bad; those that cannot be read are left out.
    """
    paths = sorted(folder.glob("nonfinite/**/report.json"))
    found = [(path, record) for path in paths if (record := _read(path)) is not None]
    found.sort(key=lambda each: each[1]["step"])
    items = []
    for path, record in found[:MAX_STEPS]:
        causes = record.get("causes")
        cause = f"; {causes[0]}" if isinstance(causes, list) and causes else ""
        where = escape(str(path.parent.relative_to(folder)))
        items.append(
            f"<li><strong>Step {record['step']:,}</strong>: first not finite was "
            f"{escape(str(record.get('first')))}{escape(cause)}. <small>{where}</small></li>"
        )
    if not items:
        return ""
    listed = "".join(items)
    return f'<section><h2>Not finite</h2><ul class="warnings">{listed}</ul></section>\n'


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text("utf-8", "replace"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(record, dict) and type(record.get("step")) is int
    return record if known else None
