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
    """Return versions, machines and a recipe's git revision. Every rank must call it."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "platform": platform.platform(),
        "machines": distributed.all_gather_json(platform.node()),
        "ranks": distributed.world_size(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "executable": sys.executable,
        "git": git(code.resolve().parent) if code is not None else None,
        "packages": packages(),
    }


def git(folder: Path) -> dict[str, Any] | None:
    """Return the git revision of a folder, such as ``{"revision": "1a2b…", "dirty": False}``.

    ``dirty`` is True if tracked files have changes. Returns None without git or a repository.
    """

    def output(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, timeout=20
        ).strip()

    try:
        changed = output("status", "--porcelain", "--untracked-files=no")
        return {"revision": output("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or one that hangs
        return None


@functools.cache
def packages() -> dict[str, str]:
    """Return the versions of all installed distributions by name."""
    found = {
        str(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()
    }
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))
