"""Environment of a run: versions, code and machine, for `environment.json`."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from trainer import distributed


def environment(code: Path | None = None) -> dict[str, Any]:
    """Return versions, machines and git revision of a run. Every rank must call it.

    Args:
        code: a file of the recipe, whose git revision is recorded.

    Returns:
        Values that can be written as JSON, by name.
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "platform": platform.platform(),
        "machines": distributed.all_gather_json(platform.node()),
        "ranks": distributed.world_size(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "executable": sys.executable,
        "git": git(code.resolve().parent) if code is not None else None,
        "packages": packages(),
    }


def _cores() -> int | None:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count()


def git(folder: Path) -> dict[str, Any] | None:
    """Return the git revision of a folder, such as ``{"revision": "1a2b…", "dirty": False}``.

    ``dirty`` is True where tracked files have changes. Without git or a repository it is None.
    """
    command = ["git", "-C", str(folder)]
    try:
        revision = _output([*command, "rev-parse", "HEAD"])
        changed = _output([*command, "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or one that hangs
        return None
    return {"revision": revision, "dirty": bool(changed)}


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


@functools.cache
def packages() -> dict[str, str]:
    """Return the versions of all installed distributions by name."""
    found = {
        str(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()
    }
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))
