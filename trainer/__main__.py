"""Tools for finished runs: `python -m trainer replay RUN STEP`."""

from __future__ import annotations

import sys

from trainer.cli.replay import USAGE, replay


def main() -> int:
    """Run the tool that the arguments name; return its exit code, 2 for a user's error."""
    if sys.argv[1:2] != ["replay"]:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        return replay(sys.argv[2:])
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
