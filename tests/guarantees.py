"""Run the tests that hold a promise of docs/guarantees.md, and print a line for each promise.

    python -m tests.guarantees R12 S4
    python -m tests.guarantees --long

Without names all promises are tried. Tests that take minutes are left out unless ``--long``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guarantees.md"
ROW = re.compile(r"^\| ([RS]\d+) \|[^|]*\|([^|]*)\|", re.MULTILINE)


def tests_by_promise() -> dict[str, list[str]]:
    """Return the tests of each promise, as pytest names them."""
    return {
        promise: re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", cell)
        for promise, cell in ROW.findall(PAGE.read_text("utf-8"))
    }


def main() -> int:
    """Run the tests of the chosen promises; return 1 if any of them failed."""
    known = tests_by_promise()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("promises", nargs="*", metavar="PROMISE", help=f"{', '.join(known)}")
    parser.add_argument("--long", action="store_true", help="also the tests that take minutes")
    given = parser.parse_args()
    if unknown := set(given.promises) - set(known):
        parser.error(f"there is no promise {', '.join(sorted(unknown))}")
    marks = "not real" if given.long else "not long and not real"
    failed = False
    for promise in given.promises or known:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", marks, *known[promise]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            failed = True
            print(done.stdout, done.stderr, sep="\n")
        print(f"{promise}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
